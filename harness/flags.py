"""The command line, made from dataclasses, and bad input as one sentence.

    given = parse_flags(argv, "Train.", {"": [Run], "how to train": [Recipe]}, dict(size=SIZES))
    run = Run(**pick(Run, given))                  # `given` has only the flags that were given
    require(run.seed >= 0, "--seed is negative: give another one")
"""
import argparse
import inspect
import math
import re
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields

from model import Config, config


class InputError(ValueError):
    """Bad input: one sentence that names the file or flag, what is wrong and the remedy.
    report_errors() prints it.

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


def shorten(names):
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
    """{name: value} of the fields of a Config that differ from those of a size at a step: what
    flags changed on top.

    What data and recipe determine (resolution, patches, classes, drop path) does not count.
    """
    usual, found = config(size, step), {}
    for name in [field.name for field in fields(Config)]:
        if name not in ("img_size", "patch_size", "num_classes", "drop_path"):
            if getattr(cfg, name) != getattr(usual, name):
                found[name] = getattr(cfg, name)
    return found


class Parser(argparse.ArgumentParser):
    """argparse, with wrong flags as InputErrors, and the first line of a docstring as the
    description."""

    def __init__(self, description="", **about):
        super().__init__(description=description.partition("\n")[0], allow_abbrev=False, **about)

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def nonempty(value):
    """The type of a flag that takes text: an empty one, as of an unset variable, would mean the
    default."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or drop the flag")
    return value


MANY = 10 ** 9
BOUNDS = {  # of numbers by name; others are from 0 to MANY
    **dict.fromkeys("""img_size patch_size width depth heads epochs batch_size micro_batch
                    iterations eval_every short_side seeds jobs repeats larger_epochs
                    pretrain_epochs img_sizes batch_sizes images""".split(), (1, MANY)),
    **dict.fromkeys("label_smoothing erasing alpha layer_decay".split(), (0, 1)),
    "drop_path": (0, 0.99),
    "seed": (-math.inf, math.inf),
}


def check_bounds(values):
    """InputError if a number in {name: value}, or in a list there, is out of bounds, as nan always
    is."""
    for name, value in values.items():
        low, high = BOUNDS.get(name, (0, MANY))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                bounds = f"at least {low}" if high == MANY else f"from {low} to {high}"
                require(low <= number <= high, f"{flag(name)} is {number}; it must be {bounds}")


def checked_config(make, **values):
    """make(**values), where make is Config or config(): InputError if model.py refuses them."""
    try:
        return make(**values)
    except ValueError as error:
        raise InputError(str(error)) from error


def add_flags(parser, cls, skip=(), choices=()):
    """A flag for each field, its comment in the source as the help. Only flags that were given
    appear in the result."""
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
        text = re.sub(r" \[\d\]", "", text).replace("%", "%%")     # [5] is a reference of model.py
        if cls is not Config and field.default not in ("", MISSING):
            text += f" (default: {field.default})"
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **options)


def parse_flags(argv, description, groups, choices, out="out", **about):
    """{name: value} of the flags that were given; --resume is None where it came without a path.

    `groups` are {title: dataclasses}. A field that occurs twice becomes one flag, and num_classes
    none, which the data determine. InputError for what is wrong.
    """
    parser, seen = Parser(description, **about), {"num_classes"}
    for title, classes in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for cls in classes:
            add_flags(group, cls, seen, choices)
            seen |= {field.name for field in fields(cls)}
    parser.add_argument("--resume", nargs="?", type=nonempty, default=argparse.SUPPRESS,
                        metavar="PATH",
                        help="resume the run in a folder; without PATH: in --out, or the latest "
                        f"run in {out}/")
    given = vars(parser.parse_args(argv))
    check_bounds(given)
    return given


def pick(cls, values):
    """The part of a dict that a dataclass takes."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def with_saved(given, checkpoint, run, recipe, datasets):
    """The flags that were given, on top of those of the run to resume. InputError if they would
    change it: only --dtype may be another one, and --data a folder that has moved, so neither is
    one of the built-in `datasets`. A field of the dataclasses `run`, `recipe` and Config that is
    newer than the run had its default."""
    if checkpoint is None:
        return given
    saved, changed = {}, []
    for part, cls in dict(run=run, recipe=recipe, config=Config).items():
        saved |= asdict(cls(**pick(cls, checkpoint[part])))
    for name, value in given.items():
        moved = name == "data" and not {value, saved[name]} & {*datasets}
        if name in saved and value != saved[name] and name != "dtype" and not moved:
            changed.append(f"{flag(name, value)}, not {flag(name, saved[name])}")
    require(not changed, "--resume continues the run as it was started, but here is "
            f"{' and '.join(changed)}: drop the flag, or start a new run, --init-from its last.pt "
            "to train it for longer")
    return saved | given


def check_schedules(given, recipe, cfg):
    """InputError if the schedules of a new run do not fit together, or its model has no soft mask
    to schedule."""
    for name in ("soft_mask_schedule", "soft_mask_epochs"):
        require(cfg.soft or name not in given, f"{flag(name)} needs a soft mask, but the mask of "
                f"this model is {cfg.mask!r}: drop the flag, or add --mask soft")
    for name in ("warmup_epochs", "soft_mask_epochs") if cfg.soft else ("warmup_epochs",):
        end = getattr(recipe, name)
        require(end <= recipe.epochs, f"--epochs {recipe.epochs} would end before "
                f"{flag(name, end)}: lower that, too")


def split_batch(recipe, world, strict):
    """(micro-batch size, micro-batches per iteration) of each rank. Unless `strict`, a recipe's
    micro-batch is the most that it may be. InputError if they do not divide the batch, or are odd
    where mixup and cutmix pair images.
    """
    mixes = getattr(recipe, "mixup", 0) or getattr(recipe, "cutmix", 0)
    part, left = divmod(recipe.batch_size, world)
    micro = recipe.micro_batch
    if not strict:
        fits = [size for size in range(min(micro, part), 0, -1)
                if part % size == 0 and not (mixes and size % 2)]
        micro = fits[0] if fits else 1
    near = max(1, round(recipe.batch_size / world / micro)) * world * micro
    require(left == 0 and part % micro == 0, f"--batch-size {recipe.batch_size} is not a multiple "
            f"of {plural(world, 'rank')} x --micro-batch {micro}; {near} is")
    require(not (mixes and micro % 2), f"--micro-batch {micro} is odd, but mixup and cutmix pair "
            f"images: make it even and --batch-size a multiple of {2 * world}, or set both to 0")
    return micro, part // micro
