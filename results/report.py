"""The README's tables and figures, made from the rows in this folder.

    python results/report.py             # write the tables into README.md, its links to lines of code, too
    python results/report.py --figures   # draw those in assets/ as well (needs matplotlib)

ladder.jsonl and cue.jsonl are what ladder.py appended, a row a run; properties.jsonl, collapse.jsonl and
shape-bias.jsonl what eval.py said of these runs. Other NAME.jsonl are the metrics.jsonl of the run NAME as train.py
left it; published.jsonl has the best epoch of each of the authors' logs whose weights are published; bench_*, soak-*
are what the programs in benchmarks/ said.
"""
import argparse
import inspect
import json
import math
import sys
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import model  # noqa: E402
from eval import multiply_accumulates, values_for  # noqa: E402
from ladder import RUNGS as FLAGS  # noqa: E402
from model import SIZES, STEPS, VisionTransformer, config  # noqa: E402

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
    "rmsnorm": ("x / √(mean(x²) + ε) · w", model.RMSNorm),
    "causal": ("softmax(QKᵀ/√d + M), M = −∞ above the diagonal", model.masks),
    "ps_cls": ("[patch₁ … patch_P, cls]", VisionTransformer.embed),
    "rope": ("(q₂ₖ + i q₂ₖ₊₁) · exp(i t θ^(−2k/d)) for token t, keys alike", model.rotate),
    "abs_pos": ("x + pos", VisionTransformer.embed),
    "soft_mask": ("softmax(QKᵀ/√d) ⊙ S, S = α above the diagonal, 1 elsewhere", model.masks),
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


RUNGS = {  # of ladder.py: what it does, what it is compared with, and the published ImageNet top-1 at size T
    "vit": ("a vision transformer", None, 73.9),
    "swiglu": ("LLaMA's gated MLP", "vit", 74.3),
    "rmsnorm": ("LLaMA's norm", "swiglu", 74.5),
    "causal": ("LLaMA's mask, and a **collapse**", "rmsnorm", None),
    "modified": ("class token first, and it alone sees all", "rmsnorm", None),
    "soft_first": ("class token first, and the **leak**", "causal", None),
    "ps_cls": ("the cure: the class token goes last", "rmsnorm", 71.9),
    "rope": ("rotary positions in place of learned ones", "ps_cls", 72.6),
    "abs_pos": ("learned positions as well", "rope", 73.2),
    "soft_mask": ("causal little by little: **iLLaMA**", "abs_pos", 75.0),
    "soft_constant": ("alpha 1 for an epoch, then 0 at once", "soft_mask", None),
    "soft_log": ("a soft mask that does not leak", "soft_mask", None),
}


def by_rung(name, key="test_acc1", **fields):
    """{rung: {seed: its value}} of the rows with these fields; of several rows for a seed the last one counts."""
    found = {}
    for row in rows(name):
        if all(row[field] == value for field, value in fields.items()):
            found.setdefault(row["step"], {})[row["seed"]] = row[key]
    return found


def climbed():
    """{rung: accuracies} of the longest runs that there are of every rung, by the seeds that all rungs have; and their
    epochs."""
    for last in sorted({row["epoch"] for row in rows("ladder")}, reverse=True):
        found = by_rung("ladder", epoch=last)
        seeds = sorted(set.intersection(*(set(values) for values in found.values())))
        if found.keys() >= RUNGS.keys() and len(seeds) > 1:
            return {rung: [found[rung][seed] for seed in seeds] for rung in RUNGS}, last + 1
    raise ValueError("ladder.jsonl has no two seeds of every rung: run results/ladder.py")


def quantile_of_t(degrees, share=0.95):
    """Within how many standard errors a share of Student's t distribution lies: Fisher's expansion about the normal."""
    z = NormalDist().inv_cdf((1 + share) / 2)
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
    """Those of the changes {rung: difference} that are not noise, by Holm's step-down procedure: the probability that any
    of them is called so wrongly is at most `level`."""
    found = set()
    for tested, rung in enumerate(sorted(changes, key=lambda rung: -abs(changes[rung]))):
        if abs(changes[rung]) <= quantile_of_t(degrees, 1 - level / (len(changes) - tested)) * error:
            break
        found.add(rung)
    return found


