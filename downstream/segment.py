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

from data import eval_batches, loader, printable, seed_of, shorten, train_batches
from downstream.scenes import SPLITS, Annotated, eval_transform, open_scenes, read_scene, train_transform
from downstream.segmenter import HEADS, Segmenter, evaluate, pixel_loss, predict
from eval import (DEVICES, DTYPES, Parser, default_workers, local_rank_0_first, nonempty, on_rank_0, report_errors, say,
                  setup, shut_down, stop, stop_on_signals)
from model import (CHECKPOINT, Config, config, load_state, load_weights, open_checkpoint, overrides, read_checkpoint,
                   validate, weights_of)
from train import (CHOICES, Machine, Progress, announce, batch_line, check_health, check_ranks, check_training_data,
                   device_line, end_early, find_resume, finish, flag, flags_of, load_optimizer, make_folder,
                   micro_batches, name_of, pick, plural, prepare, save, split_batch, sum_over_ranks, with_saved, wrap,
                   write)
from train import parse_flags as parse_run_flags


@dataclass(frozen=True)
class Recipe:
    """How to train."""
    head: str                    # linear, or upernet, the published one
    img_size: int                # side of the square crops, and of evaluation's windows, pixels
    short_side: int              # shorter side of an image at scale 1, pixels
    patch_size: int              # side of a patch, pixels
    iterations: int              # optimizer steps
    eval_every: int              # iterations between two evaluations; iterations is a multiple of it
    batch_size: int              # crops per iteration (global batch size), over all ranks and micro-batches
    micro_batch: int             # micro-batch size (per rank); gradients accumulate over micro-batches
    lr: float                    # peak learning rate of AdamW, of the head
    warmup: int                  # iterations of linear warm-up
    weight_decay: float          # AdamW's, on all but norms and biases
    layer_decay: float           # factor of the learning rate from each block to the one before it
    clip_grad: float             # largest norm of the gradient; 0 does not clip
    drop_path: float             # stochastic depth: probability in the last block, falling to 0 in the first
    mixup = cutmix = erasing = 0   # for train.micro_batches: an annotation is not mixed

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 1 if isinstance(value, int) and name != "warmup" else 0
            if not isinstance(value, str) and not least <= value < math.inf:
                raise ValueError(f"{flag(name)} is {value}; it must be a number from {least} on")
        if self.head not in HEADS:                       # of a checkpoint
            raise ValueError(f"unknown head {self.head!r}; choose one of {', '.join(HEADS)}")
        if self.iterations % self.eval_every:
            raise ValueError(f"--iterations {self.iterations} is not a multiple of --eval-every {self.eval_every}: "
                             "change one of them")
        if self.warmup > self.iterations:
            raise ValueError(f"--iterations {self.iterations} would end before --warmup {self.warmup}: lower that, too")


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
    step: str = "soft_mask"      # rung of the ladder, see model.py
    recipe: str = "small"        # how to train
    data: str = "scenes"         # scenes, or a folder with images/ and annotations/, each training/ and validation/
    init_from: str = ""          # checkpoint or published weights to start from, which say what the model is
    seed: int = 0                # random seed of weights, order and augmentation
    dtype: str = "auto"          # of autocast; weights stay in float32. auto: float32 for ade20k and on CPUs


@dataclass
class State:
    """Where a run stands, the same on all ranks."""
    iteration: int = 0           # those done
    epoch: int = 0               # evaluations done
    best_miou: float = -1.0
    loss_sum: float = 0.0        # since the last evaluation, over micro-batches and ranks
    unreadable: int = 0          # images since then


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


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of


def open_backbone(run, recipe, given, classes):
    """(Run, Recipe, Config, checkpoint) of a new run: what the flags say, and None, or what --init-from's are."""
    crops = dict(img_size=recipe.img_size, drop_path=recipe.drop_path, num_classes=classes)
    if not run.init_from:
        if run.recipe == "ade20k":
            raise ValueError("--recipe ade20k is for fine-tuning: give the weights to start from with --init-from")
        cfg = config(run.size, run.step, **pick(Config, given) | crops | dict(patch_size=recipe.patch_size))
        return run, recipe, cfg, None
    source = local_rank_0_first(open_checkpoint, run.init_from)
    known = dict(step="soft_mask") | source["config"] | source["run"]            # published weights are iLLaMA's
    for name in ["size", "step", *(field.name for field in fields(Config) if field.name not in crops)]:
        if given.get(name, known[name]) != known[name]:
            raise ValueError(f"{flag(name, given[name])} does not fit the weights of --init-from, which are of "
                             f"{flag(name, known[name])}: drop the flag, or --init-from")
    run, recipe = replace(run, size=known["size"], step=known["step"]), replace(recipe, patch_size=known["patch_size"])
    return run, recipe, replace(Config(**source["config"]), **crops), source


