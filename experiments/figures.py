"""All figures of the README and of docs/, drawn from the models themselves and from the rows in results/.

    python -m experiments.figures                 # each figure twice: assets/NAME.png and, for dark mode, NAME-dark.png
    python -m experiments.figures masks ladder    # these two alone
    python -m experiments.figures leak attention --runs out/ladder-3 --out-rows out/leak.jsonl

Needs matplotlib. `leak` and `attention` show the trained models of experiments/ladder.py, whose folder is --runs.
All coordinates are pixels of a page 800 wide, from its upper left corner; text of 8 points is 11 pixels high there.
"""
import io
import json
from functools import cache
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from data import Shapes, eval_transform, labels_of, normalize, open_data
from eval import Parser, report_errors
from experiments.ladder import RUNGS, title_of
from experiments.properties import class_token_attention, open_conflict, singular_values_for
from experiments.report import (PERCENT, READ, RUNS, STARTS, TRANSFERRED, climbed, read_by, rows, seeds_of, segmented,
                                transferred)
from model import STEPS, Config, VisionTransformer, build, open_checkpoint

try:
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
except ImportError:
    matplotlib = None

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PAGE = 800                                                  # pixels; 100 are an inch, and 200 pixels of the file

# GitHub's two modes, with colours that colour-blind readers tell apart: those of Okabe and Ito, lighter on black.
LIGHT = SimpleNamespace(suffix="", back="#ffffff", text="#1f2328", quiet="#59636e", line="#d1d9e0",
                        blue="#0072b2", orange="#d55e00", green="#00805e")
DARK = SimpleNamespace(suffix="-dark", back="#0d1117", text="#e6edf3", quiet="#9198a1", line="#3d444d",
                       blue="#56b4e9", orange="#f0883e", green="#1fc49a")
HUES = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#c9b600", "#0072b2")


def style(look):
    return {"figure.facecolor": look.back, "axes.facecolor": look.back, "axes.edgecolor": look.quiet, "font.size": 9,
            "text.color": look.text, "axes.labelcolor": look.text, "axes.titlesize": 9.5, "axes.titleweight": "bold",
            "xtick.color": look.quiet, "xtick.labelcolor": look.text, "xtick.labelsize": 8.5,
            "ytick.color": look.quiet, "ytick.labelcolor": look.text, "ytick.labelsize": 8.5,
            "axes.grid": True, "grid.color": look.line, "axes.axisbelow": True, "axes.spines.top": False,
            "axes.spines.right": False, "legend.facecolor": look.back, "legend.edgecolor": look.back,
            "legend.framealpha": 1}


def canvas(height):
    return Figure(figsize=(PAGE / 100, height / 100), dpi=200)


def place(fig, x, y, width, height, **kwargs):
    """Axes at a place of the page."""
    page = 100 * fig.get_figheight()
    return fig.add_axes([x / PAGE, 1 - (y + height) / page, width / PAGE, height / page], **kwargs)


def write(fig, x, y, text, fontsize=9, ha="center", **kwargs):
    """Lines of text centred about y, on baselines that do not depend on their letters, so that neighbours align."""
    size, lines = fontsize * 100 / 72, text.split("\n")
    for i, line in enumerate(lines):
        baseline = y + size * (0.36 + 1.3 * (i - (len(lines) - 1) / 2))
        fig.text(x / PAGE, 1 - baseline / (100 * fig.get_figheight()), line, fontsize=fontsize, ha=ha, **kwargs)


def show(fig, x, y, side, image):
    """A square image; its pixels are even where 2 * side is a multiple of their number."""
    ax = place(fig, x, y, side, side)
    ax.imshow(image, interpolation="nearest")
    ax.axis("off")
    return ax


# ---------------------------------------------------------------------------------------------------------------------
# From the architecture alone


MASK_PANELS = (  # title, fields of Config, alpha, what it comes to
    ("none, class token first", dict(), None, "bidirectional:\nevery token attends to all"),
    ("causal, class token first", dict(mask="causal"), None, "COLLAPSE: the class token\nattends to itself alone"),
    ("causal, class token last", dict(mask="causal", cls_last=True), None,
     "post-sequence class token:\nit attends to all"),
    ("modified, class token first", dict(mask="modified"), None,
     "causal for the patches,\nthe class token attends to all"),
    ("soft, alpha 0.5", dict(mask="soft", cls_last=True), 0.5,
     "later tokens' weights × 0.5:\npatches' rows sum to less than 1"),
    ("soft, alpha 0", dict(mask="soft", cls_last=True), 0.0,
     "later tokens' weights × 0:\npatches' rows sum to less than 1"),
)


