"""How good is a trained model?

    python eval.py out/tiny-soft_mask-shapes-1/best.pt                       # on the data that it was trained on
    python eval.py out/tiny-soft_mask-shapes-1/best.pt --data PATH --json    # on PATH/val, as one line of JSON
    python eval.py out/tiny-soft_mask-shapes-1/best.pt --image cat.jpg       # its five most likely classes
    python eval.py illama-tiny-in1k-75.0 --data PATH                         # the published weights
    torchrun --nproc_per_node=8 eval.py ...                                  # the same numbers, sooner

A checkpoint knows its model, its classes and its soft mask, so no flags say them again.
"""
import argparse
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from threading import Event

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

from data import EvalSampler, Images, eval_transform, loader, normalize, open_data, read_image
from model import Config, VisionTransformer, check_fit, config_of, depth_of, read_checkpoint, weights_of

# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices, shared with train.py


class Parser(argparse.ArgumentParser):
    """argparse, with wrong flags as ValueErrors: they are told as all bad input is."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


@contextmanager
def explain():
    """Bad input ends a program with its one sentence, said once a machine, and exit code 2."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)   # the first process says it, and torchrun ends the others; unless all is well with the first
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def setup(device="auto", dtype="auto"):
    """Join the other processes if torchrun started some. Returns (rank, world, torch.device, torch.dtype).

    `auto` takes a GPU where there is one; it computes in bfloat16 on CUDA and in float32 elsewhere.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and "RANK" in os.environ:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}: start with torchrun, which sets them all")
    rank, world, local = (int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0)))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps and world == 1 else "cpu"
    if device not in ("cuda", "mps", "cpu"):
        raise ValueError(f"unknown --device {device!r}; choose one of auto, cuda, mps, cpu")
    if device == "cuda" and neighbours > gpus:
        raise ValueError(f"--device cuda: this machine has {gpus} GPUs for {neighbours} processes; "
                         "start fewer, or use --device cpu")
    if device == "mps" and (not mps or world > 1):
        raise ValueError(f"--device mps: {'one process at a time' if mps else 'there is none on this machine'}; "
                         "use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown --dtype {dtype!r}; choose one of auto, float32, bfloat16, float16")
    if dtype == "float16" and device != "cuda":
        raise ValueError(f"--dtype float16 needs a CUDA GPU, this is {device}; use bfloat16 or float32")
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device), getattr(torch, dtype)


def in_turn(function, *args, **kwargs):
    """Call a function in the first process of each machine, then in the others: so it downloads once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        return function(*args, **kwargs)
    finally:   # after an error too: then the others meet it as well, and all end
        if dist.is_initialized() and first:
            dist.barrier()


