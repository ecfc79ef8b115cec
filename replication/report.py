"""The tables of README.md and the pages, made from the rows in results/:

    python -m replication.report

A table stands between the marks <!-- NAME --> and <!-- end -->, and PARTS says what makes it. All
other text, and the tables without marks, are written by hand. A number is the mean over all seeds
that a row has, with their standard deviation; a difference is paired by seed.
"""
import re
from functools import partial

import numpy as np
import torch

from model import SIZES, STEPS, VisionTransformer, config
from replication.ladder import PUBLISHED, ROOT, VARIANTS, title_of
from replication.properties import OFFSETS, multiply_accumulates, singular_values_for
from replication.rows import EPOCHS, RESULTS, by_step, holm, interval, paired, pivot, rows
from replication.transfer import PERCENT
from train import RECIPES

MODELS = {"vit": "ViT", "soft_mask": "iLLaMA"}
BIDIRECTIONAL = "bidirectional (`rmsnorm`)"


def plus_minus(seeds, digits=1):
    seeds = np.array([*seeds.dropna()] if hasattr(seeds, "dropna") else seeds, float)
    return f"{seeds.mean():.{digits}f} ± {seeds.std(ddof=1):.{digits}f}"


def table(head, body, left=1):
    """A table in Markdown. `head` names its columns; all but the first `left` ones hold numbers.
    What is no text has a number for each seed."""
    columns = head.split(" | ")
    rule = ["---"] * left + ["--:"] * (len(columns) - left)
    lines = [[cell if isinstance(cell, str) else plus_minus(cell) for cell in row] for row in body]
    return "\n".join([f"| {head} |", f"|{'|'.join(rule)}|",
                      *(f"| {' | '.join(row)} |" for row in lines)])


