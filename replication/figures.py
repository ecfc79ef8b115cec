"""The figures of README.md and the pages, from the rows in results/ and the models.

    python -m replication.figures                      # all of them
    python -m replication.figures masks ladder         # these two
    python -m replication.figures attention --runs out/ladder-3 --data cifar10

They are docs/images/NAME.png, and docs/social.png. Needs matplotlib. `attention` shows trained
models: --runs is the folder in which replication.ladder left them. The ground is transparent and
the colours read on white and in GitHub's dark mode. docs/images/blocks.svg is drawn by hand.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from data import eval_transform, normalize, open_data
from downstream.attention import class_token_attention
from harness.checkpoint import build, open_checkpoint
from harness.flags import Parser, require, shorten
from harness.processes import report_errors
from harness.shapes import Shapes
from model import STEPS, Config, VisionTransformer
from replication.ladder import VARIANTS, title_of
from replication.properties import singular_values_for
from replication.report import READ, read_by_row, uniform_attention
from replication.rows import EPOCHS, by_step
from replication.transfer import labels_of

try:
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patches import Rectangle
except ImportError:
    plt = None

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"

# Figures are 8 inches wide, which the pages show at 800 pixels.
# A contrast of about 4 with white and with #0d1117. Lines and marks differ in form as well as in
# colour.
GREY, BLUE, ORANGE, GREEN = "#77818c", "#2f7fd0", "#cf5b00", "#008a64"
FAINT = GREY + "50"                                         # grey, mostly transparent
LINES = (dict(color=BLUE, marker="o", linestyle="-"),
         dict(color=ORANGE, marker="s", linestyle="--"),
         dict(color=GREEN, marker="^", linestyle="-."))
STYLE = {
    "font.size": 9, "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "axes.titlecolor": GREY, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "figure.titlesize": 9.5, "figure.titleweight": "bold",
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.handlelength": 3,
    "lines.markersize": 4.5, "lines.markeredgewidth": 0, "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True, "savefig.transparent": True, "savefig.dpi": 200,
}


def bare(ax):
    """Without lines and ticks."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(False)


def show(ax, image, **kwargs):
    """An image without axes."""
    ax.imshow(image, interpolation="nearest", **kwargs)
    ax.set(xticks=[], yticks=[])
    bare(ax)


MASKS = (  # mask, whether the class token is last, alpha, title, what it comes to
    ("none", False, None, "none, class token first",
     "bidirectional:\nevery token attends to all"),
    ("causal", False, None, "causal, class token first",
     "COLLAPSE: the class token\nattends to itself alone"),
    ("causal", True, None, "causal, class token last",
     "post-sequence class token:\nit attends to all"),
    ("modified", False, None, "modified, class token first",
     "causal for the patches,\nthe class token attends to all"),
    ("soft", True, 0.5, "soft, alpha 0.5",
     "later tokens' weights × 0.5:\npatches' rows sum to less than 1"),
    ("soft", True, 0.0, "soft, alpha 0",
     "later tokens' weights × 0:\npatches' rows sum to less than 1"),
)


@torch.no_grad()
def equal_attention(mask, cls_last, alpha):
    """The attention map (N, N) where all scores are equal, for 3 x 3 patches and the class
    token."""
    cfg = Config(img_size=3, patch_size=1, width=2, heads=1, depth=1, mask=mask, cls_last=cls_last)
    model = VisionTransformer(cfg)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)            # q = k = 0: all scores are 0
    if alpha is not None:
        model.set_soft_mask(alpha)
    return model.attention_maps(torch.zeros(1, 3, 3, 3))[0, 0, 0].numpy()


