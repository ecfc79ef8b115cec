"""What is pretraining on some classes worth for others, by the number of labelled images of these?

    # All runs; stopped and started again, it continues
    python -m replication.transfer --data cifar10
    # As the paper, in small
    python -m replication.transfer --data cifar10 --pretrain-data shapes --epochs 6
    # train.py on one part of the data, and eval.py on it
    python -m replication.transfer train --data cifar10:rest-5-0 --out out/a
    python -m replication.transfer eval out/a --data cifar10:rest-5-0

The first half of a data set's classes is for pretraining; on parts of the other half a model is
trained from scratch, fine-tuned, and probed linearly.
With --pretrain-data it is another experiment, near the paper's: size T pretrained on other data,
then fine-tuned on all images of that half by the paper's recipe with fewer epochs, with and without
the soft mask.
"""
import random
import re
import sys
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

import eval as evaluation
import train
from data import OPENERS, open_data
from harness.files import ImageFolder
from harness.flags import nonempty, require
from harness.processes import report_errors
from replication.ladder import ROOT, parse_runs, parser_of_runs, train_all

FLAGS = "--size nano --width 96 --heads 3 --depth 4 --batch-size 64 --lr 1e-3"
TINY = "--size tiny --dtype bfloat16 --compile"
# A quarter of the paper's learning rate, as its batch of 1,024 is 16 times as large: the rule of
# the square root.
TUNING = "--recipe transfer --img-size 32 --patch-size 8 --batch-size 64 --lr 5e-4"
COMPARED = {  # ViT and iLLaMA; flags that keep alpha at 0
    "rmsnorm": [], "soft_mask": ["--soft-mask-epochs", "0"]}
PERCENT = (1, 5, 25, 100)                                # of the training images


def labels_of(source):
    """The labels of all images of an ImageFolder or one of torchvision's CIFARs, without reading
    them."""
    return source.labels if hasattr(source, "labels") else source.targets


class Part(Dataset):
    """Images of some classes of a data set: a percentage of each, the same for a seed, repeated
    until there are as many as without it."""
    def __init__(self, source, classes, percent=100, seed=0):
        require(isinstance(source, ImageFolder | CIFAR10), "data that are drawn, and Flowers-102, "
                "have no parts: use cifar10, cifar100 or a folder")
        labels = labels_of(source)
        self.source, self.classes, self.places, total = source, classes, [], 0
        for name in classes:
            places = [i for i, label in enumerate(labels) if source.classes[label] == name]
            total += len(places)
            random.Random(f"{seed} {name}").shuffle(places)
            self.places += places[: max(1, len(places) * percent // 100)]
        self.images = len(self.places)                   # different ones
        self.places = [self.places[i % self.images] for i in range(total)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        image, label = self.source[self.places[index]]
        return image, self.classes.index(self.source.classes[label])


PART = r"(.+):(first|rest-(\d+)-(\d+))"


def open_part(name, split, img_size):
    """NAME:first, the first half of the classes of a data set, or NAME:rest-PERCENT-SEED, the
    others; a percentage counts in training alone."""
    data, part, percent, seed = re.fullmatch(PART, name).groups()
    source = open_data(data, split, img_size)
    half = len(source.classes) // 2
    if part == "first":
        return Part(source, list(source.classes[:half]))
    percent = int(percent) if split == "train" else 100
    return Part(source, list(source.classes[half:]), percent, int(seed))


def runs(args):
    """(pretraining, transfer): {name: (command, fields of the row)} as train_all() takes them."""
    first, rest = {}, {}
    for seed in range(args.seeds):
        for step, alpha_0 in COMPARED.items():
            shared = ["-m", "replication.transfer", "train", *FLAGS.split(), "--step", step,
                      "--seed", str(seed)]
            row = dict(data=args.data, step=step, seed=seed)
            name = f"first-{step}-{seed}"
            first[name] = ([*shared, "--data", f"{args.data}:first",
                            "--epochs", str(args.pretrain_epochs)],
                           row | dict(start="pretraining", epoch=args.pretrain_epochs - 1))
            weights = ["--init-from", args.out / name / "last.pt"]
            starts = {"fine-tuning": weights, "scratch": [],
                      "probe": [*weights, "--freeze", "--lr", "1e-2", *alpha_0]}
            if alpha_0:                                  # on all images, as in the paper's Table 9
                starts["fine-tuning-0"] = [*weights, *alpha_0]
            for start, more in starts.items():
                for percent in PERCENT[-1:] if start == "fine-tuning-0" else PERCENT:
                    rest[f"{start}-{percent}-{step}-{seed}"] = (
                        [*shared, "--data", f"{args.data}:rest-{percent}-{seed}",
                         "--epochs", str(args.epochs), *more],
                        row | dict(start=start, percent=percent, epoch=args.epochs - 1))
    return first, rest


def tiny_runs(args):
    """The same two at size T, by the protocol of the paper's Tables 9 and 16: a sixth of the epochs
    to warm up, and for a linear soft mask as many as on CIFAR-100, where alone the paper finds that
    it matters."""
    first, rest = {}, {}
    sixth = str(args.epochs // 6)
    for seed in range(args.seeds):
        for step, alpha_0 in COMPARED.items():
            shared = [*TINY.split(), "--step", step, "--seed", str(seed)]
            row = dict(step=step, seed=seed)
            name = f"first-{step}-{seed}"
            first[name] = ([ROOT / "train.py", *shared, "--data", args.pretrain_data,
                            "--recipe", "small-data", "--epochs", str(args.pretrain_epochs)],
                           row | dict(data=args.pretrain_data, start="pretraining",
                                      epoch=args.pretrain_epochs - 1))
            tuning = ["-m", "replication.transfer", "train", *shared, *TUNING.split(),
                      "--data", f"{args.data}:rest-100-{seed}",
                      "--init-from", args.out / name / "last.pt",
                      "--epochs", str(args.epochs), "--warmup-epochs", sixth]
            starts = {"fine-tuning": ["--soft-mask-epochs", sixth] if alpha_0 else []}
            if alpha_0:
                starts["fine-tuning-0"] = alpha_0
            for start, more in starts.items():
                rest[f"{start}-{step}-{seed}"] = (
                    [*tuning, *more],
                    row | dict(data=args.data, start=start, epoch=args.epochs - 1))
    return first, rest


@report_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["train"], ["eval"]):
        parts = [word for word in argv if re.fullmatch(PART, word)]
        OPENERS.update({name: partial(open_part, name) for name in parts})
        return (train if argv[0] == "train" else evaluation).main(argv[1:])
    parser = parser_of_runs("transfer", __doc__)
    parser.add_argument("--pretrain-epochs", type=int, default=5)
    parser.add_argument("--pretrain-data", type=nonempty,
                        help="shapes, cifar100 ...: size T, as in the paper")
    args = parse_runs(parser, argv)
    part = open_part(f"{args.data}:first", "train", 32)              # downloaded here, once
    require(len(part.classes) > 1, f"--data {args.data} has fewer than four classes: use data with "
            "two for each half")
    if args.pretrain_data:
        require(args.epochs % 6 == 0, f"--epochs {args.epochs} with --pretrain-data: give a "
                "multiple of 6, for warm-up and soft mask have a sixth of them each")
        open_data(args.pretrain_data, "train", 32)
    args.out = args.out or Path("out", "transfer-tiny" if args.pretrain_data else "transfer")
    first, rest = tiny_runs(args) if args.pretrain_data else runs(args)
    sys.exit(0 if train_all(first, args) and train_all(rest, args) else 1)


if __name__ == "__main__":
    main()
