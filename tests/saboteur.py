"""train.py, to which something happens.

    python saboteur.py RANK MOMENT NUMBER FAULT [flags of train.py]

MOMENT is "build" (of the model), "train" or "evaluate" (a forward pass there). FAULT strikes the process RANK at the
NUMBER-th such moment: a signal's name, "SIGINT to all", which is Ctrl-C, "SIGHUP to all", a closed terminal, "SIGTERM
to the launcher" or "SIGKILL to the launcher", "full disk" or "nan".
"""
import os
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import model
from harness import processes

rank, moment, number, fault, *flags = sys.argv[1:]
moments = Counter()


def reached(now):
    moments[now] += 1
    return now == moment and moments[now] == int(number) and os.environ.get("RANK", "0") == rank


def strike():
    if fault == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))          # bytes a file
    elif fault.endswith(" to all"):
        os.killpg(0, signal.Signals[fault.removesuffix(" to all")])
    elif fault.endswith(" to the launcher"):
        os.kill(os.getppid(), signal.Signals[fault.removesuffix(" to the launcher")])
    elif fault != "nan":
        os.kill(os.getpid(), signal.Signals[fault])
    while fault.startswith("SIG") and not processes.stop_requests:           # a thread takes it
        time.sleep(0.01)


class Sabotaged(model.VisionTransformer):
    def __init__(self, cfg):
        super().__init__(cfg)
        if self.cls_token.device.type != "meta" and reached("build"):
            strike()

    def forward(self, images):
        logits = super().forward(images)
        if reached("train" if self.training else "evaluate"):
            strike()
            return logits * float("nan") if fault == "nan" else logits
        return logits


model.VisionTransformer = Sabotaged
sys.argv = ["train.py", *flags]
runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
