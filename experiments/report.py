"""The tables of README.md and docs/, made from the rows in results/: python -m experiments.report

ladder.jsonl and cue.jsonl are rows of experiments/ladder.py; properties.jsonl, collapse.jsonl and shape-bias.jsonl
those of experiments/properties.py on its runs, anytime.jsonl and anytime-cost.jsonl those of experiments/anytime.py,
leak.jsonl those of figures.py; cifar10-20-epochs.jsonl and segment.jsonl have the last row of metrics.jsonl of each run
of train.py and downstream/segment.py, camvid-multi-scale.jsonl what the latter's `eval --json` prints; where.jsonl,
transfer.jsonl and select.jsonl rows of the programs of these names there. Other NAME.jsonl are the metrics.jsonl of the
run NAME as it was left; published.jsonl has the best epoch of each of the authors' logs whose weights are published;
demo.jsonl the two runs of the README's quick start; bench_* and soak-* rows of the programs in benchmarks/.

A table stands between the marks <!-- NAME --> and <!-- end -->; PARTS says what makes it. Links to lines of code are
made here, too.
"""
import inspect
import json
import math
import re
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch

import model
from downstream.transfer import PERCENT
from downstream.transfer import RUNGS as TRANSFER_RUNGS
from experiments.ladder import RUNGS, flags_of, title_of
from experiments.properties import multiply_accumulates, singular_values_for
from model import STEPS, VisionTransformer, config
from train import parse_flags

ROOT = Path(__file__).resolve().parents[1]
CIFAR = "python train.py --data cifar10"

RUNS = {  # name: what it is, and the command that makes it again
    "shapes-tiny": ("`shapes`, iLLaMA-T, patch 8", "torchrun train.py --size tiny"),
    "cifar10-nano": ("CIFAR-10, 6 blocks 128 wide, patch 4",
                     f"{CIFAR} --size nano --depth 6 --patch-size 4 --epochs 7 --batch-size 128 --lr 2e-3 "
                     "--dtype bfloat16 --compile"),
    "cifar10-tiny": ("CIFAR-10, iLLaMA-T, patch 8",
                     f"{CIFAR} --size tiny --epochs 11 --batch-size 128 --lr 1e-3 --dtype bfloat16 --compile"),
}


LADDER = {  # rung: its formula, and where it stands
    "vit": ("x + Attn(LN(x)), then x + W₂ gelu(W₁ LN(x))", model.Block),
    "swiglu": ("W₂ (silu(W₁ x) · W₃ x)", model.SwiGLU),
    "rmsnorm": ("x / √(mean(x²) + ε) · w", model.norm),
    "causal": ("softmax(QKᵀ/√d + M), M = −∞ above the diagonal", model.Mask),
    "ps_cls": ("[patch₁ … patch_P, cls]", VisionTransformer.embed),
    "rope": ("(q₂ₖ + i q₂ₖ₊₁) · exp(i t θ^(−2k/d)) for token t, keys alike", model.rotate),
    "abs_pos": ("x + pos", VisionTransformer.embed),
    "soft_mask": ("softmax(QKᵀ/√d) ⊙ S, S = α above the diagonal, 1 elsewhere", model.Mask),
}