@torch.no_grad()
def draw_masks(look, args):
    """The attention map of each mask where all scores are equal, for 3 x 3 patches and the class token."""
    fig, cell = canvas(622), 20
    colours = LinearSegmentedColormap.from_list("", [look.back, look.blue])
    for i, (title, changes, alpha, caption) in enumerate(MASK_PANELS):
        model = VisionTransformer(Config(img_size=3, patch_size=1, width=2, heads=1, depth=1, **changes))
        torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)                    # q = k = 0: all scores are 0
        if alpha is not None:
            model.set_soft_mask(alpha)
        attn = model.attention_maps(torch.zeros(1, 3, 3, 3))[0, 0, 0].numpy()    # N, N
        N, cls = len(attn), len(attn) - 1 if model.cfg.cls_last else 0
        names = [*map(str, range(1, N))]
        names.insert(cls, "cls")

        x, y = 48 + i % 3 * 258, 50 + i // 3 * 294
        ax = place(fig, x, y, N * cell, N * cell)
        ax.pcolormesh(attn, cmap=colours, norm=LogNorm(0.02, 1), edgecolors=look.line, linewidth=0.6)    # 0 is empty
        ax.add_patch(Rectangle((0, cls), N, 1, fill=False, edgecolor=look.orange, linewidth=2.2, clip_on=False))
        ax.set(xlim=(0, N), ylim=(N, 0))
        ax.set_xticks(np.arange(N) + 0.5, names)
        ax.set_yticks(np.arange(N) + 0.5, names)
        ax.tick_params(length=0, labelsize=8, pad=2, top=False, labeltop=True, labelbottom=False)
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            labels[cls].set(color=look.orange, weight="bold")
        ax.spines[:].set_visible(False)
        ax.grid(False)
        write(fig, x + 100, y - 34, title, 9.5, weight="bold")
        collapse = dict(color=look.orange, weight="bold") if "COLLAPSE" in caption else {}
        write(fig, x + 100, y + 222, caption, **collapse)
        if alpha is not None:
            for row, total in enumerate(["sum", *(f"{total:.2f}" for total in attn.sum(1))]):
                write(fig, x + 205, y + cell * (row - 0.5), total, 8, ha="left", color=look.quiet)
    write(fig, 400, 606, "attention weights where all scores are equal; row: query, column: key; "
          "outlined: the class token's row; empty: 0", 8.5, color=look.quiet)
    return fig


BLOCK_PARTS = (  # from head to image: y, height, width, text in ViT and in iLLaMA, the rung that changes it
    (66, 26, 190, "head, on the class token", None, None),
    (112, 26, 190, "LayerNorm", "RMSNorm", "rmsnorm"),
    (160, 16, 16, "+", None, None),
    (202, 40, 190, "MLP\n$W_2$ gelu($W_1 x$)", "SwiGLU\n$W_2$ (silu($W_1 x$) · $W_3 x$)", "swiglu"),
    (248, 26, 190, "LayerNorm", "RMSNorm", "rmsnorm"),
    (290, 16, 16, "+", None, None),
    (342, 22, 150, "× v, projection", None, None),
    (385, 50, 50, "mask", None, None),
    (427, 22, 150, "softmax($q k^T / \\sqrt{d}$)", None, None),
    (457, 22, 166, "", "RoPE: rotate q and k", "rope"),
    (487, 22, 150, "q, k, v", None, None),
    (530, 26, 190, "LayerNorm", "RMSNorm", "rmsnorm"),
    (592, 16, 16, "+", None, None),
    (632, 22, 210, "tokens", None, None),
    (674, 26, 190, "patch embedding", None, None),
    (740, 70, 70, "image", None, None),
)
BLOCK_LEGEND = {  # rung: y, what it changes
    "swiglu": (202, "gated MLP, without biases"), "rmsnorm": (248, "RMSNorm replaces LayerNorm"),
    "soft_mask": (362, "weights of later tokens × α,\nwhich falls from 1 to 0 in training"),
    "causal": (415, "later tokens are masked"),
    "rope": (457, "rotary positions\nin place of learned ones"),
    "abs_pos": (586, "learned positions again,\nbeside the rotary ones"),
    "ps_cls": (641, "class token last, not first"),
}