def default_workers():
    """Loader processes: this process's share of the cores that it may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


@torch.no_grad()
def evaluate(model, batches, device, dtype=torch.float32, stop=Event()):
    """Accuracy in percent and mean cross-entropy over the batches of all ranks; every image counts once.

    Returns dict(test_acc1, test_acc5, test_loss, images, time_images_per_s), or None if some rank's `stop` was set in
    between. Leaves the model in eval mode. ValueError if a picture cannot be read.
    """
    model.eval()
    start, rows = time.time(), [torch.zeros(4)]
    for images, labels, faults in batches:
        if stop.is_set():
            break
        if any(faults):
            raise ValueError(next(filter(None, faults)))
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(normalize(images)).float()
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        rows.append(torch.stack([hits[:, 0].sum(), hits.sum(), loss, loss.new_tensor(len(labels))]))
    total = torch.stack([row.cpu() for row in rows]).double().sum(0)
    total = torch.cat([total, total.new_tensor([stop.is_set()])])
    if dist.is_initialized():
        total = total.to(device)
        dist.all_reduce(total)
    hits1, hits5, loss, images, stopped = total.tolist()
    if stopped:
        return None
    return dict(test_acc1=100 * hits1 / images, test_acc5=100 * hits5 / images, test_loss=loss / images,
                images=int(images), time_images_per_s=images / (time.time() - start))


def open_checkpoint(source):
    """A checkpoint of train.py as it is; published weights, which are bare, as train.py would have saved them."""
    checkpoint = read_checkpoint(source)
    if "config" in checkpoint:
        return require(checkpoint, ("model", "classes", "alpha", "run"), source)
    state = weights_of(checkpoint)
    return dict(config=asdict(config_of(state, source)), model=state, classes=None, alpha=0.0,
                run=dict(dtype="float32"))


def require(checkpoint, keys, name):
    """The checkpoint, if it has the keys; a ValueError with its `name` if not."""
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}: use a checkpoint that train.py wrote "
                         "(--resume takes a run's last.pt)")
    return checkpoint


def build(checkpoint):
    """The model of a checkpoint, with its weights and its soft mask."""
    state = weights_of(checkpoint)
    try:
        cfg = Config(**checkpoint["config"])
        with torch.device("meta"):                     # shapes alone: a wrong configuration takes no memory or time
            check_fit(VisionTransformer(replace(cfg, depth=min(cfg.depth, depth_of(state) + 1))), state)
    except (TypeError, RuntimeError) as error:         # wrong fields, wrong kinds, shapes beyond all bounds
        raise ValueError(f"the checkpoint's config is none of this model's ({error}): use another file") from error
    model = VisionTransformer(cfg)
    model.load_state_dict(state)
    if checkpoint["alpha"] is not None:
        model.set_soft_mask(checkpoint["alpha"])
    return model


@torch.no_grad()
def classify(model, path, transform, classes, device, dtype):
    """The five most likely classes of a picture and their probabilities, likeliest first: {name: probability}."""
    pixels, *_ = Images([(read_image(path), 0)], transform)[0, 0]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        probabilities = model(normalize(pixels[None].to(device))).float().softmax(-1)[0]
    top = probabilities.topk(min(5, len(classes)))
    return {classes[i]: p for i, p in zip(top.indices.tolist(), top.values.tolist())}


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run, a file of published weights, or a name of one")
    parser.add_argument("--data", help="a built-in data set or a folder with val/CLASS/PICTURE; default: the run's own")
    parser.add_argument("--image", help="name the five most likely classes of this picture instead")
    parser.add_argument("--soft-mask", type=float, help="alpha instead of the checkpoint's: 1 bidirectional, 0 causal")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    parser.add_argument("--batch-size", type=int, default=256, help="images a forward pass on one rank")
    parser.add_argument("--workers", type=int, default=default_workers(), help="loader processes a rank")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")

    with explain():
        args = parser.parse_args(argv)
        if args.batch_size < 1 or args.workers < 0:
            raise ValueError("--batch-size must be at least 1 and --workers at least 0")
        if args.image and args.data:
            raise ValueError("--image looks at one picture and --data at many: drop one of them")
        rank, world, device, dtype = setup(args.device, args.dtype)
        checkpoint = in_turn(open_checkpoint, args.checkpoint)
        if args.dtype == "auto" and checkpoint["run"]["dtype"] == "float32":
            dtype = torch.float32                            # as it was trained
        model = build(checkpoint).to(device).eval()
        alpha = checkpoint["alpha"]
        if args.soft_mask is not None:
            alpha = args.soft_mask
            model.set_soft_mask(alpha)
        classes, size = checkpoint["classes"], model.cfg.img_size
        transform = partial(eval_transform, size=size)
        if args.image:
            if classes is None and model.cfg.num_classes != 1000:
                raise ValueError(f"{args.checkpoint} does not name its {model.cfg.num_classes} classes, so --image "
                                 "cannot: use a checkpoint that train.py wrote")
            if classes is None:
                classes = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
            likely = classify(model, args.image, transform, classes, device, dtype)
            lines = [f"{100 * p:5.1f} %  {name}" for name, p in likely.items()]
            if rank == 0:
                print(json.dumps(likely) if args.json else "\n".join(lines))
            return
        data = args.data or checkpoint["run"].get("data")
        if data is None:
            raise ValueError(f"{args.checkpoint} does not say what it was trained on: give --data or --image")
        source = in_turn(open_data, data, "val", size, classes)
        if len(source.classes) != model.cfg.num_classes:
            raise ValueError(f"--data {data} has {len(source.classes)} classes, but the model knows "
                             f"{model.cfg.num_classes}: use the data that it was trained on")

    batches = loader(Images(source, transform), EvalSampler(len(source), args.batch_size, rank, world), args.workers)
    with explain():
        result = evaluate(model, batches, device, dtype)
    result |= dict(img_size=size, alpha=alpha)
    if rank == 0:
        if args.json:
            print(json.dumps(result))
        else:
            mask = f"mask {model.cfg.mask}" + ("" if alpha is None else f" alpha {alpha:g}")
            print(f"top-1 {result['test_acc1']:.3f} %  top-5 {result['test_acc5']:.3f} %  "
                  f"loss {result['test_loss']:.4f}  {result['images']:,} images at {size} x {size}, {mask}, "
                  f"{result['time_images_per_s']:,.0f} images/s")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
