"""Segmentation: a class for each pixel, by a head on the patches of any model of the ladder.

    python -m downstream.segment                                       # on drawn scenes, nothing to download
    python -m downstream.segment --data camvid --init-from out/a       # a folder in ADE20K's layout, pretrained
    torchrun --nproc_per_node=8 -m downstream.segment --data ADEChallengeData2016 --recipe ade20k \\
        --init-from illama-tiny-in1k-75.0                              # the published recipe
    python -m downstream.segment eval out/segment/RUN --multi-scale    # mIoU of its best.pt
    python -m downstream.segment eval out/segment/RUN --image FILE     # image, prediction and legend as a PNG

Runs are seeded, saved and resumed as those of train.py, whose flags for the machine are the same: see there.
"""
import colorsys
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as TF

from data import eval_batches, loader, normalize, seed_of, train_batches
from downstream.scenes import SPLITS, VOID, Annotated, eval_transform, open_scenes, read_scene, train_transform
from downstream.segmenter import HEADS, Segmenter, evaluate, pixel_loss, predict
from harness.checkpoint import (CHECKPOINT, load_strictly, load_weights, open_checkpoint, read_checkpoint,
                                require_keys)
from harness.files import save_png
from harness.flags import (Parser, check_bounds, checked_config, flag, nonempty, overrides, parse_flags, pick, require,
                           shorten, split_batch, with_saved)
from harness.processes import (DEVICES, DTYPES, default_workers, is_rank_0, once_per_node, print_rank0, report_errors,
                               setup, shut_down, wrap)
from harness.run import Machine, Monitor, RunFolder, compare_ranks, settings_of
from model import MASKS, SIZES, STEPS, Config, config


@dataclass(frozen=True)
class Recipe:
    """How to train."""
    head: str                    # linear, or upernet, the published one
    img_size: int                # side of the square crops, and of evaluation's windows, pixels
    short_side: int              # shorter side of an image at scale 1, pixels
    patch_size: int              # side of a patch, pixels
    iterations: int              # optimizer updates
    eval_every: int              # iterations between two evaluations; iterations is a multiple of it
    batch_size: int              # crops per iteration (global batch size), over all ranks and micro-batches
    micro_batch: int             # micro-batch size (per rank); gradients accumulate over micro-batches
    lr: float                    # peak learning rate of AdamW, of the head
    warmup: int                  # iterations of linear warm-up
    weight_decay: float          # AdamW's, on all but norms and biases
    layer_decay: float           # factor of the learning rate from each block to the one before it
    clip_grad: float             # largest norm of the gradient; 0 does not clip
    drop_path: float             # stochastic depth: probability in the last block, falling to 0 in the first


RECIPES = {
    "small": Recipe(  # minutes on a CPU
        head="linear", img_size=128, short_side=180, patch_size=8, iterations=600, eval_every=200,
        batch_size=16, micro_batch=16, lr=2e-3, warmup=50, weight_decay=0.05, layer_decay=1.0, clip_grad=1.0,
        drop_path=0.0),
    "ade20k": Recipe(  # the published configurations *_ms1, of the last launch scripts
        head="upernet", img_size=512, short_side=512, patch_size=16, iterations=160_000, eval_every=16_000,
        batch_size=32, micro_batch=4, lr=6e-5, warmup=1500, weight_decay=0.01, layer_decay=0.9, clip_grad=0.0,
        drop_path=0.1),
}
SCALES = (0.5, 0.75, 1, 1.25, 1.5, 1.75)   # of multi-scale evaluation, as published


@dataclass
class Run:
    """What to train, on what."""
    size: str = "nano"           # width, depth and heads, see model.py
    step: str = "soft_mask"      # step from ViT to iLLaMA, see model.py
    recipe: str = "small"        # how to train
    data: str = "scenes"         # scenes, or a folder with images/ and annotations/, each training/ and validation/
    void: int = 0                # in annotations: 0 is unlabelled, classes count from 1; or 255, and they count from 0
    init_from: str = ""          # checkpoint or published weights to start from, which say what the model is
    seed: int = 0                # random seed of weights, order and augmentation
    dtype: str = "auto"          # of autocast; weights stay in float32. auto: float32 for ade20k and on CPUs


