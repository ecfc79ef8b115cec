"""How fast a training step and inference are, and how much memory they take, beside others' models.

    pip install --no-deps timm==0.5.4                    # or any other version, which the rows name
    python -m replication.bench_model --out out/training.jsonl
    python -m replication.bench_model --device cuda --sizes base --dtypes bfloat16 --batch-sizes 128

All contenders are built first and then timed in turns, so that a slow minute of the machine hits
all of them. That is done three times: `images_per_s_each` has the medians of the turns, in order,
and `images_per_s` is their median. `published` is the authors' own model, from their repository's
folder models/ on PYTHONPATH. `peak` is the fraction of the peak matmul throughput, measured between
them: 2 (inference) or 6 (training) times the published dense multiply-accumulates of the iLLaMA of
that size, per second. `saved_mb` is the activation memory (saved for backward); `step_mb`, on a
GPU, the most memory that a step takes beside the weights; both in 10^6 bytes.
"""
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

from harness.flags import InputError, Parser, check_bounds, nonempty, require
from harness.processes import DEVICES, processor, report_errors, use_tf32, wrap
from harness.run import Machine
from model import SIZES, VisionTransformer, config
from replication.fused import DoubledKeys, TwoPasses
from replication.properties import append_row, multiply_accumulates, one_process

# tf32: float32 with TF32 in matrix multiplications
DTYPES = ("float32", "tf32", "bfloat16", "float16")


