"""The ladder on CIFAR-10: every step and variant with several seeds, each a plain run of train.py.

    python -m replication.ladder               # stopped and started again, it continues
    python -m replication.ladder --seeds 5     # two more of each: only what is missing is run
    python -m replication.ladder --epochs 10   # longer runs, in a folder of their own
    # More flags of train.py, for all runs
    python -m replication.ladder --with="--lr 5e-4" --steps vit swiglu
    # Size T, several runs at once on a GPU
    python -m replication.ladder --long --epochs 100 --device cuda --jobs 4

A finished run appends its last line of metrics, with the accuracy after each epoch, to rows.jsonl
in --out, its step or variant as `step`, and its folder stays. results/ladder.jsonl holds the rows
that the README shows; all were run on a CPU, so that they compare. Rows of --with name its flags as
`with`; results/ladder-with.jsonl holds those that the pages show, ladder-long.jsonl of --long.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from data import open_data
from harness.flags import InputError, Parser, check_bounds, flag, nonempty, require
from harness.processes import (DEVICES, default_workers, report_errors, stop_on_signals,
                               stop_requests)
from harness.run import write
from train import parse

ROOT = Path(__file__).resolve().parents[1]
# Half of size T's width and a third of its depth; there, too, SwiGLU's hidden width is 8/3 D to the
# digit.
FLAGS = ("--recipe small-data --size nano --width 96 --heads 3 --depth 4 --patch-size 4 "
         "--batch-size 64 --lr 1e-3 --dtype bfloat16 --compile")
# Size T itself, for a GPU. RandAugment is left out: the cores beside a GPU would need longer for it
# than that trains.
LONG = ("--recipe small-data --size tiny --patch-size 4 --batch-size 512 --micro-batch 512 "
        "--lr 1e-3 --drop-path 0.1 --mixup 0.8 --cutmix 1.0 --erasing 0.25 --dtype bfloat16 "
        "--compile")


MAY_DIFFER = ("seeds", "steps", "device", "jobs", "out")    # between calls for one folder of runs


@dataclass(frozen=True)
class Variant:
    """A row of the results: what it changes, the step that it is compared with, and what the paper
    reports for it."""
    what: str
    against: str = ""
    flags: str = ""                       # default: --step and its name
    published: float | None = None        # ImageNet top-1 at size T, %
    published_loss: float | None = None   # training loss at size T
    published_base: float | None = None   # the same at size B
    published_base_loss: float | None = None


VARIANTS = {
    "vit": Variant("the vision transformer"),
    "swiglu": Variant("SwiGLU instead of the GELU MLP", "vit"),
    "rmsnorm": Variant("RMSNorm instead of LayerNorm", "swiglu"),
    "causal": Variant("causal mask, class token first: **collapse**", "rmsnorm"),
    "ps_cls": Variant("post-sequence class token", "rmsnorm"),
    "rope": Variant("RoPE instead of learned positions", "ps_cls"),
    "abs_pos": Variant("learned positions as well", "rope"),
    "soft_mask": Variant("soft mask: **iLLaMA**", "abs_pos"),
    # Variants
    "modified": Variant("class token first, and it alone attends to all", "rmsnorm",
                        "--step rmsnorm --mask modified"),
    "rope_alone": Variant("RoPE instead of learned positions, no causal mask", "rmsnorm",
                          "--step rmsnorm --rope --no-abs-pos"),
    "soft_first": Variant("class token first, `soft` at alpha 0 from the start: the **leak**",
                          "causal", "--step rmsnorm --mask soft --soft-mask-epochs 0"),
    "soft_constant": Variant("alpha 1 for an epoch, then 0 at once", "soft_mask",
                             "--step soft_mask --soft-mask-schedule constant"),
    "soft_log": Variant("a soft mask that does not leak", "soft_mask",
                        "--step soft_mask --mask soft_log"),
}
TABLES = ROOT / "replication" / "results" / "published-tables.jsonl"
PUBLISHED = [json.loads(line) for line in TABLES.read_text().splitlines()]
for row in PUBLISHED:                     # Table 17, and Table 1 for `modified`
    if row["row"] in VARIANTS:
        VARIANTS[row["row"]] = replace(
            VARIANTS[row["row"]], published=row["tiny"], published_loss=row["tiny_loss"],
            published_base=row["base"], published_base_loss=row["base_loss"])


def step_flags(step):
    return VARIANTS[step].flags or f"--step {step}"


def title_of(step):
    return step_flags(step).removeprefix("--step ")


def long_flags(step, epochs):
    """LONG, with a warm-up of 1/20 of the epochs, and 1/6 for the soft mask, as published for size
    T."""
    flags = [*LONG.split(), "--warmup-epochs", str(epochs // 20)]
    if "soft" in step:
        flags += ["--soft-mask-epochs", str(epochs // 6)]
    return flags


def train(folder, command, jobs, device):
    """A run, from where it stands to its end, in a process of its own. Returns its exit code, or
    None if not begun."""
    if stop_requests:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    cores = max(1, default_workers() // jobs)
    environment = os.environ | dict(OMP_NUM_THREADS=str(cores))
    machine = ["--device", device, "--workers", "0" if device == "cpu" else str(cores)]
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen([sys.executable, *command, *machine, "--out", folder,
                                    "--resume"], stdout=log, stderr=log, env=environment)
    while process.poll() is None:
        time.sleep(0.2)
        if stop_requests:
            process.terminate()                                         # it saves itself
            process.wait()
    return process.returncode


def read_rows(file):
    """The rows of a file, if there is one. InputError if it is damaged."""
    try:
        lines = file.read_bytes().splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{file} does not have a JSON object in each line ({error}): repair or "
                         "remove it") from error
    require(all(isinstance(row, dict) for row in rows), f"{file} does not have a JSON object in "
            "each line: repair or remove it")
    return rows


def commit():
    """Of this code, with -dirty where files were changed; None where git does not know it."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def claim(folder, args):
    """Make a folder for runs, which belongs to one program and one set of flags, and says so in
    about.json. InputError if it belongs to others."""
    file = folder / "about.json"
    about = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    before = json.loads(file.read_text()) if file.exists() else about
    for name in sorted(before.keys() | about):
        was, now = before.get(name), about.get(name)
        require(was == now, f"{folder} holds runs with {flag(name)} {was!r}, not {now!r}: give "
                "another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(about).encode())


def train_all(runs, args):
    """Runs {name: (command, fields that its row gets)}, args.jobs at a time, but those that have
    their row in rows.jsonl already. Returns whether all are finished."""
    claim(args.out, args)
    table, left, code = args.out / "rows.jsonl", {}, commit()
    done = read_rows(table)
    for name, (command, fields) in runs.items():
        fields = fields | dict(flags=" ".join(map(str, command[1:])))
        if not any(row.items() >= fields.items() for row in done):
            left[name] = command, fields
    jobs = max(1, min(args.jobs, len(left)))
    print(f"{len(left)} runs to do, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, args.out / name, command, jobs, args.device): name
                   for name, (command, _) in left.items()}
        for future in as_completed(futures):
            name = futures[future]
            if future.result() == 0:
                epochs = read_rows(args.out / name / "metrics.jsonl")
                row = epochs[-1] | left[name][1] | dict(
                    commit=code, acc1_by_epoch=[epoch["test_acc1"] for epoch in epochs])
                with open(table, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}: {row['test_acc1']:.2f} %", flush=True)
            elif future.result() is not None:
                stop_requests.append("a run that failed")        # the others save themselves, too
                print(f"{name}: not finished, see {args.out / name / 'log.txt'}", flush=True)
    return not stop_requests


def parser_of_runs(program, description, out=None):
    """The flags of programs that make many runs."""
    parser = Parser(prog=f"python -m replication.{program}", description=description)
    parser.add_argument("--data", default="cifar10",
                        help="cifar10, which is downloaded, or as in train.py")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--epochs", type=int, default=3, help="of each run")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of each run")
    parser.add_argument("--jobs", type=int, default=max(1, default_workers()),
                        help="runs at a time, sharing the cores")
    parser.add_argument("--out", type=nonempty, default=out,
                        help="folder of the runs and their rows"
                        + ("" if out else "; default: one in out/, named by the other flags"))
    return parser


