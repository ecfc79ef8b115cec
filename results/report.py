"""The README's tables and figure, made from the runs in this folder.

    python results/report.py            # write the tables into README.md
    python results/report.py --figure   # draw assets/curves.png as well (needs matplotlib)

NAME.jsonl is the metrics.jsonl of the run NAME as train.py left it; published.jsonl has the best epoch of each of the
authors' logs whose weights are published; bench_*, soak-* are what the programs in benchmarks/ said.
"""
import argparse
import inspect
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
from model import STEPS, VisionTransformer, config  # noqa: E402

CIFAR = "python train.py --data datasets/cifar10"

RUNS = {  # name: what it is, and the command that makes it again
    "shapes-tiny": ("`shapes`, iLLaMA-T, patch 8", "torchrun train.py --size tiny"),
    "cifar10-nano": ("CIFAR-10, 6 blocks 128 wide, patch 4",
                     f"{CIFAR} --size nano --depth 6 --patch-size 4 --epochs 7 --batch-size 128 --lr 2e-3 "
                     "--dtype bfloat16 --compile"),
    "cifar10-tiny": ("CIFAR-10, iLLaMA-T, patch 8",
                     f"{CIFAR} --size tiny --epochs 11 --batch-size 128 --lr 1e-3 --dtype bfloat16 --compile"),
}


LADDER = {  # rung: what it does, its formula, where it stands, and the published ImageNet top-1 at size T
    "vit": ("a vision transformer",
            "x + Attn(LN(x)), then x + W₂ gelu(W₁ LN(x))", model.Block, "73.9"),
    "swiglu": ("LLaMA's gated MLP",
               "W₂ (silu(W₁ x) · W₃ x)", model.SwiGLU, "74.3"),
    "rmsnorm": ("LLaMA's norm",
                "x / √(mean(x²) + ε) · w", model.RMSNorm, "74.5"),
    "causal": ("LLaMA's mask, and a **collapse**",
               "softmax(QKᵀ/√d + M), M = −∞ above the diagonal", model.masks, "none"),
    "ps_cls": ("the cure: the class token goes last",
               "[patch₁ … patch_P, cls]", VisionTransformer.embed, "71.9"),
    "rope": ("rotary positions in place of learned ones",
             "(q₂ₖ + i q₂ₖ₊₁) · exp(i t θ^(−2k/d)) for token t, keys alike", model.rotate, "72.6"),
    "abs_pos": ("learned positions as well",
                "x + pos", VisionTransformer.embed, "73.2"),
    "soft_mask": ("causal little by little: **iLLaMA**",
                  "softmax(QKᵀ/√d) ⊙ S, S = α above the diagonal, 1 elsewhere", model.masks, "75.0 ²"),
}


def ladder_table():
    lines = ["| `--step` | what it does | formula | code | parameters | published ¹ |", "|---|---|---|---|--:|--:|"]
    for step in STEPS:
        what, formula, code, published = LADDER[step]
        source, first = inspect.getsourcelines(code)
        link = f"[`{code.__name__}`](model.py#L{first}-L{first + len(source) - 1})"
        with torch.device("meta"):
            parameters = sum(p.numel() for p in VisionTransformer(config("tiny", step)).parameters())
        lines.append(f"| `{step}` | {what} | {formula} | {link} | {parameters:,} | {published} |")
    return "\n".join(lines)


NAMES = {"timm vit": "timm 0.5.4's ViT-T", "vit": "our ViT-T", "torchvision base": "torchvision's vit_b_16",
         "soft base": "iLLaMA-B, mask `soft`", "soft recompute": "iLLaMA-T, mask `soft`, `--recompute`"}
