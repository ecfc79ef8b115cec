"""The tables of README.md and the pages, made from the rows in results/: python -m replication.report

A table stands between the marks <!-- NAME --> and <!-- end -->, and PARTS says what makes it. All other text, and the
tables without marks, are written by hand.
"""
import re
from functools import partial
from statistics import fmean, stdev

import torch

from model import SIZES, VisionTransformer, config
from replication.ladder import PUBLISHED, VARIANTS, title_of
from replication.properties import OFFSETS, multiply_accumulates, singular_values_for
from replication.rows import (EPOCHS, MODELS, READ, ROOT, RUNS, SEGMENTED, STARTS, TRANSFERRED, by_step,
                                 comparisons, interval, ladder, matching, read_by, rows, seeds_of, segmented, shared,
                                 significant)
from replication.transfer import PERCENT
from train import RECIPES


def plus_minus(values, digits=1):
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def means(*columns, digits=1):
    """The mean of each column: a number of each seed, in a list, or {seed: number} on the seeds that all have."""
    if isinstance(columns[0], dict):
        columns = [[column[seed] for seed in shared(*columns)] for column in columns]
    return " / ".join(f"{fmean(seeds):.{digits}f}" for seeds in columns)


def percent(values, whole=1):
    return [100 * value / whole for value in values]


def cell(value):
    """Text as it is; a number of each seed, in a list or {seed: number}, as mean ± standard deviation."""
    if isinstance(value, str):
        return value
    return plus_minus(list(value.values()) if isinstance(value, dict) else value)


def table(head, body, left=1):
    """A table in Markdown. `head` names its columns; all but the first `left` ones hold numbers."""
    columns = head.split(" | ")
    rule = ["---"] * left + ["--:"] * (len(columns) - left)
    return "\n".join([f"| {head} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(map(cell, row))} |" for row in body)])


# ---------------------------------------------------------------------------------------------------------------------
# The ladder and the paper


def results_table():
    found, losses = ladder(), ladder("train_loss")
    beyond_chance = significant({step: chance for step, (_, _, chance) in comparisons().items()})
    body = []
    for step, row in VARIANTS.items():
        difference, seeds = "", str(len(found[step]))
        if row.against:
            difference = interval(found[step], found[row.against]) + (" *" if step in beyond_chance else "")
            pairs = len(shared(found[step], found[row.against]))
            seeds += f" ({pairs})" if pairs < len(found[step]) else ""
        published = [(row.published, 1), (row.published_loss, 3), (row.published_base, 1), (row.published_base_loss, 3)]
        body.append([f"`{title_of(step)}`", row.what, f"`{row.against}`" if row.against else "", seeds, found[step],
                     difference, f"{fmean(losses[step].values()):.3f}",
                     *("" if value is None else f"{value:.{digits}f}" for value, digits in published)])
    return table("`--step` | what it changes | against | seeds | top-1, % | difference [95 %] | train loss "
                 "| paper ¹, T: top-1 | train loss | B: top-1 | train loss", body, left=3)


def published_table():
    return table("weights | parameters | epoch | top-1 | top-5 | loss", [
        [f"`{row['weights']}`", f"{row['n_parameters']:,}", str(row["epoch"]), f"{row['published_acc1']:.3f} %",
         f"{row['published_acc5']:.3f} %", f"{row['published_loss']:.4f}"] for row in rows("published")])