def parse_runs(parser, argv):
    """The flags of such a program, checked, and what is needed before the first run."""
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    args.out, args.program = args.out and Path(args.out), parser.prog
    open_data(args.data, "train", 32)                    # downloaded here, once, if at all
    stop_on_signals()                                    # its runs save themselves
    return args


@report_errors()
def main(argv=None):
    parser = parser_of_runs("ladder", __doc__)
    parser.add_argument("--steps", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--long", action="store_true", help="size T, for a GPU and more epochs")
    parser.add_argument("--with", metavar="FLAGS", default="", help='more flags of train.py '
                        'for all runs, as in --with="--lr 5e-4"')
    args = parse_runs(parser, argv)
    more = shlex.split(vars(args)["with"])
    given = parse(more)
    own = given.keys() & {"data", "epochs", "step", "seed", "device", "workers", "out", "resume"}
    require(not own, f"--with sets {', '.join(map(flag, sorted(own)))}, which the ladder does "
            "itself: leave that out")
    name = ["ladder-long" if args.long else "ladder", str(args.epochs),
            *re.findall(r"[\w.]+", " ".join(more))]
    args.out = args.out or Path("out", "-".join(name))
    runs = {}
    for seed in range(args.seeds):
        for step in args.steps:
            flags = long_flags(step, args.epochs) if args.long else FLAGS.split()
            command = [ROOT / "train.py", "--data", args.data, *flags, "--epochs", str(args.epochs),
                       *step_flags(step).split(), "--seed", str(seed), *more]
            fields = dict(step=step, seed=seed, epoch=args.epochs - 1)
            if more:
                fields["with"] = vars(args)["with"]
            runs[f"{step}-{seed}"] = command, fields
    sys.exit(0 if train_all(runs, args) else 1)


if __name__ == "__main__":
    main()
