"""How fast a training step and inference are, beside the models that people would use otherwise.

    pip install --no-deps timm==0.5.4
    python benchmarks/bench_model.py --out results/bench_model.jsonl

All contenders are built first and then timed in turns, so that a slow minute of the machine hits all of them; each row
is the median of the turns. `peak` is the share of the fastest matrix product that the machine did between them: 2
(inference) or 6 (training) times the published dense multiply-accumulates of iLLaMA-T, per second.
"""
import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import VisionTransformer, config  # noqa: E402


def peer(module):
    """A module of timm, without the warnings that so old a package gives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError:
        sys.exit("error: timm is missing: pip install --no-deps timm==0.5.4")


def report(row, out):
    """Print a row, and append it to the file `out` if there is one."""
    print(json.dumps(row))
    if out:
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")


def timm_vit(img_size):
    return peer("timm").create_model("vit_tiny_patch16_224", img_size=img_size)


def illama(**fields):
    def build(img_size):
        model = VisionTransformer(config("tiny", img_size=img_size, **fields))
        if model.cfg.mask.startswith("soft"):
            model.set_soft_mask(0.5)
        return model
    return build


MODELS = {
    "timm vit": timm_vit,
    "vit": illama(step="vit"),
    "causal": illama(step="abs_pos"),
    "soft": illama(),
    "soft_log": illama(mask="soft_log"),
}


def multiply_accumulates(img_size, width=192, depth=12, hidden=512, patch=16, classes=1000):
    """iLLaMA-T's as published: dense attention, all tokens in all blocks."""
    tokens = (img_size // patch) ** 2 + 1
    block = tokens * (4 * width ** 2 + 3 * width * hidden) + 2 * tokens ** 2 * width
    return 3 * patch ** 2 * width * (tokens - 1) + depth * block + classes * width


def step(model, images, labels, dtype, train):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(train):
        logits = model(images)
        if train:
            F.cross_entropy(logits, labels).backward()
    model.zero_grad()


def matmul_peak(dtype, n=2048):
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * n ** 3 / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inference", action="store_true", help="a forward pass, not a training step")
    parser.add_argument("--out", help="append the rows to this file as well")
    args = parser.parse_args()

    torch._dynamo.config.recompile_limit = 100             # all contenders share one forward's code, and stay compiled
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    labels = torch.randint(1000, (args.batch_size,))
    contenders = {}
    for name in args.models:
        for dtype in args.dtypes:
            for compiled in args.compile:
                model = MODELS[name](args.img_size).train(not args.inference)
                if compiled:
                    model.compile()
                for _ in range(2):
                    step(model, images, labels, getattr(torch, dtype), not args.inference)
                contenders[name, dtype, compiled] = model, []
                print(f"ready: {name} {dtype} {'compiled' if compiled else 'eager'}", file=sys.stderr)

    peaks = {dtype: [] for dtype in args.dtypes}
    for _ in range(args.repeats):
        for dtype in args.dtypes:
            peaks[dtype].append(matmul_peak(getattr(torch, dtype)))
        for (name, dtype, compiled), (model, seconds) in contenders.items():
            start = time.perf_counter()
            step(model, images, labels, getattr(torch, dtype), not args.inference)
            seconds.append(time.perf_counter() - start)

    work = (2 if args.inference else 6) * multiply_accumulates(args.img_size)
    for (name, dtype, compiled), (_, seconds) in contenders.items():
        rate = args.batch_size / statistics.median(seconds)
        row = dict(model=name, dtype=dtype, compiled=bool(compiled), img_size=args.img_size, batch_size=args.batch_size,
                   training=not args.inference, images_per_s=round(rate, 2),
                   peak=round(rate * work / max(peaks[dtype]), 3), matmul_gflops=round(max(peaks[dtype]) / 1e9))
        report(row, args.out)


if __name__ == "__main__":
    main()
