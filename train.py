"""Train any rung of the ladder, on anything from a laptop's CPU to many machines.

    python train.py --size tiny                                # iLLaMA-T on the built-in shapes, nothing to download
    torchrun train.py --size tiny                              # the same
    torchrun --nproc_per_node=8 train.py --data PATH           # 8 GPUs, a folder with train/ and val/ class folders
    python train.py --data cifar10 --step ps_cls --no-rmsnorm  # any rung, any flag on top
    python train.py --resume                                   # go on with the newest run

A recipe names everything about a run; flags change it. The run's folder holds config.json, metrics.jsonl (a line per
epoch), last.pt, prev.pt (the one before) and best.pt; eval.py reads these three.

A run is a function of its flags: every random draw is seeded by its purpose, so a run that was interrupted and resumed
ends as the run that was not. SIGTERM, SIGINT and SIGHUP make it save itself and end with exit code 75.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)         # while it imports, Ctrl-C ends it without a traceback

import argparse
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import socket
import sys
import time
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (DATASETS, Images, class_folders, erase, eval_batches, eval_transform, loader, mix, normalize,
                  open_data, printable, seed_of, shorten, train_batches, train_transform)
from eval import (DEVICES, DTYPES, Parser, all_gather, default_workers, evaluate, is_rank_0, local_rank_0_first,
                  nonempty, on_rank_0, report_errors, say, setup, shut_down, stop, stop_on_signals, write_lock)
from model import (CHECKPOINT, MASKS, SIZES, STEPS, Config, VisionTransformer, build, config, is_dense, load_weights,
                   overrides, read_checkpoint, validate)


@dataclass(frozen=True)
class Recipe:
    """How to train. An epoch is as many global batches as the training images fill; the remainder is left out."""
    img_size: int                # resolution, pixels
    patch_size: int              # side of a patch, pixels
    epochs: int                  # passes over the training images
    batch_size: int              # images per iteration (global batch size), over all ranks and micro-batches
    micro_batch: int             # micro-batch size (per rank); gradients accumulate over micro-batches
    lr: float                    # peak learning rate of AdamW, not scaled with the batch size
    min_lr: float                # final learning rate of the cosine
    warmup_epochs: int           # linear warm-up from 0
    weight_decay: float          # AdamW's, on the weights of linear layers and patch embedding only
    clip_grad: float             # largest norm of the gradient; 0 does not clip
    drop_path: float             # stochastic depth: probability in the last block, falling to 0 in the first
    label_smoothing: float       # probability spread evenly over the classes
    mixup: float                 # alpha of mixup's Beta distribution; 0 is off
    cutmix: float                # alpha of CutMix's; with both on, each micro-batch takes one of them
    erasing: float               # probability of random erasing
    augment: bool                # RandAugment after crop and flip
    soft_mask_schedule: str      # constant (alpha stays 1) or linear (1 to 0), then 0
    soft_mask_epochs: int        # for so many epochs; 0: alpha is 0 from the start

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name in ("epochs", "batch_size", "micro_batch") and value < 1:
                raise ValueError(f"{flag(name)} is {value}; it must be at least 1")
            if not isinstance(value, str) and not 0 <= value < math.inf:
                raise ValueError(f"{flag(name)} is {value}; it must be a number from 0 on")
            if name in ("label_smoothing", "erasing") and value > 1:
                raise ValueError(f"{flag(name)} is {value}; it is a probability, at most 1")


SMALL_DATA = Recipe(  # images of about 32 pixels, minutes on a CPU
    img_size=32, patch_size=8, epochs=4, batch_size=64, micro_batch=256,
    lr=7e-4, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0, drop_path=0.0,
    label_smoothing=0.1, mixup=0.0, cutmix=0.0, erasing=0.0, augment=False,
    soft_mask_schedule="linear", soft_mask_epochs=1)

# What the published runs have in common, and how the rungs of the published ladder below the last were trained.
# Evidence: Tables 12 to 14 of the paper and the released scripts or, where a comment says so, the launch scripts in
# their repository's first commit (github.com/techmonsterwang/iLLaMA, d27201c). Learning rates, masks, decay and drop
# path also follow from the logs. Micro-batches are those of 8 GPUs, of 4 for transfer to CIFAR; others give the same
# run, but for which images are mixed.
BASIC = Recipe(
    img_size=224, patch_size=16, epochs=300, batch_size=4096, micro_batch=128,
    lr=4e-3, min_lr=1e-6, warmup_epochs=50, weight_decay=0.05, clip_grad=0.0, drop_path=0.0,
    label_smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=0.25, augment=True,
    soft_mask_schedule="constant", soft_mask_epochs=0)
IN21K = replace(  # launch scripts l6 and l9, which leave mixup and cutmix at their defaults
    BASIC, epochs=90, micro_batch=32, lr=1e-3, warmup_epochs=5, weight_decay=0.01, drop_path=0.1, soft_mask_epochs=30)
TUNE = replace(  # launch scripts nft3, nft11, hft11, hft12, hft18; no mixup or CutMix, as the logged accuracies confirm
    BASIC, epochs=30, batch_size=512, micro_batch=32, warmup_epochs=0, weight_decay=1e-8, mixup=0.0, cutmix=0.0)
TUNE_384 = replace(TUNE, img_size=384, micro_batch=16)
TRANSFER = replace(  # to CIFAR-10: the paper's Table 16; what it leaves out, from launch scripts r22 to r27, for 4 GPUs
    BASIC, batch_size=1024, micro_batch=256, lr=2e-3, soft_mask_schedule="linear", soft_mask_epochs=25)

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
    "transfer": TRANSFER,
    "transfer-cifar100": replace(TRANSFER, soft_mask_epochs=50),
    # Flowers-102 is not in the paper; its launch scripts try soft masks of 25 to 100 epochs
    "transfer-flowers": replace(TRANSFER, epochs=600, warmup_epochs=100, batch_size=512, micro_batch=64),
}
TUNING = ("base-384", "base-in21k-224", "base-in21k-384", "large-in21k-224", "large-in21k-384", "transfer",
          "transfer-cifar100", "transfer-flowers")                # start from weights


@dataclass
class Run:
    """What to train, on what."""
    size: str = "tiny"           # width, depth and heads, see model.py
    step: str = "soft_mask"      # rung of the ladder, see model.py
    recipe: str = ""             # default: small-data; for 1,000 class folders that of --size, on lower rungs basic
    data: str = "shapes"         # a built-in data set, see data.py, or a folder with train/ and val/ class folders
    init_from: str = ""          # checkpoint or published weights to start from; another number of classes: new head
    select: str = ""             # of a larger model to start from, select weights: uniform, or aligned by heads
    freeze: bool = False         # linear probing: train head and last norm alone, on the weights to start from
    seed: int = 0                # random seed of weights, order and augmentation
    dtype: str = "auto"          # of autocast; weights stay in float32. auto: float32 for ImageNet and on CPUs


@dataclass
class Machine:
    """What changes nothing about the run but its speed and last digits."""
    out: str = ""                # the run's folder; default: NAME-N below out/, N the next free number
    device: str = "auto"         # auto takes a GPU where there is one
    compile: bool = False        # torch.compile the model
    recompute: bool = False      # activation checkpointing of each block: less memory, more time
    workers: int = default_workers()   # data-loading workers per rank
    save_every: int = 0          # iterations between two checkpoints; one is also made after each epoch

    def __post_init__(self):
        if not 0 <= self.workers <= 1024:
            raise ValueError(f"--workers is {self.workers}; it must be from 0 to 1024")
        if self.save_every < 0:
            raise ValueError(f"--save-every is {self.save_every}; it must be at least 0")


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
# What an iteration needs


@dataclass
class State:
    """Where a run stands, the same on all ranks: beside weights and optimizer all that a checkpoint needs."""
    iteration: int = 0                   # those done
    epoch: int = 0                       # the first one that has not been evaluated
    alpha: float | None = None           # the soft mask's, if the model has one
    best_acc1: float = -1.0              # since alpha reached its final value
    loss_sum: float = 0.0                # of this epoch, over micro-batches and ranks
    unreadable: int = 0                  # images of this epoch


def make_optimizer(model, recipe):
    """AdamW of what trains; no weight decay on norms, biases, positions and class token."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (rest if p.ndim == 1 or name in ("pos_embed", "cls_token") else decay).append(p)
    groups = [dict(params=decay, weight_decay=recipe.weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def recompute_blocks(blocks):
    """Activation checkpointing: only each block's input is saved for backward, which computes the rest again."""
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def wrap(model, blocks, machine, world):
    """The model as it is trained: with activation checkpointing, compiled, in DistributedDataParallel."""
    if machine.recompute:
        recompute_blocks(blocks)
    if machine.compile:
        model.compile()
    if world == 1:
        return model
    net = DistributedDataParallel(model)
    net.broadcast_buffers = False        # they follow from the configuration; torch is renaming the argument
    return net


def micro_batches(batches, recipe, classes, seed, first, accumulate, rank, device, progress):
    """(images, labels, how many of them were unreadable) of the whole run from iteration `first` on: on the device,
    normalized, erased and mixed as the recipe says."""
    warned = set()
    for number in itertools.count(first * accumulate):
        start = time.perf_counter()
        images, labels, faults = next(batches)
        progress.waited += time.perf_counter() - start
        for fault in set(filter(None, faults)) - warned:
            warned.add(fault)
            with suppress(OSError):                      # stderr is lost; say() is for rank 0 alone
                tqdm.write(f"warning: {printable(fault)}; until then the next one takes its place", sys.stderr)
        rng = random.Random(f"{seed} {number // accumulate} {rank} {number % accumulate}")
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = normalize(images)
        if recipe.erasing:
            erase(images, rng, recipe.erasing)
        if recipe.mixup or recipe.cutmix:
            images, labels = mix(images, labels, classes, rng, recipe.mixup, recipe.cutmix)
        yield images, labels, sum(map(bool, faults))


def sum_over_ranks(loss, norm, unreadable, stops):
    """Two tensors and two numbers, each summed over the ranks: beside the gradients the one exchange of an iteration,
    and its only wait for the device. What is not finite on one rank is not finite in the sum."""
    sums = torch.stack([loss, norm, torch.full_like(loss, unreadable), torch.full_like(loss, stops)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def check_health(loss, norm, state, n_images, folder, scaler):
    """ValueError if a loss or gradient of an iteration is not finite, or too many images of an epoch are unreadable."""
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):       # a GradScaler skips those
        raise ValueError(f"the loss or its gradient is not a finite number at iteration {state.iteration}; it was not "
                         f"applied, and {folder} holds the run as it was last saved: try a smaller --lr or "
                         "--dtype float32")
    most = min(n_images - 1, max(10, n_images // 100))
    if state.unreadable > most:
        raise ValueError(f"more than {most:,} of {n_images:,} training images cannot be read: see the warnings, and "
                         "replace or remove them")


def metrics_row(run, recipe, cfg, state, per_epoch, n_losses, result, n_parameters, **times):
    """A line of metrics.jsonl, with the names of the published logs; state.loss_sum is that of `n_losses`."""
    span = range(state.epoch * per_epoch, state.iteration)
    return dict(
        step=run.step, overrides=overrides(cfg, run.size, run.step), seed=run.seed, epoch=state.epoch,
        train_loss=state.loss_sum / n_losses,
        train_lr=fmean(lr_at(i, recipe, per_epoch) for i in span),
        train_soft_mask_rate=fmean(soft_mask_at(i, recipe, per_epoch) for i in span) if cfg.soft else None,
        **{name: result[name] for name in ("test_loss", "test_acc1", "test_acc5")}, n_parameters=n_parameters,
        unreadable=state.unreadable, **times)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@report_errors()
def main(argv=None):
    started = time.perf_counter()
    given = parse_flags(argv)            # the user's mistakes are found before the folder is made
    machine = Machine(**pick(Machine, given))
    path, checkpoint = find_resume(given)
    run, recipe, cfg = resolve(given, checkpoint)
    rank, world, device, dtype = setup(machine.device, run.dtype)
    run = replace(run, dtype=str(dtype).removeprefix("torch."))
    state = State(**pick(State, checkpoint or {}))
    micro_batch, accumulate = split_batch(recipe, world, strict="micro_batch" in given)
    train = local_rank_0_first(open_data, run.data, "train", recipe.img_size)
    val = local_rank_0_first(open_data, run.data, "val", recipe.img_size, train.classes)
    check_training_data(run, recipe, train, checkpoint)
    check_ranks(run, recipe, cfg, state, train, val)
    per_epoch = len(train) // recipe.batch_size
    cfg = replace(cfg, num_classes=len(train.classes))
    torch.manual_seed(seed_of("weights", run.seed))
    model = (build(checkpoint) if checkpoint else VisionTransformer(cfg)).to(device)
    notes = []
    if run.init_from and not checkpoint:
        if run.select:
            from downstream.select import select_weights                         # only --select needs downstream/
            notes = local_rank_0_first(select_weights, model, run.init_from, run.select, train.classes)
        else:
            weights = local_rank_0_first(read_checkpoint, run.init_from)
            notes = load_weights(model, weights, new_head=True, classes=train.classes)
    if run.freeze:
        model.requires_grad_(False)
        model.norm.requires_grad_()
        model.head.requires_grad_()
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    settings = dict(run=asdict(run), recipe=asdict(recipe), config=asdict(cfg), classes=train.classes,
                    train_images=len(train), ranks=world)
    folder = path.parent if path else on_rank_0(make_folder, machine.out, name_of(run, cfg), "resume" in given)
    rows = on_rank_0(prepare, folder, path, given, settings, state)
    if not (folder / "best.pt").exists():                # last.pt was copied without it
        state.best_acc1 = -1.0

    net = wrap(model, model.blocks, machine, world)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    progress = Progress(recipe, per_epoch)
    transform = partial(train_transform, size=cfg.img_size, augment=recipe.augment)
    order = train_batches(len(train), recipe.batch_size, accumulate, rank, world, run.seed, recipe.epochs,
                          state.iteration)
    loaded = iter(loader(Images(train, transform, run.seed), order, machine.workers, device))
    batches = micro_batches(loaded, recipe, cfg.num_classes, run.seed, state.iteration, accumulate, rank, device,
                            progress)
    val_batches = loader(Images(val, partial(eval_transform, size=cfg.img_size)),
                         eval_batches(len(val), micro_batch, rank, world), machine.workers, device)
    n_parameters = sum(p.numel() for p in model.parameters())

    say(introduction(run, recipe, cfg, machine, train, val, device, world, micro_batch, n_parameters))
    announce(run, notes, folder, path, checkpoint, world, given, recipe.epochs, recipe.epochs * per_epoch)

    save_run = partial(save, settings, state, model, optimizer, scaler, folder)
    for epoch in range(state.epoch, recipe.epochs):
        model.train()
        progress.start(f"epoch {epoch}", state.iteration - epoch * per_epoch)
        while state.iteration < (epoch + 1) * per_epoch:
            lr = lr_at(state.iteration, recipe, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if cfg.soft and state.alpha != (alpha := soft_mask_at(state.iteration, recipe, per_epoch)):
                model.set_soft_mask(alpha)
                state.alpha = alpha
            torch.manual_seed(seed_of("drop path", run.seed, state.iteration, rank))

            loss_sum, unreadable = torch.zeros((), device=device), 0
            for micro in range(accumulate):
                images, labels, n_unreadable = next(batches)
                net.require_backward_grad_sync = micro == accumulate - 1         # ranks average their gradients once
                with autocast:
                    loss = F.cross_entropy(net(images), labels, label_smoothing=recipe.label_smoothing)
                scaler.scale(loss / accumulate).backward()
                loss_sum += loss.detach()
                unreadable += n_unreadable
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
            loss_sum, norm, unreadable, stops = sum_over_ranks(loss_sum, norm, unreadable, len(stop))
            state.unreadable += int(unreadable)
            check_health(loss_sum, norm, state, len(train), folder, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.loss_sum += loss_sum
            state.iteration += 1

            progress.update(loss_sum / accumulate / world, lr, state.alpha)
            if stops:
                progress.end()
                save_run()
                end_early(state, folder)
            if machine.save_every and state.iteration % machine.save_every == 0:
                save_run()
        rate, waiting = progress.end()

        save_run()                                       # before the evaluation, which may fail
        result = evaluate(model, val_batches, device, dtype, stop)
        if result is None:
            end_early(state, folder)
        row = metrics_row(run, recipe, cfg, state, per_epoch, per_epoch * accumulate * world, result, n_parameters,
                          time_s=time.perf_counter() - started, time_images_per_s=rate, time_waiting=waiting)
        say(f"epoch {epoch}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
            f"top-1 {row['test_acc1']:.2f} %  top-5 {row['test_acc5']:.2f} %  {rate:,.0f} images/s  "
            f"{row['time_s']:,.0f} s")
        final = not cfg.soft or state.alpha == soft_mask_at(recipe.epochs * per_epoch - 1, recipe, per_epoch)
        improved = final and row["test_acc1"] > state.best_acc1              # under different masks they do not compare
        state.epoch, state.loss_sum, state.unreadable = epoch + 1, 0.0, 0
        if improved:
            state.best_acc1 = row["test_acc1"]
        rows.append(json.dumps(row).encode())
        if is_rank_0():
            write(folder / "metrics.jsonl", b"".join(row + b"\n" for row in rows))
        save_run(improved)

    finish(f"top-1 {state.best_acc1:.2f} %", folder, "python eval.py", run.data)


def introduction(run, recipe, cfg, machine, train, val, device, world, micro_batch, n_parameters):
    """The first lines of a run: all that tells it from another."""
    ablation = flags_of(overrides(cfg, run.size, run.step))
    return "\n".join([
        f"model   {run.size}, step {run.step}{ablation}: {n_parameters:,} parameters, {cfg.img_size} x {cfg.img_size} "
        f"pixels in patches of {cfg.patch_size}, {cfg.tokens} tokens, mask {cfg.mask}",
        f"data    {run.data}: {len(train):,} images to train, {len(val):,} to test, {len(train.classes)} classes",
        f"{batch_line(run, recipe, RECIPES, world, micro_batch)}: "
        f"{plural(recipe.epochs, 'epoch')} of {plural(len(train) // recipe.batch_size, 'iteration')}",
        device_line(run, machine, device)])


def batch_line(run, recipe, recipes, world, micro_batch):
    accumulate, usual = recipe.batch_size // world // micro_batch, asdict(recipes[run.recipe])
    batch = f"{plural(world, 'rank')} x {plural(accumulate, 'micro-batch', 'es')} x {plural(micro_batch, 'image')}"
    changes = flags_of({name: value for name, value in asdict(recipe).items() if value != usual[name]})
    return f"batch   {recipe.batch_size} = {batch}; recipe {run.recipe}{changes}"


def device_line(run, machine, device):
    threads = f" with {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    extras = ", compiled" * machine.compile + ", activation checkpointing" * machine.recompute
    if device.type == "cuda" and run.dtype == "float32":
        extras = f", TF32 {'on' if torch.backends.cudnn.allow_tf32 else 'off'}{extras}"
    return f"device  {device.type}{threads}, {run.dtype}{extras}"


def announce(run, notes, folder, path, checkpoint, world, given, epochs, iterations):
    """Say where a run begins: weights, folder, and what it resumes."""
    if checkpoint:
        finished = ", finished" * (checkpoint["epoch"] == epochs)
        say(f"resume  {path} at iteration {checkpoint['iteration']:,} of {iterations:,}{finished}")
        if checkpoint["ranks"] != world:
            say(f"ranks   {checkpoint['ranks']} before, {world} now: what is drawn by rank, and rounding, will differ")
    else:
        if run.init_from:
            say(f"init    {'; '.join([f'weights of {run.init_from}', *notes])}")
        say(f"run     {folder}{', nothing to resume' * ('resume' in given)}")


def finish(best, folder, program, data):
    """Say how good the best weights are and how to evaluate them, and part from the folder and the other ranks."""
    file = folder / "best.pt"
    if file.exists():
        best = f"{best} in {file}"
    else:                                                # of a finished run's last.pt, copied without it
        best = file = folder / "last.pt"
    say(f"done    {best}; evaluate it: {program} {shlex.quote(str(file))} --data {shlex.quote(data)}")
    unlock(folder)
    shut_down()


PREEMPTED = 75      # exit code of a run that was asked to stop: "try again", EX_TEMPFAIL of sysexits.h


def end_early(state, folder):
    """End a run that was asked to stop and has saved itself."""
    unlock(folder)
    say(f"preempted at iteration {state.iteration}; go on with --resume {shlex.quote(str(folder))}")
    if dist.is_initialized():
        dist.barrier()                                   # or torchrun would end rank 0 because another rank has ended
    sys.exit(PREEMPTED)


class Progress:
    """How fast it goes: a bar on a terminal, elsewhere a line every ten seconds; rank 0 alone shows it."""

    def __init__(self, recipe, per_epoch):
        self.recipe, self.per_epoch, self.waited = recipe, per_epoch, 0.0

    def start(self, title, done):
        """Begin an epoch of which so many iterations are done."""
        self.title, self.done = title, done
        self.began = self.shown = time.perf_counter(), done, self.waited     # when, iterations, seconds without data
        self.bar = tqdm(total=self.per_epoch, initial=done, desc=title, leave=False, disable=not is_rank_0() or None)

    def speed(self, since):
        """Images/s, and the fraction of the time spent waiting for data, since a mark."""
        then, before, waited = since
        seconds = max(time.perf_counter() - then, 1e-9)
        return (self.done - before) * self.recipe.batch_size / seconds, (self.waited - waited) / seconds

    def update(self, loss, lr, alpha):
        self.done += 1
        self.bar.update()
        if time.perf_counter() - self.shown[0] > (10 if self.bar.disable else 1):
            rate, waiting = self.speed(self.shown)
            mask = "" if alpha is None else f"alpha {alpha:.3f}  "
            hint = "; more --workers may help" if waiting > 0.2 else ""
            text = f"loss {loss:.4f}  lr {lr:.2e}  {mask}{rate:,.0f} images/s, data wait {waiting:.0%}{hint}"
            self.bar.set_postfix_str(text)
            if self.bar.disable:
                say(f"{self.title}  {self.done}/{self.per_epoch}  {text}")
            self.shown = time.perf_counter(), self.done, self.waited

    def end(self):
        """Images/s and the fraction of waiting over the epoch, as far as it was trained now."""
        self.bar.close()
        return self.speed(self.began)


# ---------------------------------------------------------------------------------------------------------------------
# The command line comes from the dataclasses


CHOICES = dict(size=SIZES, step=STEPS, recipe=RECIPES, mask=MASKS, device=DEVICES, dtype=DTYPES,
               soft_mask_schedule=("constant", "linear"), select=("uniform", "aligned"))   # flags with a list of values


def flag(name, value=None):
    """How a field is written on the command line."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')}{'' if value is None else f' {value}'}"


def flags_of(changes):
    """Fields and their values as they are written on the command line."""
    return "".join(f" {flag(*change)}" for change in changes.items())


def name_of(run, cfg):
    """SIZE-STEP-DATA of a run's folder, with the flags on top of the rung."""
    changes = flags_of(overrides(cfg, run.size, run.step)).replace(" --", "-").replace(" ", "-")
    return f"{run.size}-{run.step}{changes}-{Path(run.data).name}"


def plural(n, word, s="s"):
    return f"{n:,} {word}{'' if n == 1 else s}"


def add_flags(parser, cls, skip=(), choices=CHOICES):
    """A flag for each field, its comment as the help. Only flags that were given appear in the result."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    for field in fields(cls):
        if field.name not in skip:
            options = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
                       dict(type=nonempty if field.type is str else field.type))
            if field.name in choices:
                options["choices"] = list(choices[field.name])
            default = f" (default: {field.default})" if cls is not Config and field.default not in ("", MISSING) else ""
            text = re.sub(r" \[\d\]", "", comments[field.name]).replace("%", "%%")      # [5] is a reference of model.py
            parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text + default, **options)


def pick(cls, values):
    """The part of a dict that a dataclass takes."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def parse_flags(argv=None, run=Run, recipe=Recipe, choices=CHOICES, out="out",
                description="Train any rung of the ladder from ViT to iLLaMA.", **about):
    """The flags that were given, by name; --resume is None when it came without a path."""
    parser = Parser(description=description, allow_abbrev=False, **about)
    add_flags(parser, run, choices=choices)
    add_flags(parser, Machine, choices=choices)
    parser.add_argument("--resume", nargs="?", type=nonempty, default=argparse.SUPPRESS, metavar="PATH",
                        help=f"go on with the run in a folder; without PATH: in --out, or the newest in {out}/")
    add_flags(parser.add_argument_group("how to train (default: as --recipe says)"), recipe, choices=choices)
    add_flags(parser.add_argument_group("model (default: as --size and --step say)"), Config,
              skip=["num_classes"] + [field.name for field in fields(recipe)])
    return vars(parser.parse_args(argv))


def with_saved(given, checkpoint):
    """The flags that were given, on top of those of the run to resume. ValueError if they would change it."""
    if checkpoint is None:
        return given
    saved = checkpoint["run"] | checkpoint["recipe"] | checkpoint["config"]
    given = {name: value for name, value in given.items() if (name, value) != ("dtype", "auto")}     # as it was
    changed = [f"{flag(name, value)}, not {flag(name, saved[name])}"
               for name, value in given.items() if name in saved and name != "data" and saved[name] != value]
    if changed:
        raise ValueError(f"--resume goes on with the run as it was started, but here is {' and '.join(changed)}: "
                         "drop the flag, or start a new run, --init-from its last.pt to train it for longer")
    return saved | given


def resolve(given, checkpoint):
    """Flags, recipe and checkpoint -> (Run, Recipe, Config), but for the number of classes, which the data tell."""
    given = with_saved(given, checkpoint)
    run = Run(**pick(Run, given))
    run = replace(run, recipe=run.recipe or default_recipe(run))
    if run.recipe not in RECIPES:                                         # of a checkpoint
        raise ValueError(f"unknown --recipe {run.recipe!r}; choose one of {', '.join(RECIPES)}")
    size = run.recipe.partition("-")[0]
    if size in SIZES and size != run.size and run.recipe != "small-data":
        raise ValueError(f"--recipe {run.recipe} is for --size {size}, not {run.size}: change one of them")
    if run.recipe in TUNING and not run.init_from:
        raise ValueError(f"--recipe {run.recipe} is for fine-tuning: give the weights to start from with --init-from")
    if not run.init_from and (run.freeze or run.select):
        raise ValueError(f"--{'freeze' if run.freeze else 'select'} needs weights to start from: give --init-from")
    recipe = RECIPES[run.recipe]
    if run.recipe == "basic" and run.size in RECIPES:
        recipe = replace(recipe, drop_path=RECIPES[run.size].drop_path)   # published per size, unlike the rest of it
    recipe = replace(recipe, **pick(Recipe, given))
    if run.dtype == "auto" and not run.recipe.startswith(("small-data", "transfer")):
        run = replace(run, dtype="float32")                               # as the published runs
    cfg = config(run.size, run.step, **pick(Config, asdict(recipe)) | pick(Config, given))
    if checkpoint is None:
        for name in ("soft_mask_schedule", "soft_mask_epochs"):
            if name in given and not cfg.soft:
                raise ValueError(f"{flag(name)} needs a soft mask, but the mask of this model is {cfg.mask!r}: drop "
                                 "the flag, or add --mask soft")
        if recipe.min_lr > recipe.lr:
            raise ValueError(f"--min-lr {recipe.min_lr} is above --lr {recipe.lr}: lower --min-lr, too")
        longer = [flag(name, getattr(recipe, name)) for name in ["warmup_epochs"] + ["soft_mask_epochs"] * cfg.soft
                  if recipe.epochs < getattr(recipe, name)]
        if longer:
            raise ValueError(f"--epochs {recipe.epochs} would end before {' and '.join(longer)}: lower that, too")
    return run, recipe, cfg


def default_recipe(run):
    train = Path(run.data, "train")
    if run.data in DATASETS or not train.is_dir() or len(class_folders(train)) != 1000:
        return "small-data"
    if run.init_from:
        raise ValueError("--init-from on 1,000 classes needs a --recipe: one for fine-tuning "
                         f"({', '.join(TUNING)}), or another one and its epochs from scratch")
    name = run.size if run.step == list(STEPS)[-1] else "basic"
    if name not in RECIPES:
        raise ValueError(f"--size {run.size} has no recipe of its own for 1,000 classes; choose one with --recipe: "
                         f"{', '.join(RECIPES)}")
    return name


def split_batch(recipe, world, strict):
    """(micro-batch size, micro-batches per iteration) of each rank. Unless `strict`, a recipe's micro-batch is the most
    that it may be."""
    part, left = divmod(recipe.batch_size, world)
    micro, mixing = recipe.micro_batch, recipe.mixup or recipe.cutmix
    while not strict and micro > 1 and (micro > part or part % micro or mixing and micro % 2):
        micro -= 1
    if left or part % micro:
        near = max(1, round(recipe.batch_size / world / micro)) * world * micro
        raise ValueError(f"--batch-size {recipe.batch_size} is not a multiple of {plural(world, 'rank')} "
                         f"x --micro-batch {micro}; {near} is")
    if micro % 2 and mixing:
        raise ValueError(f"--micro-batch {micro} is odd, but mixup and cutmix pair the images of a micro-batch: "
                         "make it even, or set both to 0")
    return micro, part // micro


def check_training_data(run, recipe, train, checkpoint):
    """ValueError if the images are too few, or not those of the run to resume."""
    if len(train) < recipe.batch_size:
        raise ValueError(f"--data {run.data} has {len(train)} training images, less than one --batch-size "
                         f"{recipe.batch_size}: make it smaller")
    if checkpoint and list(train.classes) != checkpoint["classes"]:
        raise ValueError(f"--data {run.data} has the classes {shorten(train.classes)}, but the run to resume had "
                         f"{shorten(checkpoint['classes'])}: give the data that it was started with")
    if checkpoint and len(train) != checkpoint["train_images"]:
        raise ValueError(f"--data {run.data} has {len(train)} training images, but the run to resume had "
                         f"{checkpoint['train_images']}: give the data that it was started with")


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def find_resume(given, out="out", kinds=(State, Run, Recipe)):
    """(path, checkpoint) that --resume means, the newest that is intact; (None, None) if nothing has been saved yet."""
    if "resume" not in given:
        return None, None
    if given["resume"] and "out" in given:
        raise ValueError(f"--resume {given['resume']} goes on in that folder: drop --out")
    root = Path(given["resume"] or given.get("out") or out)
    if root.is_file():
        return root, read_run(root, *kinds)
    names = "last.pt", "prev.pt"                     # by age: whatever time a copied file bears
    found = [path for name in names for path in (root / name, *root.glob(f"*/{name}")) if path.exists()]
    if not found:
        if given["resume"]:
            raise ValueError(f"--resume {root}: no checkpoint there; check the path, or give --out {root} --resume, "
                             "which starts where nothing has been saved")
        return None, None
    folder, faults = max(found, key=lambda path: path.stat().st_mtime).parent, []
    for path in (folder / name for name in names if folder / name in found):
        try:
            checkpoint = read_run(path, *kinds)
        except ValueError as error:
            faults.append(str(error))
            continue
        if faults:
            say(f"warning: going on from {path}, the one before, for {'; '.join(faults)}", sys.stderr)
        return path, checkpoint
    raise ValueError(f"no checkpoint in {folder} is intact ({'; '.join(faults)}): restore one, or start anew")


def read_run(path, state, run, recipe):
    checkpoint = read_checkpoint(path)
    validate(checkpoint, CHECKPOINT | {field.name: field.type for field in fields(state)} | dict(
        run=run, recipe=recipe, classes=list, train_images=int, ranks=int, optimizer=dict, scaler=dict), path)
    return checkpoint


FILES = ("config.json", "metrics.jsonl", "last.pt", "prev.pt", "best.pt")    # of a run's folder


def make_folder(out, name, resume):
    """The run's folder. Without `out`: out/NAME-N, N the first free number."""
    try:
        existing = FILES[1:] if resume else FILES        # a run that died before its first checkpoint left config.json
        if out and any(Path(out, file).exists() for file in existing):
            raise ValueError(f"--out {out} holds another run: give another folder, or add --resume to go on with it")
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            return Path(out)
        Path("out").mkdir(exist_ok=True)                                        # an error if it is a link to nothing
        for number in itertools.count(1):
            with suppress(FileExistsError):
                folder = Path("out", f"{name}-{number}")
                folder.mkdir(parents=True)
                return folder
    except OSError as error:
        raise ValueError(f"--out {out or 'out'} cannot be made ({error.strerror}): give another folder") from error


def prepare(folder, path, given, settings, state):
    """Put the run's folder in order before training; returns the rows of metrics.jsonl of the epochs done."""
    lock(folder)
    for name in FILES:                                   # of a process that was killed while it wrote
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    if path and path.name == "prev.pt" and Path(given["resume"] or "") != path:
        os.replace(path, folder / "last.pt")             # or the next save would put a damaged last.pt in its place
    write(folder / "config.json", json.dumps(settings, indent=1).encode())
    with suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().splitlines()[: state.epoch]
    return []


def lock(folder):
    """Take the run's folder for this process, as long as it lives. ValueError if it is another's."""
    lock.file = None                                     # close an earlier run's: closing a file drops all its locks
    try:
        import fcntl                                     # not on Windows
    except ImportError:
        return
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(f"{folder} is being trained by {file.read() or 'another process'}: wait until that has ended; "
                         f"if it has, delete {file.name}") from error
    except OSError:                                      # a file system without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    lock.file = file


def unlock(folder):
    if is_rank_0():
        (folder / ".lock").unlink(missing_ok=True)


def write(path, content, previous=None):
    """Write bytes so that the file is intact at any moment, old or new; the old one is kept as `previous`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with write_lock:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):                          # on a read-only file system
            temporary.unlink()
        raise ValueError(f"{path} cannot be written ({error.strerror}): make room for it, then go on with --resume; "
                         "what was saved before is intact") from error


def save(settings, state, model, optimizer, scaler, folder, improved=False):
    """On rank 0 write last.pt, keeping the one before as prev.pt; and best.pt if `improved`. ValueError on all if the
    last update made weights infinite."""
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise ValueError(f"weights are not finite after iteration {state.iteration}, which was not saved: try a "
                         "smaller --lr or --dtype float32")
    if not is_rank_0():
        return

    def store(checkpoint, name, previous=None):
        buffer = io.BytesIO()            # through memory: torch.save into a full disk hides the reason
        torch.save(checkpoint, buffer)
        write(folder / name, buffer.getbuffer(), previous)
    weights = settings | asdict(state) | dict(model=model.state_dict())
    if improved:
        store(weights, "best.pt")
    moments = optimizer.state_dict()["state"]
    store(weights | dict(optimizer=moments, scaler=scaler.state_dict()), "last.pt", folder / "prev.pt")


def load_optimizer(optimizer, moments):
    """AdamW's moments of each parameter, {index: {name: tensor}}, into the optimizer. ValueError if they do not fit:
    the fused AdamW does not check, and would write beyond a tensor's end."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        own = moments.get(i)
        validate(own, dict(step=torch.Tensor, exp_avg=torch.Tensor, exp_avg_sq=torch.Tensor), f"the optimizer: {i}")
        shapes = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
        if any(own[name].shape != shapes[name] for name in shapes) or not all(map(is_dense, own.values())):
            raise ValueError(f"the optimizer: {i} does not fit a parameter of shape {tuple(p.shape)}: use another file")
    groups = optimizer.state_dict()["param_groups"]                             # they follow from the recipe
    optimizer.load_state_dict(dict(state={i: moments[i] for i in range(len(params))}, param_groups=groups))


def check_ranks(run, recipe, cfg, state, train, val):
    """ValueError if ranks differ in these: through a file that not all nodes have, or a flag given to some of them."""
    mine = asdict(state) | asdict(cfg) | asdict(recipe) | dict(
        seed=run.seed, dtype=run.dtype, data=run.data if run.data in DATASETS else "",   # a folder may have two paths
        train_images=len(train), test_images=len(val), classes=train.classes)
    first, *others = all_gather(mine)
    for rank, theirs in enumerate(others, 1):
        for name in mine:
            if theirs[name] != first[name]:
                raise ValueError(f"{name} is {first[name]!r} on rank 0, but {theirs[name]!r} on rank {rank}: give all "
                                 "nodes the same data and flags, and a folder for --out and --resume that they share")


if __name__ == "__main__":
    stop_on_signals()
    main()