def ladder_table():
    lines = ["| `--step` | formula | code | parameters |", "|---|---|---|--:|"]
    for step in STEPS:
        formula, code = LADDER[step]
        source, first = inspect.getsourcelines(code)
        link = f"[`{code.__name__}`](model.py#L{first}-L{first + len(source) - 1})"
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VisionTransformer(config("tiny", step)).parameters())
        lines.append(f"| `{step}` | {formula} | {link} | {parameters:,} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


CHANGES = {rung: parse_flags(flags_of(rung).split()) for rung in RUNGS}


def rung_of(row):
    """The rung that a row is about. Rows of the ladder name it; others have the step and what differs from it."""
    size = ("width", "depth", "heads")
    changes = {name: value for name, value in row.get("overrides", {}).items() if name not in size}
    if row["step"] not in STEPS:
        return row["step"]
    other = f"{row['step']} {changes}" if changes else row["step"]
    return next((rung for rung in RUNGS if CHANGES[rung] == dict(step=row["step"]) | changes), other)


def by_rung(name, key="test_acc1", **fields):
    """{rung: {seed: its value}} of the rows with these fields; of several rows for a seed the last one counts."""
    found = {}
    for row in rows(name):
        if all(row[field] == value for field, value in fields.items()):
            found.setdefault(rung_of(row), {})[row["seed"]] = row[key]
    return found


def climbed():
    """{rung: accuracies} of the longest runs that there are of every rung, by the seeds that all rungs have; and their
    epochs."""
    for last in sorted({row["epoch"] for row in rows("ladder")}, reverse=True):
        found = by_rung("ladder", epoch=last)
        seeds = sorted(set.intersection(*(set(values) for values in found.values())))
        if found.keys() >= RUNGS.keys() and len(seeds) > 1:
            return {rung: [found[rung][seed] for seed in seeds] for rung in RUNGS}, last + 1
    raise ValueError("ladder.jsonl has no two seeds of every rung: run python -m experiments.ladder")


def quantile_of_t(degrees, fraction=0.95):
    """Within how many standard errors a fraction of Student's t distribution lies, by Fisher's expansion."""
    z = NormalDist().inv_cdf((1 + fraction) / 2)
    return (z + (z ** 3 + z) / (4 * degrees) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * degrees ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * degrees ** 3))


def standard_error(found):
    """(standard error of the difference of two rungs' means, degrees of freedom), in a design of rungs x seeds.

    A seed fixes the order of the images and their crops, and so moves all rungs together; what is left of a run when
    its rung's and its seed's means are taken out is the noise. Rungs whose class token is blind have another, or none.
    """
    runs = [values for rung, values in found.items() if rung not in ("causal", "soft_first")]
    seeds = len(runs[0])
    means = [fmean(values[seed] for values in runs) for seed in range(seeds)]
    left = [value - fmean(values) - mean + fmean(means) for values in runs for value, mean in zip(values, means)]
    degrees = (len(runs) - 1) * (seeds - 1)
    return math.sqrt(sum(x ** 2 for x in left) / degrees * 2 / seeds), degrees


def significant(changes, error, degrees, level=0.05):
    """Those of the changes {rung: difference} that are not noise, by Holm's step-down procedure: the probability that
    any of them is called so wrongly is at most `level`."""
    found = set()
    for tested, rung in enumerate(sorted(changes, key=lambda rung: -abs(changes[rung]))):
        if abs(changes[rung]) <= quantile_of_t(degrees, 1 - level / (len(changes) - tested)) * error:
            break
        found.add(rung)
    return found


def plus_minus(values, digits=1):
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def comparisons():
    """(accuracies, changes against the rungs that they are compared with, the significant ones, the test in words)."""
    found, epochs = climbed()
    changes = {rung: fmean(found[rung]) - fmean(found[row.against]) for rung, row in RUNGS.items() if row.against}
    error, degrees = standard_error(found)
    words = (f"Mean and standard deviation of {len(found['vit'])} seeds, {epochs} epochs. Bold differences are "
             f"significant: Student's t test with {degrees} degrees of\nfreedom (two-way model, rung and seed, noise estimated "
             f"without `causal` and the leak; standard error of a difference: {error:.2f}\npoints), corrected for the "
             f"{len(changes)} comparisons of both tables by Holm's procedure at 5 %. Not significant does not mean equal.")
    return found, changes, significant(changes, error, degrees), words


def change(rung, changes, beyond):
    text = f"{changes[rung]:+.1f}" if rung in changes else ""
    return f"**{text}**" if rung in beyond else text