def plus_minus(values, digits=1):
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def steps_table():
    found, epochs = climbed()
    changes = {rung: fmean(found[rung]) - fmean(found[peer]) for rung, (_, peer, _) in RUNGS.items() if peer}
    error, degrees = standard_error(found)
    beyond = significant(changes, error, degrees)
    lines = ["| `--step` | what it does | CIFAR-10 top-1, here | against | difference | significant? "
             "| ImageNet top-1, published ¹ |", "|---|---|--:|---|--:|---|--:|"]
    for rung, (what, peer, published) in RUNGS.items():
        cells = [f"`{peer}`", f"{changes[rung]:+.1f}", "yes" if rung in beyond else "no"] if peer else ["", "", ""]
        theirs = "" if published is None else f"{published}{' ²' if rung == 'soft_mask' else ''}"
        flags = FLAGS[rung].removeprefix("--step ")
        lines.append(f"| `{flags}` | {what} | {plus_minus(found[rung])} | {' | '.join(cells)} | {theirs} |")
    table = "\n".join(lines)
    return f"""{table}

Mean and standard deviation of {len(found["vit"])} seeds, {epochs} epochs. Significant: Student's t test with {degrees} degrees
of freedom, a seed's effect on all rungs taken out (standard error of a difference: {error:.2f} points), corrected for the
{len(changes)} comparisons of this table by Holm's procedure at 5 %. What is not significant need not be equal."""


def collapse_table():
    lines = ["| rung | where the class token looks, block by block | variance of a logit over pictures |", "|---|---|--:|"]
    for row in rows("collapse"):
        picture = f'<img src="assets/attention-{row["step"]}.png" alt="Attention of {row["step"]}">'
        lines.append(f"| `{row['step']}` | {picture} | {row['logit_variance']:.2g} |")
    return "\n".join(lines)


def seeds_of(name, key, step):
    return list(by_rung(name, key)[step].values())


def rank_table():
    lines = ["| block | ViT, 80 % | iLLaMA, 80 % | ViT, 90 % | iLLaMA, 90 % |", "|---|--:|--:|--:|--:|"]
    columns = [seeds_of("properties", key, step) for key in ("rank_80", "rank_90") for step in ("vit", "soft_mask")]
    for block in range(len(columns[0][0])):
        cells = [plus_minus([fmean(seed[block]) for seed in column]) for column in columns]
        lines.append(f"| {block + 1} | {' | '.join(cells)} |")
    uniform = torch.full((65, 65), 1 / 65)                               # attention that tells no token from another
    cells = [str(values_for(share, each).item()) for share in (0.8, 0.9) for each in (uniform, uniform.tril())]
    return "\n".join([*lines, f"| uniform attention | {' | '.join(cells)} |"])


def calibration_table():
    lines = ["| | top-1 | calibration error |", "|---|--:|--:|"]
    for step, name in (("vit", "ViT"), ("soft_mask", "iLLaMA")):
        accuracy, error = (seeds_of("properties", key, step) for key in ("test_acc1", "ece"))
        lines.append(f"| {name} | {plus_minus(accuracy)} % | {plus_minus([100 * ece for ece in error])} % |")
    return "\n".join(lines)


def shape_table():
    lines = ["| rung | top-1, both cues agree | shape bias, cues at odds |", "|---|--:|--:|"]
    for step in by_rung("shape-bias"):
        accuracy, bias = (seeds_of("shape-bias", key, step) for key in ("test_acc1", "shape_bias"))
        lines.append(f"| `{step}` | {plus_minus(accuracy)} % | {plus_minus([100 * share for share in bias])} % |")
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


