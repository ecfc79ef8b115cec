"""Is weight selection worth it?

Smaller models that start from some of a larger one's weights, and random ones beside.

    # 13 runs; stopped and started again, it continues
    python -m replication.starts --data cifar10
    # The larger model has seen half of the classes alone
    python -m replication.starts --data cifar10 --other-classes

See downstream/selection.py for the two rules. `permuted` is a control: the weights of `uniform`,
shuffled within each tensor. With --other-classes the smaller models are trained on the second half.
A row has the accuracy after each epoch.
"""
import sys
from pathlib import Path

import torch

from data import seed_of
from downstream import selection
from harness.checkpoint import open_checkpoint
from harness.processes import report_errors
from harness.run import write
from replication.ladder import ROOT, parse_runs, parser_of_runs, train_all
from replication.transfer import open_part

# Flags of train.py for all, for the larger model, and for the smaller ones
FLAGS = "--batch-size 64 --lr 1e-3 --dtype bfloat16 --compile"
LARGER = "--size tiny --depth 4"
SMALLER = "--size nano --depth 3"
STARTS = ("random", "uniform", "aligned", "permuted")
OTHERS = ("random", "uniform", "permuted")            # with --other-classes


def permute(checkpoint, seed):
    """Shuffle the elements of each tensor: their values stay, what they computed together does
    not."""
    generator = torch.Generator().manual_seed(seed_of("permute", seed))
    for name, tensor in checkpoint["model"].items():
        order = torch.randperm(tensor.numel(), generator=generator)
        checkpoint["model"][name] = tensor.flatten()[order].view_as(tensor)


def make_start(start, larger, path, seed):
    """Write the checkpoint that a smaller model starts from."""
    flags = [str(larger), *SMALLER.split(), "--seed", str(seed)]
    if start != "permuted":
        selection.main([*flags, "--rule", start, "--out", str(path)])
        return
    selected = path.with_suffix(".selected.pt")
    selection.main([*flags, "--rule", "uniform", "--out", str(selected)])
    checkpoint = open_checkpoint(selected)
    permute(checkpoint, seed)
    write(path, checkpoint)


def train_larger(args, name, program):
    """Whether the larger model is trained."""
    command = [*program, *FLAGS.split(), *LARGER.split(), "--epochs", str(args.larger_epochs)]
    row = dict(data=args.data, start=name, seed=0, epoch=args.larger_epochs - 1)
    return train_all({name: (command, row)}, args)


def train_smaller(args, starts, larger, program, suffix=""):
    """Whether the smaller models are trained, after the checkpoints are made that they start
    from."""
    command = [*program, *FLAGS.split(), *SMALLER.split(), "--epochs", str(args.epochs)]
    runs = {}
    for seed in range(args.seeds):
        for start in starts:
            name, init = f"{start}{suffix}-{seed}", []
            if start != "random":
                small = args.out / f"{name}.pt"
                init = ["--init-from", small]
                if not small.exists():
                    make_start(start, args.out / larger / "last.pt", small, seed)
            row = dict(data=args.data, start=start + suffix, seed=seed, epoch=args.epochs - 1)
            runs[name] = [*command, "--seed", str(seed), *init], row
    return train_all(runs, args)


@report_errors()
def main(argv=None):
    parser = parser_of_runs("starts", __doc__)
    parser.add_argument("--larger-epochs", type=int, default=4)
    parser.add_argument("--other-classes", action="store_true", help="the larger model is trained "
                        "on half of the classes, the smaller ones on the others")
    args = parse_runs(parser, argv)
    args.out = args.out or Path("out", "select-other" if args.other_classes else "select")
    if args.other_classes:
        open_part(f"{args.data}:first", "train", 32)     # refused now if these data have no parts
        program = ["-m", "replication.transfer", "train", "--data"]
        done = (train_larger(args, "larger-other", [*program, f"{args.data}:first"])
                and train_smaller(args, OTHERS, "larger-other",
                                  [*program, f"{args.data}:rest-100-0"], "-other"))
    else:
        program = [ROOT / "train.py", "--data", args.data]
        done = (train_larger(args, "larger", program)
                and train_smaller(args, STARTS, "larger", program))
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
