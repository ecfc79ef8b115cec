"""train.py, to which something happens: python saboteur.py RANK MOMENT NUMBER FAULT [flags of train.py]

MOMENT is "train" or "evaluate" (a forward pass there). FAULT strikes the process RANK at the NUMBER-th such moment: a
signal's name, "SIGINT to all", which is Ctrl-C, "SIGTERM to the launcher", "full disk", "nan" or "a bug".
"""
import os
import resource
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path

import model

rank, moment, number, fault, *flags = sys.argv[1:]
moments = Counter()


def strike():
    name, _, target = fault.partition(" to ")
    if fault == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))          # bytes a file
    elif fault == "a bug":
        raise TypeError("a bug")
    elif target == "all":
        os.killpg(0, signal.Signals[name])
    elif fault != "nan":
        os.kill(os.getppid() if target else os.getpid(), signal.Signals[name])


class Sabotaged(model.VisionTransformer):
    def forward(self, images):
        logits, now = super().forward(images), "train" if self.training else "evaluate"
        moments[now] += 1
        if now == moment and moments[now] == int(number) and os.environ.get("RANK", "0") == rank:
            strike()
            return logits * float("nan") if fault == "nan" else logits
        return logits


Sabotaged.__name__ = "VisionTransformer"                 # its runs are those of train.py
model.VisionTransformer = Sabotaged
sys.argv = ["train.py", *flags]
runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