def draw_blocks(look, args):
    """ViT and iLLaMA side by side, each part in the colour of the rung that changes it."""
    fig = canvas(782)
    ax = place(fig, 0, 0, PAGE, 782)
    rungs = dict(zip(list(STEPS)[1:], enumerate(HUES, 1)))                       # rung: its number and colour
    image = np.asarray(Shapes("val", 66)[6][0])

    def tint(colour, amount):
        return tuple(amount * np.array(to_rgb(colour)) + (1 - amount) * np.array(to_rgb(look.back)))

    def text(x, y, string, fontsize=9, ha="center", **kwargs):
        ax.text(x, y, string, fontsize=fontsize, ha=ha, va="center", linespacing=1.2, zorder=7, **kwargs)

    def badge(x, y, rung):
        number, colour = rungs[rung]
        ax.add_patch(Circle((x, y), 8.5, facecolor=colour, edgecolor=look.back, linewidth=1, zorder=6))
        text(x, y + 0.5, number, 8.5, weight="bold", color="white" if rung == "soft_mask" else "black")

    def frame(left, top, width, height, radius, **kwargs):
        shape = f"round,pad=0,rounding_size={radius}"
        ax.add_patch(FancyBboxPatch((left, top), width, height, boxstyle=shape, **dict(edgecolor=look.quiet) | kwargs))

    def box(x, y, width, height, string, rung=None, applied=True, side=0, fontsize=9):
        """In the colour of its rung, filled once that is applied; its number at the left or right, side -1 or 1."""
        hue = rungs[rung][1] if rung else look.quiet
        frame(x - width / 2, y - height / 2, width, height, 5, edgecolor=hue, linewidth=1.7 if rung else 1, zorder=4,
              facecolor=tint(hue, 0.26) if rung and applied else look.back,
              linestyle=(0, (3, 2)) if rung and not applied else "-")
        text(x, y + 0.5, string, fontsize)
        if side:
            badge(x + side * width / 2, y if width > 110 else y - height / 2, rung)

    def arrow(*points):
        ax.plot(*zip(*points), color=look.quiet, linewidth=1.2, zorder=2)
        ax.annotate("", points[-1], points[-2], zorder=2, arrowprops=dict(
            arrowstyle="-|>,head_length=0.4,head_width=0.22", color=look.quiet, linewidth=1, shrinkA=0, shrinkB=0))

    for x, llama in ((140, False), (660, True)):
        text(x, 16, "iLLaMA" if llama else "ViT", 13, weight="bold")
        text(x, 36, f"--step {'soft_mask' if llama else 'vit'}", 8.5, family="monospace", color=look.quiet)
        frame(x - 132, 138, 264, 428, 9, zorder=0, facecolor=tint(look.quiet, 0.07), edgecolor=look.line)
        frame(x - 104, 312, 208, 192, 7, zorder=1, facecolor=look.back)
        text(x + 124, 151, "× depth", ha="right", color=look.quiet)
        text(x - 97, 322, "attention", 8.5, ha="left", color=look.quiet)
        above = None
        for y, height, width, ours, theirs, rung in BLOCK_PARTS:
            name = theirs if llama and theirs else ours
            if not name:
                continue
            if above:
                arrow((x, y - height / 2), (x, above))                           # the stream, from part to part
            above = y + height / 2
            if name == "+":
                ax.add_patch(Circle((x, y), 8, facecolor=look.back, edgecolor=look.quiet, linewidth=1.2, zorder=4))
                ax.plot([x - 4, x + 4, x, x, x], [y, y, y, y - 4, y + 4], color=look.text, linewidth=1.2, zorder=5)
            elif name == "mask":                                                 # queries down, keys across
                for i, j in np.ndindex(5, 5):
                    hue = rungs["soft_mask" if j > i else "causal"][1] if llama else look.quiet
                    ax.add_patch(Rectangle((x - 25 + 10 * j, y - 25 + 10 * i), 10, 10, edgecolor=look.back, zorder=4,
                                           facecolor=tint(hue, 0.5 if not llama else 0.4 if j > i else 0.9)))
            elif name == "tokens":
                edge = x - width / 2
                for token in [*"123456789", "cls"] if llama else ["cls", *"123456789"]:
                    wide, rung = (30, "ps_cls") if token == "cls" else (20, None)
                    box(edge + wide / 2, y, wide - 4, height, token, rung, llama, (llama or -1) if rung else 0, 8)
                    edge += wide
            elif name == "image":
                for i, j in np.ndindex(3, 3):
                    left, top = x - 35 + 24 * j, y - 35 + 24 * i
                    ax.imshow(image[22 * i:, 22 * j:][:22, :22], extent=(left, left + 22, top + 22, top), zorder=4)
            else:
                box(x, y, width, height, name, rung, llama, (-1 if llama else 1) if rung else 0)
        for low, high in ((555, 290), (273, 160)):                               # past attention, past the MLP
            arrow((x, low), (x - 117, low), (x - 117, high), (x - 8, high))
        box(x + 76, 592, 108, 26, "learned positions", "abs_pos", llama, 1, 8)
        arrow((x + 22, 592), (x + 8, 592))
    text(174, 385, "no mask", 8.5, ha="left")
    text(710, 371, "× α", ha="left")
    text(610, 398, "× 1", ha="right")
    badge(697, 371, "soft_mask")
    badge(623, 398, "causal")

    for rung, (y, change) in BLOCK_LEGEND.items():
        badge(303, y - 7, rung)
        text(318, y - 7, rung, 9.5, ha="left", family="monospace", weight="bold")
        write(fig, 318, y + 10 + 7.7 * change.count("\n"), change, 8.5, ha="left")
    text(400, 57, "What each rung changes", 10, weight="bold")
    write(fig, 400, 97, "numbers: order of the ladder\ndashed: before the rung\nfilled: after it", 8.5,
          color=look.quiet)
    ax.set(xlim=(0, PAGE), ylim=(782, 0), aspect="auto")
    ax.axis("off")
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# The built-in data