def number(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


# --------------------------------------------------------------------------------------------------
# The ladder and the paper


def ladder(key="test_acc1", flags=None):
    """{step: a number of each seed} of the ladder, or of that with other flags."""
    if flags is None:
        return by_step("ladder", key, epoch=EPOCHS - 1)
    return by_step("ladder-with", key, epoch=EPOCHS - 1, **{"with": flags})


def starred(pairs, found, digits=1):
    """{name: interval() of its two steps}, with a star where the difference is significant among
    all of them."""
    beyond_chance = holm({name: paired(found[a], found[b])[3] for name, (a, b) in pairs.items()})
    return {name: interval(found[a], found[b], digits) + (" *" if name in beyond_chance else "")
            for name, (a, b) in pairs.items()}


COMPARED = {step: (step, row.against) for step, row in VARIANTS.items() if row.against}


def steps_table():
    """The README's: the steps alone."""
    found = ladder()
    change, body = starred(COMPARED, found), []
    for step in STEPS:
        theirs, before = VARIANTS[step].published, VARIANTS.get(VARIANTS[step].against)
        body.append([f"`{step}`", found[step], change.get(step, ""),
                     f"{theirs:.1f}" + (f" ({theirs - before.published:+.1f})" if before else "")])
    return table("`--step` | here: top-1, % | difference [95 %] | the paper's", body)


def results_table():
    found, losses = ladder(), ladder("train_loss")
    change, body = starred(COMPARED, found), []
    for step, row in VARIANTS.items():
        published = [number(row.published, 1), number(row.published_loss, 3),
                     number(row.published_base, 1), number(row.published_base_loss, 3)]
        body.append([f"`{title_of(step)}`", row.what, f"`{row.against}`" if row.against else "",
                     str(found[step].count()), found[step], change.get(step, ""),
                     f"{losses[step].mean():.3f}", *published])
    return table("`--step` | what it changes | against | seeds | top-1, % | difference [95 %] "
                 "| train loss | paper ¹, T: top-1 | train loss | B: top-1 | train loss", body,
                 left=3)


PAIRS = {  # what a comparison is about: its two steps
    "SwiGLU": ("swiglu", "vit"),
    "RMSNorm": ("rmsnorm", "swiglu"),
    "causal mask": ("ps_cls", "rmsnorm"),
    "modified mask": ("modified", "rmsnorm"),
    "RoPE in place of learned positions": ("rope", "ps_cls"),
    "both, against learned positions alone": ("abs_pos", "ps_cls"),
    "soft mask, which leaks": ("soft_mask", "abs_pos"),
    "soft mask without a leak": ("soft_log", "abs_pos"),
    "RoPE, both positions and soft mask": ("soft_mask", "ps_cls"),
    "iLLaMA against bidirectional": ("soft_mask", "rmsnorm"),
    "iLLaMA against ViT": ("soft_mask", "vit")}


def pairs_table():
    found = ladder()
    accuracy, losses = starred(PAIRS, found), starred(PAIRS, ladder("train_loss"), 3)
    body = [[what, f"`{step}`", f"`{other}`", str(paired(found[step], found[other])[4]),
             accuracy[what], losses[what]] for what, (step, other) in PAIRS.items()]
    return table("what changes | `--step` | against | pairs | top-1 [95 %] | training loss [95 %]",
                 body, left=3)


def published_table():
    return table("weights | parameters | epoch | top-1 | top-5 | loss", [
        [f"`{row.weights}`", f"{row.n_parameters:,}", str(row.epoch), f"{row.published_acc1:.3f} %",
         f"{row.published_acc5:.3f} %", f"{row.published_loss:.4f}"]
        for row in rows("published").itertuples()])


def paper_table():
    """The paper's figures from results/published-tables.jsonl, and ours beside them."""
    top1, train, test = (ladder(key) for key in ("test_acc1", "train_loss", "test_loss"))
    with torch.device("meta"):
        models = [VisionTransformer(config(size)) for size in ("tiny", "small", "base", "large")]
    parameters = [sum(p.numel() for p in each.parameters()) / 1e6 for each in models]
    macs = [multiply_accumulates(each.cfg)["published"] / 1e9 for each in models]
    bits = [by_step("quantize", epoch=EPOCHS - 1, bits=bits)["soft_mask"] for bits in (32, 8)]
    shape = 100 * by_step("shape-bias", "shape_bias")
    rank = by_step("properties", "rank_80").map(lambda blocks: np.mean(blocks[0]))
    tuned = [by_step("transfer-tiny", start=start)[step] for step, start in TUNED]
    miou = segmented(True)
    starts = [by_step("select", start=start)["soft_mask"] for start in ("uniform", "random")]
    masks, schedules = ["no soft mask", "soft mask"], ["no soft mask", "linear 50", "constant 50"]
    sizes = ["iLLaMA-T", "iLLaMA-S", "iLLaMA-B", "iLLaMA-L, IN-21K"]
    others = ["ConvNeXt-B", "DeiT3-B", "iLLaMA-B"]
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
        ("Table 8", "calibration error: ConvNeXt-B / DeiT3-B / iLLaMA-B; here ViT / iLLaMA", "ece",
         others, [by_step("properties", "ece")[step] for step in MODELS], 4),
        ("Table 8", "shape decisions, %, of the same models", "shape", others,
         [shape[step] for step in MODELS], 1),
        ("Table 9", "top-1 on CIFAR-10: ViT-T / iLLaMA-T without / with soft mask; here five "
         "classes, from shapes", "cifar10",
         ["ViT-T", "iLLaMA-T, no soft mask", "iLLaMA-T, soft mask"], tuned, 1),
        ("Table 10", "mIoU, ADE20K: ViT-T / iLLaMA-T; here CamVid, bidirectional / iLLaMA", "miou",
         ["ViT-T", "iLLaMA-T"], [miou["rmsnorm"], miou["soft_mask"]], 1),
        ("Table 18", "top-1 from LLaMA-2 weights / random weights, T; here from a larger iLLaMA's, "
         "3 epochs", "tiny", ["LLaMA2-7B, weight selection", "random weights"], starts, 1),
        ("Figure 4", "singular values for 80 % in layer 1: head 1 of ViT-T / iLLaMA-T, of 197; "
         "here all heads, of 65", "rank_80", ["ViT-T", "iLLaMA-T"],
         [rank[step] for step in MODELS], 1)]
    theirs = {(row["source"], row["row"]): row for row in PUBLISHED}
    return table("paper | what | published | here", [
        [source, what, " / ".join(str(theirs[source, name][key]) for name in names),
         " / ".join(f"{np.nanmean(seeds):.{digits}f}" for seeds in ours)]
        for source, what, key, names, ours, digits in lines], left=2)


