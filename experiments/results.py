"""The rows in results/, by what was run; which of their differences are more than noise; and what they are called.

ladder.jsonl has rows of experiments/ladder.py; properties.jsonl, collapse.jsonl, shape-bias.jsonl and leak.jsonl those
of experiments/properties.py on its runs, anytime.jsonl those of experiments/anytime.py;
cifar10-20-epochs.jsonl and segment.jsonl have the last row of metrics.jsonl of each run of train.py and
downstream/segment.py, camvid-multi-scale.jsonl what the latter's `eval --json` prints; where.jsonl, transfer.jsonl and
select.jsonl rows of the programs of these names. Other NAME.jsonl are the metrics.jsonl of the run NAME as it was left;
demo.jsonl the two runs of the README's quick start; bench_* rows of the programs in benchmarks/. published-tables.jsonl
holds figures of the paper, each with its table or figure, published.jsonl the best epoch of each of the authors' logs
whose weights are published.
"""
import json
import math
from pathlib import Path
from statistics import NormalDist, fmean

from experiments.ladder import VARIANTS, flags_of
from experiments.transfer import COMPARED
from model import STEPS
from train import parse

ROOT = Path(__file__).resolve().parents[1]


def rows(name):
    return [json.loads(line) for line in (ROOT / "results" / f"{name}.jsonl").read_text().splitlines()]


def matching(name, **fields):
    """The rows that have these fields."""
    return [row for row in rows(name) if all(row.get(field) == value for field, value in fields.items())]


# ---------------------------------------------------------------------------------------------------------------------
# By step and seed


EPOCHS = 3                        # of the ladder that the pages show
CHANGES = {step: parse(flags_of(step).split()) for step in VARIANTS}


def step_of(row):
    """The step that a row is about. Rows of the ladder name it; others have the step and what differs from it."""
    size = ("width", "depth", "heads")
    changes = {name: value for name, value in row.get("overrides", {}).items() if name not in size}
    if row["step"] not in STEPS:
        return row["step"]
    other = f"{row['step']} {changes}" if changes else row["step"]
    return next((step for step in VARIANTS if CHANGES[step] == dict(step=row["step"]) | changes), other)


def by_step(name, key="test_acc1", **fields):
    """{step: {seed: its value}} of the rows with these fields; of several rows for a seed the last one counts."""
    found = {}
    for row in matching(name, **fields):
        found.setdefault(step_of(row), {})[row["seed"]] = row[key]
    return found


def seeds_of(name, key, step, **fields):
    """What each seed has, in the order of seeds."""
    return [value for _, value in sorted(by_step(name, key, **fields)[step].items())]


def climbed(key="test_acc1"):
    """{step: a value for each seed that all steps have}"""
    found = by_step("ladder", key, epoch=EPOCHS - 1)
    seeds = sorted(set.intersection(*map(set, found.values())))
    return {step: [found[step][seed] for seed in seeds] for step in VARIANTS}


# ---------------------------------------------------------------------------------------------------------------------
# Which differences are more than noise


def quantile_of_t(degrees, fraction=0.95):
    """Within how many standard errors a fraction of Student's t distribution lies, by Fisher's expansion."""
    z = NormalDist().inv_cdf((1 + fraction) / 2)
    return (z + (z ** 3 + z) / (4 * degrees) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * degrees ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * degrees ** 3))


def standard_error(found):
    """(standard error of the difference of two steps' means, degrees of freedom), in a design of steps x seeds.

    A seed fixes the order of the images and their crops, and so moves all steps together; what is left of a run when
    its step's and its seed's means are taken out is the noise. Steps whose class token is blind have another, or none.
    """
    runs = [values for step, values in found.items() if step not in ("causal", "soft_first")]
    seeds = len(runs[0])
    means = [fmean(values[seed] for values in runs) for seed in range(seeds)]
    left = [value - fmean(values) - mean + fmean(means) for values in runs for value, mean in zip(values, means)]
    degrees = (len(runs) - 1) * (seeds - 1)
    return math.sqrt(sum(x ** 2 for x in left) / degrees * 2 / seeds), degrees


def significant(changes, error, degrees, level=0.05):
    """Those of the changes {step: difference} that are not noise, by Holm's step-down procedure: the probability that
    any of them is called so wrongly is at most `level`."""
    found = set()
    for tested, step in enumerate(sorted(changes, key=lambda step: -abs(changes[step]))):
        if abs(changes[step]) <= quantile_of_t(degrees, 1 - level / (len(changes) - tested)) * error:
            break
        found.add(step)
    return found


def comparisons():
    """{step: its difference to the step that it is compared with}; which of them are significant; and which are if
    `vit` is left out of the comparisons and of the estimate of the noise."""
    found = climbed()
    changes = {step: fmean(found[step]) - fmean(found[row.against]) for step, row in VARIANTS.items() if row.against}
    others = {step: values for step, values in found.items() if step != "vit"}
    among = {step: change for step, change in changes.items() if VARIANTS[step].against != "vit"}
    return changes, significant(changes, *standard_error(found)), significant(among, *standard_error(others))


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


RUNS = {"shapes-tiny": "`shapes`, iLLaMA-T, patch 8", "cifar10-nano": "CIFAR-10, 6 blocks 128 wide, patch 4",
        "cifar10-tiny": "CIFAR-10, iLLaMA-T, patch 8"}
READ = {  # name of the runs, less their seed: how they were trained
    "causal-3": "causal, whole images, 3 epochs", "prefixes-3": "causal, prefixes, 3 epochs",
    "bidirectional-3": "bidirectional, prefixes, 3 epochs", "prefixes-10": "causal, prefixes, 10 epochs"}
MODELS = {"vit": "ViT", "soft_mask": "iLLaMA"}
SEGMENTED = {"rmsnorm": "ViT (`rmsnorm`)", "ps_cls": "causal (`ps_cls`)", "soft_mask": "iLLaMA (`soft_mask`)"}
STARTS = {"scratch": "from scratch", "fine-tuning": "fine-tuned", "probe": "linear probe"}
TRANSFERRED = {step: SEGMENTED[step] for step in COMPARED}


def read_by(name, key):
    """What each seed of such runs has."""
    return [row[key] for row in rows("anytime") if row["run"].rpartition("-")[0] == name]


def segmented(name, step, pretrained):
    """The rows of downstream.segment or experiments.where, a seed each, from CIFAR-10's weights or without."""
    return [row for row in matching(name, step=step) if bool(row["init_from"]) == pretrained]