def draw_shapes(look, args):
    """Two images of each class."""
    fig, source = canvas(178), Shapes("train", 72)
    for i in range(20):
        show(fig, 4 + i % 10 * 80, 24 + i // 10 * 78, 72, source[i][0])
    for i, name in enumerate(source.classes):
        write(fig, 40 + 80 * i, 12, name)
    return fig


def draw_conflict(look, args):
    """What training teaches, a texture for every shape, and what the conflict split asks."""
    fig, agree = canvas(512), Shapes("train", 72, cue=True)
    conflict, shapes, textures = open_conflict("shapes-cue", 64)
    write(fig, 4, 12, "training and validation: each shape has a texture of its own", 9.5, ha="left", weight="bold")
    write(fig, 4, 140, "conflict: shape and texture belong to different classes", 9.5, ha="left", weight="bold")
    for i, name in enumerate(agree.classes):
        show(fig, 4 + 80 * i, 26, 72, agree[30 + i][0])
        write(fig, 40 + 80 * i, 108, name)
    for i in range(12):
        x, y, index = 2 + i % 6 * 133.5, 156 + i // 6 * 180, 133 + i             # these have ten different textures
        show(fig, x, y, 128, conflict[index][0])
        write(fig, x + 64, y + 149, f"shape: {shapes[index]}\ntexture: {textures[index]}'s")
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# From the rows in results/


def draw_ladder(look, args):
    """Each seed a dot and each mean a bar; beside it, the published accuracies."""
    found, epochs = climbed()
    row, top, clear = 35, 34, dict(facecolor=look.back, edgecolor="none", pad=1)
    fig = canvas(top + row * len(RUNGS) + 94)
    ours = place(fig, 222, top, 330, row * len(RUNGS))
    theirs = place(fig, 622, top, 160, row * len(RUNGS), sharey=ours)
    for y, rung in enumerate(RUNGS):
        colour, mean = look.blue if rung in STEPS else look.orange, fmean(found[rung])
        published = RUNGS[rung].published
        ours.plot(found[rung], [y] * len(found[rung]), "o", color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0)
        ours.plot([mean, mean], [y - 0.3, y + 0.3], color=colour, linewidth=2)
        ours.text(72, y, f"{mean:.1f}", va="center")
        name = title_of(rung).replace(" ", "\n", 1)
        write(fig, 212, top + (y + 0.5) * row, name, 8 if "\n" in name else 8.5, ha="right", family="monospace")
        if published is not None:
            theirs.plot(published, y, "s", color=look.green, markersize=6)
            theirs.text(published + 0.25, y, published, va="center", bbox=clear)
    ours.axvline(10, color=look.quiet, linestyle=":", linewidth=1.2)
    ours.text(11.5, 0, "chance: 10 %", color=look.quiet, va="center", fontsize=8.5, bbox=clear)
    collapsed = list(RUNGS).index("causal")
    ours.text(12.5, collapsed, "collapse", color=look.blue, va="center", weight="bold", bbox=clear)
    ours.set(xlim=(0, 70), ylim=(len(RUNGS) - 0.5, -0.5), yticks=range(len(RUNGS)), xlabel="CIFAR-10 top-1, %",
             title=f"measured here, {epochs} epochs")
    theirs.set(xlim=(71.5, 76), xticks=range(72, 77), xlabel="ImageNet top-1, %", title="published, size T")
    for ax in (ours, theirs):
        ax.tick_params(left=False, labelleft=False)
        ax.spines["left"].set_visible(False)
    marks = [Line2D([], [], marker=mark, color=colour, linestyle="", markersize=6)
             for mark, colour in (("o", look.blue), ("o", look.orange), ("s", look.green))]
    fig.legend(marks, ["rung of the ladder", "variant of a rung", "the authors' value"], loc="lower center", ncols=3,
               bbox_to_anchor=(0.5, 0.035), handletextpad=0.1)
    write(fig, 400, top + row * len(RUNGS) + 82, "a dot per seed; bar and number: mean of the seeds", 8.5,
          color=look.quiet)
    return fig


def draw_properties(look, args):
    """How flat the attention maps' spectra are, and how accurate a model is where it is so confident."""
    fig = canvas(350)
    left, right = place(fig, 60, 34, 310, 260), place(fig, 470, 34, 310, 260)
    for step, name, colour, shift in (("vit", "ViT", look.orange, -0.12), ("soft_mask", "iLLaMA", look.blue, 0.12)):
        seeds = seeds_of("properties", "rank_90", step)
        points = [(block + 1 + shift, count) for seed in seeds for block, heads in enumerate(seed) for count in heads]
        left.plot(*zip(*points), "o", color=colour, markersize=4.5, alpha=0.55, markeredgewidth=0, label=name)
        for i, bins in enumerate(seeds_of("properties", "reliability", step)):
            points = [(100 * sure, 100 * accuracy) for images, sure, accuracy in bins if images >= 30]
            right.plot(*zip(*points), "o-", color=colour, markersize=3, linewidth=1.2, alpha=0.75,
                       label=None if i else name)
    uniform = torch.full((65, 65), 1 / 65, dtype=torch.float64)                  # the mask alone, nothing learned
    for attn, mask, y in ((uniform, "no mask", 2), (uniform.tril(), "soft at alpha 0", 45)):
        count = singular_values_for(0.9, attn).item()
        left.axhline(count, color=look.quiet, linestyle=":", linewidth=1.2)
        left.text(0.56, y, f"uniform attention, {mask}: {count}", color=look.quiet, fontsize=8.5)
    right.plot([0, 100], [0, 100], ":", color=look.quiet)
    right.text(64, 58, "perfectly calibrated", color=look.quiet, fontsize=8.5, rotation=40, ha="center", va="center")
    left.set(xlabel="block", ylabel="singular values for 90 % of their sum", xticks=range(1, len(seeds[0]) + 1),
             xlim=(0.5, len(seeds[0]) + 0.5), ylim=(0, 50), title="rank of the attention maps, a dot per head")
    right.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100),
              title="reliability diagram, a line per seed")
    left.legend(loc="lower right", ncols=2, bbox_to_anchor=(1.02, 0.07), handletextpad=0.2)
    right.legend(loc="upper left")
    return fig