def open_splits(run, recipe, checkpoint):
    """(training, validation) data. ValueError if they are too few, or not those of the run to resume."""
    data, val = (open_scenes(run.data, split, recipe.short_side) for split in SPLITS)
    check_training_data(run, recipe, data, checkpoint)
    return data, val


def load_parts(model, source, head, classes):
    """Load a checkpoint's backbone, but for what a Segmenter's does not have, and its head if it is this program's and
    the same `head` of the same classes. Returns sentences about what had to be adapted."""
    state = {str(name).removeprefix("backbone."): value for name, value in source["model"].items()}
    decode = {name.removeprefix("decode."): state.pop(name) for name in list(state) if name.startswith("decode.")}
    if decode:                                           # after UPerNet there was no last norm: a fresh one
        state = {f"norm.{name}": value for name, value in model.backbone.norm.state_dict().items()} | state
    absent = [name for name in ("head", "norm") if isinstance(getattr(model.backbone, name), nn.Identity)]
    state = {name: value for name, value in weights_of(dict(model=state)).items() if name.split(".")[0] not in absent}
    notes = load_weights(model.backbone, state)
    if decode and (head, classes) == ((source.get("recipe") or {}).get("head"), source["classes"]):
        load_state(model.decode, decode)
    elif decode:
        notes.append("new head")
    return notes


def open_validation(checkpoint, data):
    """The validation split of `data`, by default of what the model was trained on. ValueError for other classes."""
    data = data or checkpoint["run"]["data"]
    val = open_scenes(data, SPLITS[1], checkpoint["recipe"]["short_side"])
    if val.classes != checkpoint["classes"]:
        raise ValueError(f"--data {data} has the classes {shorten(val.classes)}, but the model knows "
                         f"{shorten(checkpoint['classes'])}: use the data that it was trained on")
    return val


def validation(val, rank=0, world=1, workers=0, device=torch.device("cpu")):
    """Batches of one image, for evaluate(): images differ in size."""
    return loader(Annotated(val, eval_transform), eval_batches(len(val), 1, rank, world), workers, device)