def paper_table():
    """The paper's figures from results/published-tables.jsonl, and ours beside them."""
    top1, train, test = (ladder(key) for key in ("test_acc1", "train_loss", "test_loss"))
    with torch.device("meta"):
        models = [VisionTransformer(config(size)) for size in ("tiny", "small", "base", "large")]
    parameters = [[sum(p.numel() for p in each.parameters()) / 1e6] for each in models]
    macs = [[multiply_accumulates(each.cfg)["published"] / 1e9] for each in models]
    bits = [seeds_of("quantize", "test_acc1", "soft_mask", epoch=EPOCHS - 1, bits=bits) for bits in (32, 8)]
    ece = [seeds_of("properties", "ece", step) for step in MODELS]
    shape = [percent(seeds_of("shape-bias", "shape_bias", step)) for step in MODELS]
    rank = [[fmean(seed[0]) for seed in seeds_of("properties", "rank_80", step)] for step in MODELS]
    tuned = ("rmsnorm", "fine-tuning"), ("soft_mask", "fine-tuning-0"), ("soft_mask", "fine-tuning")
    cifar10 = [seeds_of("transfer-tiny", "test_acc1", step, start=start) for step, start in tuned]
    miou = [[row["test_miou"] for row in segmented("segment", step, True)] for step in ("rmsnorm", "soft_mask")]
    starts = [seeds_of("select", "test_acc1", "soft_mask", start=start) for start in ("uniform", "random")]
    masks, schedules = ["no soft mask", "soft mask"], ["no soft mask", "linear 50", "constant 50"]
    sizes, others = ["iLLaMA-T", "iLLaMA-S", "iLLaMA-B", "iLLaMA-L, IN-21K"], ["ConvNeXt-B", "DeiT3-B", "iLLaMA-B"]
    lines = [  # where in the paper; what; the column there, its rows; ours, with how many digits
        ("Table 3", "top-1 without soft mask / linear / constant, T", "tiny", schedules,
         [top1["abs_pos"], top1["soft_mask"], top1["soft_constant"]], 1),
        ("Table 4", "training loss without / with soft mask, T", "tiny_train", masks,
         [train["abs_pos"], train["soft_mask"]], 3),
        ("Table 4", "test loss, T", "tiny_test", masks, [test["abs_pos"], test["soft_mask"]], 3),
        ("Table 6", "parameters in millions, T / S / B / L", "params_m", sizes, parameters, 1),
        ("Table 6", "multiply-accumulates in G, T / S / B / L", "gmacs", sizes, macs, 1),
        ("Table 7", "top-1 with 32 / 8 bits, T; here both with norms of queries and keys", "tiny",
         ["iLLaMA, 32 bits", "iLLaMA, 8 bits"], bits, 1),
        ("Table 8", "calibration error: ConvNeXt-B / DeiT3-B / iLLaMA-B; here ViT / iLLaMA", "ece", others, ece, 4),
        ("Table 8", "shape decisions, %, of the same models", "shape", others, shape, 1),
        ("Table 9", "top-1 on CIFAR-10: ViT-T / iLLaMA-T without / with soft mask; here five classes, from shapes",
         "cifar10", ["ViT-T", "iLLaMA-T, no soft mask", "iLLaMA-T, soft mask"], cifar10, 1),
        ("Table 10", "mIoU, ADE20K: ViT-T / iLLaMA-T; here CamVid, ViT / iLLaMA", "miou", ["ViT-T", "iLLaMA-T"],
         miou, 1),
        ("Table 18", "top-1 from LLaMA-2 weights / random weights, T; here from a larger iLLaMA's, 3 epochs", "tiny",
         ["LLaMA2-7B, weight selection", "random weights"], starts, 1),
        ("Figure 4", "singular values for 80 % in layer 1: head 1 of ViT-T / iLLaMA-T, of 197; here all heads, of 65",
         "rank_80", ["ViT-T", "iLLaMA-T"], rank, 1)]
    theirs = {(row["source"], row["row"]): row for row in PUBLISHED}
    return table("paper | what | published | here", [
        [source, what, " / ".join(str(theirs[source, name][key]) for name in names), means(*ours, digits=digits)]
        for source, what, key, names, ours, digits in lines], left=2)


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


def rank_of_steps_table():
    """Mean over heads and blocks, and what uniform attention under the same mask has."""
    masks = {"rmsnorm": "no mask", "ps_cls": "causal", "soft_log": "causal", "soft_mask": "soft, alpha 0"}
    body = []
    for step, mask in masks.items():
        uniform = uniform_attention(65)[mask]
        line = [f"`{step}`", mask]
        for fraction, key in ((0.8, "rank_80"), (0.9, "rank_90")):
            line.append([fmean(map(fmean, blocks)) for blocks in by_step("rank", key)[step].values()])
            line.append(str(singular_values_for(fraction, uniform).item()))
        body.append(line)
    return table("step | mask in the end | 80 % | uniform | 90 % | uniform", body, left=2)


def uniform_attention(tokens):
    """Attention maps (N, N) that tell no token from another: the mask alone, nothing learned."""
    full = torch.full((tokens, tokens), 1 / tokens)
    lower = full.tril()
    return {"no mask": full, "causal": lower / lower.sum(1, keepdim=True), "soft, alpha 0": lower}


def uniform_table():
    maps = [(mask, attn, uniform_attention(197)[mask]) for mask, attn in uniform_attention(65).items()]
    return table("uniform attention | 65 tokens, 80 % | 90 % | 197 tokens, 80 % | 90 %", [
        [mask, *(str(singular_values_for(fraction, attn).item()) for attn in (small, large) for fraction in (0.8, 0.9))]
        for mask, small, large in maps])