# --------------------------------------------------------------------------------------------------
# Properties


def collapse_table():
    return table("step | variance of a logit over images", [
        [f"`{row.step}`", f"{row.logit_variance:.2g}"] for row in rows("collapse").itertuples()])


def rank_table():
    """Mean over heads and blocks, and what uniform attention under the same mask has."""
    lines = [("properties", "vit", "no mask"), ("properties", "soft_mask", "soft, alpha 0"),
             ("rank", "rmsnorm", "no mask"), ("rank", "ps_cls", "causal"),
             ("rank", "soft_log", "causal"), ("rank", "soft_mask", "soft, alpha 0")]
    body = []
    for name, step, mask in lines:
        seeds = by_step(name, "rank_80")[step].dropna().index
        body.append([f"`{step}`", f"{seeds.min()} to {seeds.max()}", mask])
        for fraction, key in ((0.8, "rank_80"), (0.9, "rank_90")):
            uniform = [singular_values_for(fraction, uniform_attention(tokens)[mask]).item()
                       for tokens in (65, 197)]
            body[-1] += [by_step(name, key)[step].dropna().map(np.mean), *map(str, uniform)]
    return table("step | seeds | mask in the end | of 65, for 80 % | uniform | uniform, of 197 "
                 "| for 90 % | uniform | uniform, of 197", body, left=3)


def uniform_attention(tokens):
    """Attention maps (N, N) that tell no token from another: the mask alone, nothing learned."""
    full = torch.full((tokens, tokens), 1 / tokens)
    lower = full.tril()
    return {"no mask": full, "causal": lower / lower.sum(1, keepdim=True), "soft, alpha 0": lower}


def calibration_table():
    body = []
    for smoothing, file in (("0.1", "properties"), ("0", "label-smoothing")):
        accuracy, ece = by_step(file), 100 * by_step(file, "ece")
        bins = by_step(file, "reliability")
        gaps = bins.map(lambda bins: 100 * np.average([c - a for _, c, a in bins],
                                                      weights=[n for n, _, _ in bins]))
        body += [[name, smoothing, accuracy[step], ece[step], gaps[step]]
                 for step, name in MODELS.items()]
        body.append(["iLLaMA - ViT [95 %]", smoothing,
                     *(interval(found["soft_mask"], found["vit"])
                       for found in (accuracy, ece, gaps))])
    return table("model | label smoothing | top-1, % | calibration error, % "
                 "| confidence - accuracy, %", body, left=2)


def landscape_table():
    """How much higher the loss is at some distance from the trained weights, on average over
    directions."""
    distance = np.hypot(OFFSETS, np.array(OFFSETS)[:, None])
    grids = by_step("landscape", "landscape").map(np.array)  # pairs of directions, offsets, offsets
    trained = grids.map(lambda grid: grid[..., distance == 0].mean())
    rings = {f"{inner} to {outer}": (distance > inner) & (distance <= outer)
             for inner, outer in ((0, 0.5), (0.5, 1))}
    more = {name: grids.map(lambda grid: grid[..., ring].mean()) - trained
            for name, ring in rings.items()}
    body = [[name, plus_minus(trained[step], 2),
             *(plus_minus(found[step], 2) for found in more.values())]
            for step, name in MODELS.items()]
    body.append(["iLLaMA - ViT [95 %]", *(interval(found["soft_mask"], found["vit"], 2)
                                          for found in (trained, *more.values()))])
    return table("model | loss of the trained weights | "
                 f"{' | '.join(f'more at {name}' for name in rings)}", body)


