"""The command line, made from dataclasses, and bad input reported in one line.

    given = parse_flags(argv, "Train a model.", {"": [Run, Machine], "how to train": [Recipe]}, dict(size=SIZES))
    run = Run(**pick(Run, given))                        # `given` has only the flags that were given
    require(run.seed >= 0, "--seed is negative: give another one")
"""
import argparse
import inspect
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields

from model import Config, config


class InputError(ValueError):
    """Bad input: one sentence that names the file or flag, what is wrong and the remedy. report_errors() prints it.

    Any other ValueError is a bug, and keeps its traceback.
    """


def require(condition, sentence):
    if not condition:
        raise InputError(sentence)


@contextmanager
def needs(what, packages):
    """Imports of optional packages: an InputError says what needs them."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs {packages}: pip install {packages}") from error


@contextmanager
def as_input_error():
    """ValueErrors of model.py, where it is given what the user says, as InputErrors."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


REPORT_AFTER = 5         # seconds, on other ranks than local rank 0

REFUSALS = {  # what the system refuses, by words in an error
    r"DataLoader worker \(pid|ancdata|open files|shared memory":
        "a data-loading worker was ended by the system, which may be short of memory, shared memory (/dev/shm) or open "
        "files: use fewer --workers",
    "EADDRINUSE|address already in use":
        "the port at which the ranks meet, MASTER_PORT, is in use: give torchrun another --master_port",
    "CUDA out of memory":
        "the GPU has too little free memory for this: add --recompute, or start with a smaller --micro-batch; in "
        "evaluation make --batch-size smaller",
    r"devices?(\(s\))? (is/)?are busy|exclusive[- ](process|thread)":
        "the GPU is taken by another program, which has it to itself: wait for that, or name another one with "
        "CUDA_VISIBLE_DEVICES",
    "deterministic implementation|CUBLAS_WORKSPACE_CONFIG":
        "an operation of this model has no deterministic form on this device: drop --deterministic",
    "by peer": "another rank has ended: see its message, then go on with --resume",
    r"alloc|out of memory|\w+ation overflow|MemoryError":
        "there is not enough memory for this: make the model, the images or the batch smaller",
}


@contextmanager
def report_errors():
    """Bad input, and what the system refuses, ends a program with one line, printed once per node, and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")                   # None where it is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")              # class names, on a terminal without Unicode
    try:
        yield
    except (InputError, RuntimeError, OSError, MemoryError) as error:
        known = [reason for words, reason in REFUSALS.items() if re.search(words, repr(error), re.I)]
        if isinstance(error, InputError):
            reason = printable(str(error))
        elif known and not getattr(error, "filename", None):
            reason = known[0]
        elif isinstance(error, OSError) and error.strerror:
            path = printable(str(error.filename or "the system"))
            reason = f"{path}: {error.strerror}: give another path or fewer processes"
        else:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(REPORT_AFTER)   # local rank 0 reports it, and torchrun ends this one, unless that has no error
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:            # of programs that have nothing to save
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def shorten(names):
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def printable(text):
    """Text of files and their names, without what would control a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def plural(n, word, s="s"):
    return f"{n:,} {word}{'' if n == 1 else s}"


def flag(name, value=None):
    """How a field is written on the command line."""
    name = name.replace("_", "-")
    if value is None:
        return f"--{name}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def flags_of(changes):
    """Fields and their values as they are written on the command line, each after a space."""
    return "".join(f" {flag(name, value)}" for name, value in changes.items())


def overrides(cfg, size, step):
    """{name: value} of the fields of a Config that differ from those of a size at a step: what flags changed on top.

    What data and recipe determine (resolution, patches, classes, drop path) does not count.
    """
    usual, found = config(size, step), {}
    for name in [field.name for field in fields(Config)]:
        if name not in ("img_size", "patch_size", "num_classes", "drop_path"):
            if getattr(cfg, name) != getattr(usual, name):
                found[name] = getattr(cfg, name)
    return found


class Parser(argparse.ArgumentParser):
    """argparse, with wrong flags as InputErrors: they are reported as all bad input is. A description's first line
    counts: it may be a module's docstring, which python -OO leaves out."""

    def __init__(self, description=None, **about):
        super().__init__(description=(description or "").partition("\n")[0], allow_abbrev=False, **about)

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def nonempty(value):
    """The type of a flag that takes text: an empty one, as of an unset variable, would mean the default."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or drop the flag")
    return value


MANY = 10 ** 9
BOUNDS = {  # of numbers, by name, wherever they come from: a flag or a file; other numbers are at least 0
    **dict.fromkeys(("img_size", "patch_size", "num_classes", "width", "heads", "epochs", "batch_size", "micro_batch",
                     "iterations", "eval_every", "seeds", "jobs", "repeats", "larger_epochs", "pretrain_epochs",
                     "img_sizes", "batch_sizes"), (1, MANY)),
    **dict.fromkeys(("label_smoothing", "erasing", "soft_mask", "layer_decay"), (0, 1)),
    **dict.fromkeys(("mixup", "cutmix"), (0, 1000)),         # alphas of Beta distributions
    "short_side": (1, 10_000),
    "depth": (1, 1000),              # 100,000 blocks would be built for minutes
    "drop_path": (0, 0.99),
    "workers": (0, 1024),
    "seed": (-math.inf, math.inf),
}


def check_bounds(values, written=flag):
    """InputError if a number in {name: value} is not one, or out of bounds; `written` is how messages call it."""
    for name, given in values.items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, int | float) and not isinstance(value, bool):
                low, high = BOUNDS.get(name, (0, math.inf))
                bounds = f"at least {low}" if high >= MANY and not value > high else f"from {low} to {high:,}"
                require(low <= value <= high and (isinstance(value, int) or math.isfinite(value)),
                        f"{written(name)} is {value}; it must be {bounds}")


def checked_config(make, **values):
    """make(**values), where make is Config or config(), for what flags or a file say: InputError if it is wrong."""
    check_bounds(values)
    with as_input_error():
        cfg = make(**values)
    channels = cfg.width // cfg.heads
    require(not cfg.rope or channels % 2 == 0, f"RoPE rotates pairs of channels, but a head has {channels}: choose "
            "--width and --heads that make it even, or --no-rope")
    require(cfg.mask in ("none", "causal") or cfg.tokens < 2 ** 16, f"mask {cfg.mask} needs a table of {cfg.tokens:,} "
            f"x {cfg.tokens:,} tokens: choose a larger --patch-size, or --mask causal")
    return cfg


def add_flags(parser, cls, skip=(), choices=()):
    """A flag for each field, its comment in the source as the help. Only flags that were given appear in the result."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        if field.name in skip:
            continue
        options = dict(type=nonempty if field.type is str else field.type)
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if field.name in choices:
            options["choices"] = list(choices[field.name])
        text = comments.get(field.name, "")
        text = re.sub(r" \[\d\]", "", text).replace("%", "%%")              # [5] is a reference of model.py
        if cls is not Config and field.default not in ("", MISSING):
            text += f" (default: {field.default})"
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **options)


