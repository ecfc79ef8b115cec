"""Is weight selection worth it? Smaller models that start from some of a larger one's weights, and random ones beside.

    python -m experiments.select --data cifar10      # ten runs; stopped and started again, it continues

See downstream/select.py for the two rules. A row has the accuracy after each epoch.
"""
import sys
from pathlib import Path

import train
from data import open_data
from downstream import select
from experiments.ladder import ROOT, parser_of_runs, train_all
from harness.flags import check_bounds, flags_of, overrides, report_errors
from harness.processes import stop_on_signals

FLAGS = "--batch-size 64 --lr 1e-3 --workers 0 --device cpu"
STARTS = ("random", "uniform", "aligned")


def train_larger(args):
    """Whether the larger model is trained."""
    command = [ROOT / "train.py", "--data", args.data, *args.flags.split(), *args.larger.split(), "--epochs",
               str(args.larger_epochs)]
    row = dict(data=args.data, start="larger", seed=0, epoch=args.larger_epochs - 1)
    return train_all({"larger": (command, row)}, args.out, 1, curve=True)


def train_smaller(args):
    """Whether the smaller models are trained, after the checkpoints are made that they start from."""
    runs = {}
    flags = ["--data", args.data, *args.flags.split(), *args.smaller.split(), "--epochs", str(args.epochs)]
    run, _, cfg = train.resolve(train.parse(flags), None)
    model = f"--size {run.size} --step {run.step}" + flags_of(overrides(cfg, run.size, run.step))
    larger = str(args.out / "larger" / "last.pt")
    for seed in range(args.seeds):
        for start in STARTS:
            init = []
            if start != "random":
                small = args.out / f"{start}-{seed}.pt"
                init = ["--init-from", small]
                if not small.exists():
                    select.main([larger, *model.split(), "--rule", start, "--seed", str(seed), "--out", str(small)])
            runs[f"{start}-{seed}"] = ([ROOT / "train.py", *flags, "--seed", str(seed), *init],
                                       dict(data=args.data, start=start, seed=seed, epoch=args.epochs - 1))
    return train_all(runs, args.out, args.jobs, curve=True)


@report_errors()
def main(argv=None):
    parser = parser_of_runs("select", __doc__.splitlines()[0], Path("out", "select"),
                            "of the smaller ones, from 0 on; the larger one has 0")
    parser.add_argument("--larger", default="--size tiny --depth 4", help="flags of train.py for the larger model")
    parser.add_argument("--smaller", default="--size nano --depth 3", help="flags of train.py for the smaller ones")
    parser.add_argument("--flags", default=FLAGS, help="flags of train.py for all")
    parser.add_argument("--larger-epochs", type=int, default=4)
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    open_data(args.data, "train", 32)                                # downloaded here, once, if at all
    stop_on_signals()
    sys.exit(0 if train_larger(args) and train_smaller(args) else 1)


if __name__ == "__main__":
    main()