def shape_table():
    """Shapes anywhere in the image, and centred."""
    body = []
    for where, name in (("anywhere", "shape-bias"), ("centred", "shape-bias-centred")):
        accuracy, bias = by_step(name), 100 * by_step(name, "shape_bias")
        neither = 100 - 100 * by_step(name, "decided") / rows(name).conflicts.iloc[0]
        body += [[where, f"`{title_of(step)}`", str(bias[step].count()), accuracy[step], bias[step],
                  neither[step]] for step in VARIANTS if step in bias]
    return table("shapes | step | seeds | cues agree: top-1, % | cues conflict: shape bias, % "
                 "| neither cue, %", body, left=2)


def bias_table():
    """What RoPE and the mask add to the shape bias, each without the other and with it."""
    anywhere, centred = (100 * by_step(name, "shape_bias")
                         for name in ("shape-bias", "shape-bias-centred"))
    columns = anywhere, anywhere[anywhere.index >= 3], centred
    pairs = {"RoPE, with the mask": ("rope", "ps_cls"), "RoPE, without": ("rope_alone", "rmsnorm"),
             "the mask, without RoPE": ("ps_cls", "rmsnorm"),
             "the mask, with RoPE": ("rope", "rope_alone")}
    columns = [starred(pairs, found) for found in columns]
    return table("points of shape bias [95 %] | anywhere, ten seeds | the later seven alone "
                 "| centred, three seeds",
                 [[what, *(column[what] for column in columns)] for what in pairs])


def quantize_table():
    """Against the same model without rounding, and beside it the step itself, without norms of
    queries and keys."""
    control, bits = (by_step("quantize", epoch=EPOCHS - 1, bits=bits) for bits in (32, 8))
    plain = ladder().loc[bits.index]
    return table("model | as it is: top-1, % | with norms of queries and keys | and 8 bits "
                 "| what 8 bits change [95 %] | what the norms change [95 %]", [
        [name, plain[step], control[step], bits[step], interval(bits[step], control[step]),
         interval(control[step], plain[step])] for step, name in MODELS.items()])


READ = {  # name of the runs, less their seed: how they were trained
    "causal-3": "causal, whole images, 3 epochs",
    "prefixes-3": "causal, prefixes, 3 epochs",
    "bidirectional-3": "bidirectional, prefixes, 3 epochs",
    "prefixes-10": "causal, prefixes, 10 epochs"}


def read_by_row(name):
    """Top-1 after each row of patches (seeds, rows) of such runs."""
    found = rows("anytime")
    return np.array([*found[found.run.str.rpartition("-")[0] == name].acc1_by_row])


def anytime_table():
    return table(f"top-1, %, after row | {' | '.join(map(str, range(1, 9)))}",
                 [[title, *read_by_row(name).T] for name, title in READ.items()])


# --------------------------------------------------------------------------------------------------
# Longer runs and other tasks


def epochs_table():
    """What the mask costs, by epochs and tokens."""
    lines = [("3", "17", partial(ladder, flags="--patch-size 8")),
             ("20", "17", partial(by_step, "cifar10-20-epochs")),
             ("3", "65", ladder),
             ("10", "65", partial(by_step, "ladder", epoch=9))]
    body = []
    for epochs, tokens, found in lines:
        accuracy, loss = (found(key=key)[["rmsnorm", "ps_cls"]].dropna()
                          for key in ("test_acc1", "train_loss"))
        body.append([epochs, tokens, str(len(accuracy)), accuracy["rmsnorm"], accuracy["ps_cls"],
                     interval(accuracy["ps_cls"], accuracy["rmsnorm"]),
                     interval(loss["ps_cls"], loss["rmsnorm"], 3)])
    return table("epochs | tokens | seeds | `rmsnorm`: top-1, % | `ps_cls`: top-1, % "
                 "| the mask's difference [95 %] | of training loss [95 %]", body, left=0)


