"""The ladder on CIFAR-10: every rung and its variants with several seeds, each a plain run of train.py.

    python -m experiments.ladder               # stopped and started again, it goes on
    python -m experiments.ladder --seeds 5     # two more of each: only what is missing is run
    python -m experiments.ladder --epochs 10   # longer runs, in a folder of their own

A finished run appends its last line of metrics to rows.jsonl in --out, the rung as its `step`, and its folder stays.
All run on the CPU, so that their rows compare. results/ladder.jsonl holds the rows that the README shows.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from data import open_data
from eval import default_workers, report_errors, stop, stop_on_signals

ROOT = Path(__file__).resolve().parents[1]
# Half of size T's width and a third of its depth; there, too, SwiGLU's hidden width is 8/3 D to the digit.
FLAGS = ("--size nano --width 96 --heads 3 --depth 4 --patch-size 4 --batch-size 64 --lr 1e-3 "
         "--dtype bfloat16 --compile --workers 0 --device cpu")


@dataclass(frozen=True)
class Rung:
    """A row of the results: what it changes, the rung that it is compared with, and what the paper reports for it."""
    what: str
    against: str = ""
    flags: str = ""                       # default: --step and its name
    published: float | None = None        # ImageNet top-1 at size T, %
    published_loss: float | None = None   # training loss at size T
    published_base: float | None = None   # the same at size B
    published_base_loss: float | None = None


RUNGS = {
    "vit": Rung("the vision transformer"),
    "swiglu": Rung("SwiGLU instead of the GELU MLP", "vit"),
    "rmsnorm": Rung("RMSNorm instead of LayerNorm", "swiglu"),
    "causal": Rung("causal mask, class token first: **collapse**", "rmsnorm"),
    "ps_cls": Rung("post-sequence class token", "rmsnorm"),
    "rope": Rung("RoPE instead of learned positions", "ps_cls"),
    "abs_pos": Rung("learned positions as well", "rope"),
    "soft_mask": Rung("soft mask: **iLLaMA**", "abs_pos"),
    # Variants
    "modified": Rung("class token first, and it alone attends to all", "rmsnorm", "--step rmsnorm --mask modified"),
    "rope_alone": Rung("RoPE instead of learned positions, no causal mask", "rmsnorm",
                       "--step rmsnorm --rope --no-abs-pos"),
    "soft_first": Rung("class token first, `soft` at alpha 0 from the start: the **leak**", "causal",
                       "--step rmsnorm --mask soft --soft-mask-epochs 0"),
    "soft_constant": Rung("alpha 1 for an epoch, then 0 at once", "soft_mask",
                          "--step soft_mask --soft-mask-schedule constant"),
    "soft_log": Rung("a soft mask that does not leak", "soft_mask", "--step soft_mask --mask soft_log"),
}
PUBLISHED = [json.loads(line) for line in (ROOT / "results" / "published-tables.jsonl").read_text().splitlines()]
for row in PUBLISHED:                     # Table 17, and Table 1 for `modified`
    if row["row"] in RUNGS:
        RUNGS[row["row"]] = replace(RUNGS[row["row"]], published=row["tiny"], published_loss=row["tiny_loss"],
                                    published_base=row["base"], published_base_loss=row["base_loss"])


def flags_of(rung):
    return RUNGS[rung].flags or f"--step {rung}"


def title_of(rung):
    return flags_of(rung).removeprefix("--step ")


def train(folder, command, jobs):
    """A run, from where it stands to its end, in a process of its own. Returns its exit code, or None if not begun."""
    if stop:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | dict(OMP_NUM_THREADS=str(max(1, default_workers() // jobs)))
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen([sys.executable, *command, "--out", folder, "--resume"], stdout=log, stderr=log,
                                   env=environment)
    while process.poll() is None:
        time.sleep(0.2)
        if stop:
            process.terminate()                                         # it saves itself
            process.wait()
    return process.returncode


def train_all(runs, out, jobs, curve=False):
    """Runs {name: (command, fields that its row gets)}, so many at a time, but those that have their row in rows.jsonl
    already; with `curve` it has the accuracy after each epoch, too. Returns whether all are finished."""
    table = out / "rows.jsonl"
    runs = {name: (command, fields | dict(flags=" ".join(map(str, command[1:])))) for name, (command, fields) in runs.items()}
    done = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    left = [name for name, (_, fields) in runs.items() if not any(row.items() >= fields.items() for row in done)]
    print(f"{len(left)} runs to do, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, out / name, runs[name][0], jobs): name for name in left}
        for future in as_completed(futures):
            name = futures[future]
            if future.result() == 0:
                epochs = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
                row = epochs[-1] | runs[name][1]
                if curve:
                    row["acc1_by_epoch"] = [epoch["test_acc1"] for epoch in epochs]
                with open(table, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}: {row['test_acc1']:.2f} %", flush=True)
            elif future.result() is not None:
                stop.append("a run that failed")                        # the others save themselves, too
                print(f"{name}: not finished, see {out / name / 'log.txt'}", flush=True)
    return not stop


def add_flags(parser, seeds="with seeds from 0 on", out=None):
    """The flags of programs that make many runs."""
    parser.add_argument("--data", default="cifar10", help="cifar10, which is downloaded, or as in train.py")
    parser.add_argument("--seeds", type=int, default=3, help=seeds)
    parser.add_argument("--jobs", type=int, default=max(1, default_workers()), help="runs at a time, sharing the cores")
    parser.add_argument("--out", type=Path, default=out, help="folder of the runs and their rows"
                        + ("" if out else "; default: out/ladder-EPOCHS"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, "runs of each rung, with seeds from 0 on")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    args.out = args.out or Path("out", f"ladder-{args.epochs}")
    with report_errors():
        if min(args.seeds, args.epochs, args.jobs) < 1:
            raise ValueError("--seeds, --epochs and --jobs must be at least 1")
        open_data(args.data, "train", 32)                               # downloaded here, once, if at all
    stop_on_signals()
    flags = [ROOT / "train.py", "--data", args.data, *FLAGS.split(), "--epochs", str(args.epochs)]
    runs = {f"{rung}-{seed}": ([*flags, *flags_of(rung).split(), "--seed", str(seed)],
                               dict(step=rung, seed=seed, epoch=args.epochs - 1))
            for seed in range(args.seeds) for rung in args.rungs}
    sys.exit(0 if train_all(runs, args.out, args.jobs) else 1)


if __name__ == "__main__":
    main()
