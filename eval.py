"""How good is a trained model, and what is it like?

    python eval.py out/tiny-soft_mask-shapes-1/best.pt                       # on the data that it was trained on
    python eval.py out/tiny-soft_mask-shapes-1/best.pt --data PATH --json    # on PATH/val, as one line of JSON
    python eval.py out/tiny-soft_mask-shapes-1/best.pt --image cat.jpg       # its five most likely classes
    python eval.py illama-tiny-in1k-75.0 --data PATH                         # the published weights
    torchrun --nproc_per_node=8 eval.py ...                                  # the same numbers, sooner

A checkpoint knows its model, its classes and its soft mask, so no flags say them again. Further properties, in any
number, beside the accuracy, in one process:

    --calibration          is it as often right as it is sure? Expected calibration error [1]
    --rank                 how flat is the spectrum of its attention maps? Their singular values
    --attention OUT.png    where does the class token look? On three pictures, or on --image
    --shape-bias DIR       does it go by shape or by texture? On pictures that pit them against each other [2]
    --int8                 what do 8-bit weights and activations cost?
    --macs                 how much work is an image? Multiply-accumulates

[1] Guo et al., arXiv 1706.04599       [2] Geirhos et al., arXiv 1811.12231
"""
import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from data import (EvalSampler, Images, categories, eval_transform, loader, normalize, open_conflict, open_data,
                  read_image, some)
from model import (Config, VisionTransformer, check_fit, config_of, conform, depth_of, masks, overrides, read_checkpoint,
                   weights_of)

# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices, shared with train.py


class Parser(argparse.ArgumentParser):
    """argparse, with wrong flags as ValueErrors: they are told as all bad input is."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


@contextmanager
def explain():
    """Bad input, and what the system refuses, ends a program with one sentence, said once a machine, and exit code 2."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError):
            reason = str(error)
        elif isinstance(error, OSError) and error.strerror:
            reason = f"{error.filename or 'the operating system'}: {error.strerror}: give another path or fewer processes"
        elif isinstance(error, MemoryError) or re.search("alloc|out of memory|overflow", str(error)):
            reason = "there is not enough memory for this: make the model, the images or the batch smaller"
        else:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)   # the first process says it, and torchrun ends the others; unless all is well with the first
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)


stop = []   # signals that asked to: a list, as a handler that took a lock could be made to wait for itself


def stop_on_signals():
    """SIGTERM and SIGINT ask the program to stop, by what they leave in `stop`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))


DEVICES, DTYPES = ("auto", "cuda", "mps", "cpu"), ("auto", "float32", "bfloat16", "float16")
patient = None   # a group of all ranks for waiting: NCCL would end those that wait ten minutes for a download or a scan


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
    if device == "cuda" and neighbours > gpus:
        raise ValueError(f"--device cuda: this machine has {gpus} GPUs for {neighbours} processes; "
                         "start fewer, or use --device cpu")
    if device == "mps" and (not mps or world > 1):
        raise ValueError(f"--device mps: {'one process at a time' if mps else 'there is none on this machine'}; "
                         "use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in DTYPES:   # of a checkpoint
        raise ValueError(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype == "float16" and device != "cuda":
        raise ValueError(f"--dtype float16 needs a CUDA GPU, this is {device}; use bfloat16 or float32")
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if world > 1:
        global patient
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return rank, world, device, getattr(torch, dtype)


def in_turn(function, *args, **kwargs):
    """Call a function in the first process of each machine, then in the others: so it downloads once."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier(patient)
    try:
        return function(*args, **kwargs)
    finally:   # after an error too: then the others meet it as well, and all end
        if dist.is_initialized() and first:
            dist.barrier(patient)


def on_first(function, *args):
    """Call a function on rank 0 alone; all ranks get what it returns, or the ValueError that it raises."""
    answer = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = function(*args)
        except ValueError as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer, group=patient)
    if answer[1]:
        raise answer[1]
    return answer[0]


