"""Train any rung of the ladder, on anything from a laptop's CPU to many machines.

    python train.py --size tiny                                # iLLaMA-T on the built-in shapes, nothing to download
    torchrun train.py --size tiny                              # the same
    torchrun --nproc_per_node=8 train.py --data PATH           # 8 GPUs, a folder with train/ and val/ class folders
    python train.py --data cifar10 --step ps_cls --no-rmsnorm  # any rung, any flag on top
    python train.py --resume                                   # go on with the newest run

A recipe names everything about a run; flags change it. The run's folder holds config.json, metrics.jsonl (a line an
epoch), last.pt, prev.pt (the one before) and best.pt; eval.py reads these three.

A run is a function of its flags: every random draw is made anew from what it is for, so a run that was interrupted and
resumed is the run that was left alone. SIGTERM and SIGINT make it save itself and end with exit code 75.
"""
import argparse
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (BUILT_IN, EvalSampler, Images, TrainSampler, erase, eval_transform, loader, mix, normalize, open_data,
                  seed_of, some, train_transform)
from eval import Parser, build, default_workers, evaluate, explain, in_turn, require, setup
from model import STEPS, Config, VisionTransformer, config, load_weights, read_checkpoint


@dataclass(frozen=True)
class Recipe:
    """How to train. An epoch is the whole global batches that the training pictures give; a remainder is left out."""
    img_size: int                # pixels a side
    patch_size: int              # pixels a side of a patch
    epochs: int                  # times through the training pictures
    batch_size: int              # images an iteration: over all ranks and micro-batches
    micro_batch: int             # images a forward pass on one rank; gradients accumulate over them
    lr: float                    # peak learning rate of AdamW, whatever the batch size
    min_lr: float                # where the cosine ends
    warmup_epochs: int           # linear warm-up from 0
    weight_decay: float          # AdamW's, on matrices alone
    clip_grad: float             # largest norm of the gradient; 0 does not clip
    drop_path: float             # stochastic depth, in the last block; 0 in the first
    label_smoothing: float       # probability spread evenly over the classes
    mixup: float                 # alpha of mixup's Beta distribution; 0 is off
    cutmix: float                # alpha of CutMix's; with both on, each micro-batch takes one of them
    erasing: float               # probability of random erasing
    augment: bool                # RandAugment after crop and flip
    soft_mask_schedule: str      # constant (alpha stays 1) or linear (1 to 0), then 0
    soft_mask_epochs: int        # for so many epochs; 0 is causal from the start

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name in ("epochs", "batch_size", "micro_batch") and value < 1:
                raise ValueError(f"{flag(name)} is {value}; it must be at least 1")
            if not isinstance(value, str) and not 0 <= value < math.inf:
                raise ValueError(f"{flag(name)} is {value}; it must be a number from 0 on")
            if name in ("label_smoothing", "erasing") and value > 1:
                raise ValueError(f"{flag(name)} is {value}; it is a probability, at most 1")
        if self.soft_mask_schedule not in ("constant", "linear"):
            raise ValueError(f"unknown --soft-mask-schedule {self.soft_mask_schedule!r}; choose constant or linear")


SMALL_DATA = Recipe(  # pictures of about 32 pixels, minutes on a CPU
    img_size=32, patch_size=8, epochs=4, batch_size=64, micro_batch=256,
    lr=7e-4, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0, drop_path=0.0,
    label_smoothing=0.1, mixup=0.0, cutmix=0.0, erasing=0.0, augment=False,
    soft_mask_schedule="linear", soft_mask_epochs=1)

# What the published runs have in common, and how the rungs of the published ladder below the last were trained.
# Evidence: the released scripts or, where a comment says so, the launch scripts in their repository's first commit
# (github.com/techmonsterwang/iLLaMA, d27201c). Learning rates, masks, decay and drop path also follow from the logs.
# Micro-batches are those of 8 GPUs; others give the same run, but for which images are mixed.
BASIC = Recipe(
    img_size=224, patch_size=16, epochs=300, batch_size=4096, micro_batch=128,
    lr=4e-3, min_lr=1e-6, warmup_epochs=50, weight_decay=0.05, clip_grad=0.0, drop_path=0.0,
    label_smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25, augment=True,
    soft_mask_schedule="constant", soft_mask_epochs=0)