def draw_curves(look, args):
    """Top-1 over the minutes of training."""
    fig = canvas(330)
    ax = place(fig, 60, 14, 720, 262)
    for (name, (title, _)), colour, mark in zip(RUNS.items(), (look.green, look.blue, look.orange), "so^"):
        minutes, top1 = zip(*((row["time_s"] / 60, row["test_acc1"]) for row in rows(name)))
        ax.plot(minutes, top1, f"{mark}-", color=colour, markersize=5, label=title.replace("`", ""))
        ax.annotate(f"{top1[-1]:.1f} %", (minutes[-1], top1[-1]), (0, 9), textcoords="offset points", ha="center",
                    color=colour, weight="bold")
    ax.set(xlabel="minutes on 2 CPU cores", ylabel="top-1 on validation images, %", xlim=(0, 21), ylim=(0, 109),
           yticks=range(0, 101, 20), xticks=range(0, 21, 5))
    ax.legend(loc="lower right")
    return fig


def draw_anytime(look, args):
    """Accuracy after each row of patches, and of stopping early against the work that it takes; a line per seed."""
    fig = canvas(390)
    left, right = place(fig, 60, 34, 320, 262), place(fig, 460, 34, 320, 262)
    forms = dict(zip(READ, (dict(color=look.text, linestyle="--"), dict(color=look.blue),
                            dict(color=look.orange, alpha=0.35, linewidth=5, zorder=1), dict(color=look.green))))
    for name, title in READ.items():
        for seed, accuracy in enumerate(read_by(name, "acc1_by_row")):
            left.plot(range(1, len(accuracy) + 1), accuracy, **dict(linewidth=1.3, marker="o", markersize=3) | forms[name],
                      label=None if seed else title)
    for name in ("causal-3", "prefixes-3", "prefixes-10"):
        for curve in read_by(name, "curve"):
            accuracy, _, work = zip(*curve)
            right.plot(work, accuracy, linewidth=1.3, **forms[name])
        right.plot(read_by(name, "exit_work"), read_by(name, "exit_acc1"), "D", markersize=6, markeredgecolor=look.back,
                   color=forms[name]["color"], zorder=4)
    right.axvline(1, color=look.quiet, linestyle=":", linewidth=1.2)
    right.text(0.985, 14, "one forward pass", color=look.quiet, fontsize=8.5, rotation=90, ha="right", va="bottom")
    left.set(xlabel="rows of patches read", ylabel="CIFAR-10 top-1, %", xticks=range(1, 9), ylim=(10, 75),
             title="after each row, a line per seed")
    right.set(xlabel="mean work, relative to one forward pass", ylim=(10, 75), xlim=(0, 1.2),
              title="early exit; diamonds: the threshold chosen")
    fig.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 0.005))
    return fig