def results_table():
    """The rungs, their variants, and what the differences mean."""
    found, changes, beyond, words = comparisons()
    lines = ["| `--step` | what it changes | CIFAR-10 top-1, here | difference | ImageNet top-1, published ¹ |",
             "|---|---|--:|--:|--:|"]
    for rung, above in zip(STEPS, ["", *STEPS]):
        row = RUNGS[rung]
        theirs = "" if row.published is None else f"{row.published}{' ²' if rung == 'soft_mask' else ''}"
        lines.append(f"| `{rung}` | {row.what} | {plus_minus(found[rung])} | {change(rung, changes, beyond)}"
                     f"{' ³' if row.against != above else ''} | {theirs} |")
    lines += ["", "| variant | what it changes | CIFAR-10 top-1, here | against | difference |",
              "|---|---|--:|---|--:|"]
    for rung in [rung for rung in RUNGS if rung not in STEPS]:
        row = RUNGS[rung]
        lines.append(f"| `{title_of(rung)}` | {row.what} | {plus_minus(found[rung])} | `{row.against}` "
                     f"| {change(rung, changes, beyond)} |")
    return "\n".join([*lines, "", words])


def collapse_table():
    lines = ["| rung | variance of a logit over images |", "|---|--:|"]
    return "\n".join(lines + [f"| `{row['step']}` | {row['logit_variance']:.2g} |" for row in rows("collapse")])


def seeds_of(name, key, step):
    return list(by_rung(name, key)[step].values())


def rank_table():
    lines = ["| block | ViT, 80 % | iLLaMA, 80 % | ViT, 90 % | iLLaMA, 90 % |", "|---|--:|--:|--:|--:|"]
    columns = [seeds_of("properties", key, step) for key in ("rank_80", "rank_90") for step in ("vit", "soft_mask")]
    for block in range(len(columns[0][0])):
        cells = [plus_minus([fmean(seed[block]) for seed in column]) for column in columns]
        lines.append(f"| {block + 1} | {' | '.join(cells)} |")
    uniform = torch.full((65, 65), 1 / 65)                               # attention that tells no token from another
    cells = [str(singular_values_for(fraction, each).item()) for fraction in (0.8, 0.9)
             for each in (uniform, uniform.tril())]
    return "\n".join([*lines, f"| uniform attention | {' | '.join(cells)} |"])


def calibration_table():
    lines = ["| | top-1 | calibration error |", "|---|--:|--:|"]
    for step, name in (("vit", "ViT"), ("soft_mask", "iLLaMA")):
        accuracy, error = (seeds_of("properties", key, step) for key in ("test_acc1", "ece"))
        lines.append(f"| {name} | {plus_minus(accuracy)} % | {plus_minus([100 * ece for ece in error])} % |")
    return "\n".join(lines)


def shape_table():
    lines = ["| rung | top-1, cues agree | shape bias, cues conflict |", "|---|--:|--:|"]
    for rung in sorted(by_rung("shape-bias"), key=list(RUNGS).index):
        accuracy, bias = (seeds_of("shape-bias", key, rung) for key in ("test_acc1", "shape_bias"))
        lines.append(f"| `{title_of(rung)}` | {plus_minus(accuracy)} % "
                     f"| {plus_minus([100 * value for value in bias])} % |")
    return "\n".join(lines)


def int8_table():
    lines = ["| | float32 | 8 bits | change | size |", "|---|--:|--:|--:|--:|"]
    for step, name in (("vit", "ViT"), ("soft_mask", "iLLaMA")):
        full, small, mb, small_mb = (seeds_of("properties", key, step)
                                     for key in ("test_acc1", "int8_acc1", "float32_mb", "int8_mb"))
        change = [b - a for a, b in zip(full, small)]
        lines.append(f"| {name} | {plus_minus(full, 2)} % | {plus_minus(small, 2)} % "
                     f"| {fmean(change):+.2f} ± {stdev(change):.2f} | {mb[0]:.2f} → {small_mb[0]:.2f} MB |")
    return "\n".join(lines)


READ = {  # name of the runs, less their seed: how they were trained
    "causal-3": "causal, whole images, 3 epochs", "prefixes-3": "causal, prefixes, 3 epochs",
    "bidirectional-3": "bidirectional, prefixes, 3 epochs", "prefixes-10": "causal, prefixes, 10 epochs"}