def gather(value):
    """What each rank has, by rank."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value, group=patient)
    return values


def leave():
    """Part from the other ranks. The barrier lets gloo's threads put away their tensors, for which they need Python's
    lock; torch 2.6 holds it while it waits for these threads to end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_first():
    return os.environ.get("RANK", "0") == "0"


def default_workers():
    """Loader processes: this process's share of the cores that it may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy


@torch.no_grad()
def predict(model, batches, device, dtype=torch.float32, stop=()):
    """Logits (B, classes) in float32 and labels (B,) of each batch, until `stop` holds something. ValueError if an image
    cannot be read. Leaves the model in eval mode."""
    model.eval()
    for images, labels, faults in tqdm(batches, "evaluate", leave=False, disable=not is_first() or None):
        if stop:
            return
        if any(faults):
            raise ValueError(next(filter(None, faults)))
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(normalize(images))
        yield logits.float(), labels


def evaluate(model, batches, device, dtype=torch.float32, stop=(), keep=None):
    """Accuracy in percent and mean cross-entropy over the batches of all ranks; every image counts once.

    Returns dict(test_acc1, test_acc5, test_loss, images, time_images_per_s), or None if some rank's `stop` held something
    in between. `keep`, if given, is a list that takes this rank's (logits, labels) of each batch. The device is waited
    for once, at the end.
    """
    start, images, rows = time.time(), 0, [torch.zeros(3, device=device)]
    for logits, labels in predict(model, batches, device, dtype, stop):
        if keep is not None:
            keep.append((logits, labels))
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        rows.append(torch.stack([hits[:, 0].sum(), hits.sum(), loss]))
        images += len(labels)
    sums = torch.stack(rows).cpu().double().sum(0).tolist()
    total = torch.tensor([*sums, images, len(stop) > 0], dtype=torch.float64)
    if dist.is_initialized():
        total = total.to(device)
        dist.all_reduce(total)
    hits1, hits5, loss, images, stopped = total.tolist()
    if stopped:
        return None
    return dict(test_acc1=100 * hits1 / images, test_acc5=100 * hits5 / images, test_loss=loss / images,
                images=int(images), time_images_per_s=images / (time.time() - start))


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def calibration(logits, labels, bins=15):
    """Expected calibration error [1]: the mean over pictures of |accuracy - confidence| of their bin.

    logits (n, classes), labels (n,). Confidence is the largest probability, from i / bins to (i + 1) / bins in bin i.
    Returns dict(ece, reliability): ece from 0 to 1; (pictures, confidence, accuracy) of each bin that has any.
    ValueError if a logit is not a finite number.
    """
    if not logits.isfinite().all():
        raise ValueError("some logits are not finite numbers, so they hold no confidence: use another checkpoint")
    confidence, guess = logits.cpu().double().softmax(-1).max(-1)
    place, hits = (confidence * bins).ceil() - 1, (guess == labels.cpu()).double()
    inside = [place == i for i in range(bins)]
    rows = [(int(i.sum()), confidence[i].mean().item(), hits[i].mean().item()) for i in inside if i.any()]
    ece = sum(n * abs(accuracy - sure) for n, sure, accuracy in rows) / len(labels)
    return dict(ece=ece, reliability=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def values_for(share, maps):
    """How many singular values, largest first and not squared, reach a share of their sum: (..., N, N) -> (...)."""
    values = torch.linalg.svdvals(maps.cpu().double())                                       # ..., N
    return (values.cumsum(-1) / values.sum(-1, keepdim=True) < share).sum(-1) + 1


@torch.no_grad()
def attention_rank(model, images):
    """How many singular values of each attention map reach 80 and 90 % of their sum.

    images (B, 3, H, W). As in the published analysis, a head's maps are averaged over the images before they are
    decomposed. Returns dict(rank_80, rank_90), depth x heads each.
    """
    mean = sum(model.attention_maps(image[None])[:, 0] for image in images) / len(images)    # depth, heads, N, N
    return dict(rank_80=values_for(0.8, mean).tolist(), rank_90=values_for(0.9, mean).tolist())


@torch.no_grad()
def draw_attention(model, pictures, cell=128):
    """Where the class token looks, a row a picture: the picture, and for each block its patches from dark to yellow, by
    the attention that they get, mean over heads, the most in full yellow; below it their share of all attention.

    pictures (B, 3, H, W), uint8, on the model's device. Returns a PIL image.
    """
    B, side = len(pictures), model.cfg.img_size // model.cfg.patch_size
    maps = model.attention_maps(normalize(pictures)).mean(2)[:, :, model.cls].squeeze(2)     # depth, B, N
    patches = (maps[..., :-1] if model.cfg.cls_last else maps[..., 1:]).cpu()                # depth, B, P
    heat = patches / patches.amax(-1, keepdim=True).clamp(min=1e-12)
    heat = F.interpolate(heat.unflatten(-1, (side, side)), (cell, cell), mode="nearest")     # depth, B, cell, cell
    heat = heat[:, :, None]
    pixels = TF.resize(pictures.cpu(), [cell, cell], TF.InterpolationMode.NEAREST).float()   # B, 3, cell, cell
    colour = 255 * torch.cat([heat, heat ** 2, 0 * heat], dim=2)
    cells = torch.cat([pixels[None], (1 - heat) * pixels / 3 + heat * colour])               # 1 + depth, B, 3, ...
    sheet = Image.new("RGB", ((cell + 2) * len(cells), (cell + 16) * B), "white")
    for column, row in itertools.product(range(len(cells)), range(B)):
        name = f"block {column}: {100 * patches[column - 1, row].sum():.0f} %" if column else "picture"
        x, y = column * (cell + 2), row * (cell + 16)
        sheet.paste(TF.to_pil_image(cells[column, row].byte()), (x, y))
        ImageDraw.Draw(sheet).text((x + 2, y + cell + 1), name, fill="black")
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Shape or texture


def decide(logits, known):
    """The likeliest category of each picture: the highest mean probability over a category's classes [2].

    logits (n, classes), known {category: its classes} -> n categories.
    """
    probabilities = logits.softmax(-1)
    means = torch.stack([probabilities[:, classes].mean(-1) for classes in known.values()])
    return [list(known)[best] for best in means.argmax(0).tolist()]


def shape_bias(decisions, shapes, textures):
    """The share of shape among the decisions that were for a picture's shape or for its texture [2].

    Three lists of category names. Pictures whose shape and texture agree do not count. nan if no decision counts.
    """
    by_shape = sum(d == s != t for d, s, t in zip(decisions, shapes, textures, strict=True))
    by_texture = sum(d == t != s for d, s, t in zip(decisions, shapes, textures))
    return by_shape / (by_shape + by_texture) if by_shape + by_texture else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Size and work


def to_int8(x, dim=()):
    """Integers from -128 to 127, and the scale that they are multiplied by; symmetric, one scale for all of `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round().clamp(-128, 127), scale


def quantize(model):
    """A copy with 8-bit linear layers in its blocks, simulated in float, and its size in bytes.

    Weights have a scale for each output channel. What goes into a layer is rounded as it comes (dynamic), one scale
    for the whole tensor, so results depend a little on the batch. All else stays in float32.
    """
    model = copy.deepcopy(model)
    size = 4 * sum(p.numel() for p in model.parameters())
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            values, scale = to_int8(layer.weight.data, dim=1)
            layer.weight.data = values * scale
            layer.register_forward_pre_hook(lambda _, inputs: torch.mul(*to_int8(*inputs)))
            size += 4 * scale.numel() - 3 * values.numel()
    # All tokens through the last block: forward would slice weights there, past the hooks.
    model.forward = lambda images: model.head(model.forward_features(images)[:, model.cls]).squeeze(1)
    return model, size


def multiply_accumulates(cfg):
    """Those of one image, in linear layers, patches and attention. The authors count the same, and ViT's norms besides.

    `published`: all tokens in all blocks, all pairs of them in attention. `as_run`: of the last block only what the
    class token needs. `causal`: and of attention in the others only what the mask at alpha 0 leaves, which dense
    products do not save. A pair masked before the softmax needs neither product, one masked after it the first.
    """
    with torch.device("meta"):
        model = VisionTransformer(replace(cfg, depth=1))
    N, D = cfg.tokens, cfg.width
    mlp = sum(p.numel() for p in model.blocks[0].mlp.parameters() if p.ndim == 2)
    ends = model.patch_embed.proj.weight.numel() * (N - 1) + model.head.weight.numel()
    block = N * (4 * D ** 2 + mlp) + 2 * N ** 2 * D
    last = 2 * N * D ** 2 + 2 * D ** 2 + mlp + 2 * N * D             # keys and values of all, the rest of one
    bias, gate = masks(cfg)
    hidden = 0 if bias is None else 2 * D * int(bias.isinf().sum())
    hidden += 0 if gate is None else D * int((gate == 0).sum())
    return dict(published=ends + cfg.depth * block, as_run=ends + (cfg.depth - 1) * block + last,
                causal=ends + (cfg.depth - 1) * (block - hidden) + last)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and the command line


CHECKPOINT = dict(  # what is read of a checkpoint of train.py, for evaluation
    model=dict, config=Config, classes=list | None, alpha=float | int | None,
    run=dict(size=str, step=str, data=str, dtype=str, seed=int))


def open_checkpoint(source):
    """A checkpoint of train.py as it is; published weights, which are bare, as train.py would have saved them."""
    checkpoint = read_checkpoint(source)
    if "config" in checkpoint:
        conform(checkpoint, CHECKPOINT, source)
        return checkpoint
    state = weights_of(checkpoint)
    return dict(config=asdict(config_of(state, source)), model=state, classes=None, alpha=0.0,
                run=dict(dtype="float32"))


def build(checkpoint):
    """The model of a checkpoint, with its weights and its soft mask."""
    state, cfg = weights_of(checkpoint), Config(**checkpoint["config"])
    try:
        with torch.device("meta"):                     # shapes alone: a wrong configuration takes no memory or time
            check_fit(VisionTransformer(replace(cfg, depth=min(cfg.depth, depth_of(state) + 1))), state)
    except RuntimeError as error:                      # shapes beyond all bounds
        raise ValueError(f"the checkpoint's config is none of this model's ({error}): use another file") from error
    model = VisionTransformer(cfg)
    model.load_state_dict(state)
    if checkpoint["alpha"] is not None:
        model.set_soft_mask(checkpoint["alpha"])
    return model


@torch.no_grad()
def classify(model, picture, classes, dtype):
    """{name: probability} of the five likeliest classes of a picture (3, H, W), the likeliest first."""
    with torch.autocast(picture.device.type, dtype, enabled=dtype != torch.float32):
        probabilities = model(normalize(picture[None])).float().softmax(-1)[0]
    top = probabilities.topk(min(5, len(classes)))
    return {classes[i]: p for i, p in zip(top.indices.tolist(), top.values.tolist())}


def sample(images, count=30):
    """(count, 3, H, W), uint8: pictures drawn at random, the same each time; all of them if there are fewer."""
    places = random.Random("sample").sample(range(len(images.source)), min(count, len(images.source)))
    return torch.stack([images[0, place][0] for place in places])


def save_picture(picture, path):
    try:
        picture.save(path)
    except OSError as error:
        raise ValueError(f"--attention {path} cannot be written ({error.strerror}): give another path") from error


def lines(result):
    """What main found, for people."""
    r = result
    mask = f"mask {r['mask']}" + ("" if r["alpha"] is None else f" alpha {r['alpha']:g}")
    size = f"{r['img_size']} x {r['img_size']}"
    yield (f"top-1 {r['test_acc1']:.3f} %  top-5 {r['test_acc5']:.3f} %  loss {r['test_loss']:.4f}  "
           f"{r['images']:,} images at {size}, {mask}, {r['dtype']}, {r['time_images_per_s']:,.0f} images/s")
    if "ece" in r:
        yield f"calibration error {100 * r['ece']:.2f} %"
        for pictures, sure, right in r["reliability"]:
            yield f"  {100 * sure:5.1f} % sure, {100 * right:5.1f} % right: {pictures:,} pictures"
    if "int8_acc1" in r:
        yield (f"8 bits: top-1 {r['int8_acc1']:.3f} %, {r['int8_mb']:.2f} MB; "
               f"float32: {r['test_acc1']:.3f} %, {r['float32_mb']:.2f} MB")
    if "rank_80" in r:
        yield "singular values that make 80 / 90 % of an attention map, head by head"
        for i, heads in enumerate(zip(r["rank_80"], r["rank_90"]), 1):
            yield f"  block {i:2}" + "".join(f"{most:6} / {nearly:3}" for most, nearly in zip(*heads))
    if "logit_variance" in r:
        yield f"variance of the logits over pictures: {r['logit_variance']:.3g}"
        yield f"attention drawn in {r['attention']}"
    if "shape_bias" in r:
        share = "undefined" if r["shape_bias"] is None else f"{100 * r['shape_bias']:.1f} %"
        yield f"shape bias {share}, of {r['decided']:,} decisions for shape or texture on {r['conflicts']:,} pictures"
    if "macs" in r:
        counts = (f"{count / 1e9:.4f} G {name.replace('_', ' ')}" for name, count in r["macs"].items())
        yield f"multiply-accumulates: {', '.join(counts)}"


def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt, or published weights by file or name")
    parser.add_argument("--data", help="a built-in data set or a folder with val/CLASS/PICTURE; default: the run's own")
    parser.add_argument("--image", help="look at this picture alone: name its five most likely classes")
    parser.add_argument("--soft-mask", type=float, help="alpha instead of the checkpoint's: 1 bidirectional, 0 causal")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    parser.add_argument("--batch-size", type=int, default=256, help="images a forward pass on one rank")
    parser.add_argument("--workers", type=int, default=default_workers(), help="loader processes a rank")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was trained, if that was float32")
    more = parser.add_argument_group("properties, in any number, each beside the accuracy")
    more.add_argument("--calibration", action="store_true", help="expected calibration error, and its 15 bins")
    more.add_argument("--rank", action="store_true", help="singular values of attention maps, mean over 30 pictures")
    more.add_argument("--attention", metavar="OUT.png", help="draw where the class token looks on --image, or on three")
    more.add_argument("--shape-bias", metavar="DIR", help="on DIR/SHAPE/shapeN-textureN.png, or shapes-cue")
    more.add_argument("--int8", action="store_true", help="accuracy and size with 8-bit weights and activations")
    more.add_argument("--macs", action="store_true", help="multiply-accumulates of one image")

    with explain():
        args = parser.parse_args(argv)
        if args.batch_size < 1 or args.workers < 0:
            raise ValueError("--batch-size must be at least 1 and --workers at least 0")
        for name in ("data", "calibration", "rank", "shape_bias", "int8", "macs"):
            if args.image and getattr(args, name):
                raise ValueError(f"--image looks at one picture alone: drop it, or --{name.replace('_', '-')}")
        if args.attention and not (Path(args.attention).suffix == ".png" and Path(args.attention).parent.is_dir()):
            raise ValueError(f"--attention {args.attention}: give the path of a .png, in a folder that exists")
        if args.int8 and args.dtype not in ("auto", "float32"):
            raise ValueError(f"--int8 is compared with float32: drop --dtype {args.dtype}")
        rank, world, device, dtype = setup(args.device, args.dtype)
        asked = [name for name in ("calibration", "rank", "attention", "shape_bias", "int8") if getattr(args, name)]
        if world > 1 and asked:
            raise ValueError(f"--{asked[0].replace('_', '-')} is measured in one process: use python, not torchrun")
        checkpoint = in_turn(open_checkpoint, args.checkpoint)
        run = checkpoint["run"]
        if args.dtype == "auto" and (run["dtype"] == "float32" or args.int8):
            dtype = torch.float32                            # as it was trained, or as it is compared
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
            picture = Images([(read_image(args.image), 0)], transform)[0, 0][0].to(device)
            likely = classify(model, picture, classes, dtype)
            if args.attention:
                save_picture(draw_attention(model, picture[None]), args.attention)
            if rank == 0:
                table = (f"{100 * p:5.1f} %  {name}" for name, p in likely.items())
                print(json.dumps(likely) if args.json else "\n".join(table))
                if args.attention and not args.json:
                    print(f"attention drawn in {args.attention}")
            return
        data = args.data or run.get("data")
        if data is None:
            raise ValueError(f"{args.checkpoint} does not say what it was trained on: give --data or --image")
        source = in_turn(open_data, data, "val", size, classes)
        if len(source.classes) != model.cfg.num_classes:
            raise ValueError(f"--data {data} has {len(source.classes)} classes, but the model knows "
                             f"{model.cfg.num_classes}: use the data that it was trained on")
        if args.shape_bias:
            known = categories(source.classes)
            conflict, shapes, textures = open_conflict(args.shape_bias, size)
            unknown = sorted({*shapes, *textures} - known.keys())
            if unknown:
                raise ValueError(f"--shape-bias {args.shape_bias} has the categories {some(unknown)}, but the model "
                                 f"knows {some(known)}: use a model of these, or of ImageNet's 1,000 classes")

    def batches_of(pictures):
        sampler = EvalSampler(len(pictures), args.batch_size, rank, world)
        return loader(Images(pictures, transform), sampler, args.workers, device)

    with explain():
        batches, kept = batches_of(source), [] if args.calibration else None
        result = evaluate(model, batches, device, dtype, keep=kept)
        result |= dict(mask=model.cfg.mask, alpha=alpha, img_size=size, dtype=str(dtype).removeprefix("torch."))
        if "step" in run:
            result |= dict(step=run["step"], overrides=overrides(model.cfg, run["size"], run["step"]), seed=run["seed"])
        if args.calibration:
            result |= calibration(*map(torch.cat, zip(*kept)))
        if args.int8:
            small, size_int8 = quantize(model)
            result |= dict(int8_acc1=evaluate(small, batches, device)["test_acc1"], int8_mb=size_int8 / 1e6,
                           float32_mb=4e-6 * sum(p.numel() for p in model.parameters()))
        if args.rank or args.attention:
            pictures = sample(Images(source, transform)).to(device)
        if args.rank:
            result |= attention_rank(model, normalize(pictures))
        if args.attention:
            save_picture(draw_attention(model, pictures[:3]), args.attention)
            with torch.no_grad():
                result |= dict(logit_variance=model(normalize(pictures)).var(0).mean().item(), attention=args.attention)
        if args.shape_bias:
            logits = torch.cat([logits for logits, _ in predict(model, batches_of(conflict), device, dtype)])
            decisions = decide(logits, known)
            decided = sum(s != t and d in (s, t) for d, s, t in zip(decisions, shapes, textures))
            result |= dict(shape_bias=shape_bias(decisions, shapes, textures) if decided else None, decided=decided,
                           conflicts=sum(map(str.__ne__, shapes, textures)))
        if args.macs:
            result |= dict(macs=multiply_accumulates(model.cfg))
    if rank == 0:
        print(json.dumps(result) if args.json else "\n".join(lines(result)))
    leave()


if __name__ == "__main__":
    main()