def draw_masks():
    """What each mask leaves of attention, row by row."""
    fig, axes = plt.subplots(2, 3, figsize=(8, 6.3))
    for ax, (mask, cls_last, alpha, title, caption) in zip(axes.flat, MASKS):
        attn = equal_attention(mask, cls_last, alpha)
        N = len(attn)
        cls = N - 1 if cls_last else 0
        names = [str(patch) for patch in range(1, N)]
        names.insert(cls, "cls")
        show_matrix(ax, attn, cls)
        ax.set_xlabel(caption)
        ax.set_title(title, pad=8)
        if "COLLAPSE" in caption:
            ax.xaxis.label.set(color=ORANGE, weight="bold")
        ax.set_xticks(np.arange(N) + 0.5, names)
        ax.set_yticks(np.arange(N) + 0.5, names)
        ax.get_yticklabels()[cls].set(color=ORANGE, weight="bold")
        if alpha is not None:
            for row, total in enumerate(attn.sum(1)):
                ax.text(N + 0.2, row + 0.5, f"{total:.2f}", fontsize=8.5, va="center")
            ax.text(N + 0.2, -0.5, "sum", fontsize=8.5, va="center")
    fig.supxlabel("attention weights where all scores are equal; row: query, column: key; "
                  "outlined: the class token's row; empty: 0", fontsize=8.5)
    return fig


def show_matrix(ax, attn, cls):
    """An attention map, the class token's row outlined."""
    N = len(attn)
    colours = LinearSegmentedColormap.from_list("", [BLUE + "00", BLUE])  # from transparent to blue
    ax.pcolormesh(attn, cmap=colours, norm=LogNorm(0.02, 1),              # 0 stays empty
                  edgecolors=FAINT, linewidth=0.6)
    ax.add_patch(Rectangle((0, cls), N, 1, fill=False, edgecolor=ORANGE, linewidth=2.2,
                           clip_on=False, zorder=3))
    ax.set(xlim=(0, N), ylim=(N, 0), aspect="equal")
    ax.tick_params(pad=2, labeltop=True, labelbottom=False)
    bare(ax)


def draw_social():
    """The preview of links to the repository, 1280 x 640 pixels: the README's two runs, one blind,
    one seeing."""
    fig, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), facecolor="#0d1117")
    found = by_step("demo")
    for ax, step, cls_last, title in zip(axes, ("causal", "ps_cls"), (False, True),
                                         ("class token first: blind", "moved to the end: it sees")):
        ax.set_facecolor("#0d1117")
        show_matrix(ax, equal_attention("causal", cls_last, None), 9 if cls_last else 0)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=11, color="white")
        ax.set_xlabel(f"{found[step].iloc[0]:.2f} %", fontsize=20, weight="bold",
                      color=ORANGE if step == "causal" else BLUE)
    fig.suptitle("iLLaMA, step by step: a ViT under LLaMA's causal mask", fontsize=12,
                 color="white")
    return fig


def draw_shapes():
    """Two images of each class."""
    fig, axes = plt.subplots(2, 10, figsize=(8, 1.85))
    source = Shapes("train", 72)
    for i, ax in enumerate(axes.flat):
        show(ax, source[i][0])
    for ax, name in zip(axes[0], source.classes):
        ax.set_title(name, fontsize=9, weight="normal")
    return fig


def draw_ladder():
    """Each seed a mark and each mean a bar; beside it, the published accuracies."""
    found = by_step("ladder", epoch=EPOCHS - 1)
    fig, (ours, theirs) = plt.subplots(1, 2, figsize=(8, 5.3), sharey=True, width_ratios=(2, 1))
    for y, step in enumerate(VARIANTS):
        seeds, published = found[step].dropna(), VARIANTS[step].published
        mean = seeds.mean()
        color, marker = (BLUE, "o") if step in STEPS else (ORANGE, "D")
        ours.plot(seeds, [y] * len(seeds), marker, color=color, alpha=0.7)
        ours.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2.2)
        ours.text(63.3, y, f"{mean:.1f}", va="center")
        if mean < 48:                                                            # left of the axis
            ours.text(48.2, y, f"← collapse: {mean:.0f} %, chance", color=color, weight="bold",
                      va="center")
        if published is not None:
            theirs.plot(published, y, "s", color=GREEN, markersize=6)
            theirs.text(75.3, y, f"{published}", va="center")
            if published < 71.5:
                theirs.text(71.6, y, "← fails", color=GREEN, weight="bold", va="center")
    ours.set(xlim=(48, 63), ylim=(len(VARIANTS) - 0.5, -0.5),
             xlabel="CIFAR-10 top-1, %; the axis starts at 48",
             title=f"measured here, {EPOCHS} epochs")
    theirs.set(xlim=(71.5, 75.2), xticks=range(72, 76), xlabel="ImageNet top-1, %; from 71.5",
               title="published, size T")
    names = [title_of(step).replace(" ", "\n", 1) for step in VARIANTS]
    ours.set_yticks(range(len(VARIANTS)), names, family="monospace", fontsize=8)
    for ax in (ours, theirs):
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    fig.supxlabel("circles: steps; diamonds: variants of a step; a mark per seed, bar and number: "
                  "their mean; squares: the authors' values", fontsize=8.5)
    return fig