def read_by(name, key):
    """What each seed of such runs has."""
    return [row[key] for row in rows("anytime") if row["run"].rpartition("-")[0] == name]


def anytime_table():
    count = len(rows("anytime")[0]["acc1_by_row"])
    lines = [f"| top-1, %, after row | {' | '.join(map(str, range(1, count + 1)))} |", "|---|" + "--:|" * count]
    for name, title in READ.items():
        cells = [plus_minus(values) for values in zip(*read_by(name, "acc1_by_row"))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| early exit | all rows, top-1 | early exit, top-1 | rows read | work |", "|---|--:|--:|--:|--:|"]
    for name, title in READ.items():
        if name != "bidirectional-3":
            whole, early, read, work = (read_by(name, key) for key in ("whole_acc1", "exit_acc1", "exit_rows", "exit_work"))
            lines.append(f"| {title} | {plus_minus(whole)} % | {plus_minus(early)} % | {plus_minus(read, 2)} of {count} "
                         f"| {plus_minus(work, 2)} x |")
    return "\n".join(lines)


def reading_table():
    lines = ["| size T, an answer after each row | rows | work: cached | read again | ratio | seconds: cached | read again "
             "| ratio | one forward pass |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows("anytime-cost"):
        macs, time = row["macs"], row["time_s"]
        lines.append(f"| {row['img_size']} pixels | {row['rows']} | {macs['reader'] / 1e9:.2f} G | {macs['again'] / 1e9:.2f} G "
                     f"| {macs['again'] / macs['reader']:.1f} x | {time['reader']:.2f} | {time['again']:.2f} "
                     f"| {time['again'] / time['reader']:.1f} x | {time['once']:.2f} |")
    return "\n".join(lines)


SEGMENTED = {"rmsnorm": "ViT (`rmsnorm`)", "ps_cls": "causal (`ps_cls`)", "soft_mask": "iLLaMA (`soft_mask`)"}


def segmented(name, step, pretrained):
    """The rows of downstream.segment or downstream.where of a rung, a seed each, from CIFAR-10's weights or without."""
    return [row for row in rows(name) if row["step"] == step and bool(row["init_from"]) == pretrained]


def segment_table():
    lines = ["| CamVid, validation | from scratch: mIoU | pixel accuracy | from CIFAR-10 weights: mIoU | pixel accuracy |",
             "|---|--:|--:|--:|--:|"]
    for step, title in SEGMENTED.items():
        cells = [f"{plus_minus([row[key] for row in segmented('segment', step, pretrained)])} %"
                 for pretrained in (False, True) for key in ("test_miou", "test_pixel_acc")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


def camvid_table():
    lines = [f"| IoU, % | mean | {' | '.join(CAMVID)} |", "|---|" + "--:|" * (1 + len(CAMVID))]
    for views, row in (("single scale", rows("camvid")[-1]), ("six scales, flips", rows("camvid-multi-scale")[0])):
        lines.append(f"| {views} | **{row['test_miou']:.1f}** | {' | '.join(f'{iou:.0f}' for iou in row['test_iou'])} |")
    return "\n".join(lines)


STARTS = {"scratch": "from scratch", "fine-tuning": "fine-tuned", "probe": "linear probe"}
TRANSFERRED = {step: SEGMENTED[step] for step in TRANSFER_RUNGS}


def transferred(start, step, percent):
    """Top-1 of each seed's run of downstream.transfer."""
    found = {row["seed"]: row["test_acc1"] for row in rows("transfer")
             if (row["start"], row["step"], row.get("percent")) == (start, step, percent)}
    return [found[seed] for seed in sorted(found)]


def transfer_table():
    images = [f"{250 * percent:,}" for percent in PERCENT]                                     # of 25,000
    lines = [f"| labelled images | {' | '.join(images)} |", "|---|" + "--:|" * len(images)]
    for step, model_title in TRANSFERRED.items():
        for start, what in STARTS.items():
            cells = [f"{plus_minus(transferred(start, step, percent))} %" for percent in PERCENT]
            lines.append(f"| {model_title}, {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selected(start):
    """Top-1 after each epoch, of each seed's run of downstream.select."""
    return [row["acc1_by_epoch"] for row in sorted(rows("select"), key=lambda row: row["seed"]) if row["start"] == start]


def select_table():
    epochs = range(1, 1 + len(selected("random")[0]))
    lines = [f"| start | {' | '.join(f'epoch {epoch}' for epoch in epochs)} |", "|---|" + "--:|" * len(epochs)]
    for start, what in (("random", "random weights"), ("uniform", "`--select uniform`"), ("aligned", "`--select aligned`")):
        lines.append(f"| {what} | {' | '.join(f'{plus_minus(values)} %' for values in zip(*selected(start)))} |")
    return "\n".join(lines)


def macs_table():
    lines = ["| multiply-accumulates | as the authors count | as run | causal at best |", "|---|--:|--:|--:|"]
    for size in ("tiny", "small", "base", "large"):
        for img_size in (224, 384, 512):
            macs = multiply_accumulates(config(size, img_size=img_size, mask="causal"))
            cells = [f"{count / 1e9:.4f} G" for count in macs.values()]
            lines.append(f"| {size}, {img_size} pixels | {' | '.join(cells)} |")
    lines += ["", "| size T, float32, compiled, batch 1 | training, bidirectional | `causal` | inference, bidirectional "
              "| `causal` | activation memory of `causal` |", "|---|--:|--:|--:|--:|--:|"]
    for img_size in (224, 512, 1024):
        found = {(row["model"], row["training"]): row for row in rows("bench_model/mask") if row["img_size"] == img_size}
        cells = []
        for training in (True, False):
            rates = [found[name, training]["images_per_s"] for name in ("bidirectional", "causal")]
            cells += [f"{rates[0]:.2f} images/s", f"{rates[1] / rates[0]:.2f} x"]
        lines.append(f"| {(img_size // 16) ** 2 + 1:,} tokens ({img_size} pixels) | {' | '.join(cells)} "
                     f"| {found['causal', True]['saved_mb']:,.0f} MB |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


NAMES = {"timm vit": "timm 0.5.4's ViT-T", "vit": "our ViT-T", "torchvision base": "torchvision's vit_b_16",
         "soft base": "iLLaMA-B, mask `soft`", "soft recompute": "iLLaMA-T, mask `soft`, `--recompute`"}
COLUMNS = [("float32", False), ("float32", True)]


def measured(run):
    """The rows of one run of bench_model.py: {(model, dtype, compiled, img_size, batch_size): row}."""
    return {tuple(row[key] for key in ("model", "dtype", "compiled", "img_size", "batch_size")): row
            for row in rows(f"bench_model/{run}")}


def title(name):
    return NAMES.get(name, f"iLLaMA-T, mask `{name}`")


def ratios(heading, run, names, *inputs):
    """A table of images/s: that of the first of the names, and the others' as multiples of it."""
    found = measured(run)
    titles = [f"{dtype}, {'compiled' if compiled else 'eager'}" for dtype, compiled in COLUMNS]
    lines = [f"| {heading} | {' | '.join(titles)} |", "|---|--:|--:|"]
    for name in names:
        pairs = [[found[(model, *column, *inputs)]["images_per_s"] for model in (name, names[0])] for column in COLUMNS]
        cells = [f"{rate:.1f} images/s" if name == names[0] else f"{rate / peer:.2f} x" for rate, peer in pairs]
        lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    return lines


def speed_table():
    tiny = ["timm vit", "vit", "causal", "soft", "soft_log"]
    lines = [*ratios("training step, 224 pixels, batch 16", "training", [*tiny, "soft recompute"], 224, 16), "",
             *ratios("inference, 224 pixels, batch 16", "inference", tiny, 224, 16), "",
             *ratios("training step, 224 pixels, batch 4", "base", ["torchvision base", "soft base"], 224, 4)]
    soft, macs = measured("training")["soft", "float32", True, 224, 16], multiply_accumulates(config("tiny"))
    peak = soft["peak"] * macs["as_run"] / macs["published"]             # the rows count the paper's dense model
    theirs, ours = rows("bench_data")
    return "\n".join([
        *lines, "", f"Compiled in float32, iLLaMA-T trains at {peak:.0%} of the machine's peak matmul throughput "
        f"({soft['matmul_gflops']} GFLOP/s), counting what is computed.", "",
        "From a JPEG file to a training image at resolution 224 with the published augmentation:",
        f"{ours['images_per_s']} images/s on one core, {theirs['images_per_s']} with timm's pipeline: "
        f"{ours['ratio']:.2f} times as many."])


def memory_table():
    lines = ["| activation memory (saved for backward), float32 | 224 pixels, batch 16, eager | compiled | 384 pixels, batch 8, eager "
             "| compiled |", "|---|--:|--:|--:|--:|"]
    for name in ("timm vit", "vit", "causal", "soft_log", "soft", "soft recompute"):
        saved = [measured(run)[(name, "float32", compiled, *inputs)]["saved_mb"]
                 for run, inputs in (("training", (224, 16)), ("training-384", (384, 8))) for compiled in (False, True)]
        lines.append(f"| {title(name)} | " + " | ".join(f"{mb:,.0f} MB" for mb in saved) + " |")
    return "\n".join(lines)


def growth_table():
    lines = ["| iLLaMA-T, training, float32, compiled | images/s, mask `soft` | `causal` | timm's ViT-T "
             "| activation memory per image, `soft` | `causal` | timm's |", "|---|--:|--:|--:|--:|--:|--:|"]
    for img_size in (224, 384, 512):
        found = [measured("tokens")[name, "float32", True, img_size, 4] for name in ("soft", "causal", "timm vit")]
        lines.append(f"| {(img_size // 16) ** 2 + 1} tokens ({img_size} pixels), batch 4 | "
                     + " | ".join(f"{row['images_per_s']:.1f}" for row in found) + " | "
                     + " | ".join(f"{row['saved_mb'] / 4:.0f} MB" for row in found) + " |")
    for row in rows("bench_model/batch") + rows("bench_model/ranks"):
        batch = row["batch_size"]
        if row["ranks"] > 1:
            batch = f"{row['ranks']} x {batch} on 2 ranks, a core each"
        lines.append(f"| 197 tokens, batch {batch} ¹ | {row['images_per_s']:.1f} | | "
                     f"| {row['saved_mb'] / row['batch_size']:.0f} MB | | |")
    return "\n".join(lines)


def files_table():
    lines = ["A data-loading worker shares the main process's memory until one of them writes to it. Its private memory, in MB,",
             "while it reads a folder of a million images:", "",
             "| file list | start-up | at the first batch | after 140 s |", "|---|--:|--:|--:|"]
    for name, what in (("torchvision", "torchvision's ImageFolder: a list of tuples"), ("ours", "here: arrays")):
        start, *looks = [row for row in rows("bench_files") if row["contender"] == name and row["files"] == 1_000_000]
        first, last = (max(look["private_mb"]) for look in (looks[0], looks[-1]))
        lines.append(f"| {what} | {start['startup_s']:.1f} s | {first:.0f} | {last:.0f} |")
    return "\n".join(lines)


def soak_table():
    lines = ["Two ranks with four data-loading workers each, and as many for evaluation, over 20 minutes: private memory of a",
             "process, in MB, and its open files.", "",
             "| data | process | minute 2 | minute 10 | minute 20 | open files |", "|---|---|--:|--:|--:|--:|"]
    for data in ("shapes", "photos"):
        looks = rows(f"soak-{data}")
        looks = [min(looks, key=lambda row: abs(row["minute"] - minute)) for minute in (2, 10, 20)]
        for kind, part in (("ranks", slice(0, 2)), ("workers", slice(2, None))):
            own = [row["own_mb"][part] for row in looks]
            files = [max(row["open_files"][part]) for row in looks]
            lines.append(f"| {data} | {kind} | " + " | ".join(f"{min(mb):.0f} to {max(mb):.0f}" for mb in own)
                         + f" | at most {', '.join(map(str, files))} |")
    return "\n".join(lines)


def published_table():
    lines = ["| weights | parameters | epoch | top-1 | top-5 | loss |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows("published"):
        lines.append(f"| `{row['weights']}` | {row['n_parameters']:,} | {row['epoch']} | {row['published_acc1']:.3f} % "
                     f"| {row['published_acc5']:.3f} % | {row['published_loss']:.4f} |")
    return "\n".join(lines)


def rows(name):
    return [json.loads(line) for line in (ROOT / "results" / f"{name}.jsonl").read_text().splitlines()]


def runs_table():
    lines = ["| run | parameters | epochs | minutes | top-1 |", "|---|--:|--:|--:|--:|"]
    for name, (title, _) in RUNS.items():
        last = rows(name)[-1]
        lines.append(f"| {title} | {last['n_parameters']:,} | {last['epoch'] + 1} | {last['time_s'] / 60:.1f} "
                     f"| {last['test_acc1']:.1f} % |")
    return "\n".join([*lines, "", "```bash", *(command for _, command in RUNS.values()), "```"])


def longer(step):
    """Top-1 of each seed's run of 20 epochs."""
    return [row["test_acc1"] for row in sorted(rows("cifar10-20-epochs"), key=lambda row: row["seed"]) if row["step"] == step]


def longer_costs():
    """What the causal mask costs in 20 epochs, seed by seed, points of top-1."""
    return [one - other for one, other in zip(longer("rmsnorm"), longer("ps_cls"), strict=True)]


def longer_table():
    return "\n".join(["| CIFAR-10, 96 wide, 4 blocks, patch 8 | 20 epochs: top-1 |", "|---|--:|",
                      *(f"| {SEGMENTED[step]} | {plus_minus(longer(step))} % |" for step in ("rmsnorm", "ps_cls")),
                      "", f"Mean ± standard deviation of {len(longer_costs())} seeds; seed by seed, the mask costs {plus_minus(longer_costs())} points."])


def last_of(name):
    """(top-1 in %, minutes) of a run."""
    return rows(name)[-1]["test_acc1"], rows(name)[-1]["time_s"] / 60


def proved():
    (shapes, minutes), (cifar, more) = last_of("shapes-tiny"), last_of("cifar10-nano")
    return f"""Equality with the published code is tested: logits within 1e-4 on every rung of size T and for iLLaMA-S, parameter counts
to the digit for all sizes, learning rates and alphas, sampled from each of the ten published logs, to 1e-9. On two CPU cores iLLaMA-T
reaches {shapes:.1f} % on the built-in shapes after {minutes:.0f} minutes, and a smaller model {cifar:.1f} % on CIFAR-10 after {more:.0f}. The
published models reach 75.0 % (5.7M parameters) to 86.0 % (310M) on ImageNet: that takes GPUs and was not run here."""


def claims_table():
    found, changes, beyond, _ = comparisons()

    def published(rung):
        return f"{RUNGS[rung].published - RUNGS[RUNGS[rung].against].published:+.1f} points"

    def points(rung):
        return f"{changes[rung]:+.1f} points" + ("" if rung in beyond else ", not significant")

    def both(key, value=lambda seed: seed):
        return [fmean(map(value, seeds_of("properties", key, step))) for step in ("vit", "soft_mask")]
    ranks = both("rank_90", lambda seed: fmean(fmean(heads) for heads in seed))
    errors, full, small = both("ece", lambda ece: 100 * ece), both("test_acc1"), both("int8_acc1")
    miou = [fmean(row["test_miou"] for row in segmented("segment", step, True)) for step in SEGMENTED]
    gains = [fmean(transferred("fine-tuning", step, percent)) - fmean(transferred("scratch", step, percent))
             for percent in (1, 100) for step in TRANSFERRED]
    starts = {start: [fmean(values) for values in zip(*selected(start))] for start in ("random", "uniform", "aligned")}
    ahead = [starts[start][epoch] - starts["random"][epoch] for epoch in (0, -1) for start in ("uniform", "aligned")]
    bias = [100 * fmean(seeds_of("shape-bias", "shape_bias", rung))
            for rung in ("rmsnorm", "ps_cls", "rope_alone", "rope")]
    claims = [
        ("A causal mask with the class token first collapses", "training fails",
         f"{fmean(found['causal']):.1f} %, chance, with every seed; all images get the same logits", "**reproduced**"),
        ("A post-sequence class token cures it", f"{RUNGS['ps_cls'].published} %", f"{fmean(found['ps_cls']):.1f} %", "**reproduced**"),
        ("SwiGLU improves ViT", published("swiglu"), points("swiglu"), "**reproduced**, and larger after few epochs"),
        ("RMSNorm improves it further", published("rmsnorm"), points("rmsnorm"), "not observed at this scale"),
        ("The causal mask costs accuracy", published("ps_cls"),
         f"{points('ps_cls')}, after 3 epochs; {-fmean(longer_costs()):+.1f} after 20", "observed after 20 epochs, and smaller"),
        ("The soft mask improves accuracy", "+0.5 points ⁴", points("soft_mask"), "not observed at this scale"),
        ("Causal attention maps have a higher rank", "in most heads",
         f"{ranks[0]:.0f} singular values for 90 % in ViT, {ranks[1]:.0f} in iLLaMA",
         "observed, but the mask alone does that"),
        ("Its confidence is calibrated", "no figure released", f"error {errors[0]:.1f} % and {errors[1]:.1f} %",
         "no difference to ViT beyond the seeds' spread"),
        ("It relies more on shape than ViT", "no figure released",
         f"shape bias {bias[0]:.0f} % with `rmsnorm`, {bias[1]:.0f} % with the causal mask, {bias[2]:.0f} % with RoPE, "
         f"{bias[3]:.0f} % with both", "**reproduced**, most of it by RoPE"),
        ("It is compatible with 8-bit quantization", "no figure released",
         f"{small[0] - full[0]:+.1f} and {small[1] - full[1]:+.1f} points after training", "**reproduced**, for both"),
        ("It transfers to segmentation", "no figure released",
         f"CamVid, from CIFAR-10 weights: mIoU {miou[0]:.1f} % with `rmsnorm`, {miou[1]:.1f} % with the causal mask, {miou[2]:.1f} % in iLLaMA",
         "**reproduced**; the mask alone costs"),
        ("It transfers to other classes", "no figure released",
         f"pretraining on other classes gains {gains[0]:.1f} points in ViT and {gains[1]:.1f} in iLLaMA with 250 labelled images, "
         f"{gains[2]:.1f} and {gains[3]:.1f} with 25,000", "**reproduced**, for both"),
        ("It can start from a larger model's weights", "no figure released",
         f"{ahead[0]:+.1f} points over random weights after an epoch, {ahead[2]:+.1f} after three; by whole heads "
         f"{ahead[1]:+.1f} and {ahead[3]:+.1f}", "**reproduced**, by either rule"),
    ]
    return "\n".join(["| claim | published | measured here | verdict |", "|---|---|---|---|",
                      *(f"| {' | '.join(claim)} |" for claim in claims)])


PARTS = dict(
    proved=proved, ladder=ladder_table, results=results_table, claims=claims_table,
    collapse=collapse_table, rank=rank_table, calibration=calibration_table, shape=shape_table, int8=int8_table,
    macs=macs_table, runs=runs_table, published=published_table, speed=speed_table, memory=memory_table,
    growth=growth_table, longer=longer_table, anytime=anytime_table, reading=reading_table, soak=soak_table, files=files_table,
    segment=segment_table, camvid=camvid_table, transfer=transfer_table, select=select_table)
PAGES = ("README.md", "docs/properties.md", "docs/downstream.md", "docs/training.md", "docs/speed.md")


def written(text):
    """A page with each part between two marks made anew."""
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text()))