IN21K = replace(  # launch scripts l6 and l9, which leave mixup and cutmix at their defaults
    BASIC, epochs=90, micro_batch=32, lr=1e-3, warmup_epochs=5, weight_decay=0.01, drop_path=0.1, soft_mask_epochs=30)
TUNE = replace(  # launch scripts nft3, nft11, hft11, hft12 and hft18; unmixed, as the logged training accuracy confirms
    BASIC, epochs=30, batch_size=512, micro_batch=32, warmup_epochs=0, weight_decay=1e-8, mixup=0.0, cutmix=0.0)
TUNE_384 = replace(TUNE, img_size=384, micro_batch=16)

RECIPES = {
    "small-data": SMALL_DATA,
    "basic": BASIC,
    "tiny": replace(BASIC, warmup_epochs=5, mixup=0.1, cutmix=0.1, soft_mask_epochs=50),
    "small": replace(BASIC, warmup_epochs=5, mixup=0.5, cutmix=0.5, drop_path=0.1,
                     soft_mask_schedule="linear", soft_mask_epochs=50),
    "base": replace(BASIC, mixup=0.95, drop_path=0.4, soft_mask_schedule="linear", soft_mask_epochs=25),
    "base-384": replace(TUNE_384, lr=8e-5, drop_path=0.8, micro_batch=32),
    "base-in21k": IN21K,
    "large-in21k": IN21K,
    "base-in21k-224": replace(TUNE, lr=8e-5, drop_path=0.2),
    "base-in21k-384": replace(TUNE_384, lr=1.1e-4, drop_path=0.2),
    "large-in21k-224": replace(TUNE, lr=6e-5, drop_path=0.3),
    "large-in21k-384": replace(TUNE_384, lr=3.5e-5, drop_path=0.3),
}


@dataclass
class Run:
    """What to train, on what, where."""
    size: str = "tiny"           # nano, tiny, small, base or large
    step: str = "soft_mask"      # rung of the ladder, see model.py
    recipe: str = ""             # see RECIPES; default: small-data, for 1,000 class folders that of --size, or basic
    data: str = "shapes"         # shapes, shapes-cue, cifar10, cifar100, or a folder with train/ and val/ class folders
    init_from: str = ""          # checkpoint or name of published weights to start from; a head of other classes is new
    seed: int = 0                # of weights, order and augmentation
    dtype: str = "auto"          # auto, float32, bfloat16 or float16: autocast; weights stay in float32


@dataclass
class Machine:
    """What changes nothing about the run but its speed and last digits."""
    out: str = ""                # the run's folder; default: out/SIZE-STEP-DATA-N, the next free number
    device: str = "auto"         # auto, cuda, mps or cpu
    compile: bool = False        # torch.compile the model
    recompute: bool = False      # keep only the blocks' inputs for the backward pass: less memory, more time
    workers: int = default_workers()   # loader processes a rank
    save_every: int = 0          # iterations between two checkpoints; one is also made after each epoch


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the iteration


def lr_at(iteration, recipe, iterations_per_epoch):
    """Warm-up from 0 to the peak, both included, then a cosine that would reach min_lr one iteration after the last."""
    warmup, total = recipe.warmup_epochs * iterations_per_epoch, recipe.epochs * iterations_per_epoch
    if iteration < warmup:
        return recipe.lr * iteration / max(1, warmup - 1)
    progress = (iteration - warmup) / (total - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) / 2 * (1 + math.cos(math.pi * progress))


def soft_mask_at(iteration, recipe, iterations_per_epoch):
    """alpha: 1 or falling to 0 for soft_mask_epochs, both ends included, then 0."""
    end = recipe.soft_mask_epochs * iterations_per_epoch
    if iteration >= end:
        return 0.0
    return 1.0 if recipe.soft_mask_schedule == "constant" else 1 - iteration / max(1, end - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The command line comes from the dataclasses


def flag(name, value=None):
    """How a field is written on the command line."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')}{'' if value is None else f' {value}'}"


def add_flags(parser, cls, skip=()):
    """A flag for each field, its comment as the help. Only flags that were given appear in the result."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        if field.name not in skip:
            kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type)
            default = f" (default: {field.default})" if cls in (Run, Machine) and field.default != "" else ""
            parser.add_argument(flag(field.name), default=argparse.SUPPRESS,
                                help=comments[field.name].replace("%", "%%") + default, **kind)