def draw_where(look, args):
    """mIoU by row and by column of an image and of a window, with and without a causal mask; a line per seed."""
    fig = canvas(470)
    panels = [("image", "rows", "of an image, eighths from the top"), ("image", "columns", "of an image, eighths from the left"),
              ("window", "rows", "of a window, patches from the top"), ("window", "columns", "of a window, patches from the left")]
    for i, (what, side, title) in enumerate(panels):
        ax = place(fig, 60 + 390 * (i % 2), 34 + 210 * (i // 2), 330, 150)
        for step, colour in (("rmsnorm", look.blue), ("ps_cls", look.orange)):
            curves = [row[what][f"{side}_miou"] for row in segmented("where", step, True)]
            span = range(1, 1 + len(curves[0]))
            for curve in curves:
                ax.plot(span, curve, color=colour, linewidth=0.8, alpha=0.5)
            ax.plot(span, np.mean(curves, axis=0), "o-", color=colour, markersize=3, linewidth=1.8,
                    label=None if i else {"rmsnorm": "bidirectional (rmsnorm)", "ps_cls": "causal (ps_cls)"}[step])
        ax.set(ylabel="" if i % 2 else "mIoU, %", ylim=(0, 55), title=f"{side} {title}", xticks=span[::2])
    fig.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, 0.005))
    return fig


def draw_transfer(look, args):
    """Accuracy against the number of labelled images, by where a model starts; a line per seed."""
    fig = canvas(330)
    forms = dict(zip(STARTS, (dict(color=look.text, linestyle="--"), dict(color=look.blue), dict(color=look.orange))))
    for i, (step, title) in enumerate(TRANSFERRED.items()):
        ax = place(fig, 60 + 390 * i, 34, 330, 210)
        images = [250 * percent for percent in PERCENT]
        for start, what in STARTS.items():
            curves = list(zip(*(transferred(start, step, percent) for percent in PERCENT)))
            for curve in curves:
                ax.plot(images, curve, linewidth=0.8, alpha=0.5, **forms[start])
            ax.plot(images, np.mean(curves, axis=0), marker="o", markersize=4, linewidth=1.8, **forms[start],
                    label=None if i else what)
        ax.set(xscale="log", xticks=images, xlabel="labelled images", ylabel="" if i else "top-1, %", ylim=(45, 85),
               title=title.replace("`", ""))
        ax.set_xticks([], minor=True)
        ax.set_xticklabels(f"{count:,}" for count in images)
    fig.legend(loc="lower center", ncols=3, bbox_to_anchor=(0.5, 0.005))
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# From the trained models of experiments/ladder.py