def lengths_table():
    """How much the mask's difference changes with more epochs."""
    columns = []
    for key, digits in (("test_acc1", 1), ("train_loss", 3)):
        lengths = dict(tokens_17=ladder(key, flags="--patch-size 8"),
                       tokens_17_later=by_step("cifar10-20-epochs", key),
                       tokens_65=ladder(key), tokens_65_later=by_step("ladder", key, epoch=9))
        mask = {name: found["ps_cls"] - found["rmsnorm"] for name, found in lengths.items()}
        columns.append(starred({"17 tokens, 3 to 20 epochs": ("tokens_17_later", "tokens_17"),
                                "65 tokens, 3 to 10 epochs": ("tokens_65_later", "tokens_65")},
                               mask, digits))
    return table("change of the mask's difference [95 %] | top-1 | training loss", [
        [what, *(column[what] for column in columns)] for what in columns[0]])


TAKEN_APART = {
    "causal mask": ("ps_cls", "rmsnorm"), "RoPE in place of learned positions": ("rope", "ps_cls"),
    "learned positions as well": ("abs_pos", "rope"), "soft mask": ("soft_mask", "abs_pos"),
    "all of them": ("soft_mask", "rmsnorm")}
LATE = {  # alpha above 0 for half of the epochs
    "soft mask, alpha 1, then 0": ("soft_constant", "abs_pos"),
    "soft mask, alpha from 1 to 0": ("soft_mask", "abs_pos"),
    "the same without a leak": ("soft_log", "abs_pos"),
    "the leak: soft mask against that": ("soft_mask", "soft_log")}


def changes_table(name, title, start, pairs):
    """What steps change, by rows of their own. `start`: the name and the step of the first line."""
    accuracy, losses = (by_step(name, key) for key in ("test_acc1", "train_loss"))
    changes, of_loss = starred(pairs, accuracy), starred(pairs, losses, 3)
    what, step = start
    return table(f"{title} | `--step` | top-1, % | difference [95 %] | training loss [95 %]", [
        [what, f"`{title_of(step)}`", accuracy[step], "", ""],
        *([what, f"`{title_of(step)}`", accuracy[step], changes[what], of_loss[what]]
          for what, (step, _) in pairs.items())], left=2)


def rates_table():
    """SwiGLU at other learning rates."""
    found = {"5e-4": ladder(flags="--lr 5e-4"), "1e-3": ladder(), "2e-3": ladder(flags="--lr 2e-3")}
    body = [[rate, str(steps["vit"].count()), steps["vit"], steps["swiglu"],
             interval(steps["swiglu"], steps["vit"])] for rate, steps in found.items()]
    return table("learning rate | seeds | `vit`: top-1, % | `swiglu`: top-1, % "
                 "| difference [95 %]", body)


def long_table():
    """The ladder at length, which needs a GPU: replication.ladder --long."""
    found = rows("ladder-long")
    first = found.iloc[0]
    epochs = range(4, len(first.acc1_by_epoch), 5)
    return table(f"CIFAR-10, size T, {first.epochs} epochs, {first.time_device}: "
                 "top-1, % after epoch | " + " | ".join(str(epoch + 1) for epoch in epochs), [
        [f"`{title_of(row.step)}`, seed {row.seed}",
         *(f"{row.acc1_by_epoch[epoch]:.1f}" for epoch in epochs)]
        for row in found.itertuples()])


SEGMENTED = {"rmsnorm": BIDIRECTIONAL, "ps_cls": "causal (`ps_cls`)",
             "soft_mask": "iLLaMA (`soft_mask`)", "rope_alone": "bidirectional with RoPE"}


def segmented(pretrained):
    """mIoU of the runs of downstream.segment, from CIFAR-10's weights or without."""
    found = rows("segment")
    return pivot(found[found.init_from.astype(bool) == pretrained], "test_miou")


def segment_table():
    scratch, pretrained = (segmented(weights) for weights in (False, True))
    return table("CamVid, validation: mIoU, % | from scratch | against bidirectional [95 %] "
                 "| from CIFAR-10 weights | against bidirectional [95 %]", [
        [title, *(cell for found in (scratch, pretrained) for cell in (
            [found[step], "" if step == "rmsnorm" else interval(found[step], found["rmsnorm"])]
            if step in found else ["not trained", ""]))]
        for step, title in SEGMENTED.items()])


