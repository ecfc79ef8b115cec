"""What several test files need: a small folder of images, a run on it, and programs in processes of their own."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import eval_transform, normalize, open_data
from harness.checkpoint import build

ROOT = Path(__file__).parents[1]
DEADLINE = 600           # seconds after which something has gone wrong
# A model and a run of seconds: two blocks, 16 pixels, 24 images in 3 iterations.
SMALL = "--size nano --depth 2 --img-size 16 --patch-size 8 --batch-size 8 --epochs 2 --workers 0 --device cpu".split()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """train/ and val/ with three classes: 24 and 11 images of odd sizes, noise with a hint of the class's colour."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 24), ("val", 11)):
        for i in range(count):
            rng, label = random.Random(f"{split} {i}"), i % 3
            size = rng.randint(17, 40), rng.randint(17, 40)
            image = Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
            image.putalpha(225)
            sheet = Image.new("RGB", size, [(190, 90, 90), (90, 190, 90), (90, 90, 190)][label])
            sheet.paste(image, (0, 0), image)
            folder = root / split / ["cat", "dog", "owl"][label]
            folder.mkdir(parents=True, exist_ok=True)
            sheet.save(folder / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """A folder with four classes of 40 training and 8 validation images, each of a colour of its own."""
    root = tmp_path_factory.mktemp("animals")
    for i, name in enumerate(("ant", "bee", "cat", "dog")):
        for split, count in (("train", 40), ("val", 8)):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                rng = random.Random(f"{name} {split} {k}")
                colour = tuple(rng.randrange(60, 200) for _ in range(3))
                Image.new("RGB", (16, 16), colour).save(root / split / name / f"{k:02}.png")
    return root


@pytest.fixture(scope="session")
def thousand(tmp_path_factory):
    """A folder with 1,000 class folders."""
    root = tmp_path_factory.mktemp("thousand")
    for i in range(1000):
        (root / "train" / f"n{i:08}").mkdir(parents=True)
    return root


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """The folder of a finished run on `photos`."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main(["--data", str(photos), "--out", str(folder), *SMALL])
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def wait_until(condition):
    """Wait for an event. The deadline is for what never comes, so it is far beyond what a busy machine takes."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited for what does not come"
        time.sleep(0.02)


def environment(**changes):
    """That of a program of ours, started from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {key: str(changes[key]) for key in changes}


def heed_signals():
    """Also where the tests run in a script's background or under nohup, which ignore some, and so would what they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Program:
    """A program of ours in a process and a session of its own: its path, or -m and its module, and its flags. **changes
    are of its environment; `out` is where it prints, instead of to a file."""

    def __init__(self, *command, out=None, **changes):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("out", "err")]
        with open(self.files[0], "w") as file, open(self.files[1], "w") as errors:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out or file, stderr=errors,
                                            env=environment(**changes), start_new_session=True, preexec_fn=heed_signals)
        self.pid = self.process.pid

    def said(self):
        return without_gloo(self.files[0].read_text())

    def wait(self):
        """(exit code, what it wrote to stdout, to stderr); no process of its session is left."""
        code = self.process.wait(DEADLINE)
        wait_until(lambda: not left_behind(session=self.pid))
        return code, self.said(), self.files[1].read_text()


def without_gloo(text):
    """Without the lines that torch itself prints for each rank of a gloo group, in versions from 2.8 to 2.10 at least."""
    return re.sub(r"^\[Gloo\] Rank .*\n", "", text, flags=re.M)


def free_store():
    """Where ranks or launchers meet, at a port that nobody else can take in between."""
    return torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def in_ranks(ranks, *command, machines=1):
    """Run a program of ours on the CPU in several processes, on machines that are played, as torchrun would.

    Ranks end by themselves, but where one reports bad input: the others, which wait for that, are killed then. Returns
    the first exit code that is not 0, or 0, and what all wrote to stdout and to stderr.
    """
    store = free_store()
    local = ranks // machines
    shared = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=local, MASTER_ADDR="localhost", MASTER_PORT=store.port,
                  TORCHELASTIC_USE_AGENT_STORE=True)
    programs = [Program(*command, "--device", "cpu", RANK=rank, LOCAL_RANK=rank % local, **shared)
                for rank in range(ranks)]
    codes = []

    def all_have_ended():
        for program in programs:
            if program.process.poll() is not None and program not in ended:
                ended.append(program)
                codes.append(program.process.returncode)
        if 2 in codes:
            for program in programs:
                program.process.kill()
        return len(ended) == ranks
    ended = []
    wait_until(all_have_ended)
    _, out, err = zip(*(program.wait() for program in programs))
    return next(filter(None, codes), 0), "".join(out), "".join(err)


def torchrun(ranks, *command, machines=1, flags=()):
    """Run a program of ours in several processes on the CPU, by one launcher for each machine that is played.

    Each process imports torch, which takes seconds: where the launcher is not the point, there is in_ranks(). Returns
    the first launcher's exit code, and what all wrote to stdout and to stderr.
    """
    store = free_store()
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}",
                f"--nproc_per_node={ranks // machines}", "--rdzv_backend=c10d", "--rdzv_conf=is_host=0",
                f"--rdzv_endpoint=localhost:{store.port}", "--local_addr=localhost", *flags]
    running = [subprocess.Popen([*launcher, *map(str, command), "--device", "cpu"], text=True, env=environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_signals) for _ in range(machines)]
    try:
        out, err = zip(*(process.communicate(timeout=DEADLINE) for process in running))
    finally:
        for process in running:
            process.terminate()                                              # if it has not ended
    return running[0].returncode, without_gloo("".join(out)), "".join(err)


def left_behind(mark=None, session=None):
    """Processes that run with `mark` on their command line, or in a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):                                          # it has ended
            state, _, _, its_session = (process / "stat").read_text().rpartition(") ")[2].split()[:4]
            marked = mark is not None and os.fsencode(mark) in (process / "cmdline").read_bytes()
            if state != "Z" and (marked or int(its_session) == session):
                found.append(process.name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What a program says and leaves


def refused(program, argv, capsys):
    """Run a program's main on bad input; returns its one sentence."""
    with pytest.raises(SystemExit) as end:
        program.main([str(arg) for arg in argv])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def load(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    """The rows of metrics.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time_")} for row in rows]


def equal(one, other):
    """Whether two checkpoints are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def by_hand(photos, checkpoint, alpha=None):
    """Logits and labels of all images, one at a time."""
    model = build(torch.load(checkpoint, weights_only=True)).eval()
    if alpha is not None:
        model.set_soft_mask(alpha)
    logits, labels = [], []
    for image, label in open_data(str(photos), "val", 16):
        pixels = torch.from_numpy(np.array(eval_transform(image.convert("RGB"), None, 16))).permute(2, 0, 1)
        with torch.no_grad():
            logits.append(model(normalize(pixels[None])))
        labels.append(label)
    return torch.cat(logits), torch.tensor(labels)