def pick(cls, values):
    """The part of a dict that a dataclass takes."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def parse_flags(argv=None):
    """The flags that were given, by name; --resume is '' when it came without a path."""
    parser = Parser(description="Train any rung of the ladder from ViT to iLLaMA.", allow_abbrev=False)
    add_flags(parser, Run)
    add_flags(parser, Machine)
    parser.add_argument("--resume", nargs="?", const="", default=argparse.SUPPRESS, metavar="PATH",
                        help="go on with the run in a folder; without PATH: in --out, or the newest in out/")
    add_flags(parser.add_argument_group("how to train (default: as --recipe says)"), Recipe)
    add_flags(parser.add_argument_group("model (default: as --size and --step say)"), Config,
              skip=["num_classes"] + [field.name for field in fields(Recipe)])
    return vars(parser.parse_args(argv))


def settle(given, checkpoint):
    """Flags, recipe and checkpoint -> (Run, Recipe, the Config's fields that do not follow from them)."""
    if checkpoint is not None:
        saved = checkpoint["run"] | checkpoint["recipe"] | checkpoint["config"]
        changed = [f"{flag(name, value)}, not {flag(name, saved[name])}"
                   for name, value in given.items() if name in saved and name != "data" and saved[name] != value]
        if changed:
            raise ValueError(f"--resume goes on with the run as it was started, but here is {' and '.join(changed)}: "
                             "drop the flag, or start a new run")
        given = saved | given
    run = Run(**pick(Run, given))
    run = replace(run, recipe=run.recipe or default_recipe(run))
    if run.recipe not in RECIPES:
        raise ValueError(f"unknown --recipe {run.recipe!r}; choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[run.recipe]
    if run.recipe == "basic" and run.size in RECIPES:
        recipe = replace(recipe, drop_path=RECIPES[run.size].drop_path)   # the one thing that it had by the size
    recipe = replace(recipe, **pick(Recipe, given))
    if run.dtype == "auto" and run.recipe != "small-data":
        run = replace(run, dtype="float32")                               # as the published runs
    cfg = config(run.size, run.step, **pick(Config, asdict(recipe)) | pick(Config, given))
    explicit = [name for name in ("soft_mask_schedule", "soft_mask_epochs") if name in given]
    if explicit and checkpoint is None and not cfg.mask.startswith("soft"):
        raise ValueError(f"{flag(explicit[0])} needs a soft mask, but the mask of this model is {cfg.mask!r}: "
                         "drop the flag, or add --mask soft")
    return run, recipe, cfg


def plural(n, word, s="s"):
    return f"{n:,} {word}{'' if n == 1 else s}"


def default_recipe(run):
    train = Path(run.data, "train")
    if run.data in BUILT_IN or not train.is_dir() or sum(entry.is_dir() for entry in os.scandir(train)) != 1000:
        return "small-data"
    name = run.size if run.step == list(STEPS)[-1] else "basic"
    if name not in RECIPES:
        raise ValueError(f"--size {run.size} has no recipe of its own for 1,000 classes; choose one with --recipe: "
                         f"{', '.join(RECIPES)}")
    return name


def check_classes(run, classes, chosen):
    """Folders that are nearly ImageNet, and ImageNet's recipes from scratch on something else, are mistakes."""
    if run.data in BUILT_IN or run.init_from or classes == 1000 or run.recipe.endswith("-in21k"):
        return
    if run.recipe != "small-data":
        raise ValueError(f"--recipe {run.recipe} is for ImageNet's 1,000 classes, but {run.data}/train has {classes} "
                         "class folders: complete them, give --init-from to fine-tune, or choose --recipe small-data")
    if 900 < classes < 1100 and not chosen:
        raise ValueError(f"{run.data}/train has {classes} class folders, nearly ImageNet's 1,000: complete them, "
                         "or choose a --recipe")


def divide(recipe, world, strict):
    """Images a forward pass, and forward passes an iteration, on each rank. Unless `strict`, a recipe's micro-batch is
    the most that it may be."""
    share, left = divmod(recipe.batch_size, world)
    micro = recipe.micro_batch
    while not strict and micro > 1 and (micro > share or share % micro):
        micro -= 1
    if left or share % micro:
        near = max(1, round(recipe.batch_size / world / micro)) * world * micro
        raise ValueError(f"--batch-size {recipe.batch_size} is not a multiple of {plural(world, 'rank')} "
                         f"x --micro-batch {micro}; {near} is")
    if micro % 2 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"--micro-batch {micro} is odd, but mixup and cutmix pair the images of a micro-batch: "
                         "make it even, or set both to 0")
    return micro, share // micro


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def find_resume(given):
    """(path, checkpoint) that --resume means, the newest that is whole; (None, None) if nothing has been saved yet."""
    if "resume" not in given:
        return None, None
    if given["resume"] and "out" in given:
        raise ValueError(f"--resume {given['resume']} goes on in that folder: drop --out")
    place = Path(given["resume"] or given.get("out") or "out")
    if place.is_file():
        return place, read_run(place)
    found = [*place.glob("last.pt"), *place.glob("prev.pt"), *place.glob("*/last.pt"), *place.glob("*/prev.pt")]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        if given["resume"]:
            raise ValueError(f"--resume {place}: no checkpoint there; check the path, or give --out {place} --resume, "
                             "which starts where nothing has been saved")
        return None, None
    faults = []
    for path in (path for path in found if path.parent == found[0].parent):
        try:
            checkpoint = read_run(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        if faults and os.environ.get("RANK", "0") == "0":
            print(f"warning: going on from {path}, the one before, for {'; '.join(faults)}", file=sys.stderr)
        return path, checkpoint
    raise ValueError(f"no checkpoint in {found[0].parent} is whole ({'; '.join(faults)}): restore one, or start anew")


def read_run(path):
    return require(read_checkpoint(path), (
        "run", "recipe", "config", "classes", "train_images", "model", "alpha", "optimizer", "scaler", "iteration",
        "epoch", "tallies", "best_acc1"), path)


def make_folder(out, name, resume):
    """The run's folder. Without `out`: out/NAME-N, N the first free number."""
    if out and not resume and any(Path(out, file).exists() for file in ("config.json", "last.pt", "best.pt")):
        raise ValueError(f"--out {out} holds another run: give another folder, or add --resume to go on with it")
    try:
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            return Path(out)
        for number in itertools.count(1):
            folder = Path("out", f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise ValueError(f"--out {out or 'out'} cannot be made ({error.strerror}): give another folder") from error


def write(path, content, previous=None):
    """Write bytes so that the file is whole at any moment, old or new; the old one is kept as `previous`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error.strerror}): make room for it, then go on with --resume; "
                         "what was saved before is whole") from error


def save(checkpoint, path, previous=None):
    buffer = io.BytesIO()                # through memory: torch.save into a full disk hides the reason
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer(), previous)


def check_same(path, checkpoint, run, train, iterations_per_epoch, world):
    """ValueError if the data are not those of the run to resume, or the ranks cannot take over."""
    if list(train.classes) != list(checkpoint["classes"]):
        raise ValueError(f"--data {run.data} has the classes {some(train.classes)}, but the run to resume had "
                         f"{some(checkpoint['classes'])}: give the data that it was started with")
    if len(train) != checkpoint["train_images"]:
        raise ValueError(f"--data {run.data} has {len(train)} training pictures, but the run to resume had "
                         f"{checkpoint['train_images']}: give the data that it was started with")
    before = len(checkpoint["tallies"])
    if before != world and checkpoint["iteration"] > checkpoint["epoch"] * iterations_per_epoch:
        raise ValueError(f"{path} was saved within an epoch on {plural(before, 'rank')}, but here {world} would go on: "
                         f"start {before}, or a new run from its weights with --init-from {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The run


PREEMPTED = 75                     # exit code of a run that was asked to stop: "try again", EX_TEMPFAIL of sysexits.h
stop = threading.Event()           # set by SIGTERM and SIGINT


def make_optimizer(model, recipe):
    """AdamW; no decay on norms, biases, positions and class token."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        (rest if p.ndim == 1 or name in ("pos_embed", "cls_token") else decay).append(p)
    groups = [dict(params=decay, weight_decay=recipe.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def recompute_blocks(model):
    """Let the backward pass compute anew what is inside each block; only the block's input is kept for it."""
    for block in model.blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def from_all_ranks(tensor):
    """(ranks, *shape), on the CPU."""
    if not dist.is_initialized():
        return tensor.cpu()[None]
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor)
    return torch.stack(tensors).cpu()


def speed(since, iterations, waited, recipe):
    """Images/s and the share of time spent waiting for data since a mark (time, iterations, seconds waited)."""
    seconds = time.time() - since[0]
    return (iterations - since[1]) * recipe.batch_size / seconds, (waited - since[2]) / seconds


def main(argv=None):
    started = time.time()
    with explain():   # whatever the user can get wrong is found in here, before any work is done
        given = parse_flags(argv)
        machine = Machine(**pick(Machine, given))
        if machine.workers < 0:
            raise ValueError(f"--workers is {machine.workers}; it must be at least 0")
        if machine.save_every < 0:
            raise ValueError(f"--save-every is {machine.save_every}; it must be at least 0")
        path, checkpoint = find_resume(given)
        run, recipe, cfg = settle(given, checkpoint)
        rank, world, device, dtype = setup(machine.device, run.dtype)
        run = replace(run, dtype=str(dtype).removeprefix("torch."))
        micro_batch, accumulate = divide(recipe, world, strict="micro_batch" in given)
        train = in_turn(open_data, run.data, "train", cfg.img_size)
        val = in_turn(open_data, run.data, "val", cfg.img_size, train.classes)
        check_classes(run, len(train.classes), "recipe" in given)
        if len(train) < recipe.batch_size:
            raise ValueError(f"--data {run.data} has {len(train)} training pictures, less than one --batch-size "
                             f"{recipe.batch_size}: make it smaller")
        iterations_per_epoch = len(train) // recipe.batch_size
        if checkpoint:
            check_same(path, checkpoint, run, train, iterations_per_epoch, world)
        cfg = replace(cfg, num_classes=len(train.classes))
        torch.manual_seed(seed_of("weights", run.seed))
        model, notes = (build(checkpoint) if checkpoint else VisionTransformer(cfg)).to(device), []
        if run.init_from and not checkpoint:
            notes = load_weights(model, in_turn(read_checkpoint, run.init_from), new_head=True)
        folder = path and path.parent
        if not path and (rank == 0 or machine.out):
            name = f"{run.size}-{run.step}-{Path(run.data).name}"
            folder = make_folder(machine.out, name, resume="resume" in given)
    say = partial(print, flush=True) if rank == 0 else lambda *_: None

    sampler = TrainSampler(len(train), recipe.batch_size, accumulate, rank, world, run.seed)
    transform = partial(train_transform, size=cfg.img_size, augment=recipe.augment)
    train_batches = loader(Images(train, transform, run.seed), sampler, machine.workers,
                           pin_memory=device.type == "cuda")
    val_batches = loader(Images(val, partial(eval_transform, size=cfg.img_size)),
                         EvalSampler(len(val), micro_batch, rank, world), machine.workers)
    total = recipe.epochs * iterations_per_epoch

    if machine.recompute:
        recompute_blocks(model)
    if machine.compile:
        model.compile()
    soft = cfg.mask.startswith("soft")
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    iteration, first_epoch, best, rows = 0, 0, -1.0, []
    alpha = None                                     # the soft mask's, if the model has one
    tally = torch.zeros(2, device=device)            # this rank's, over the epoch: sum of losses, unreadable pictures
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        iteration, first_epoch, best, alpha = (checkpoint[key] for key in ("iteration", "epoch", "best_acc1", "alpha"))
        if iteration > first_epoch * iterations_per_epoch:
            tally = checkpoint["tallies"][rank].to(device)
        with suppress(FileNotFoundError):
            rows = (folder / "metrics.jsonl").read_text().splitlines()[:first_epoch]
    net = DistributedDataParallel(model) if world > 1 else model
    n_parameters = sum(p.numel() for p in model.parameters())

    say(f"model   {run.size}, step {run.step}: {n_parameters:,} parameters, {cfg.img_size} x {cfg.img_size} pixels "
        f"in patches of {cfg.patch_size}, {cfg.tokens} tokens, mask {cfg.mask}")
    say(f"data    {run.data}: {len(train):,} pictures to train, {len(val):,} to test, {len(train.classes)} classes")
    say(f"batch   {recipe.batch_size} = {plural(world, 'rank')} x {plural(accumulate, 'micro-batch', 'es')} "
        f"x {plural(micro_batch, 'image')}; recipe {run.recipe}: {plural(recipe.epochs, 'epoch')} "
        f"of {plural(iterations_per_epoch, 'iteration')}")
    threads = f" with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    extras = [word for word, on in (("compiled", machine.compile), ("blocks recomputed", machine.recompute)) if on]
    say(f"device  {device.type}{threads}, {', '.join([run.dtype, *extras])}")
    if run.init_from and not checkpoint:
        say(f"init    {'; '.join([f'weights of {run.init_from}', *notes])}")
    settings = dict(run=asdict(run), recipe=asdict(recipe), config=asdict(cfg), classes=train.classes,
                    train_images=len(train))
    if rank == 0:
        for stale in folder.glob("*.tmp"):           # of a process that was killed while it wrote
            stale.unlink()
        if path and path.name == "prev.pt" and given["resume"] != str(path):
            os.replace(path, folder / "last.pt")     # or the next save would put a damaged last.pt in its place
        with explain():
            write(folder / "config.json", json.dumps(settings, indent=1).encode())
    say(f"resume  {path} at iteration {iteration:,} of {total:,}{', finished' if first_epoch == recipe.epochs else ''}"
        if path else f"run     {folder}{', nothing to resume' if 'resume' in given else ''}")

    def save_state(epoch, improved=False):
        """Write last.pt, and best.pt if `improved`; all ranks take part. `epoch` is the first one not evaluated yet."""
        tallies = from_all_ranks(tally)
        if rank == 0:
            weights = dict(**settings, model=model.state_dict(), alpha=alpha, iteration=iteration, epoch=epoch,
                           best_acc1=best)
            state = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), tallies=tallies)
            with explain():
                if improved:
                    save(weights, folder / "best.pt")
                save(weights | state, folder / "last.pt", previous=folder / "prev.pt")

    def preempt(epoch):
        save_state(epoch)
        say(f"preempted at iteration {iteration}; go on with --resume {folder}")
        if world > 1:
            dist.barrier()                           # or torchrun would end rank 0 because another rank has ended
        sys.exit(PREEMPTED)

    unreadable = set()                               # pictures that this process has warned of
    most_unreadable = min(len(train) - 1, max(10, len(train) // 100))        # in an epoch; beyond that the run stops
    for epoch in range(first_epoch, recipe.epochs):
        model.train()
        begin = iteration - epoch * iterations_per_epoch         # 0, but for a run that was stopped within the epoch
        sampler.epoch, sampler.start = epoch, begin  # before iter(): workers ask for their first batches at once
        batches, waited = iter(train_batches), 0.0
        shown = epoch_started = time.time(), begin, waited       # when, iterations until then, seconds without data
        bar = tqdm(total=iterations_per_epoch, initial=begin, desc=f"epoch {epoch}", leave=False,
                   disable=None if rank == 0 else True)
        for step in range(begin, iterations_per_epoch):
            lr = lr_at(iteration, recipe, iterations_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if soft:
                alpha = soft_mask_at(iteration, recipe, iterations_per_epoch)
                model.set_soft_mask(alpha)
            torch.manual_seed(seed_of("drop path", run.seed, iteration, rank))
            for micro in range(accumulate):
                asked = time.time()
                images, labels, faults = next(batches)
                waited += time.time() - asked
                for fault in filter(None, faults):
                    tally[1] += 1
                    if fault not in unreadable:
                        unreadable.add(fault)
                        tqdm.write(f"warning: {fault}; until then the next one takes its place", file=sys.stderr)
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                rng, images = random.Random(f"{run.seed} {iteration} {rank} {micro}"), normalize(images)
                if recipe.erasing:
                    erase(images, rng, recipe.erasing)
                if recipe.mixup or recipe.cutmix:
                    images, labels = mix(images, labels, cfg.num_classes, rng, recipe.mixup, recipe.cutmix)
                last = micro == accumulate - 1       # the ranks average their gradients once, after the last one
                with nullcontext() if last or world == 1 else net.no_sync():
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss = F.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)
                    scaler.scale(loss / accumulate).backward()
                tally[0] += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
            sound = tally[0].isfinite() & (norm.isfinite() | scaler.is_enabled())   # it skips steps that overflow
            flags = torch.stack([sound.new_tensor(stop.is_set()), ~sound, tally[1] * world > most_unreadable])
            stopping, diverged, too_many = from_all_ranks(flags.byte()).any(0).tolist()   # the only wait for the device
            with explain():
                if diverged:
                    raise ValueError(f"the loss or its gradient is not a finite number at iteration {iteration}; it was "
                                     f"not applied, and {folder} holds the run as it was last saved: try a smaller --lr "
                                     "or --dtype float32")
                if too_many:
                    raise ValueError(f"more than {most_unreadable:,} of {len(train):,} training pictures "
                                     "cannot be read: see the warnings, and replace or remove them")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            iteration += 1

            bar.update()
            if time.time() - shown[0] > (10 if bar.disable else 1):
                rate, waiting = speed(shown, step + 1, waited, recipe)
                mask = f"alpha {alpha:.3f}  " if soft else ""
                hint = "; more --workers may help" if waiting > 0.2 else ""
                text = (f"loss {loss.item():.4f}  lr {lr:.2e}  {mask}{rate:,.0f} images/s, "
                        f"data wait {waiting:.0%}{hint}")
                bar.set_postfix_str(text)
                if bar.disable:
                    say(f"epoch {epoch}  {step + 1}/{iterations_per_epoch}  {text}")
                shown = time.time(), step + 1, waited
            if stopping:
                bar.close()
                preempt(epoch)
            if machine.save_every and iteration % machine.save_every == 0:
                save_state(epoch)
        bar.close()
        rate, waiting = speed(epoch_started, iterations_per_epoch, waited, recipe)

        with explain():
            result = evaluate(model, val_batches, device, dtype, stop)
        if result is None:
            preempt(epoch)
        losses, faults = from_all_ranks(tally).double().sum(0).tolist()
        tally.zero_()
        span = range(iteration - iterations_per_epoch, iteration)
        row = dict(
            step=run.step, seed=run.seed, epoch=epoch,
            train_loss=losses / (iterations_per_epoch * accumulate * world),
            train_lr=fmean(lr_at(i, recipe, iterations_per_epoch) for i in span),
            train_soft_mask_rate=fmean(soft_mask_at(i, recipe, iterations_per_epoch) for i in span) if soft else None,
            **{name: result[name] for name in ("test_loss", "test_acc1", "test_acc5")}, n_parameters=n_parameters,
            unreadable=int(faults), time_s=time.time() - started, time_images_per_s=rate, time_waiting=waiting)
        say(f"epoch {epoch}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
            f"top-1 {row['test_acc1']:.2f} %  top-5 {row['test_acc5']:.2f} %  "
            f"{rate:,.0f} images/s  {row['time_s']:,.0f} s")
        rows.append(json.dumps(row))
        if rank == 0:
            with explain():
                write(folder / "metrics.jsonl", "".join(f"{row}\n" for row in rows).encode())
        final = not soft or alpha == soft_mask_at(total - 1, recipe, iterations_per_epoch)
        improved = final and row["test_acc1"] > best     # accuracies under different masks do not compare
        best = row["test_acc1"] if improved else best
        save_state(epoch + 1, improved)

    say(f"done    top-1 {best:.2f} % in {folder / 'best.pt'}; evaluate it: "
        f"python eval.py {folder / 'best.pt'} --data {run.data}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    main()