STARTS = {"scratch": "from scratch", "fine-tuning": "fine-tuned",
          "fine-tuning-0": "fine-tuned without soft mask", "probe": "linear probe"}
TUNED = ("rmsnorm", "fine-tuning"), ("soft_mask", "fine-tuning-0"), ("soft_mask", "fine-tuning")


def transfer_table():
    images = " | ".join(f"{250 * part:,}" for part in PERCENT)       # of 25,000
    body = []
    for start, what in STARTS.items():
        found = {part: by_step("transfer", start=start, percent=part) for part in PERCENT}
        for step in ("rmsnorm", "soft_mask"):
            if step in found[100]:
                body.append([f"{SEGMENTED[step]}, {what}",
                             *(steps.get(step, "") for steps in found.values())])
    return table(f"top-1, %, by labelled images | {images}", body)


def tiny_transfer_table():
    """Size T as in the paper's Table 9: each run of iLLaMA's against the bidirectional model's."""
    def found(step, start, key="test_acc1"):
        return by_step("transfer-tiny", key, start=start)[step]
    titles = BIDIRECTIONAL, "iLLaMA, no soft mask in fine-tuning", "iLLaMA (`soft_mask`)"
    body = []
    for (step, start), title in zip(TUNED, titles):
        difference = "" if step == "rmsnorm" else interval(found(step, start), found(*TUNED[0]))
        body.append([title, found(step, "pretraining"), found(step, start), difference,
                     plus_minus(found(step, start, "train_loss"), 3)])
    return table("size T | shapes: top-1, % | five classes of CIFAR-10: top-1, % "
                 "| against bidirectional [95 %] | train loss", body)


def select_table():
    starts = {
        "random": "random weights", "uniform": "`--rule uniform`", "aligned": "`--rule aligned`",
        "permuted": "`uniform`, then permuted", "random-other": "five classes: random weights",
        "uniform-other": "five classes: `uniform`, of a model of the other five",
        "permuted-other": "five classes: that, then permuted"}
    body = []
    for start, what in starts.items():
        control = "random-other" if start.endswith("other") else "random"
        random = by_step("select", start=control)["soft_mask"]
        own = by_step("select", start=start)["soft_mask"]
        epochs = np.array([*rows("select", start=start).acc1_by_epoch]).T
        body.append([what, *epochs, "" if own.equals(random) else interval(own, random)])
    return table("start: top-1, % | epoch 1 | epoch 2 | epoch 3 | against random weights [95 %]",
                 body)


def caption_table():
    """Of the same images: sentences, and names alone."""
    says = dict(one="a large star top left .", name="star .", two="a star above a ring .")
    kinds, body = ("exact", "size", "shape", "place", "relation"), []
    found = {say: rows("caption", say=say).set_index("seed") for say in says}
    for say, example in says.items():
        columns = [found[say][f"test_{kind}"] for kind in kinds]
        body.append([example, *("" if column.isna().all() else column for column in columns)])
    change = interval(found["one"].test_shape, found["name"].test_shape)
    body.append(["sentence - name alone [95 %]", "", "", change, "", ""])
    return table(f"what it writes: right, % | {' | '.join(kinds)}", body)


# --------------------------------------------------------------------------------------------------
# Speed and memory


IMAGES = {"in1k": 1_281_167, "in21k": 11_060_223}        # to train, in an epoch


def hours_table():
    """How long the published recipes take, by what they train on; and on one GPU, where bench_model
    has timed it."""
    measured = {(row.size, row.img_size): row for name in ("tiny", "small", "base")
                for row in rows(f"speed/gpu-{name}", model="soft").itertuples()}
    body = []
    published = [name for name in RECIPES
                 if name.partition("-")[0] in SIZES and name != "small-data"]
    for name in published:
        recipe = RECIPES[name]
        images = recipe.epochs * IMAGES["in21k" if name.endswith("in21k") else "in1k"]
        row = measured.get((name.partition("-")[0], recipe.img_size))
        body.append([f"`{name}`", str(recipe.img_size), str(recipe.epochs),
                     f"{images / 1e6:,.0f} million", f"{images / 1000 / 3600:,.0f}",
                     f"{images / row.images_per_s / 3600:,.0f}" if row else ""])
    device = next(iter(measured.values())).device
    return table("recipe | pixels | epochs | images | hours at 1,000 images/s "
                 f"| on one {device}", body)