def trained(rung, runs):
    return build(open_checkpoint(runs / f"{rung}-0" / "last.pt")).eval()


def first_images(source, size, name, count):
    """(count, 3, H, W), uint8: the first images of a class, the same in whatever order the classes are stored."""
    places = [i for i, label in enumerate(labels_of(source)) if label == source.classes.index(name)][:count]
    return torch.stack([TF.pil_to_tensor(eval_transform(source[i][0], None, size)) for i in places])


@torch.no_grad()
def leak(model, images):
    """How far each token's output moves when the last patch is inverted: |change| / |output| in percent, N numbers.

    images (B, 3, H, W), uint8; the mean over them. Under an exact causal mask all tokens before that patch have 0.
    """
    inverted = images.clone()
    inverted[..., -model.cfg.patch_size:, -model.cfg.patch_size:] ^= 255
    before, after = (model.forward_features(normalize(batch)) for batch in (images, inverted))   # B, N, D
    return (100 * (after - before).norm(dim=-1) / before.norm(dim=-1)).mean(0).tolist()


@cache
def leaks(runs, data):
    """{rung: its leak}, over the first ten images of every class."""
    found = {}
    for rung in TRAINED["leak"]:
        model = trained(rung, runs)
        source = open_data(data, "val", model.cfg.img_size)
        images = [first_images(source, model.cfg.img_size, name, 10) for name in source.classes]
        found[rung] = leak(model, torch.cat(images))
    return found


def draw_leak(look, args):
    """The leak of the published soft mask at alpha 0, beside two masks that have none."""
    fig = canvas(350)
    ax = place(fig, 62, 14, 718, 280)
    found = leaks(args.runs, args.data)
    last = len(found["soft_mask"]) - 2                                           # the last patch's is the next token
    for rung, name, form in (
            ("soft_mask", "soft, alpha 0 (published)", dict(color=look.orange, marker="o", markersize=4, zorder=3)),
            ("soft_log", "soft_log, alpha 0", dict(color=look.green, linewidth=5)),
            ("ps_cls", "causal", dict(color=look.text, linewidth=1.6, linestyle=(0, (3, 3))))):
        percent = found[rung][:last]
        ends = f"{percent[0]:.2g} % at token 1, {percent[-1]:.3g} % at token {last}" if any(percent) else "exactly 0"
        ax.plot(range(1, last + 1), percent, label=f"{name}: {ends}", **form)
    top = 1.25 * max(found["soft_mask"][:last])
    ax.axvspan(last + 0.5, last + 2.5, color=look.line, alpha=0.6, linewidth=0)
    ax.text(last + 1.5, top / 2, "inverted patch, class token", rotation=90, ha="center", va="center", fontsize=8.5)
    ax.axhline(0, color=look.quiet, linewidth=1, zorder=1)
    ax.set(xlim=(0, last + 2.5), ylim=(-0.05 * top, top), xticks=[1, *range(8, last + 2, 8)],
           xlabel="token, in raster order of the patches", ylabel="change of the token's output, %")
    ax.legend(loc="upper left")
    return fig


ATTENTION_ROWS = {"vit": "no mask,\nclass token\nfirst", "causal": "causal,\nclass token\nfirst",
                  "ps_cls": "causal,\nclass token\nlast", "soft_mask": "soft, alpha 0,\nclass token\nlast"}


