"""What several test files need: a small folder of images, and a run on it."""
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import eval_transform, normalize, open_data
from harness.checkpoint import build

ROOT = Path(__file__).parents[1]
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


def torchrun(ranks, *command, machines=1):
    """Run a program of ours in several processes on the CPU, by one launcher for each machine that is played.

    Returns the first launcher's exit code, and what all wrote to stdout and to stderr.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}",
                f"--nproc_per_node={ranks // machines}", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
                "--local_addr=localhost"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*launcher, *map(str, command), "--device", "cpu"], text=True, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(machines)]
    out, err = zip(*(process.communicate(timeout=100) for process in running))
    return running[0].returncode, "".join(out), "".join(err)


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