def calibration_table():
    body = []
    for step, name in MODELS.items():
        for smoothing, file in (("0.1", "properties"), ("0", "label-smoothing")):
            gaps = []
            for bins in seeds_of(file, "reliability", step):
                images = sum(count for count, _, _ in bins)
                gaps.append(sum(count * (confidence - hits) for count, confidence, hits in bins) / images)
            accuracy, ece = (seeds_of(file, key, step) for key in ("test_acc1", "ece"))
            body.append([name, smoothing, accuracy, percent(ece), percent(gaps)])
    return table("model | label smoothing | top-1, % | calibration error, % | confidence - accuracy, %", body, left=2)


def landscape_table():
    """How much higher the loss is at some distance from the trained weights, on average over directions."""
    distance = torch.tensor(OFFSETS).square()
    distance = (distance + distance[:, None]).sqrt()
    body = []
    for step, name in MODELS.items():
        grids = [torch.tensor(grid) for grid in seeds_of("landscape", "landscape", step)]
        trained = [grid[distance == 0].item() for grid in grids]
        body.append([name, plus_minus(trained, 2)])
        for inner, outer in ((0, 0.5), (0.5, 1)):
            ring = (distance > inner) & (distance <= outer)
            body[-1].append(plus_minus([grid[ring].mean().item() - loss for grid, loss in zip(grids, trained)], 2))
    return table("model | loss of the trained weights | more at a distance up to 0.5 | from 0.5 to 1", body)


def shape_table(name):
    body, conflicts = [], rows(name)[0]["conflicts"]
    for step in sorted(by_step(name), key=list(VARIANTS).index):
        accuracy, bias, decided = (seeds_of(name, key, step) for key in ("test_acc1", "shape_bias", "decided"))
        neither = [conflicts - count for count in decided]
        body.append([f"`{title_of(step)}`", accuracy, percent(bias), percent(neither, conflicts)])
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


def quantize_table():
    """Against the same model without rounding, and beside it the step itself, without norms of queries and keys."""
    body, plain = [], ladder()
    for step, name in MODELS.items():
        control, bits = (by_step("quantize", "test_acc1", epoch=EPOCHS - 1, bits=bits)[step] for bits in (32, 8))
        body.append([name, {seed: plain[step][seed] for seed in bits}, control, bits, interval(bits, control)])
    return table("model | as it is: top-1, % | with norms of queries and keys | and 8 bits | difference [95 %]", body)


def anytime_table():
    return table(f"top-1, %, after row | {' | '.join(map(str, range(1, 9)))}",
                 [[title, *zip(*read_by(name, "acc1_by_row"))] for name, title in READ.items()])


# ---------------------------------------------------------------------------------------------------------------------
# Longer runs and other tasks


def runs_table():
    body = []
    for name, title in RUNS.items():
        last = rows(name)[-1]
        body.append([title, f"{last['n_parameters']:,}", str(last["epoch"] + 1), f"{last['time_s'] / 60:.1f}",
                     f"{last['test_acc1']:.1f}"])
    return table("run | parameters | epochs | minutes | top-1, %", body)


def epochs_table():
    """What the mask costs, by epochs and tokens."""
    keys, body = ("test_acc1", "train_loss"), []
    lines = [("3", "17", [ladder(key, flags="--patch-size 8") for key in keys]),
             ("20", "17", [by_step("cifar10-20-epochs", key) for key in keys]),
             ("3", "65", [ladder(key) for key in keys]),
             ("10", "65", [by_step("ladder", key, epoch=9) for key in keys])]
    for epochs, tokens, (accuracy, losses) in lines:
        body.append([epochs, tokens, str(len(accuracy["ps_cls"])), accuracy["rmsnorm"], accuracy["ps_cls"],
                     interval(accuracy["ps_cls"], accuracy["rmsnorm"]),
                     interval(losses["ps_cls"], losses["rmsnorm"], 3)])
    return table("epochs | tokens | seeds | `rmsnorm`: top-1, % | `ps_cls`: top-1, % | the mask's difference [95 %] "
                 "| of training loss [95 %]", body, left=0)


def rates_table():
    """SwiGLU at other learning rates."""
    found = {"5e-4": ladder(flags="--lr 5e-4"), "1e-3": ladder(), "2e-3": ladder(flags="--lr 2e-3")}
    return table("learning rate | seeds | `vit`: top-1, % | `swiglu`: top-1, % | difference [95 %]", [
        [rate, str(len(steps["vit"])), steps["vit"], steps["swiglu"], interval(steps["swiglu"], steps["vit"])]
        for rate, steps in found.items()])


