"""How fast a training step and inference are, and how much memory training takes, beside models of others.

    pip install --no-deps timm==0.5.4
    python -m benchmarks.bench_model --out out/training.jsonl

All contenders are built first and then timed in turns, so that a slow minute of the machine hits all of them; each row
is the median of the turns. `peak` is the fraction of the peak matmul throughput, measured between them: 2
(inference) or 6 (training) times the published dense multiply-accumulates of the iLLaMA of that size, per second.
`saved_mb` is the activation memory (saved for backward), in 10^6 bytes.
"""
import argparse
import importlib
import itertools
import statistics
import sys
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F
import torchvision

from experiments.properties import multiply_accumulates
from harness.processes import wrap
from harness.run import Machine, append_row
from model import VisionTransformer, config


def medians_in_turns(ways, repeats, warm_up=0):
    """{name: median seconds} of functions that take turns, so that a slow minute of the machine hits all of them."""
    seconds = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def peer(module):
    """A module of timm, without the warnings that so old a package gives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError:
        sys.exit("error: timm is missing: pip install --no-deps timm==0.5.4")


def illama(size="tiny", **fields):
    def build(img_size):
        model = VisionTransformer(config(size, img_size=img_size, **fields))
        if model.cfg.soft:
            model.set_soft_mask(0.5)
        return model
    return build


MODELS = {  # name: how it is built, for an image size
    "timm vit": lambda img_size: peer("timm").create_model("vit_tiny_patch16_224", img_size=img_size),
    "vit": illama(step="vit"),
    "bidirectional": illama(mask="none"),
    "causal": illama(step="abs_pos"),
    "soft": illama(),
    "soft_log": illama(mask="soft_log"),
    "soft recompute": illama(),
    "torchvision base": lambda img_size: torchvision.models.vit_b_16(image_size=img_size),
    "soft base": illama("base"),
}


def forward(model, images, labels, dtype):
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return F.cross_entropy(model(images), labels)


@torch.no_grad()
def inference(model, *batch):
    forward(model, *batch)


def training_step(model, *batch):
    forward(model, *batch).backward()
    model.zero_grad()


def saved_for_backward(model, *batch):
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights and tables not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(model, *batch)   # kept, or the tensors would go, and others could take their addresses
    del loss
    return sum(saved.values())


def matmul(a, b):
    for _ in range(4):
        a @ b


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS,
                        default=["timm vit", "vit", "causal", "soft", "soft_log", "soft recompute"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="and bfloat16, which a CPU may emulate")
    parser.add_argument("--compile", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--img-sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inference", action="store_true", help="a forward pass, not a training step")
    parser.add_argument("--out", help="append the rows to this file as well")
    args = parser.parse_args()

    torch._dynamo.config.recompile_limit = 100             # all models share one forward's code, and stay compiled
    torch.manual_seed(0)
    ways, rows, n = {}, {}, 2048
    for dtype in args.dtypes:
        ways[dtype] = partial(matmul, *torch.randn(2, n, n).to(getattr(torch, dtype)))
    for key in itertools.product(args.models, args.dtypes, args.compile, args.img_sizes, args.batch_sizes):
        name, dtype, compiled, img_size, batch_size = key
        model = MODELS[name](img_size).train(not args.inference)
        machine = Machine(compile=bool(compiled), recompute="recompute" in name)
        net = wrap(model, getattr(model, "blocks", []), machine, world=1)
        images, labels = torch.randn(batch_size, 3, img_size, img_size), torch.randint(1000, (batch_size,))
        batch = images, labels, getattr(torch, dtype)
        ways[key] = partial(inference if args.inference else training_step, net, *batch)
        rows[key] = dict(model=name, dtype=dtype, compiled=bool(compiled), img_size=img_size, batch_size=batch_size,
                         training=not args.inference)
        for _ in range(2):
            ways[key]()
        if not args.inference:
            rows[key]["saved_mb"] = round(saved_for_backward(model, *batch) / 1e6, 1)
        print(f"ready: {rows[key]}", file=sys.stderr)

    seconds = medians_in_turns(ways, args.repeats)
    for key, row in rows.items():
        name, dtype, _, img_size, batch_size = key
        cfg = config("base" if name.endswith("base") else "tiny", img_size=img_size)
        work = (2 if args.inference else 6) * multiply_accumulates(cfg)["published"]
        rate, peak = batch_size / seconds[key], 4 * 2 * n ** 3 / seconds[dtype]
        append_row(row | dict(images_per_s=round(rate, 3), peak=round(rate * work / peak, 3),
                              matmul_gflops=round(peak / 1e9)), args.out)


if __name__ == "__main__":
    main()