class ListChoices(argparse.Action):
    """--list: print what flags choose from, a line each with what it stands for, and end."""

    def __call__(self, parser, *_):
        for name, options in self.const.items():
            for option in options:
                meaning = options[option] if isinstance(options, dict) else {}
                values = meaning if isinstance(meaning, dict) else dict(list(asdict(meaning).items())[:6])
                print(f"{flag(name, option):28}{flags_of(values)}".rstrip())
        parser.exit()


def parse_flags(argv, description, groups, choices, out="out", data=(), **about):
    """{name: value} of the flags that were given; --resume is None where it came without a path.

    `groups` are {title: dataclasses}. A field that occurs twice becomes one flag, and num_classes none, which the data
    determine. `data` are built-in data sets. InputError for what is wrong.
    """
    parser, seen = Parser(description, **about), {"num_classes"}
    for title, classes in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for cls in classes:
            add_flags(group, cls, seen, choices)
            seen |= {field.name for field in fields(cls)}
    parser.add_argument("--resume", nargs="?", type=nonempty, default=argparse.SUPPRESS, metavar="PATH",
                        help=f"resume the run in a folder; without PATH: in --out, or the latest run in {out}/")
    listed = {name: choices[name] for name in ("step", "size", "recipe", "mask")} | dict(data=data)
    parser.add_argument("--list", action=ListChoices, nargs=0, const=listed, default=argparse.SUPPRESS,
                        help="print the steps, sizes, recipes, masks and built-in data sets")
    given = vars(parser.parse_args(argv))
    check_bounds(given)
    return given


def pick(cls, values):
    """The part of a dict that a dataclass takes."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def with_saved(given, checkpoint):
    """The flags that were given, on top of those of the run to resume. InputError if they would change it."""
    if checkpoint is None:
        return given
    saved = checkpoint["run"] | checkpoint["recipe"] | checkpoint["config"]
    given, changed = dict(given), []
    if given.get("dtype") == "auto":                                   # as it was
        del given["dtype"]
    for name, value in given.items():
        if name in saved and name != "data" and saved[name] != value:
            changed.append(f"{flag(name, value)}, not {flag(name, saved[name])}")
    require(not changed, f"--resume continues the run as it was started, but here is {' and '.join(changed)}: drop the "
            "flag, or start a new run, --init-from its last.pt to train it for longer")
    return saved | given


def check_schedules(given, recipe, cfg):
    """InputError if the schedules of a new run do not fit together, or its model has no soft mask to schedule."""
    require(recipe.min_lr <= recipe.lr, f"--min-lr {recipe.min_lr} is above --lr {recipe.lr}: lower --min-lr, too")
    for name in ("soft_mask_schedule", "soft_mask_epochs"):
        require(cfg.soft or name not in given, f"{flag(name)} needs a soft mask, but the mask of this model is "
                f"{cfg.mask!r}: drop the flag, or add --mask soft")
    for name in ("warmup_epochs", "soft_mask_epochs") if cfg.soft else ("warmup_epochs",):
        end = getattr(recipe, name)
        require(end <= recipe.epochs, f"--epochs {recipe.epochs} would end before {flag(name, end)}: lower that, too")


def split_batch(recipe, world, strict, mixes=False):
    """(micro-batch size, micro-batches per iteration) of each rank. Unless `strict`, a recipe's micro-batch is the most
    that it may be. InputError if they do not divide the batch, or images that are paired (`mixes`) are an odd number.
    """
    part, left = divmod(recipe.batch_size, world)
    micro = recipe.micro_batch
    if not strict:
        fits = [size for size in range(min(micro, part), 0, -1) if part % size == 0 and not (mixes and size % 2)]
        micro = fits[0] if fits else 1
    near = max(1, round(recipe.batch_size / world / micro)) * world * micro
    require(left == 0 and part % micro == 0, f"--batch-size {recipe.batch_size} is not a multiple of "
            f"{plural(world, 'rank')} x --micro-batch {micro}; {near} is")
    require(not (mixes and micro % 2), f"--micro-batch {micro} is odd, but mixup and cutmix pair the images of a "
            "micro-batch: make it even, or set both to 0")
    return micro, part // micro