def segment_table():
    return table("CamVid, validation, % | from scratch: mIoU | pixel accuracy | from CIFAR-10 weights: mIoU "
                 "| pixel accuracy", [
        [title, *([row[key] for row in segmented("segment", step, pretrained)] or "not trained"
                  for pretrained in (False, True) for key in ("test_miou", "test_pixel_acc"))]
        for step, title in SEGMENTED.items()])


CAMVID = "sky | building | pole | road | pavement | tree | sign | fence | car | pedestrian | bicyclist"


def classes_table():
    body = []
    for step, title in SEGMENTED.items():
        seeds = [row["test_iou"] for row in segmented("segment", step, True)]
        body.append([title, *(means(ious) for ious in zip(*seeds))])
    return table(f"IoU, %, from CIFAR-10 weights | {CAMVID}", body)


def upside_down_table():
    """What the causal mask costs in images as they are and upside down: in whole images and in their halves."""
    parts = (("segment", lambda row: row["test_miou"]), ("where", lambda row: fmean(row["image"]["rows_miou"][:4])),
             ("where", lambda row: fmean(row["image"]["rows_miou"][4:])))
    body = []
    for images, suffix in (("as they are", ""), ("upside down", "-upside-down")):
        pairs = [[{row["seed"]: value(row) for row in segmented(name + suffix, step, True)}
                  for step in ("rmsnorm", "ps_cls")] for name, value in parts]
        body.append([images, *pairs[0], *(interval(causal, bidirectional) for bidirectional, causal in pairs)])
    return table("CamVid, mIoU, % | ViT (`rmsnorm`) | causal (`ps_cls`) | the mask's difference [95 %] "
                 "| in the upper half | in the lower half", body)


def camvid_table():
    views = {"single scale": rows("camvid")[-1], "six scales, flips": rows("camvid-multi-scale")[0]}
    return table(f"IoU, % | mean | {CAMVID}", [
        [name, f"**{row['test_miou']:.1f}**", *(f"{iou:.0f}" for iou in row["test_iou"])]
        for name, row in views.items()])


def transfer_table():
    images = " | ".join(f"{250 * part:,}" for part in PERCENT)                                 # of 25,000
    return table(f"top-1, %, by labelled images | {images}", [
        [f"{title}, {what}", *(by_step("transfer", start=start, percent=part).get(step, "") for part in PERCENT)]
        for step, title in TRANSFERRED.items() for start, what in STARTS.items()
        if matching("transfer", step=step, start=start)])


def transfer_tiny_table():
    """Size T as in the paper's Table 9: each run of iLLaMA's against ViT's."""
    def found(step, start):
        return by_step("transfer-tiny", start=start)[step]
    vit, body = ("rmsnorm", "fine-tuning"), []
    for run, title in {vit: "ViT (`rmsnorm`)", ("soft_mask", "fine-tuning-0"): "iLLaMA, no soft mask in fine-tuning",
                       ("soft_mask", "fine-tuning"): "iLLaMA (`soft_mask`)"}.items():
        difference = "" if run == vit else interval(found(*run), found(*vit))
        step, start = run
        loss = plus_minus(seeds_of("transfer-tiny", "train_loss", step, start=start), 3)
        body.append([title, found(step, "pretraining"), found(*run), difference, loss])
    return table("size T | shapes: top-1, % | five classes of CIFAR-10: top-1, % | against ViT [95 %] | train loss",
                 body)


def select_table():
    starts = {
        "random": "random weights", "uniform": "`--rule uniform`", "aligned": "`--rule aligned`",
        "permuted": "`uniform`, then permuted", "random-other": "five classes: random weights",
        "uniform-other": "five classes: `uniform`, of a model of the other five",
        "permuted-other": "five classes: that, then permuted"}
    return table("start: top-1, % | epoch 1 | epoch 2 | epoch 3",
                 [[what, *zip(*(row["acc1_by_epoch"] for row in matching("select", start=start)))]
                  for start, what in starts.items() if matching("select", start=start)])


def long_table():
    """The ladder at length, which needs a GPU: replication.ladder --long."""
    found = rows("ladder-long")
    first = found[0]
    epochs = range(4, len(first["acc1_by_epoch"]), 5)
    return table(f"CIFAR-10, size T, {first['epochs']} epochs, {first['time_device']}: top-1, % after epoch | "
                 + " | ".join(str(epoch + 1) for epoch in epochs), [
        [f"`{title_of(row['step'])}`, seed {row['seed']}", *(f"{row['acc1_by_epoch'][epoch]:.1f}" for epoch in epochs)]
        for row in found])


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