@torch.no_grad()
def draw_attention(look, args):
    """What the class token attends to, a row per rung: heat over the image, with the most attended patch outlined."""
    fig, side = canvas(666), 128
    for row, (rung, title) in enumerate(ATTENTION_ROWS.items()):
        model = trained(rung, args.runs)
        size, patch, grid = model.cfg.img_size, model.cfg.patch_size, model.cfg.img_size // model.cfg.patch_size
        source = open_data(args.data, "val", size)
        image = first_images(source, size, "horse" if "horse" in source.classes else source.classes[0], 4)[-1:]
        patches = class_token_attention(model, image)[:, 0]                                      # depth, P
        pixels = image[0].permute(1, 2, 0).numpy() / 255                                         # H, W, 3
        grey = 0.25 + 0.75 * pixels.mean(-1, keepdims=True)                                      # H, W, 1
        y = 30 + row * (side + 26)
        write(fig, 6, y + 34, rung, 9.5, ha="left", family="monospace", weight="bold")
        write(fig, 6, y + 74, title, 8.5, ha="left")
        show(fig, 112, y, side, pixels)
        for block, weights in enumerate(patches, 1):
            x, total, most = 112 + block * (side + 9), weights.sum().item(), weights.argmax().item()
            heat = (weights / weights.max().clamp(min=1e-12)).unflatten(0, (grid, grid)).numpy()
            heat = 0.7 * np.kron(heat, np.ones((patch, patch)))[..., None]                       # H, W, 1: opacity
            ax = show(fig, x, y, side, grey * (1 - heat) + np.array(to_rgb("#d55e00")) * heat)
            for colour, width in (("white", 3.2), ("black", 1.4)) if total else ():
                corner = most % grid * patch - 0.5, most // grid * patch - 0.5
                ax.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=colour, linewidth=width))
            write(fig, x + side / 2, y + side + 11, f"{100 * total:.0f} % to patches", 8.5,
                  **{} if total else dict(color=look.orange, weight="bold"))
            if not row:
                write(fig, x + side / 2, 15, f"block {block}", 9.5, weight="bold")
    write(fig, 112 + side / 2, 15, "image", 9.5, weight="bold")
    write(fig, 400, 655, "orange: attention of the class token, mean over heads, relative to the most attended patch, "
          "which is outlined", 8.5, color=look.quiet)
    return fig


# ---------------------------------------------------------------------------------------------------------------------


FIGURES = dict(masks=draw_masks, blocks=draw_blocks, shapes=draw_shapes, conflict=draw_conflict, ladder=draw_ladder,
               properties=draw_properties, curves=draw_curves, anytime=draw_anytime, where=draw_where,
               transfer=draw_transfer, leak=draw_leak, attention=draw_attention)
TRAINED = dict(leak=("soft_mask", "soft_log", "ps_cls"), attention=tuple(ATTENTION_ROWS))        # rungs that they need
SMOOTH = ("shapes", "conflict")                             # their gradients need more than 256 colours


def save(name, look, args):
    with matplotlib.rc_context(style(look)):
        file = io.BytesIO()
        FIGURES[name](look, args).savefig(file)
    image = Image.open(file).convert("RGB")
    if name not in SMOOTH:
        image = image.quantize(256, dither=Image.Dither.NONE)                    # less than half the size
    image.save(ASSETS / f"{name}{look.suffix}.png", optimize=True)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(FIGURES)}")
    parser.add_argument("--runs", type=Path, default="out/ladder-3", help="the ladder's folder, with RUNG-0/last.pt")
    parser.add_argument("--data", default="cifar10", help="validation images for leak and attention, as in train.py")
    parser.add_argument("--out-rows", type=Path, help="append the numbers of leak to this file, a row per model")
    with report_errors():
        args = parser.parse_args()
        if matplotlib is None:
            raise ValueError("the figures need matplotlib: pip install matplotlib")
        unknown = [name for name in args.names if name not in FIGURES]
        if unknown:
            raise ValueError(f"unknown figure {unknown[0]!r}; choose among {', '.join(FIGURES)}")
        for name in args.names or FIGURES:
            missing = [rung for rung in TRAINED.get(name, ()) if not (args.runs / f"{rung}-0" / "last.pt").is_file()]
            if missing:
                print(f"{name}: skipped, {args.runs}/{missing[0]}-0/last.pt is missing; --runs is the ladder's folder")
                continue
            for look in (LIGHT, DARK):
                save(name, look, args)
            print(f"{name}: drawn")
            if name == "leak" and args.out_rows:
                with open(args.out_rows, "a") as file:
                    for rung, percent in leaks(args.runs, args.data).items():
                        metrics = (args.runs / f"{rung}-0" / "metrics.jsonl").read_text().splitlines()
                        row = dict(step=rung, seed=0, test_acc1=json.loads(metrics[-1])["test_acc1"], leak=percent)
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