def parse_flags(argv):
    return parse_run_flags(
        argv, Run, Recipe, CHOICES | dict(recipe=RECIPES, head=HEADS), "out/segment",
        prog="python -m downstream.segment",
        description="Train a model that gives each pixel a class; `eval` as the first word evaluates one.")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train(argv):
    started = time.perf_counter()
    given = parse_flags(argv)
    machine = Machine(**pick(Machine, given))
    path, checkpoint = find_resume(given, "out/segment", (State, Run, Recipe))
    values = with_saved(given, checkpoint)
    run = Run(**pick(Run, values))
    recipe = Recipe(**checkpoint["recipe"]) if checkpoint else replace(RECIPES[run.recipe], **pick(Recipe, given))
    if run.dtype == "auto" and run.recipe == "ade20k":
        run = replace(run, dtype="float32")              # as the published runs
    rank, world, device, dtype = setup(machine.device, run.dtype)
    run = replace(run, dtype=str(dtype).removeprefix("torch."))
    state = State(**pick(State, checkpoint or {}))
    micro_batch, accumulate = split_batch(recipe, world, strict="micro_batch" in given)
    if recipe.head == "upernet" and micro_batch == 1 and not (device.type == "cuda" and world > 1):
        raise ValueError("--head upernet normalizes over the micro-batch, which has 1 crop here: give a --batch-size "
                         "and a --micro-batch that leave each rank at least 2")
    data, val = open_splits(run, recipe, checkpoint)
    if checkpoint:
        cfg, source = Config(**checkpoint["config"]), None
    else:
        run, recipe, cfg, source = open_backbone(run, recipe, given, len(data.classes))
    check_ranks(run, recipe, cfg, state, data, val)
    torch.manual_seed(seed_of("weights", run.seed))
    model, notes = Segmenter(cfg, recipe.head), []
    if source:
        notes = load_parts(model, source, recipe.head, data.classes)
    if checkpoint:
        load_state(model, checkpoint["model"])
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    settings = dict(run=asdict(run), recipe=asdict(recipe), config=asdict(cfg), classes=data.classes,
                    alpha=0.0 if cfg.soft else None, train_images=len(data), ranks=world)
    name = f"segment/{name_of(run, cfg)}-{recipe.head}"
    folder = path.parent if path else on_rank_0(make_folder, machine.out, name, "resume" in given)
    rows = on_rank_0(prepare, folder, path, given, settings, state)
    if not (folder / "best.pt").exists():                # last.pt was copied without it
        state.best_miou = -1.0

    if world > 1 and device.type == "cuda":              # on a CPU each rank normalizes its own crops
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = wrap(model, model.backbone.blocks, machine, world)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    progress = Progress(recipe, recipe.eval_every)
    crops = Annotated(data, partial(train_transform, size=cfg.img_size, short_side=recipe.short_side), run.seed)
    passes = math.ceil(recipe.iterations / (len(data) // recipe.batch_size))                 # over the data
    order = train_batches(len(data), recipe.batch_size, accumulate, rank, world, run.seed, passes, state.iteration)
    batches = micro_batches(iter(loader(crops, order, machine.workers, device)), recipe, cfg.num_classes, run.seed,
                            state.iteration, accumulate, rank, device, progress)
    val_batches = validation(val, rank, world, machine.workers, device)
    n_parameters = sum(p.numel() for p in model.parameters())

    say(f"model   {run.size}, step {run.step}{flags_of(overrides(cfg, run.size, run.step))}, head {recipe.head}: "
        f"{n_parameters:,} parameters, crops of {cfg.img_size} x {cfg.img_size} pixels in patches of {cfg.patch_size}")
    say(f"data    {run.data}: {len(data):,} images to train, {len(val):,} to test, {len(data.classes)} classes")
    say(f"{batch_line(run, recipe, RECIPES, world, micro_batch)}: {plural(recipe.iterations, 'iteration')}")
    say(device_line(run, machine, device))
    periods = recipe.iterations // recipe.eval_every
    announce(run, notes, folder, path, checkpoint, world, given, periods, recipe.iterations)

    save_run = partial(save, settings, state, model, optimizer, scaler, folder)
    for period in range(state.epoch, periods):
        end = (period + 1) * recipe.eval_every
        model.train()
        progress.start(f"to iteration {end}", state.iteration - period * recipe.eval_every)
        while state.iteration < end:
            lr = lr_at(state.iteration, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            torch.manual_seed(seed_of("drop path", run.seed, state.iteration, rank))         # and dropout

            loss_sum, unreadable = torch.zeros((), device=device), 0
            for micro in range(accumulate):
                images, labels, n_unreadable = next(batches)
                net.require_backward_grad_sync = micro == accumulate - 1
                with autocast:
                    loss = pixel_loss(net(images), labels)
                scaler.scale(loss / accumulate).backward()
                loss_sum += loss.detach()
                unreadable += n_unreadable
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
            loss_sum, norm, unreadable, stops = sum_over_ranks(loss_sum, norm, unreadable, len(stop))
            state.unreadable += int(unreadable)
            check_health(loss_sum, norm, state, recipe.eval_every * recipe.batch_size, folder, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.loss_sum += loss_sum
            state.iteration += 1

            progress.update(loss_sum / accumulate / world, lr, None)
            if stops:
                progress.end()
                save_run()
                end_early(state, folder)
            if machine.save_every and state.iteration % machine.save_every == 0:
                save_run()
        rate, waiting = progress.end()
        for buffer in model.buffers() if world > 1 else ():
            dist.broadcast(buffer, 0)                    # batch norm's statistics: all evaluate with those of rank 0

        save_run()                                       # before the evaluation, which may fail
        result = evaluate(model, val_batches, recipe.short_side, device, dtype, stop)
        if result is None:
            end_early(state, folder)
        row = dict(step=run.step, overrides=overrides(cfg, run.size, run.step), seed=run.seed, head=recipe.head,
                   init_from=run.init_from, iteration=state.iteration,
                   train_loss=state.loss_sum / (recipe.eval_every * accumulate * world), **result,
                   n_parameters=n_parameters, unreadable=state.unreadable, time_s=time.perf_counter() - started,
                   time_images_per_s=rate, time_waiting=waiting)
        say(f"iteration {end}  train loss {row['train_loss']:.4f}  mIoU {row['test_miou']:.2f} %  pixel accuracy "
            f"{row['test_pixel_acc']:.2f} %  {rate:,.0f} images/s  {row['time_s']:,.0f} s")
        improved = row["test_miou"] > state.best_miou
        state.epoch, state.loss_sum, state.unreadable = period + 1, 0.0, 0
        state.best_miou = max(state.best_miou, row["test_miou"])
        rows.append(json.dumps(row).encode())
        if rank == 0:
            write(folder / "metrics.jsonl", b"".join(row + b"\n" for row in rows))
        save_run(improved)

    finish(f"mIoU {state.best_miou:.2f} %", folder, "python -m downstream.segment eval", run.data)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation from the command line


def open_segmenter(source, device):
    """(model, checkpoint) of a run's folder or file, on a device."""
    checkpoint = local_rank_0_first(read_checkpoint, source)
    if "head" not in (checkpoint.get("recipe") or {}):
        raise ValueError(f"{source} is no run of downstream.segment: start one with --init-from {source}")
    validate(checkpoint, CHECKPOINT | dict(run=Run, recipe=Recipe, classes=list), source)
    model = Segmenter(Config(**checkpoint["config"]), Recipe(**checkpoint["recipe"]).head)
    load_state(model, checkpoint["model"])
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
    parser = Parser(prog="python -m downstream.segment eval", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt")
    parser.add_argument("--data", type=nonempty, help="scenes, or a folder in ADE20K's layout; default: the run's own")
    parser.add_argument("--multi-scale", action="store_true", help=f"mean over scales {SCALES} and horizontal flips")
    parser.add_argument("--image", type=nonempty, help="segment this image alone, and draw it")
    parser.add_argument("--draw", type=nonempty, help="where that is drawn; default: segmentation.png")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    parser.add_argument("--workers", type=int, default=default_workers(), help="data-loading workers per rank")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was trained, if that was float32")
    args = parser.parse_args(argv)
    if args.image and (args.data or args.json):
        raise ValueError("--image segments one image alone, and draws it: drop it, or --data and --json")
    if args.draw and (not args.image or Path(args.draw).suffix.lower() != ".png"):
        raise ValueError(f"--draw {args.draw} is the PNG of an --image: give an --image, and a name that ends in .png")
    if not 0 <= args.workers <= 1024:
        raise ValueError(f"--workers is {args.workers}; it must be from 0 to 1024")
    rank, world, device, dtype = setup(args.device, args.dtype)
    model, checkpoint = open_segmenter(args.checkpoint, device)
    if args.dtype == "auto" and checkpoint["run"]["dtype"] == "float32":
        dtype = torch.float32
    short_side, classes = checkpoint["recipe"]["short_side"], checkpoint["classes"]
    views = dict(scales=SCALES, flip=True) if args.multi_scale else {}
    if args.image:
        image, file = read_scene(args.image), args.draw or "segmentation.png"
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = predict(model, TF.pil_to_tensor(image).to(device), short_side, **views).argmax(0).cpu()
        if rank == 0:
            draw(image, predicted, classes).save(file)
            print(f"{file} has {args.image}, the class of each pixel, and the legend")
        return shut_down()
    val = open_validation(checkpoint, args.data)
    result = evaluate(model, validation(val, rank, world, args.workers, device), short_side, device, dtype, **views)
    if rank == 0 and args.json:
        print(json.dumps(result | dict(images=len(val), multi_scale=args.multi_scale)))
    elif rank == 0:
        for name, iou in zip(classes, result["test_iou"]):
            print(f"{'    none' if iou is None else f'{iou:6.2f} %'}  {printable(name)}")
        print(f"mIoU {result['test_miou']:.3f} %  pixel accuracy {result['test_pixel_acc']:.3f} %  {len(val):,} images"
              f"{', multi-scale' * args.multi_scale}")
    shut_down()


@report_errors()
def main(argv=None):
    command, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "eval":
        evaluate_run(flags)
    else:
        train(argv)


if __name__ == "__main__":
    if sys.argv[1:2] != ["eval"]:                        # which has nothing to save
        stop_on_signals()
    main()