IMAGES = {"in1k": 1_281_167, "in21k": 11_060_223}        # to train, in an epoch


def hours_table():
    """How long the published recipes take, by what they train on; and on one GPU, where bench_model has timed it."""
    measured = {(row["size"], row["img_size"]): row for name in ("tiny", "small", "base")
                for row in rows(f"speed/gpu-{name}") if row["model"] == "soft"}
    body = []
    published = [name for name in RECIPES if name.partition("-")[0] in SIZES and name != "small-data"]
    for name in published:
        recipe = RECIPES[name]
        images = recipe.epochs * IMAGES["in21k" if name.endswith("in21k") else "in1k"]
        row = measured.get((name.partition("-")[0], recipe.img_size))
        body.append([f"`{name}`", str(recipe.img_size), str(recipe.epochs), f"{images / 1e6:,.0f} million",
                     f"{images / 1000 / 3600:,.0f}", f"{images / row['images_per_s'] / 3600:,.0f}" if row else ""])
    device = next(iter(measured.values()))["device"]
    return table(f"recipe | pixels | epochs | images | hours at 1,000 images/s | on one {device}", body)


MEASURED = dict(  # what sets two measurements of bench_model.py apart, in words
    training=lambda on: "training" if on else "inference", size="size {}".format, dtype=str,
    img_size=lambda side: f"{config(img_size=side).tokens:,} tokens", batch_size="batch {}".format,
    compiled=lambda on: "compiled" if on else "eager")


def measured_table(run, what, cell):
    """A line per model and a column for each way to run it. `cell` makes the text of a row and its column's first."""
    found = [row for row in rows(f"speed/{run}") if what in row]
    varies = [name for name in MEASURED if len({row[name] for row in found}) > 1]
    common = [words(found[0][name]) for name, words in MEASURED.items() if name not in varies]
    columns, models = {}, {}
    for row in found:
        column = ", ".join(MEASURED[name](row[name]) for name in varies)
        columns.setdefault(column, []).append(row)
        models.setdefault(row["model"], {})[column] = row
    body = [[model, *(cell(of[column], columns[column][0]) if column in of else "" for column in columns)]
            for model, of in models.items()]
    return table(f"{', '.join([*common, found[0]['device']])} | {' | '.join(columns)}", body)


def speed_table(run):
    """Images/s of the first model, and the others' as multiples of it."""
    def cell(row, first):
        rate = row["images_per_s"]
        if row is first:
            return f"{rate:,.{0 if rate > 100 else 2}f} images/s"
        return f"{rate / first['images_per_s']:.2f} x"
    return measured_table(run, "images_per_s", cell)


def memory_table(run):
    """Activation memory of the batch."""
    return measured_table(run, "saved_mb", lambda row, _: f"{row['saved_mb']:,.0f} MB")


def macs_table():
    body = []
    for size in ("tiny", "small", "base", "large"):
        for img_size in (224, 384, 512):
            macs = multiply_accumulates(config(size, img_size=img_size, mask="causal"))
            body.append([f"{size}, {img_size} pixels", *(f"{count / 1e9:.4f} G" for count in macs.values())])
    return table("multiply-accumulates | as the authors count | as run | causal at best", body)


PARTS = dict(
    results=results_table, paper=paper_table, published=published_table, collapse=collapse_table,
    rank=rank_table, ranks=rank_of_steps_table, uniform=uniform_table, calibration=calibration_table,
    landscape=landscape_table, shape=partial(shape_table, "shape-bias"),
    centred=partial(shape_table, "shape-bias-centred"), int8=int8_table, quantize=quantize_table,
    anytime=anytime_table, runs=runs_table, epochs=epochs_table, rates=rates_table,
    segment=segment_table, classes=classes_table, flipped=upside_down_table, camvid=camvid_table,
    transfer=transfer_table, tiny=transfer_tiny_table, select=select_table,
    macs=macs_table, hours=hours_table, long=long_table)
for path in (ROOT / "replication" / "results" / "speed").glob("*.jsonl"):
    PARTS |= {f"speed-{path.stem}": partial(speed_table, path.stem),
              f"memory-{path.stem}": partial(memory_table, path.stem)}
PAGES = ("README.md", "docs/downstream.md", "docs/training.md", "docs/gpu.md", "docs/extending.md",
         *(f"replication/{name}.md" for name in ("paper", "properties", "speed", "downstream")))


def written(text):
    """A page with each part between two marks made anew."""
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", text,
                  flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text()))