@dataclass
class State:
    """Where a run stands, the same on all ranks."""
    iteration: int = 0           # those done
    epoch: int = 0               # evaluations done
    best_miou: float = -1.0
    loss_sum: float = 0.0        # of the iterations since the last evaluation, each a mean over micro-batches and ranks


def lr_at(iteration, recipe):
    """A straight line from the peak to 0 after the last iteration, times a warm-up from a millionth to 1."""
    warm = 1e-6 + (1 - 1e-6) * iteration / recipe.warmup if iteration < recipe.warmup else 1.0
    return recipe.lr * warm * (1 - iteration / recipe.iterations)


def make_optimizer(model, recipe):
    """AdamW. The learning rate of a group is lr_at() times its "scale": 1 in the head, and in each block layer_decay
    times that of the block after it. No weight decay on norms and biases."""
    last, groups = len(model.backbone.blocks) + 1, {}
    for name, p in model.named_parameters():
        part, *rest = name.removeprefix("backbone.").split(".")
        layer = 1 + int(rest[0]) if part == "blocks" else last if part in ("decode", "norm") else 0
        key = recipe.layer_decay ** (last - layer), recipe.weight_decay * (p.ndim > 1)
        groups.setdefault(key, []).append(p)
    groups = [dict(params=params, scale=scale, weight_decay=decay) for (scale, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def parse(argv=None):
    """{name: value} of the flags that were given."""
    choices = dict(size=SIZES, step=STEPS, recipe=RECIPES, mask=MASKS, device=DEVICES, dtype=DTYPES, head=HEADS,
                   void=(0, VOID))
    return parse_flags(argv, "Train a model that gives each pixel a class; `eval` as the first word evaluates one.", {
        "": [Run, Machine], "how to train (default: as --recipe says)": [Recipe],
        "model (default: as --size and --step say)": [Config]}, choices, "out/segment",
        prog="python -m downstream.segment")


def resolve(given, checkpoint):
    """Flags and the checkpoint to resume -> (Run, Recipe). InputError for what does not fit together."""
    given = with_saved(given, checkpoint, Run, Recipe, ["scenes"])
    run = Run(**pick(Run, given))
    require(run.recipe in RECIPES, f"unknown --recipe {run.recipe!r}; choose one of {', '.join(RECIPES)}")
    require(run.init_from or run.recipe != "ade20k",
            "--recipe ade20k is for fine-tuning: give the weights to start from with --init-from")
    recipe = replace(RECIPES[run.recipe], **pick(Recipe, given))
    require(recipe.head in HEADS, f"unknown --head {recipe.head!r}; choose one of {', '.join(HEADS)}")
    require(recipe.img_size >= 8, f"--img-size {recipe.img_size} is too small for windows that overlap: give 8 or more")
    require(recipe.iterations % recipe.eval_every == 0, f"--iterations {recipe.iterations} is not a multiple of "
            f"--eval-every {recipe.eval_every}: change one of them")
    require(recipe.warmup <= recipe.iterations, f"--iterations {recipe.iterations} would end before --warmup "
            f"{recipe.warmup}: lower that, too")
    if run.dtype == "auto" and run.recipe == "ade20k":
        run = replace(run, dtype="float32")              # as the published runs
    return run, recipe


def choose_backbone(run, recipe, given, checkpoint, classes):
    """(Run, Recipe, Config, checkpoint to start from or None). The backbone is that of the run to resume, that of
    --init-from, or what the flags say. InputError if flags contradict the weights."""
    crops = dict(img_size=recipe.img_size, drop_path=recipe.drop_path, num_classes=classes)
    if checkpoint:
        return run, recipe, checked_config(Config, **checkpoint["config"]), None
    if not run.init_from:
        values = pick(Config, given) | crops | dict(patch_size=recipe.patch_size)
        return run, recipe, checked_config(config, size=run.size, step=run.step, **values), None
    source = once_per_node(open_checkpoint, run.init_from)
    known = asdict(checked_config(Config, **source["config"])) | source["run"]
    for name in ["size", "step", *(field.name for field in fields(Config) if field.name not in crops)]:
        require(given.get(name, known[name]) == known[name], f"{flag(name, given.get(name))} does not fit the weights "
                f"of --init-from {run.init_from}, with {flag(name, known[name])}: drop the flag, or --init-from")
    run, recipe = replace(run, size=known["size"], step=known["step"]), replace(recipe, patch_size=known["patch_size"])
    return run, recipe, checked_config(Config, **source["config"] | crops), source


def load_parts(model, source, head, classes):
    """Load a checkpoint's backbone, but for what a Segmenter's does not have, and its head if it is this program's and
    the same `head` of the same classes. Returns sentences about what had to be adapted."""
    decode, backbone = {}, {}
    unused = ("head",) if HEADS[head].final_norm else ("head", "norm")
    for name, value in source["model"].items():
        part, _, rest = str(name).removeprefix("backbone.").partition(".")
        if part == "decode":
            decode[rest] = value
        elif part not in unused:
            backbone[f"{part}.{rest}" if rest else part] = value
    if decode:                                           # after UPerNet there was no last norm: a fresh one
        norm = model.backbone.norm.state_dict()
        backbone = {f"norm.{name}": value for name, value in norm.items()} | backbone
    notes = load_weights(model.backbone, backbone)
    if decode and source["classes"] == classes and (source.get("recipe") or {}).get("head") == head:
        load_strictly(model.decode, decode)
    elif decode:
        notes.append("new head")
    return notes


def open_validation(checkpoint, data):
    """The validation split of `data`, by default of what the model was trained on. InputError for other classes."""
    run, recipe = checkpoint["run"], checkpoint["recipe"]
    val = open_scenes(data or run["data"], SPLITS[1], recipe["short_side"], run.get("void", 0))
    require(val.classes == checkpoint["classes"], f"--data {data} has the classes {shorten(val.classes)}, but the "
            f"model knows {shorten(checkpoint['classes'])}: use the data that it was trained on")
    return val


def validation(val, rank=0, world=1, workers=0, device=torch.device("cpu")):
    """Batches of one image, for evaluate(): images differ in size."""
    return loader(Annotated(val, eval_transform), eval_batches(len(val), 1, rank, world), workers, device)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(argv):
    started = time.perf_counter()
    given = parse(argv)
    folder = RunFolder(given, Segmenter, below="out/segment")
    checkpoint = folder.checkpoint
    run, recipe = resolve(given, checkpoint)
    machine = Machine(**pick(Machine, given))
    rank, world, device, dtype = setup(machine.device, run.dtype)
    require(not (machine.deterministic and device.type == "cuda"), "--deterministic: the loss of pixels has no "
            "deterministic form on GPUs: drop it")
    run = replace(run, dtype=str(dtype).removeprefix("torch."))
    state = State(**pick(State, checkpoint or {}))
    compare_ranks(asdict(run) | asdict(state))           # before the weights are read node by node

    # Data
    micro_batch, accumulate = split_batch(recipe, world, "micro_batch" in given)
    sync_norms = world > 1 and device.type == "cuda"     # on a CPU each rank normalizes its own crops
    require(recipe.head != "upernet" or micro_batch > 1 or sync_norms, "--head upernet normalizes over the "
            "micro-batch, 1 crop here: give a --batch-size and a --micro-batch that leave each rank 2 or more")
    train, val = (open_scenes(run.data, split, recipe.short_side, run.void) for split in SPLITS)
    run, recipe, cfg, source = choose_backbone(run, recipe, given, checkpoint, len(train.classes))
    settings = settings_of(run, recipe, cfg, train, val, world) | dict(alpha=0.0 if cfg.soft else None)
    folder.check(settings, state)
    transform = partial(train_transform, size=cfg.img_size, short_side=recipe.short_side)
    crops = Annotated(train, transform, run.seed, replace=True)
    passes = math.ceil(recipe.iterations / (len(train) // recipe.batch_size))            # over the data
    order = train_batches(len(train), recipe.batch_size, accumulate, rank, world, run.seed, passes, state.iteration)
    train_loader = loader(crops, order, machine.workers, device)
    val_loader = validation(val, rank, world, machine.workers, device)

    # Model and optimizer
    torch.manual_seed(seed_of("weights", run.seed))
    model, notes = Segmenter(cfg, recipe.head), []
    if source:
        notes = load_parts(model, source, recipe.head, train.classes)
    if checkpoint:
        load_strictly(model, checkpoint["model"])
    if sync_norms:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder.open(model, optimizer, scaler)
    every = recipe.eval_every                            # iterations of a period, which ends with an evaluation
    monitor = Monitor(folder, started, losses=accumulate * world)
    net = wrap(model, model.backbone.blocks, machine, world)
    batches = monitor.watch(train_loader)
    periods = recipe.iterations // every
    folder.announce(RECIPES[run.recipe], machine, micro_batch, notes, periods, every, unit="period")

    for period in range(state.epoch, periods):
        end = (period + 1) * every
        model.train()
        monitor.start(f"to iteration {end}", state.iteration - period * every, every)
        while state.iteration < end:
            lr = lr_at(state.iteration, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            torch.manual_seed(seed_of("drop path", run.seed, state.iteration, rank))     # and dropout

            loss_sum = torch.zeros((), device=device)
            for micro in range(accumulate):
                images, labels = (x.to(device, non_blocking=True) for x in next(batches))
                net.require_backward_grad_sync = micro == accumulate - 1            # as DDP.no_sync(): average once
                with autocast:
                    loss = pixel_loss(net(normalize(images)), labels)
                scaler.scale(loss / accumulate).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
            state.loss_sum += monitor.check(loss_sum, grad_norm, scaler)                 # the one wait for the device
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.iteration += 1

            monitor.update(lr)
            if monitor.stopping or machine.save_every and state.iteration % machine.save_every == 0:
                folder.save()
            if monitor.stopping:
                folder.end_early()
        monitor.end()
        if world > 1:
            for buffer in model.buffers():               # batch norm's statistics: all evaluate with those of rank 0
                dist.broadcast(buffer, 0)

        folder.save()                                    # before the evaluation, which may fail
        result = evaluate(model, val_loader, recipe.short_side, device, dtype)
        if result is None:                               # asked to stop
            folder.end_early()
        train_loss = state.loss_sum / every
        row = dict(step=run.step, overrides=overrides(cfg, run.size, run.step), seed=run.seed, head=recipe.head,
                   init_from=run.init_from, iteration=state.iteration, train_loss=train_loss, **result,
                   n_parameters=folder.n_parameters, **monitor.times())
        print_rank0("iteration {iteration}  train loss {train_loss:.4f}  mIoU {test_miou:.2f} %  pixel accuracy "
                    "{test_pixel_acc:.2f} %  {time_images_per_s:,.0f} images/s  {time_s:,.0f} s".format(**row))
        folder.log(row)
        improved = row["test_miou"] > state.best_miou
        state.best_miou = max(state.best_miou, row["test_miou"])
        state.epoch, state.loss_sum = period + 1, 0.0
        folder.save(improved)

    folder.finish(f"mIoU {state.best_miou:.2f} %", "python -m downstream.segment eval", run.data)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation from the command line


def open_segmenter(source, device):
    """(model, checkpoint) of a run's folder or file, on a device."""
    checkpoint = once_per_node(read_checkpoint, source)
    require("head" in (checkpoint.get("recipe") or {}),
            f"{source} is no run of downstream.segment: start one with --init-from {source}")
    require_keys(checkpoint, CHECKPOINT, source)
    _, recipe = resolve({}, checkpoint)
    model = Segmenter(checked_config(Config, **checkpoint["config"]), recipe.head)
    load_strictly(model, checkpoint["model"])
    return model.to(device).eval(), checkpoint


def draw(image, predicted, classes):
    """A PIL image, the prediction (H, W) in colours, and a legend of the classes in it, the most frequent first."""
    colours = [tuple(round(255 * v) for v in colorsys.hsv_to_rgb(0.618 * i % 1, 0.75, 1 - 0.35 * (i % 2)))
               for i in range(len(classes))]
    counts = predicted.flatten().bincount(minlength=len(classes))
    present = [i for i in counts.argsort(descending=True).tolist() if counts[i]]
    page = Image.new("RGB", (2 * image.width + 160, max(image.height, 16 * len(present) + 8)), "white")
    page.paste(image, (0, 0))
    page.paste(TF.to_pil_image(torch.tensor(colours, dtype=torch.uint8)[predicted].permute(2, 0, 1)), (image.width, 0))
    pen, x = ImageDraw.Draw(page), 2 * image.width + 8
    for row, i in enumerate(present):
        pen.rectangle((x, 16 * row + 4, x + 12, 16 * row + 16), fill=colours[i])
        pen.text((x + 18, 16 * row + 4), classes[i].split(",")[0], fill="black")         # ADE20K's have synonyms
    return page


def evaluate_run(argv):
    parser = Parser(prog="python -m downstream.segment eval")
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt")
    parser.add_argument("--data", type=nonempty, help="scenes, or a folder in ADE20K's layout; default: the run's own")
    parser.add_argument("--multi-scale", action="store_true", help=f"mean over scales {SCALES} and horizontal flips")
    parser.add_argument("--image", type=nonempty, help="segment this image alone, and draw it")
    parser.add_argument("--draw", default="segmentation.png", help="the .png in which that is drawn")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    parser.add_argument("--workers", type=int, default=default_workers(), help="data-loading workers per rank")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was trained, if that was float32")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    require(not (args.image and (args.data or args.json)),
            "--image segments one image alone, and draws it: drop it, or --data and --json")
    require(Path(args.draw).suffix == ".png", f"--draw {args.draw}: give a name that ends in .png")

    rank, world, device, dtype = setup(args.device, args.dtype)
    model, checkpoint = open_segmenter(args.checkpoint, device)
    if args.dtype == "auto" and checkpoint["run"]["dtype"] == "float32":
        dtype = torch.float32
    short_side, classes = checkpoint["recipe"]["short_side"], checkpoint["classes"]
    views = dict(scales=SCALES, flip=True) if args.multi_scale else {}
    if args.image:
        image = read_scene(args.image, upright=True)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = predict(model, TF.pil_to_tensor(image).to(device), short_side, **views).argmax(0).cpu()
        if is_rank_0():
            save_png(draw(image, predicted, classes), args.draw, "downstream.segment")
        text = f"{args.draw} has {args.image}, the class of each pixel, and the legend"
    else:
        val = open_validation(checkpoint, args.data)
        batches = validation(val, rank, world, args.workers, device)
        result = evaluate(model, batches, short_side, device, dtype, **views)
        lines = [f"{'    none' if iou is None else f'{iou:6.2f} %'}  {name}"
                 for name, iou in zip(classes, result["test_iou"])]
        lines.append(f"mIoU {result['test_miou']:.3f} %  pixel accuracy {result['test_pixel_acc']:.3f} %  "
                     f"{len(val):,} images")
        text = "\n".join(lines)
        if args.json:
            text = json.dumps(result | dict(images=len(val), multi_scale=args.multi_scale))
    if is_rank_0():
        print(text)
    shut_down()


@report_errors()
def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if flags[:1] == ["eval"]:
        evaluate_run(flags[1:])
    else:
        train(flags)


if __name__ == "__main__":
    main()