COLUMNS = [(dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (False, True)]


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
    lines = [f"| {heading} | {' | '.join(titles)} |", "|---|--:|--:|--:|--:|"]
    for name in names:
        pairs = [[found[model, *column, *inputs]["images_per_s"] for model in (name, names[0])] for column in COLUMNS]
        cells = [f"{rate:.1f} images/s" if name == names[0] else f"{rate / peer:.2f} x" for rate, peer in pairs]
        lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    return lines


def speed_table():
    tiny = ["timm vit", "vit", "causal", "soft", "soft_log"]
    lines = [*ratios("training step, 224 pixels, batch 16", "training", [*tiny, "soft recompute"], 224, 16), "",
             *ratios("inference, 224 pixels, batch 16", "inference", tiny, 224, 16), "",
             *ratios("training step, 224 pixels, batch 4", "base", ["torchvision base", "soft base"], 224, 4)]
    soft = measured("training")["soft", "float32", True, 224, 16]
    theirs, ours = rows("bench_data")
    return "\n".join([
        *lines, "", f"Compiled in float32, iLLaMA-T trains at {soft['peak']:.0%} of the speed at which the machine multiplies "
        f"matrices ({soft['matmul_gflops']} GFLOP/s), counting the work of the paper's dense model.", "",
        "From a JPEG file to a training picture of 224 pixels with the published augmentation:",
        f"{ours['images_per_s']} pictures/s on one core, {theirs['images_per_s']} with timm's pipeline: "
        f"{ours['ratio']:.2f} times as many."])


def memory_table():
    lines = ["| kept for the backward pass, float32 | 224 pixels, batch 16, eager | compiled | 384 pixels, batch 8, eager "
             "| compiled |", "|---|--:|--:|--:|--:|"]
    for name in ("timm vit", "vit", "causal", "soft_log", "soft", "soft recompute"):
        saved = [measured(run)[name, "float32", compiled, *inputs]["saved_mb"]
                 for run, inputs in (("training", (224, 16)), ("training-384", (384, 8))) for compiled in (False, True)]
        lines.append(f"| {title(name)} | " + " | ".join(f"{mb:,.0f} MB" for mb in saved) + " |")
    return "\n".join(lines)


def growth_table():
    lines = ["| iLLaMA-T, training, float32, compiled | images/s, mask `soft` | `causal` | timm's ViT-T "
             "| kept an image, `soft` | `causal` | timm's |", "|---|--:|--:|--:|--:|--:|--:|"]
    for img_size in (224, 384, 512):
        found = [measured("tokens")[name, "float32", True, img_size, 4] for name in ("soft", "causal", "timm vit")]
        lines.append(f"| {(img_size // 16) ** 2 + 1} tokens ({img_size} pixels), batch 4 | "
                     + " | ".join(f"{row['images_per_s']:.1f}" for row in found) + " | "
                     + " | ".join(f"{row['saved_mb'] / 4:.0f} MB" for row in found) + " |")
    for row in rows("bench_model/batch") + rows("bench_model/ranks"):
        batch = f"{row['ranks']} x {row['batch_size']} on 2 ranks, a core each" if row["ranks"] > 1 else row["batch_size"]
        lines.append(f"| 197 tokens, batch {batch} | {row['images_per_s']:.1f} | | "
                     f"| {row['saved_mb'] / row['batch_size']:.0f} MB | | |")
    return "\n".join(lines)


def soak_table():
    lines = ["Two ranks with four loader processes each, and as many for evaluation, over 20 minutes: memory that a process",
             "shares with none, in MB, and its open files.", "",
             "| data | process | minute 2 | minute 10 | minute 20 | open files |", "|---|---|--:|--:|--:|--:|"]
    for data in ("shapes", "photos"):
        looks = rows(f"soak-{data}")
        looks = [min(looks, key=lambda row: abs(row["minute"] - minute)) for minute in (2, 10, 20)]
        for kind, part in (("ranks", slice(0, 2)), ("loaders", slice(2, None))):
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


def claim():
    (shapes, minutes), (cifar, more) = ((rows(name)[-1]["test_acc1"], rows(name)[-1]["time_s"] / 60)
                                        for name in ("shapes-tiny", "cifar10-nano"))
    return f"""Shown here, each by a test or a run: logits equal to the published code's within 1e-4, on every rung
of size T and for iLLaMA-S; the published parameter counts, to the digit, for all sizes; and on two CPU cores
{shapes:.1f} % top-1 on the built-in pictures after {minutes:.0f} minutes of the first command below, and
{cifar:.1f} % on CIFAR-10 after {more:.0f}, both from scratch. The published models reach 75.0 % (5.7M parameters) to
86.0 % (310M) on ImageNet: that takes GPUs, and has not been run here."""


def written(readme):
    """The README's text with each part between its two marks made anew."""
    parts = dict(claim=claim(), ladder=ladder_table(), runs=runs_table(), published=published_table(), speed=speed_table(),
                 memory=memory_table(), growth=growth_table(), soak=soak_table())
    for mark, table in parts.items():
        before, after = readme.split(f"<!-- {mark} -->\n")
        readme = f"{before}<!-- {mark} -->\n{table}\n{after[after.index('<!-- end -->'):]}"
    return readme


def figure():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("error: --figure needs matplotlib: pip install matplotlib")
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, (title, _) in RUNS.items():
        ax.plot([row["time_s"] / 60 for row in rows(name)], [row["test_acc1"] for row in rows(name)], "o-",
                markersize=3, label=title.replace("`", ""))
    ax.set(xlabel="minutes on 2 CPU cores", ylabel="top-1 on unseen pictures, %", ylim=(0, 100), xticks=range(0, 21, 5))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", frameon=False)
    fig.savefig(ROOT / "assets" / "curves.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the README's tables and figure from the runs in results/.")
    parser.add_argument("--figure", action="store_true", help="draw assets/curves.png as well")
    args = parser.parse_args()
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
    if args.figure:
        figure()
