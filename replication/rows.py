"""The rows in results/ as tables of pandas, and which of their differences are more than noise.

    ladder = by_step("ladder", epoch=2)               # a row per seed, a column per step or variant
    interval(ladder["ps_cls"], ladder["rmsnorm"])     # "+1.1 [+0.7, +1.5]"

results/README.md says what each file holds and how it was made.
"""
import json
from pathlib import Path

import numpy as np

from harness.flags import require
from model import STEPS
from replication.ladder import VARIANTS, step_flags
from train import parse

try:
    import pandas as pd
    from scipy import stats
except ImportError:
    pd = stats = None

RESULTS = Path(__file__).parent / "results"
EPOCHS = 3                        # of the ladder that the pages show
CHANGES = {step: parse(step_flags(step).split()) for step in VARIANTS}
SIZES = ("width", "depth", "heads", "patch_size")


def rows(name, **fields):
    """The rows of results/NAME.jsonl that have these fields, as a DataFrame."""
    require(pd, "the study needs pandas and scipy: pip install -r replication/requirements.txt")
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    found = pd.DataFrame([json.loads(line) for line in lines])
    for field, value in fields.items():
        found = found[found[field] == value]
    return found


def step_of(row):
    """The step that a row is about. Rows of the ladder name it; others have the step and what
    differs from it."""
    if row["step"] not in STEPS:
        return row["step"]
    overrides = row.get("overrides")
    changes = overrides if isinstance(overrides, dict) else {}
    changes = {name: value for name, value in changes.items() if name not in SIZES}
    other = f"{row['step']} {changes}" if changes else row["step"]
    return next((step for step in VARIANTS
                 if CHANGES[step] == dict(step=row["step"]) | changes), other)


def pivot(found, key="test_acc1"):
    """What each seed has, a row each, with a column for each step or variant. Of several rows for a
    seed the last one counts."""
    found = found.assign(step=found.apply(step_of, axis=1))
    found = found.drop_duplicates(["step", "seed"], keep="last")
    return found.pivot(index="seed", columns="step", values=key)


def by_step(name, key="test_acc1", **fields):
    """pivot() of the rows of results/NAME.jsonl that have these fields."""
    return pivot(rows(name, **fields), key)


# --------------------------------------------------------------------------------------------------
# Differences, paired by seed: it fixes the order of images and their crops for all steps, and the
# weights of those that have the same ones


def paired(values, others):
    """(mean difference, lower and upper end of its 95 % interval, p-value, pairs) by a paired
    t-test of two Series, on the seeds that both have."""
    both = pd.concat([values, others], axis=1).dropna()
    first, second = both.iloc[:, 0].astype(float), both.iloc[:, 1].astype(float)
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    return (first - second).mean(), low, high, test.pvalue, len(both)


def interval(values, others, digits=1):
    """paired()'s difference with its interval, in words."""
    mean, low, high, _, _ = paired(values, others)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def holm(chances, level=0.05):
    """Those of {name: p-value} that are significant by Holm's step-down procedure: the probability
    that any of them is called so wrongly is at most `level`."""
    ordered = pd.Series(chances).sort_values()
    adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax()
    return set(adjusted[adjusted <= level].index)
