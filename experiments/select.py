"""Is weight selection worth it? Smaller models that start from some of a larger one's weights, and random ones beside.

    python -m experiments.select --data cifar10      # ten runs; stopped and started again, it continues

See downstream/select.py for the two rules. A row has the accuracy after each epoch.
"""
import sys
from pathlib import Path

from downstream import select
from experiments.ladder import ROOT, parse_runs, parser_of_runs, train_all
from harness.flags import report_errors

# Flags of train.py for all, for the larger model, and for the smaller ones
FLAGS = "--batch-size 64 --lr 1e-3"
LARGER = "--size tiny --depth 4"
SMALLER = "--size nano --depth 3"
STARTS = ("random", "uniform", "aligned")


def train_larger(args):
    """Whether the larger model is trained."""
    command = [ROOT / "train.py", "--data", args.data, *FLAGS.split(), *LARGER.split(), "--epochs",
               str(args.larger_epochs)]
    row = dict(data=args.data, start="larger", seed=0, epoch=args.larger_epochs - 1)
    return train_all({"larger": (command, row)}, args, curve=True)


def train_smaller(args):
    """Whether the smaller models are trained, after the checkpoints are made that they start from."""
    command = [ROOT / "train.py", "--data", args.data, *FLAGS.split(), *SMALLER.split(), "--epochs", str(args.epochs)]
    runs = {}
    for seed in range(args.seeds):
        for start in STARTS:
            init = []
            if start != "random":
                small = args.out / f"{start}-{seed}.pt"
                init = ["--init-from", small]
                if not small.exists():
                    select.main([str(args.out / "larger" / "last.pt"), *SMALLER.split(), "--rule", start,
                                 "--seed", str(seed), "--out", str(small)])
            runs[f"{start}-{seed}"] = ([*command, "--seed", str(seed), *init],
                                       dict(data=args.data, start=start, seed=seed, epoch=args.epochs - 1))
    return train_all(runs, args, curve=True)


@report_errors()
def main(argv=None):
    parser = parser_of_runs("select", __doc__, Path("out", "select"))
    parser.add_argument("--larger-epochs", type=int, default=4)
    args = parse_runs(parser, argv)
    sys.exit(0 if train_larger(args) and train_smaller(args) else 1)


if __name__ == "__main__":
    main()
