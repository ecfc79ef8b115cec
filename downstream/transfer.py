"""What is pretraining on some classes worth for others, by how many labelled images there are of these?

    python -m downstream.transfer --data cifar10      # all runs; stopped and started again, it goes on
    python -m downstream.transfer train --data cifar10:rest-5-0 --step soft_mask     # train.py on one part of the data

The first half of a data set's classes is for pretraining. On 1, 5, 25 and 100 % of the training images of the other
half a model is trained from scratch, fine-tuned, and probed linearly: only its head and last norm are trained. All
three run for the same number of iterations; the images of a part are repeated, with other crops, to fill its epochs.
"""
import argparse
import random
import sys
from pathlib import Path

from torch.utils.data import Dataset

import data
import train
from eval import default_workers, report_errors, stop_on_signals
from experiments.ladder import train_all

FLAGS = "--size nano --width 96 --heads 3 --depth 4 --batch-size 64 --lr 1e-3 --workers 0 --device cpu"
RUNGS = {"rmsnorm": "", "soft_mask": "--soft-mask-epochs 0"}      # ViT and iLLaMA; what keeps their attention as it is
PERCENT = (1, 5, 25, 100)                                         # of the training images
STARTS = {"scratch": "", "fine-tuning": "--init-from {weights}",
          "probe": "--init-from {weights} --freeze --lr 1e-2 {as_it_is}"}


class Part(Dataset):
    """Images of some classes of a data set: a percentage of each, the same for a seed, repeated until there are as many
    as without it."""

    def __init__(self, source, classes, percent=100, seed=0):
        labels = source.labels if hasattr(source, "labels") else source.targets          # ImageFolder's, torchvision's
        self.source, self.classes, self.places, every = source, classes, [], 0
        for name in classes:
            places = [i for i, label in enumerate(labels) if source.classes[label] == name]
            every += len(places)
            random.Random(f"{seed} {name}").shuffle(places)
            self.places += places[: max(1, len(places) * percent // 100)]
        self.images = len(self.places)                                                   # different ones
        self.places = [self.places[i % self.images] for i in range(every)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        image, label = self.source[self.places[index]]
        return image, self.classes.index(self.source.classes[label])


def open_part(name, split, img_size):
    """NAME:first, the first half of the classes of a data set, or NAME:rest-PERCENT-SEED, the others; a percentage
    counts in training alone."""
    data_name, part = name.rsplit(":", 1)
    source = data.open_data(data_name, split, img_size)
    half = len(source.classes) // 2
    if part == "first":
        return Part(source, list(source.classes[:half]))
    percent, seed = map(int, part.removeprefix("rest-").split("-"))
    return Part(source, list(source.classes[half:]), percent if split == "train" else 100, seed)


def train_on_part(argv):
    """train.py, with the parts of a data set among its own."""
    names = [value for flag, value in zip(argv, argv[1:]) if flag == "--data" and ":" in value]
    data.DATASETS.update({name: lambda split, img_size, name=name: open_part(name, split, img_size) for name in names})
    stop_on_signals()
    train.main(argv)


def runs(args):
    """(pretraining, transfer): {name: (command, fields of the row)} as train_all() takes them."""
    command = ["-m", "downstream.transfer", "train", *FLAGS.split()]
    first, rest = {}, {}
    for seed in range(args.seeds):
        for step, as_it_is in RUNGS.items():
            flags = [*command, "--step", step, "--seed", str(seed)]
            name = f"first-{step}-{seed}"
            first[name] = ([*flags, "--data", f"{args.data}:first", "--epochs", str(args.pretrain_epochs)],
                           dict(step=step, seed=seed, start="pretraining"))
            for percent in PERCENT:
                for start, extra in STARTS.items():
                    extra = extra.format(weights=args.out / name / "last.pt", as_it_is=as_it_is).split()
                    rest[f"{start}-{percent}-{step}-{seed}"] = (
                        [*flags, "--data", f"{args.data}:rest-{percent}-{seed}", "--epochs", str(args.epochs), *extra],
                        dict(step=step, seed=seed, start=start, percent=percent))
    return first, rest


@report_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train_on_part(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m downstream.transfer", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="cifar10, cifar100, or a folder as train.py takes it")
    parser.add_argument("--seeds", type=int, default=3, help="with seeds from 0 on")
    parser.add_argument("--pretrain-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="each with as many images as half of the classes have")
    parser.add_argument("--jobs", type=int, default=max(1, default_workers()), help="runs at a time, sharing the cores")
    parser.add_argument("--out", type=Path, default=Path("out", "transfer"), help="folder of the runs and their rows")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.pretrain_epochs, args.jobs) < 1:
        raise ValueError("--seeds, --epochs, --pretrain-epochs and --jobs must be at least 1")
    if len(data.open_data(args.data, "train", 32).classes) < 4:                          # downloaded here, once
        raise ValueError(f"--data {args.data} has fewer than four classes: use data with two for each half")
    stop_on_signals()
    first, rest = runs(args)
    sys.exit(0 if train_all(first, args.out, args.jobs) and train_all(rest, args.out, args.jobs) else 1)


if __name__ == "__main__":
    main()