def medians_in_turns(ways, repeats, warm_up=0):
    """{name: median seconds} of functions that take turns, so that a slow minute of the machine
    hits all of them."""
    seconds = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def peer(module, remedy="pip install --no-deps timm==0.5.4"):
    """A module of others, without the warnings that an old one gives."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} cannot be imported ({error}): {remedy}, or leave it out of "
                         "--models") from error


def build_timm(size, img_size):
    return peer("timm").create_model(f"vit_{size}_patch16_224", img_size=img_size)


def build_torchvision(size, img_size):
    require(size in ("base", "large"), f"torchvision has no ViT of size {size}: leave it out of "
            "--models or --sizes")
    return getattr(torchvision.models, f"vit_{size[0]}_16")(image_size=img_size)


def build_illama(size, img_size, **fields):
    model = VisionTransformer(config(size, img_size=img_size, **fields))
    if model.cfg.soft:
        model.set_soft_mask(0.5)
    return model


def build_fused(attention, size, img_size):
    """`soft` with another way to its attention, but in the last block, of which one token is
    read."""
    model = build_illama(size, img_size)
    for block in model.blocks[:-1]:
        block.attn = attention(model.cfg)
    return model


def build_published(size, img_size):
    authors = peer("illama", "put models/ of a clone of github.com/techmonsterwang/iLLaMA on "
                   "PYTHONPATH, with timm beside it")
    model = getattr(authors, f"illama_{size}")(img_size=img_size)
    model.update_soft_mask(0.5)
    return model


MODELS = {  # name: how it is built, for a size and an image size
    "timm": build_timm,
    "torchvision": build_torchvision,
    "vit": partial(build_illama, step="vit"),
    "none": partial(build_illama, mask="none"),
    "causal": partial(build_illama, mask="causal"),
    "soft": build_illama,
    "soft_log": partial(build_illama, mask="soft_log"),
    "soft, recompute": build_illama,
    "soft, two passes": partial(build_fused, TwoPasses),
    "soft, doubled keys": partial(build_fused, DoubledKeys),
    "published": build_published,
}


class Contender:
    """A model, and a batch that it is timed on."""

    def __init__(self, name, size, dtype, compiled, img_size, batch_size, training, device):
        self.model = MODELS[name](size, img_size).to(device).train(training)
        machine = Machine(compile=bool(compiled), recompute="recompute" in name)
        wrap(self.model, getattr(self.model, "blocks", []), machine, world=1)
        self.images = torch.randn(batch_size, 3, img_size, img_size, device=device)
        self.labels = torch.randint(1000, (batch_size,), device=device)
        self.dtype, self.training, self.device = dtype, training, device
        for _ in range(2):                                           # compiles it
            self.run()

    def loss(self):
        use_tf32(self.dtype == "tf32")
        low = self.dtype in ("bfloat16", "float16")
        dtype = getattr(torch, self.dtype) if low else torch.float32
        with torch.autocast(self.device.type, dtype, enabled=low):
            return F.cross_entropy(self.model(self.images), self.labels)

    def run(self):
        """A training step without the optimizer's update, or inference."""
        if self.training:
            self.loss().backward()
            self.model.zero_grad()
        else:
            with torch.no_grad():
                self.loss()
        synchronize(self.device)

    def memory(self):
        """What a row says of it."""
        found = {}
        if self.training:
            found["saved_mb"] = round(self.saved_for_backward() / 1e6, 1)
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            found["step_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
        return found

    def saved_for_backward(self):
        """Bytes of the tensors that a forward pass keeps for the backward pass, weights and tables
        not counted."""
        own = {tensor.untyped_storage().data_ptr()
               for tensor in [*self.model.parameters(), *self.model.buffers()]}
        saved = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Kept, or the tensors would go, and others could take their addresses
            loss = self.loss()
        del loss
        return sum(saved.values())


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul(a, b, tf32):
    use_tf32(tf32)
    for _ in range(4):
        a @ b
    synchronize(a.device)


@report_errors()
def main(argv=None):
    parser = Parser(prog="python -m replication.bench_model", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS,
                        default=["timm", "vit", "causal", "soft", "soft_log", "soft, recompute"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--compile", nargs="+", type=int, choices=(0, 1), default=[0, 1])
    parser.add_argument("--img-sizes", nargs="+", type=int, default=[224])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inference", action="store_true",
                        help="a forward pass, not a training step")
    parser.add_argument("--device", choices=DEVICES, default="auto",
                        help="auto takes a GPU where there is one")
    parser.add_argument("--out", type=nonempty, help="append the rows to this file as well")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    device = one_process(args.device)

    # All models share one forward's code, and stay compiled for the shape that each is timed on,
    # whatever came before
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.manual_seed(0)
    n = 8192 if device.type == "cuda" else 2048            # large enough for all of its throughput
    names = ("model", "size", "dtype", "compiled", "img_size", "batch_size")
    ways, rows = {}, {}
    for dtype in args.dtypes:
        a, b = torch.randn(2, n, n, device=device).to(
            getattr(torch, dtype.replace("tf32", "float32")))
        ways[dtype] = partial(matmul, a, b, dtype == "tf32")
    for key in itertools.product(args.models, args.sizes, args.dtypes, args.compile,
                                 args.img_sizes, args.batch_sizes):
        contender = Contender(*key, not args.inference, device)
        row = dict(zip(names, key)) | dict(compiled=bool(key[3]), training=not args.inference)
        rows[key] = row | contender.memory()
        ways[key] = contender.run
        print(f"ready: {rows[key]}", file=sys.stderr)

    timings = [medians_in_turns(ways, args.repeats, warm_up=1) for _ in range(3)]
    versions = dict(device=processor(device))
    if "timm" in args.models:
        versions["timm"] = peer("timm").__version__
    for key, row in rows.items():
        macs = multiply_accumulates(config(row["size"], img_size=row["img_size"]))["published"]
        work = (2 if args.inference else 6) * macs
        each = [round(row["batch_size"] / seconds[key], 3) for seconds in timings]
        rate = statistics.median(each)
        peak = 4 * 2 * n ** 3 / statistics.median(seconds[row["dtype"]] for seconds in timings)
        append_row(row | dict(images_per_s=rate, images_per_s_each=each,
                              peak=round(rate * work / peak, 3), matmul_gflops=round(peak / 1e9),
                              **versions), args.out)


if __name__ == "__main__":
    main()