MEASURED = dict(  # what sets two measurements of bench_model.py apart, in words
    training=lambda on: "training" if on else "inference", size="size {}".format, dtype=str,
    img_size=lambda side: f"{config(img_size=side).tokens:,} tokens", batch_size="batch {}".format,
    compiled=lambda on: "compiled" if on else "eager")


def measured_table(name, what, cell):
    """A line per model and a column for each way to run it. `cell` makes the text of a row and its
    column's first."""
    found = rows(f"speed/{name}").dropna(subset=[what])
    first = found.iloc[0]
    varies = [field for field in MEASURED if found[field].nunique() > 1]
    common = [words(first[field]) for field, words in MEASURED.items() if field not in varies]
    found["column"] = [", ".join(MEASURED[field](row[field]) for field in varies)
                       for _, row in found.iterrows()]
    columns = {column: of.iloc[0] for column, of in found.groupby("column", sort=False)}
    body = [[model, *(cell(of.loc[column], columns[column]) if column in of.index else ""
                      for column in columns)]
            for model, of in found.groupby("model", sort=False)
            for of in [of.set_index("column")]]
    return table(f"{', '.join([*common, first.device])} | {' | '.join(columns)}", body)


def speed_table(name):
    """Images/s of the first model, and the others' as multiples of it, where there are three
    timings with the least and the largest."""
    def cell(row, first):
        rate = row.images_per_s
        if row.model == first.model:
            return f"{rate:,.{0 if rate > 100 else 2}f} images/s"
        ratio = f"{rate / first.images_per_s:.2f} x"
        if not isinstance(row.get("images_per_s_each"), list):
            return ratio
        ratios = [a / b for a, b in zip(row.images_per_s_each, first.images_per_s_each)]
        return f"{ratio} ({min(ratios):.2f} to {max(ratios):.2f})"
    return measured_table(name, "images_per_s", cell)


def memory_table(name):
    """Activation memory of the batch."""
    return measured_table(name, "saved_mb", lambda row, _: f"{row.saved_mb:,.0f} MB")


def macs_table():
    body = []
    for size, img_size in (("tiny", 224), ("tiny", 512), ("small", 224), ("base", 224),
                           ("base", 384), ("large", 224)):
        macs = multiply_accumulates(config(size, img_size=img_size, mask="causal"))
        body.append([f"{size}, {img_size} pixels",
                     *(f"{count / 1e9:.4f} G" for count in macs.values())])
    return table("multiply-accumulates | as the authors count | as run | causal at best", body)


PARTS = dict(
    steps=steps_table, results=results_table, pairs=pairs_table, paper=paper_table,
    published=published_table, collapse=collapse_table, rank=rank_table,
    calibration=calibration_table, landscape=landscape_table, shape=shape_table, bias=bias_table,
    quantize=quantize_table, anytime=anytime_table, epochs=epochs_table, lengths=lengths_table,
    rates=rates_table, long=long_table, segment=segment_table, transfer=transfer_table,
    tiny=tiny_transfer_table, select=select_table, caption=caption_table,
    apart=partial(changes_table, "ladder-tiny", "size T, 3 epochs", ("bidirectional", "rmsnorm"),
                  TAKEN_APART),
    late=partial(changes_table, "soft-mask-late", "6 epochs, alpha above 0 in the first 3",
                 ("exact mask throughout", "abs_pos"), LATE),
    macs=macs_table, hours=hours_table)
for path in (RESULTS / "speed").glob("*.jsonl"):
    PARTS |= {f"speed-{path.stem}": partial(speed_table, path.stem),
              f"memory-{path.stem}": partial(memory_table, path.stem)}
PAGES = [page for pattern in ("README.md", "docs/*.md", "replication/*.md")
         for page in ROOT.glob(pattern)]


def written(text):
    """A page with each part between two marks made anew."""
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
