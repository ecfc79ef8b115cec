"""The rows in results/, by what was run; which of their differences are more than noise; and what they are called.

ladder.jsonl has rows of replication/ladder.py, ladder-with.jsonl those with other flags, ladder-long.jsonl those of
runs of `epochs` epochs that were stopped after epoch `epoch`; properties.jsonl, rank.jsonl, landscape.jsonl,
label-smoothing.jsonl, collapse.jsonl, shape-bias*.jsonl and leak.jsonl those of replication/properties.py on its runs,
anytime.jsonl those of downstream/anytime.py; cifar10-20-epochs.jsonl and segment.jsonl have the last row of
metrics.jsonl of each run of train.py and downstream/segment.py, camvid-multi-scale.jsonl what the latter's
`eval --json` prints; where.jsonl, transfer.jsonl, select.jsonl and quantize.jsonl rows of the programs of these names,
transfer-tiny.jsonl those of transfer with --pretrain-data; NAME-upside-down.jsonl are of images upside down. Other
NAME.jsonl are the metrics.jsonl of the run NAME as it was left; demo.jsonl the two runs of the README's quick start;
speed/ has rows of the programs in replication/. published-tables.jsonl holds figures of the paper, each with its table
or figure, published.jsonl the best epoch of each of the authors' logs whose weights are published.
"""
import json
import math
from statistics import fmean, stdev

import torch

from model import STEPS
from replication.ladder import ROOT, VARIANTS, step_flags
from replication.transfer import COMPARED
from train import parse


def rows(name):
    return [json.loads(line) for line in (ROOT / "replication" / "results" / f"{name}.jsonl").read_text().splitlines()]


def matching(name, **fields):
    """The rows that have these fields."""
    return [row for row in rows(name) if all(row.get(field) == value for field, value in fields.items())]


# ---------------------------------------------------------------------------------------------------------------------
# By step and seed


EPOCHS = 3                        # of the ladder that the pages show
CHANGES = {step: parse(step_flags(step).split()) for step in VARIANTS}


def step_of(row):
    """The step that a row is about. Rows of the ladder name it; others have the step and what differs from it."""
    size = ("width", "depth", "heads", "patch_size")
    changes = {name: value for name, value in row.get("overrides", {}).items() if name not in size}
    if row["step"] not in STEPS:
        return row["step"]
    other = f"{row['step']} {changes}" if changes else row["step"]
    return next((step for step in VARIANTS if CHANGES[step] == dict(step=row["step"]) | changes), other)


def by_step(name, key="test_acc1", **fields):
    """{step: {seed: its value}} of the rows with these fields, in the order of seeds; of several rows for a seed the
    last one counts."""
    found = {}
    for row in matching(name, **fields):
        found.setdefault(step_of(row), {})[row["seed"]] = row[key]
    return {step: dict(sorted(seeds.items())) for step, seeds in found.items()}


def seeds_of(name, key, step, **fields):
    """What each seed has, in the order of seeds."""
    return list(by_step(name, key, **fields)[step].values())


def ladder(key="test_acc1", flags=None):
    """{step: {seed: its value}} of the ladder, or of that with other flags."""
    if flags is None:
        return by_step("ladder", key, epoch=EPOCHS - 1)
    return by_step("ladder-with", key, epoch=EPOCHS - 1, **{"with": flags})


# ---------------------------------------------------------------------------------------------------------------------
# Which differences are more than noise: paired by seed, as a seed fixes weights, order and crops of all steps


def fraction_within(t, degrees):
    """P(|T| <= t) of Student's t distribution, whose density is a power of a cosine in the angle atan(t / sqrt(n))."""
    def area(angle):
        u = torch.linspace(0, angle, 4001, dtype=torch.float64)
        return torch.trapezoid(u.cos() ** (degrees - 1), u).item()
    return area(math.atan(t / math.sqrt(degrees))) / area(math.pi / 2)


def quantile_of_t(degrees, fraction=0.95):
    """Within how many standard errors that fraction lies."""
    low, high = 0.0, 1e4
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fraction_within(middle, degrees) > fraction else (middle, high)
    return high


def shared(*columns):
    """The seeds that all of several {seed: value} have."""
    return sorted(set.intersection(*(set(column) for column in columns)))


def paired(values, others):
    """(mean difference, half its 95 % interval, probability of a larger one by chance) of {seed: value}, on the seeds
    that both have."""
    changes = [values[seed] - others[seed] for seed in shared(values, others)]
    error, degrees = stdev(changes) / math.sqrt(len(changes)), len(changes) - 1
    mean = fmean(changes)
    chance = 1 - fraction_within(abs(mean) / error, degrees) if error else float(mean == 0)
    return mean, quantile_of_t(degrees) * error, chance


def significant(chances, level=0.05):
    """Those of {step: probability by chance} that are not noise, by Holm's step-down procedure: the probability that
    any of them is called so wrongly is at most `level`."""
    found = set()
    for tested, step in enumerate(sorted(chances, key=chances.get)):
        if chances[step] > level / (len(chances) - tested):
            break
        found.add(step)
    return found


def interval(values, others, digits=1):
    """paired()'s difference with its interval, in words."""
    mean, half, _ = paired(values, others)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def comparisons(key="test_acc1"):
    """{step: paired() with the step that it is compared with} of the ladder."""
    found = ladder(key)
    return {step: paired(found[step], found[row.against]) for step, row in VARIANTS.items() if row.against}


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


RUNS = {"shapes-tiny": "`shapes`, iLLaMA-T, patch 8", "cifar10-nano": "CIFAR-10, 6 blocks 128 wide, patch 4",
        "cifar10-tiny": "CIFAR-10, iLLaMA-T, patch 8"}
READ = {  # name of the runs, less their seed: how they were trained
    "causal-3": "causal, whole images, 3 epochs", "prefixes-3": "causal, prefixes, 3 epochs",
    "bidirectional-3": "bidirectional, prefixes, 3 epochs", "prefixes-10": "causal, prefixes, 10 epochs"}
MODELS = {"vit": "ViT", "soft_mask": "iLLaMA"}
SEGMENTED = {"rmsnorm": "ViT (`rmsnorm`)", "ps_cls": "causal (`ps_cls`)", "soft_mask": "iLLaMA (`soft_mask`)",
             "rope_alone": "ViT with RoPE (`rmsnorm --rope --no-abs-pos`)"}
STARTS = {"scratch": "from scratch", "fine-tuning": "fine-tuned", "fine-tuning-0": "fine-tuned without soft mask",
          "probe": "linear probe"}
TRANSFERRED = {step: SEGMENTED[step] for step in COMPARED}


def read_by(name, key):
    """What each seed of such runs has."""
    return [row[key] for row in rows("anytime") if row["run"].rpartition("-")[0] == name]


def segmented(name, step, pretrained):
    """The rows of downstream.segment or replication.where, a seed each, from CIFAR-10's weights or without."""
    return [row for row in rows(name) if step_of(row) == step and bool(row["init_from"]) == pretrained]
