"""The tables of README.md and docs/, made from the rows in results/: python -m experiments.report

A table stands between the marks <!-- NAME --> and <!-- end -->, and PARTS says what makes it. The text around it is
written by hand.
"""
import inspect
import re
from statistics import fmean, stdev

import torch

import model
from experiments.ladder import VARIANTS, title_of
from experiments.paper import paper_table
from experiments.properties import multiply_accumulates, singular_values_for
from experiments.results import (MODELS, READ, ROOT, RUNS, SEGMENTED, STARTS, TRANSFERRED, by_step, climbed,
                                 comparisons, means, measured, percent, plus_minus, read_by, rows, seeds_of, segmented,
                                 selected, table, transferred)
from experiments.transfer import PERCENT
from model import VisionTransformer, config


# ---------------------------------------------------------------------------------------------------------------------
# The ladder


LADDER = {  # step: its formula, and where it stands
    "vit": ("x + Attn(LN(x)), then x + W₂ gelu(W₁ LN(x))", model.Block),
    "swiglu": ("W₂ (silu(W₁ x) · W₃ x)", model.SwiGLU),
    "rmsnorm": ("x / √(mean(x²) + ε) · w", model.norm),
    "causal": ("softmax(QKᵀ/√d + M), M = −∞ above the diagonal", VisionTransformer.mask),
    "ps_cls": ("[patch₁ … patch_P, cls]", VisionTransformer.embed),
    "rope": ("(q₂ₖ + i q₂ₖ₊₁) · exp(i t θ^(−2k/d)) for token t, keys alike", model.rotate),
    "abs_pos": ("x + pos", VisionTransformer.embed),
    "soft_mask": ("softmax(QKᵀ/√d) ⊙ S, S = α above the diagonal, 1 elsewhere", VisionTransformer.mask),
}


def ladder_table():
    body = []
    for step, (formula, code) in LADDER.items():
        source, first = inspect.getsourcelines(code)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VisionTransformer(config("tiny", step)).parameters())
        body.append([f"`{step}`", formula, f"[`{code.__name__}`](model.py#L{first}-L{first + len(source) - 1})",
                     f"{parameters:,}"])
    return table("`--step` | formula | code | parameters", body, left=3)


CODE = {  # files and folders: what they hold, in the order in which they are read
    "model.py": "the architecture: `Config` and `STEPS`, then the parts with their formulas, then the model",
    "train.py": "recipes and their sources, schedules, one loop (`main`)",
    "data.py": "data sets, transforms, the order of images, the loader",
    "eval.py": "accuracy of a checkpoint, the classes of one image",
    "test_model.py": "the architecture's specification, a property per test",
    "harness/": "not needed: command line, processes, checkpoints, a run's folder, image files",
    "synthetic/": "the drawn data sets",
    "downstream/": "with a trained model: segmentation, a smaller model's start",
    "experiments/": "the paper's claims measured again; comparisons of many runs",
    "benchmarks/": "speed and memory beside timm and torchvision",
}


def code_table():
    body = []
    for name, what in CODE.items():
        path = ROOT / name
        lines = "" if path.is_dir() else str(len(path.read_text().splitlines()))
        body.append([f"[{name}]({name.rstrip('/')})", what, lines])
    return table("in this order | what it holds | lines", body, left=2)