def draw_properties():
    """How many singular values attention maps need, and how accurate a model is where it is so
    confident."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(1.15, 1))
    for step, name, look, shift in (("vit", "ViT", LINES[1], -0.12),
                                    ("soft_mask", "iLLaMA", LINES[0], 0.12)):
        left.plot([], [], look["marker"], color=look["color"], label=name)       # for the legend
        for blocks in by_step("properties", "rank_90")[step]:
            for block, heads in enumerate(blocks, 1):
                left.plot([block + shift] * len(heads), heads, look["marker"], color=look["color"],
                          alpha=0.6)
        for seed, bins in by_step("properties", "reliability")[step].items():
            points = [(100 * confidence, 100 * accuracy)
                      for images, confidence, accuracy in bins if images >= 30]
            right.plot(*zip(*points), **look, markersize=3.5, linewidth=1.2, alpha=0.75,
                       label=None if seed else name)

    for mask, attn in uniform_attention(65).items():
        count = singular_values_for(0.9, attn).item()
        left.axhline(count, color=GREY, linestyle=":", linewidth=1.2)
        left.text(4.45, count + 0.6, f"uniform attention,\n{mask}: {count}", fontsize=8)
    left.grid(False, axis="y")
    left.set(xlabel="block", ylabel="singular values for 90 % of their sum", xticks=(1, 2, 3, 4),
             xlim=(0.5, 6.1), ylim=(0, 50), title="rank of the attention maps, a mark per head")
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.05), handlelength=1)
    right.plot([0, 100], [0, 100], ":", color=GREY)
    right.text(66, 57, "perfectly calibrated", fontsize=8.5, rotation=42, ha="center", va="center")
    right.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100),
              title="reliability diagram, a line per seed")
    right.legend(loc="upper left")
    return fig


def draw_anytime():
    """Accuracy after each row of patches, a line per seed."""
    fig, ax = plt.subplots(figsize=(8, 3.9))
    band = dict(color=GREY, linewidth=7, alpha=0.4, zorder=1)    # beneath the causal model's lines
    looks = {"causal-3": LINES[1], "prefixes-3": LINES[0], "bidirectional-3": band,
             "prefixes-10": LINES[2]}
    for name, look in looks.items():
        for seed, accuracy in enumerate(read_by_row(name)):
            ax.plot(range(1, len(accuracy) + 1), accuracy, label=None if seed else READ[name],
                    **look)
    ax.set(xlabel="rows of patches read", ylabel="CIFAR-10 top-1, %", xticks=range(1, 9))
    ax.legend(loc="lower right")
    return fig


def draw_leak():
    """How far outputs move when the last patch is inverted: under the published soft mask, and two
    without leak."""
    fig, ax = plt.subplots(figsize=(8, 3.5))
    found = by_step("leak", "leak")                                  # a number for each token
    looks = [("soft_mask", "soft, alpha 0 (published)", dict(color=ORANGE, marker="o", zorder=3)),
             ("soft_log", "soft_log, alpha 0", dict(color=GREEN, linewidth=7, alpha=0.7)),
             ("ps_cls", "causal", dict(color=BLUE, linestyle=(0, (3, 3))))]
    for step, name, look in looks:
        percent = found[step].iloc[0][:-2]           # without the last patch and the class token
        last = len(percent)
        label = name if any(percent) else f"{name}: exactly 0"
        ax.plot(range(1, last + 1), percent, label=label, **look)
    ax.axvspan(last + 0.5, last + 2.5, color=FAINT, linewidth=0)
    ax.text(last + 1.5, 1.2, "inverted patch, class token", rotation=90, ha="center", va="center",
            fontsize=8.5)
    ax.grid(False, axis="x")
    ax.set(xlim=(0, last + 2.5), ylim=(-0.13, 2.7), xticks=[1, *range(8, last + 2, 8)],
           yticks=(0, 1, 2), xlabel="token, in raster order of the patches",
           ylabel="change of the token's output, %")
    ax.legend(loc="upper left")
    return fig


ATTENTION = {"vit": "no mask,\nclass token\nfirst",
             "causal": "causal,\nclass token\nfirst",
             "ps_cls": "causal,\nclass token\nlast",
             "soft_mask": "soft, alpha 0,\nclass token\nlast"}


@torch.no_grad()
def draw_attention(runs, data):
    """What the class token attends to, a row per model: heat over the image, the most attended
    patch outlined."""
    fig, axes = plt.subplots(len(ATTENTION), 5, figsize=(8, 6.7))
    # From transparent to orange
    heat = LinearSegmentedColormap.from_list("", ["#d55e0000", "#d55e00b0"])
    for row, (step, title) in zip(axes, ATTENTION.items()):
        model = build(open_checkpoint(runs / f"{step}-0" / "last.pt")).eval()
        size, patch, grid = model.cfg.img_size, model.cfg.patch_size, model.cfg.grid
        source = open_data(data, "val", size)
        horses = [i for i, label in enumerate(labels_of(source))
                  if source.classes[label] == "horse"]
        image = eval_transform(source[horses[3]][0], None, size)
        grey = 0.25 + 0.75 * np.asarray(image).mean(-1) / 255                    # H, W
        show(row[0], image)
        row[0].set_ylabel(f"{step}\n\n{title}", rotation=0, ha="left", va="center", labelpad=75)
        pixels = normalize(TF.pil_to_tensor(image)[None])
        patches = class_token_attention(model, pixels)[:, 0]                     # depth, P
        for ax, weights in zip(row[1:], patches):
            show(ax, grey, cmap="gray", vmin=0, vmax=1)
            total, most = weights.sum().item(), weights.argmax().item()
            ax.set_xlabel(f"{100 * total:.0f} % to patches", fontsize=8.5)
            if total == 0:
                ax.xaxis.label.set(color=ORANGE, weight="bold")
                continue
            show(ax, weights.view(grid, grid), cmap=heat, vmin=0,
                 extent=(-0.5, size - 0.5, size - 0.5, -0.5))
            corner = most % grid * patch - 0.5, most // grid * patch - 0.5
            for colour, width in (("white", 3.2), ("black", 1.4)):
                ax.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=colour,
                                       linewidth=width))
    for ax, title in zip(axes[0], ("image", "block 1", "block 2", "block 3", "block 4")):
        ax.set_title(title)
    fig.supxlabel("orange: attention of the class token, mean over heads, relative to the most "
                  "attended patch, which is outlined", fontsize=8.5)
    return fig


FIGURES = dict(masks=draw_masks, social=draw_social, shapes=draw_shapes, ladder=draw_ladder,
               properties=draw_properties, anytime=draw_anytime, leak=draw_leak,
               attention=draw_attention)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*FIGURES],
                        help=f"default: {', '.join(FIGURES)}")
    parser.add_argument("--runs", type=Path, default="out/ladder-3",
                        help="attention: the folder with STEP-0/last.pt")
    parser.add_argument("--data", default="cifar10",
                        help="attention: the validation images, as in train.py")
    with report_errors():
        args = parser.parse_args(argv)
        unknown = [name for name in args.names if name not in FIGURES]
        require(not unknown, f"there is no figure {shorten(unknown)}: give some of "
                f"{', '.join(FIGURES)}")
        require(plt, "the figures need matplotlib: pip install matplotlib")
        plt.rcParams.update(STYLE)
        for name in args.names:
            fig = draw_attention(args.runs, args.data) if name == "attention" else FIGURES[name]()
            path = (IMAGES.parent if name == "social" else IMAGES) / f"{name}.png"
            fig.savefig(path, transparent=name != "social")
            image = Image.open(path)
            if name not in ("masks", "shapes"):                  # whose gradients need more colours
                image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            image.save(path, optimize=True)
            print(f"{name}: drawn")


if __name__ == "__main__":
    main()