def macs_table():
    lines = ["| multiply-accumulates | as the authors count | as run | causal at best |", "|---|--:|--:|--:|"]
    for size in list(SIZES)[1:]:
        for img_size in (224, 384, 512):
            macs = multiply_accumulates(config(size, img_size=img_size, mask="causal"))
            cells = [f"{count / 1e9:.4f} G" for count in macs.values()]
            lines.append(f"| {size}, {img_size} pixels | {' | '.join(cells)} |")
    lines += ["", "| inference, size T, float32, eager, batch 4 | bidirectional | `causal` |", "|---|--:|--:|"]
    found = measured("causal")
    for img_size in (224, 384, 512):
        rates = [found[name, "float32", False, img_size, 4]["images_per_s"] for name in ("bidirectional", "causal")]
        lines.append(f"| {img_size} pixels | {rates[0]:.1f} images/s | {rates[1] / rates[0]:.2f} x |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


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
        pairs = [[found[(model, *column, *inputs)]["images_per_s"] for model in (name, names[0])] for column in COLUMNS]
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
        saved = [measured(run)[(name, "float32", compiled, *inputs)]["saved_mb"]
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


def files_table():
    lines = ["A data-loading worker shares the main process's memory until one of them writes to it. Memory of its own, in MB,",
             "while it reads a folder of a million images:", "",
             "| file list | start-up | at the first batch | after 140 s |", "|---|--:|--:|--:|"]
    for name, what in (("torchvision", "torchvision's ImageFolder: a list of tuples"), ("ours", "here: arrays")):
        start, *looks = [row for row in rows("bench_files") if row["contender"] == name and row["files"] == 1_000_000]
        first, last = (max(look["private_mb"]) for look in (looks[0], looks[-1]))
        lines.append(f"| {what} | {start['startup_s']:.1f} s | {first:.0f} | {last:.0f} |")
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
of size T and for iLLaMA-S; the published parameter counts, to the digit, for all sizes; on two CPU cores
{shapes:.1f} % top-1 on the built-in pictures after {minutes:.0f} minutes, and {cifar:.1f} % on CIFAR-10 after {more:.0f}, both from
scratch; and each step and each property that the paper claims, measured again on small models, whether it shows there or
not. The published models reach 75.0 % (5.7M parameters) to 86.0 % (310M) on ImageNet: that takes GPUs, and has not been
run here."""


def written(readme):
    """The README's text with each part between its two marks made anew."""
    parts = dict(claim=claim, ladder=ladder_table, steps=steps_table, collapse=collapse_table, rank=rank_table,
                 calibration=calibration_table, shape=shape_table, int8=int8_table, macs=macs_table, runs=runs_table,
                 published=published_table, speed=speed_table, memory=memory_table, growth=growth_table, soak=soak_table,
                 files=files_table)
    for mark, table in parts.items():
        before, after = readme.split(f"<!-- {mark} -->\n")
        readme = f"{before}<!-- {mark} -->\n{table()}\n{after[after.index('<!-- end -->'):]}"
    return readme


def draw_ladder(plt):
    """Each seed a dot, each mean a bar; below, the published accuracies."""
    found, _ = climbed()
    fig, (ours, theirs) = plt.subplots(2, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    for x, (rung, (_, _, published)) in enumerate(RUNGS.items()):
        colour = "C0" if rung in STEPS else "C1"
        if rung == "causal":
            text = f"collapsed:\n{fmean(found[rung]):.1f} %"
            ours.annotate(text, (x, 0.02), xycoords=("data", "axes fraction"), ha="center")
        else:
            ours.plot([x] * len(found[rung]), found[rung], "o", color=colour, markersize=4, alpha=0.6)
            ours.plot([x - 0.3, x + 0.3], [fmean(found[rung])] * 2, color=colour)
        if published is not None:
            theirs.plot(x, published, "s", color="C2")
    lowest = min(min(values) for rung, values in found.items() if rung != "causal")
    ours.set(ylabel="CIFAR-10 top-1, here, %", ylim=(lowest - 3, None))
    theirs.set(ylabel="ImageNet top-1,\npublished, size T, %", ylim=(71, 76))
    theirs.set_xticks(range(len(RUNGS)), RUNGS, rotation=30, ha="right")
    for ax in (ours, theirs):
        ax.grid(alpha=0.3)
    fig.savefig(ROOT / "assets" / "ladder.png", dpi=130)


def draw_properties(plt):
    """How flat the attention maps are, and how often a model is right when it is so sure."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for step, name, colour, shift in (("vit", "ViT", "C1", -0.1), ("soft_mask", "iLLaMA", "C0", 0.1)):
        seeds = seeds_of("properties", "rank_90", step)
        points = [(block + 1 + shift, count) for seed in seeds for block, heads in enumerate(seed) for count in heads]
        left.plot(*zip(*points), "o", color=colour, markersize=4, alpha=0.5, label=name)
        for i, bins in enumerate(seeds_of("properties", "reliability", step)):
            points = [(100 * sure, 100 * accuracy) for pictures, sure, accuracy in bins if pictures >= 30]
            right.plot(*zip(*points), "o-", color=colour, markersize=3, alpha=0.6, label=None if i else name)
    right.plot([0, 100], [0, 100], ":", color="grey")
    left.set(xlabel="block", ylabel="singular values for 90 %", xticks=range(1, len(seeds[0]) + 1), ylim=(0, None))
    right.set(xlabel="confidence, %", ylabel="right, %", xlim=(0, 100), ylim=(0, 100))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    fig.savefig(ROOT / "assets" / "properties.png", dpi=130)


def draw_curves(plt):
    fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, (title, _) in RUNS.items():
        ax.plot([row["time_s"] / 60 for row in rows(name)], [row["test_acc1"] for row in rows(name)], "o-",
                markersize=3, label=title.replace("`", ""))
    ax.set(xlabel="minutes on 2 CPU cores", ylabel="top-1 on unseen pictures, %", ylim=(0, 100), xticks=range(0, 21, 5))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", frameon=False)
    fig.savefig(ROOT / "assets" / "curves.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the README's tables and figures from the rows in results/.")
    parser.add_argument("--figures", action="store_true", help="draw those in assets/ as well")
    args = parser.parse_args()
    if args.figures:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            sys.exit("error: --figures needs matplotlib: pip install matplotlib")
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
    if args.figures:
        for draw in (draw_ladder, draw_properties, draw_curves):
            draw(plt)
