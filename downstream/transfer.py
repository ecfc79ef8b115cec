"""What is pretraining on some classes worth for others, by how many labelled images there are of these?

    python -m downstream.transfer --data cifar10      # all runs; stopped and started again, it goes on
    python -m downstream.transfer train --data cifar10:rest-5-0 --step soft_mask     # train.py on one part of the data

The first half of a data set's classes is for pretraining. On 1, 5, 25 and 100 % of the training images of the other
half a model is trained from scratch, fine-tuned, and probed linearly: only its head and last norm are trained. All
three run for the same number of iterations; the images of a part are repeated, with other crops, to fill its epochs.
eval.py does not know parts: the accuracy of a run is in its metrics.jsonl.
"""
import random
import re
import sys
from pathlib import Path

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

import data
import train
from eval import Parser, report_errors, stop_on_signals
from experiments.ladder import add_flags, train_all

FLAGS = "--size nano --width 96 --heads 3 --depth 4 --batch-size 64 --lr 1e-3 --workers 0 --device cpu"
RUNGS = {"rmsnorm": [], "soft_mask": ["--soft-mask-epochs", "0"]}         # ViT and iLLaMA; flags that keep alpha at 0
PERCENT = (1, 5, 25, 100)                                                 # of the training images


class Part(Dataset):
    """Images of some classes of a data set: a percentage of each, the same for a seed, repeated until there are as many
    as without it."""

    def __init__(self, source, classes, percent=100, seed=0):
        if not isinstance(source, data.ImageFolder | CIFAR10):
            raise ValueError("data that are drawn, and Flowers-102, have no parts: use cifar10, cifar100 or a folder")
        labels = data.labels_of(source)
        self.source, self.classes, self.places, total = source, classes, [], 0
        for name in classes:
            places = [i for i, label in enumerate(labels) if source.classes[label] == name]
            total += len(places)
            random.Random(f"{seed} {name}").shuffle(places)
            self.places += places[: max(1, len(places) * percent // 100)]
        self.images = len(self.places)                                                   # different ones
        self.places = [self.places[i % self.images] for i in range(total)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        image, label = self.source[self.places[index]]
        return image, self.classes.index(self.source.classes[label])


def open_part(name, split, img_size):
    """NAME:first, the first half of the classes of a data set, or NAME:rest-PERCENT-SEED, the others; a percentage
    counts in training alone."""
    part = re.fullmatch(r"(.+):(first|rest-(\d+)-(\d+))", name)
    if not part:
        raise ValueError(f"--data {name} is no part of a data set: give NAME:first or NAME:rest-PERCENT-SEED")
    source = data.open_data(part[1], split, img_size)
    half = len(source.classes) // 2
    if part[2] == "first":
        return Part(source, list(source.classes[:half]))
    return Part(source, list(source.classes[half:]), int(part[3]) if split == "train" else 100, int(part[4]))


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
        for step, alpha_0 in RUNGS.items():
            flags = [*command, "--step", step, "--seed", str(seed)]
            row = dict(data=args.data, step=step, seed=seed)
            name = f"first-{step}-{seed}"
            first[name] = ([*flags, "--data", f"{args.data}:first", "--epochs", str(args.pretrain_epochs)],
                           row | dict(start="pretraining", epoch=args.pretrain_epochs - 1))
            weights = ["--init-from", args.out / name / "last.pt"]
            starts = {"scratch": [], "fine-tuning": weights, "probe": [*weights, "--freeze", "--lr", "1e-2", *alpha_0]}
            for percent in PERCENT:
                for start, more in starts.items():
                    rest[f"{start}-{percent}-{step}-{seed}"] = (
                        [*flags, "--data", f"{args.data}:rest-{percent}-{seed}", "--epochs", str(args.epochs), *more],
                        row | dict(start=start, percent=percent, epoch=args.epochs - 1))
    return first, rest


@report_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train_on_part(argv[1:])
    parser = Parser(prog="python -m downstream.transfer", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_flags(parser, out=Path("out", "transfer"))
    parser.add_argument("--pretrain-epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="each with as many images as half of the classes have")
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.pretrain_epochs, args.jobs) < 1:
        raise ValueError("--seeds, --epochs, --pretrain-epochs and --jobs must be at least 1")
    if len(open_part(f"{args.data}:first", "train", 32).classes) < 2:                    # downloaded here, once
        raise ValueError(f"--data {args.data} has fewer than four classes: use data with two for each half")
    stop_on_signals()
    first, rest = runs(args)
    sys.exit(0 if train_all(first, args.out, args.jobs) and train_all(rest, args.out, args.jobs) else 1)


if __name__ == "__main__":
    main()
