"""Does the private memory of data-loading workers grow with the number of files? torchvision's ImageFolder beside ours.

    python -m benchmarks.bench_files --minutes 2.33 --out out/bench_files.jsonl        # Linux, 5 minutes
    python -m benchmarks.bench_files --files 100000 --minutes 0.5 --every 15 --out out/bench_files.jsonl

The files are hard links to small JPEGs in a temporary folder with ImageNet's layout. Workers are forks: they share the
main process's memory until one of them writes to it, and reading a Python object writes its reference count.

Each contender runs in a process of its own. Its first row has the seconds that the scan of the folder takes (names
already in the kernel's cache) and the private memory that the scan adds to the main process. The other rows have the
images read so far and the private memory of each worker, both memories in 10^6 bytes. The speed is that of a machine
with other work.
"""
import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets

from benchmarks.soak import children, look_at
from data import Images, eval_transform, loader, train_batches
from harness.files import open_folder, read_image
from harness.run import append_row

CONTENDERS = {  # how each opens a folder with train/
    "torchvision": lambda root: datasets.ImageFolder(root / "train", loader=read_image),
    "ours": lambda root: open_folder(root, "train"),
}


def make_folder(root, files, classes=1000):
    """train/CLASS/CLASS_NUMBER.JPEG; a file takes at most 65,000 links on ext4, so each class has its own."""
    image = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    for label in range(classes):
        name = f"n{label:08}"
        folder = root / "train" / name
        folder.mkdir(parents=True)
        image.save(folder / f"{name}_0.JPEG", "JPEG")
        for number in range(1, len(range(label, files, classes))):
            os.link(folder / f"{name}_0.JPEG", folder / f"{name}_{number}.JPEG")


def measure(name, root, args):
    torch.set_num_threads(1)
    before, start = look_at(os.getpid())[0], time.perf_counter()
    source = CONTENDERS[name](root)
    startup = time.perf_counter() - start
    append_row(dict(contender=name, files=len(source), startup_s=round(startup, 2),
                    added_mb=round((look_at(os.getpid())[0] - before) / 1e6, 1)), args.out)
    images = Images(source, partial(eval_transform, size=16), seed=0)
    batches = train_batches(len(source), batch_size=256, epochs=100_000)
    start = time.perf_counter()
    due = read = 0
    for batch, _, errors in loader(images, batches, args.workers):
        assert not any(errors)
        read += len(batch)
        seconds = time.perf_counter() - start
        if seconds >= due:
            memory = [round(look_at(pid)[0] / 1e6, 1) for pid in children(os.getpid())]
            append_row(dict(contender=name, files=len(source), seconds=round(seconds, 1), images=read,
                            private_mb=memory), args.out)
            due += args.every
        if seconds >= 60 * args.minutes:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=2, help="of reading, for each contender")
    parser.add_argument("--every", type=float, default=10, help="seconds between rows")
    parser.add_argument("--out", help="append the rows to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.files)
        for name in CONTENDERS:
            run = multiprocessing.get_context("fork").Process(target=measure, args=(name, Path(folder), args))
            run.start()
            run.join()
            if run.exitcode:
                sys.exit(f"error: the run of {name} ended with code {run.exitcode}")


if __name__ == "__main__":
    main()