def or_nothing(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def results_table():
    found, losses = climbed()[0], climbed("train_loss")[0]
    changes, with_vit, without_vit = comparisons()
    body = []
    for step, row in VARIANTS.items():
        change = f"{changes[step]:+.1f}" if step in changes else ""
        change = f"**{change}**" if step in with_vit else f"*{change}*" if step in without_vit else change
        body.append([f"`{title_of(step)}`", row.what, f"`{row.against}`" if row.against else "", plus_minus(found[step]),
                     change, f"{fmean(losses[step]):.3f}", or_nothing(row.published, 1), or_nothing(row.published_loss, 3),
                     or_nothing(row.published_base, 1), or_nothing(row.published_base_loss, 3)])
    return table("`--step` | what it changes | against | top-1, % | difference | train loss | paper ¹, T: top-1 | train loss "
                 "| B: top-1 | train loss", body, left=3)


def published_table():
    return table("weights | parameters | epoch | top-1 | top-5 | loss", [
        [f"`{row['weights']}`", f"{row['n_parameters']:,}", str(row["epoch"]), f"{row['published_acc1']:.3f} %",
         f"{row['published_acc5']:.3f} %", f"{row['published_loss']:.4f}"] for row in rows("published")])


# ---------------------------------------------------------------------------------------------------------------------
# Properties


def collapse_table():
    return table("step | variance of a logit over images",
                 [[f"`{row['step']}`", f"{row['logit_variance']:.2g}"] for row in rows("collapse")])


def rank_table():
    columns = [seeds_of("properties", key, step) for key in ("rank_80", "rank_90") for step in MODELS]
    return table("block | ViT, 80 % | iLLaMA, 80 % | ViT, 90 % | iLLaMA, 90 %", [
        *([str(block + 1), *([fmean(seed[block]) for seed in column] for column in columns)] for block in range(4)),
        ["mean", *(means([fmean(map(fmean, seed)) for seed in column]) for column in columns)]])


def uniform_table():
    """How many singular values attention needs that tells no token from another."""
    body = [["no mask"], ["causal, rows sum to 1"], ["`soft` at alpha 0, rows sum to less"]]
    for tokens in (65, 197):
        full = torch.full((tokens, tokens), 1 / tokens)
        soft = full.tril()
        for row, maps in zip(body, (full, soft / soft.sum(1, keepdim=True), soft)):
            row += [str(singular_values_for(fraction, maps).item()) for fraction in (0.8, 0.9)]
    return table("uniform attention | 65 tokens, 80 % | 90 % | 197 tokens, 80 % | 90 %", body)


def calibration_table():
    return table("model | top-1, % | calibration error, %", [
        [name, seeds_of("properties", "test_acc1", step), percent(seeds_of("properties", "ece", step))]
        for step, name in MODELS.items()])


def shape_table():
    body, conflicts = [], rows("shape-bias")[0]["conflicts"]
    for step in sorted(by_step("shape-bias"), key=list(VARIANTS).index):
        accuracy, bias, decided = (seeds_of("shape-bias", key, step) for key in ("test_acc1", "shape_bias", "decided"))
        body.append([f"`{title_of(step)}`", accuracy, percent(bias), percent([conflicts - count for count in decided], conflicts)])
    return table("step | cues agree: top-1, % | cues conflict: shape bias, % | neither cue, %", body)


def int8_table():
    body = []
    for step, name in MODELS.items():
        full, small, mb, small_mb = (seeds_of("properties", key, step)
                                     for key in ("test_acc1", "int8_acc1", "float32_mb", "int8_mb"))
        change = [b - a for a, b in zip(full, small)]
        body.append([name, plus_minus(full, 2), plus_minus(small, 2), f"{fmean(change):+.2f} ± {stdev(change):.2f}",
                     f"{mb[0]:.2f} → {small_mb[0]:.2f} MB"])
    return table("model | float32: top-1, % | 8 bits | change | size", body)


def anytime_table():
    return table(f"top-1, %, after row | {' | '.join(map(str, range(1, 9)))}",
                 [[title, *zip(*read_by(name, "acc1_by_row"))] for name, title in READ.items()])


def reading_table():
    body = []
    for row in rows("anytime-cost"):
        macs, time = row["macs"], row["time_s"]
        body.append([f"{row['img_size']} pixels", str(row["rows"]), f"{macs['reader'] / 1e9:.2f} G",
                     f"{macs['again'] / 1e9:.2f} G", f"{macs['again'] / macs['reader']:.1f} x", f"{time['reader']:.2f}",
                     f"{time['again']:.2f}", f"{time['again'] / time['reader']:.1f} x", f"{time['once']:.2f}"])
    return table("size T, an answer after each row | rows | work: cached | read again | ratio | seconds: cached | read again "
                 "| ratio | one forward pass", body)


# ---------------------------------------------------------------------------------------------------------------------
# Longer runs and other tasks


def runs_table():
    last = {title: rows(name)[-1] for name, (title, _) in RUNS.items()}
    return table("run | parameters | epochs | minutes | top-1, %", [
        [title, f"{row['n_parameters']:,}", str(row["epoch"] + 1), f"{row['time_s'] / 60:.1f}", f"{row['test_acc1']:.1f}"]
        for title, row in last.items()])


def longer_table():
    return table("CIFAR-10, 96 wide, 4 blocks, patch 8, 20 epochs | top-1, % | training loss", [
        [SEGMENTED[step], seeds_of("cifar10-20-epochs", "test_acc1", step),
         plus_minus(seeds_of("cifar10-20-epochs", "train_loss", step), 3)] for step in ("rmsnorm", "ps_cls")])


def segment_table():
    return table("CamVid, validation, % | from scratch: mIoU | pixel accuracy | from CIFAR-10 weights: mIoU | pixel accuracy", [
        [title, *([row[key] for row in segmented("segment", step, pretrained)]
                  for pretrained in (False, True) for key in ("test_miou", "test_pixel_acc"))]
        for step, title in SEGMENTED.items()])


CAMVID = "sky | building | pole | road | pavement | tree | sign | fence | car | pedestrian | bicyclist"


def classes_table():
    body = []
    for step, title in SEGMENTED.items():
        seeds = [row["test_iou"] for row in segmented("segment", step, True)]
        body.append([title, *(means(ious) for ious in zip(*seeds))])
    return table(f"IoU, %, from CIFAR-10 weights | {CAMVID}", body)


def camvid_table():
    views = {"single scale": rows("camvid")[-1], "six scales, flips": rows("camvid-multi-scale")[0]}
    return table(f"IoU, % | mean | {CAMVID}", [
        [name, f"**{row['test_miou']:.1f}**", *(f"{iou:.0f}" for iou in row["test_iou"])] for name, row in views.items()])


def transfer_table():
    images = " | ".join(f"{250 * part:,}" for part in PERCENT)                                 # of 25,000
    return table(f"top-1, %, by labelled images | {images}", [
        [f"{title}, {what}", *(transferred(start, step, part) for part in PERCENT)]
        for step, title in TRANSFERRED.items() for start, what in STARTS.items()])


def select_table():
    starts = {"random": "random weights", "uniform": "`--rule uniform`", "aligned": "`--rule aligned`"}
    return table("start: top-1, % | epoch 1 | epoch 2 | epoch 3",
                 [[what, *zip(*selected(start))] for start, what in starts.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


NAMES = {"timm vit": "timm 0.5.4's ViT-T", "vit": "our ViT-T", "torchvision base": "torchvision's vit_b_16",
         "soft base": "iLLaMA-B, mask `soft`", "soft recompute": "iLLaMA-T, mask `soft`, `--recompute`"}


def title(name):
    return NAMES.get(name, f"iLLaMA-T, mask `{name}`")


def ratios(heading, run, names, batch_size):
    """A table of images/s: that of the first of the names, and the others' as multiples of it."""
    found = measured(run)
    columns = list(dict.fromkeys((dtype, compiled) for _, dtype, compiled, _, _ in found))
    body = []
    for name in names:
        cells = []
        for column in columns:
            rate, peer = (found[each, *column, 224, batch_size]["images_per_s"] for each in (name, names[0]))
            cells.append(f"{rate:.1f} images/s" if name == names[0] else f"{rate / peer:.2f} x")
        body.append([title(name), *cells])
    titles = " | ".join(f"{dtype}, {'compiled' if compiled else 'eager'}" for dtype, compiled in columns)
    return table(f"{heading} | {titles}", body)


def speed_table():
    tiny = ["timm vit", "vit", "causal", "soft", "soft_log"]
    return "\n\n".join([
        ratios("training step, 224 pixels, batch 16", "training", [*tiny, "soft recompute"], 16),
        ratios("inference, 224 pixels, batch 16", "inference", tiny, 16),
        ratios("training step, 224 pixels, batch 4", "base", ["torchvision base", "soft base"], 4)])


def memory_table():
    body = []
    for name in ("timm vit", "vit", "causal", "soft_log", "soft", "soft recompute"):
        saved = [measured(run)[name, "float32", compiled, *inputs]["saved_mb"]
                 for run, inputs in (("training", (224, 16)), ("training-384", (384, 8))) for compiled in (False, True)]
        body.append([title(name), *(f"{mb:,.0f} MB" for mb in saved)])
    return table("activation memory (saved for backward), float32 | 224 pixels, batch 16, eager | compiled "
                 "| 384 pixels, batch 8, eager | compiled", body)


def growth_table():
    body = []
    for img_size in (224, 384, 512):
        found = [measured("tokens")[name, "float32", True, img_size, 4] for name in ("soft", "causal", "timm vit")]
        body.append([f"{(img_size // 16) ** 2 + 1} tokens ({img_size} pixels), batch 4",
                     *(f"{row['images_per_s']:.1f}" for row in found), *(f"{row['saved_mb'] / 4:.0f} MB" for row in found)])
    for row in rows("bench_model/batch") + rows("bench_model/ranks"):
        batch = row["batch_size"] if row["ranks"] == 1 else f"{row['ranks']} x {row['batch_size']} on 2 ranks, a core each"
        body.append([f"197 tokens, batch {batch} ¹", f"{row['images_per_s']:.1f}", "", "",
                     f"{row['saved_mb'] / row['batch_size']:.0f} MB", "", ""])
    return table("iLLaMA-T, training, float32, compiled | images/s, mask `soft` | `causal` | timm's ViT-T "
                 "| activation memory per image, `soft` | `causal` | timm's", body)


def macs_table():
    body = []
    for size in ("tiny", "small", "base", "large"):
        for img_size in (224, 384, 512):
            macs = multiply_accumulates(config(size, img_size=img_size, mask="causal"))
            body.append([f"{size}, {img_size} pixels", *(f"{count / 1e9:.4f} G" for count in macs.values())])
    return table("multiply-accumulates | as the authors count | as run | causal at best", body)


def mask_table():
    body = []
    for img_size in (224, 512, 1024):
        found = {(row["model"], row["training"]): row for row in rows("bench_model/mask") if row["img_size"] == img_size}
        cells = []
        for training in (True, False):
            full, causal = (found[name, training]["images_per_s"] for name in ("bidirectional", "causal"))
            cells += [f"{full:.2f} images/s", f"{causal / full:.2f} x"]
        body.append([f"{(img_size // 16) ** 2 + 1:,} tokens ({img_size} pixels)", *cells,
                     f"{found['causal', True]['saved_mb']:,.0f} MB"])
    return table("size T, float32, compiled, batch 1 | training, bidirectional | `causal` | inference, bidirectional "
                 "| `causal` | activation memory of `causal`", body)


PARTS = dict(
    code=code_table, ladder=ladder_table, results=results_table, paper=paper_table, published=published_table, collapse=collapse_table,
    rank=rank_table, uniform=uniform_table, calibration=calibration_table, shape=shape_table, int8=int8_table,
    anytime=anytime_table, reading=reading_table, runs=runs_table, longer=longer_table,
    segment=segment_table, classes=classes_table, camvid=camvid_table, transfer=transfer_table, select=select_table,
    speed=speed_table, memory=memory_table, growth=growth_table, macs=macs_table,
    mask=mask_table)
PAGES = ("README.md", "docs/paper.md", "docs/properties.md", "docs/downstream.md", "docs/training.md", "docs/speed.md")


def written(text):
    """A page with each part between two marks made anew."""
    return re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text()))
