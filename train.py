"""Train any step from ViT to iLLaMA, on anything from a laptop's CPU to many machines.

    python train.py --size tiny                                # iLLaMA-T on the built-in shapes, nothing to download
    torchrun train.py --size tiny                              # the same
    torchrun --nproc_per_node=8 train.py --data PATH           # 8 GPUs, a folder with train/ and val/ class folders
    python train.py --data cifar10 --step ps_cls --no-rmsnorm  # any step, any flag on top
    python train.py --resume                                   # resume the latest run

The words of this file:
    given       {name: value} of the flags on the command line
    Run         what to train, on what
    Recipe      how to train; a name in RECIPES says all of it, and flags change it
    Config      the model, see model.py
    Machine     device, workers, where to save: what changes results only by rounding
    State       where a run stands between two iterations
    checkpoint  all of these but Machine, weights and optimizer in a dict: last.pt; None at first
    folder      the run's files: config.json, metrics.jsonl (a line per epoch), last.pt and best.pt
    monitor     progress, losses that are not finite, and signals: then a run saves itself and ends
"""
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from data import (OPENERS, Images, erase, eval_batches, eval_transform, loader, mix, normalize, open_data, seed_of,
                  train_batches, train_transform)
from eval import evaluate
from harness.checkpoint import build, load_weights
from harness.files import class_folders
from harness.flags import (check_schedules, checked_config, overrides, parse_flags, pick, require,
                           split_batch, with_saved)
from harness.processes import (DEVICES, DTYPES, once_per_node, print_rank0, report_errors, setup,
                               wrap)
from harness.run import Machine, Monitor, RunFolder, settings_of
from model import MASKS, SIZES, STEPS, Config, VisionTransformer, config


@dataclass(frozen=True)
class Recipe:
    """How to train. An epoch is as many global batches as the training images fill; the remainder is left out."""
    img_size: int                # resolution, pixels
    patch_size: int              # side of a patch, pixels
    epochs: int                  # passes over the training images
    batch_size: int              # images per iteration (global batch size), over all ranks and micro-batches
    micro_batch: int             # micro-batch size (per rank), at most; gradients accumulate over micro-batches
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
    flip: bool = True            # half of the images mirrored: not for digits and letters


SMALL_DATA = Recipe(  # images of about 32 pixels, minutes on a CPU
    img_size=32, patch_size=8, epochs=4, batch_size=64, micro_batch=256,
    lr=7e-4, min_lr=1e-5, warmup_epochs=1, weight_decay=0.05, clip_grad=1.0, drop_path=0.0,
    label_smoothing=0.1, mixup=0.0, cutmix=0.0, erasing=0.0, augment=False,
    soft_mask_schedule="linear", soft_mask_epochs=1)

# What the published runs have in common, and how the published steps below the last were trained.
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

RECIPES = {  # a name that begins with a size, but for small-data, is for that size alone
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
    step: str = "soft_mask"      # step from ViT to iLLaMA, see model.py
    recipe: str = ""             # default: small-data; for 1,000 class folders that of --size, on lower steps basic
    data: str = "shapes"         # shapes, cifar10 ... (see data.py), or a folder with train/ and val/
    init_from: str = ""          # checkpoint or published weights to start from; another number of classes: new head
    freeze: bool = False         # linear probing: train only head and last norm of the weights to start from
    seed: int = 0                # random seed of weights, order and augmentation
    dtype: str = "auto"          # of autocast; weights stay in float32. auto: float32 for ImageNet and on CPUs


@dataclass
class State:
    """Where a run stands, the same on all ranks: beside weights and optimizer all that a checkpoint needs."""
    iteration: int = 0                   # those done
    epoch: int = 0                       # epochs evaluated so far
    alpha: float | None = None           # the soft mask's, if the model has one
    best_acc1: float = -1.0              # since alpha reached its final value
    loss_sum: float = 0.0                # of this epoch's iterations, each a mean over micro-batches and ranks


def lr_at(iteration, recipe, iterations_per_epoch):
    """Warm-up from 0 to the peak, both included, then a cosine that would reach min_lr one iteration after the last."""
    warmup, total = recipe.warmup_epochs * iterations_per_epoch, recipe.epochs * iterations_per_epoch
    if iteration < warmup:
        return recipe.lr * iteration / (warmup - 1) if warmup > 1 else recipe.lr
    progress = (iteration - warmup) / (total - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) / 2 * (1 + math.cos(math.pi * progress))


def soft_mask_at(iteration, recipe, iterations_per_epoch):
    """alpha: 1 or falling to 0 for soft_mask_epochs, both ends included, then 0."""
    end = recipe.soft_mask_epochs * iterations_per_epoch
    if iteration >= end:
        return 0.0
    return 1.0 if recipe.soft_mask_schedule == "constant" else 1 - iteration / max(1, end - 1)


def images_of(run, recipe, train, val):
    """Two splits as the model takes them: to train, augmented, and to evaluate."""
    augmented = partial(train_transform, size=recipe.img_size, augment=recipe.augment,
                        flip=recipe.flip)
    plain = partial(eval_transform, size=recipe.img_size)
    return Images(train, augmented, run.seed, replace=True), Images(val, plain)


def make_optimizer(model, recipe):
    """AdamW of what trains, without weight decay where the model says so."""
    decay, no_decay, exempt = [], [], model.no_weight_decay()
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = no_decay if name in exempt else decay
            group.append(p)
    groups = [dict(params=decay, weight_decay=recipe.weight_decay),
              dict(params=no_decay, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def augment_batch(images, labels, recipe, classes, rng):
    """uint8 (B, 3, H, W) and labels (B,) as the model takes them: normalized, erased and mixed as the recipe says."""
    images = normalize(images)
    if recipe.erasing:
        erase(images, rng, recipe.erasing)
    if recipe.mixup or recipe.cutmix:
        images, labels = mix(images, labels, classes, rng, recipe.mixup, recipe.cutmix)
    return images, labels


def parse(argv=None):
    """{name: value} of the flags that were given."""
    choices = dict(size=SIZES, step=STEPS, recipe=RECIPES, mask=MASKS, device=DEVICES, dtype=DTYPES,
                   soft_mask_schedule=("constant", "linear"))
    return parse_flags(argv, "Train any step from ViT to iLLaMA.", {
        "": [Run, Machine], "how to train (default: as --recipe says)": [Recipe],
        "model (default: as --size and --step say)": [Config]}, choices)


def default_recipe(run):
    """small-data; for 1,000 class folders that of the size, which is for soft_mask, and basic for the other steps."""
    train = Path(run.data, "train")
    if run.data in OPENERS or not train.is_dir() or len(class_folders(train)) != 1000:
        return "small-data"
    require(not run.init_from, "--init-from on 1,000 classes needs a --recipe: one for fine-tuning "
            f"({', '.join(TUNING)}), or another one and its epochs from scratch")
    name = run.size if run.step == "soft_mask" else "basic"
    require(name in RECIPES, f"--size {run.size} has no recipe of its own for 1,000 classes; choose one with --recipe: "
            f"{', '.join(RECIPES)}")
    return name


def resolve(given, checkpoint):
    """Flags and the checkpoint to resume -> (Run, Recipe, Config), but for the number of classes, which the data
    determine. InputError for what does not fit together."""
    given = with_saved(given, checkpoint, Run, Recipe, OPENERS)
    run = Run(**pick(Run, given))
    run = replace(run, recipe=run.recipe or default_recipe(run))
    require(run.recipe in RECIPES, f"unknown --recipe {run.recipe!r}; choose one of {', '.join(RECIPES)}")
    size = run.recipe.partition("-")[0]
    require(size == run.size or size not in SIZES or run.recipe == "small-data",
            f"--recipe {run.recipe} is for --size {size}, not {run.size}: change one of them")
    require(run.init_from or run.recipe not in TUNING,
            f"--recipe {run.recipe} is for fine-tuning: give the weights to start from with --init-from")
    require(run.init_from or not run.freeze, "--freeze needs weights to start from: give --init-from")
    recipe = RECIPES[run.recipe]
    if run.recipe == "basic" and run.size in RECIPES:
        recipe = replace(recipe, drop_path=RECIPES[run.size].drop_path)   # published per size, unlike the rest of it
    recipe = replace(recipe, **pick(Recipe, given))
    if run.dtype == "auto" and not run.recipe.startswith(("small-data", "transfer")):
        run = replace(run, dtype="float32")                               # as the published runs
    cfg = checked_config(config, size=run.size, step=run.step, **pick(Config, asdict(recipe)) | pick(Config, given))
    if checkpoint is None:
        check_schedules(given, recipe, cfg)
    return run, recipe, cfg


def make_model(run, cfg, checkpoint, classes, architecture):
    """(model, sentences about the weights that it starts from): the run's as it was saved, or a new one."""
    torch.manual_seed(seed_of("weights", run.seed))
    model = build(checkpoint, architecture) if checkpoint else architecture(cfg)
    notes = []
    if run.init_from and not checkpoint:
        notes = once_per_node(load_weights, model, run.init_from, new_head=True, classes=classes)
    if run.freeze:
        model.requires_grad_(False)
        model.norm.requires_grad_()
        model.head.requires_grad_()
    return model, notes


def metrics_row(run, recipe, cfg, state, per_epoch, result, n_parameters):
    """A line of metrics.jsonl, with the names of the published logs."""
    span = range(state.epoch * per_epoch, state.iteration)
    return dict(
        step=run.step, overrides=overrides(cfg, run.size, run.step), seed=run.seed, epoch=state.epoch,
        train_loss=state.loss_sum / per_epoch,
        train_lr=fmean(lr_at(i, recipe, per_epoch) for i in span),
        train_soft_mask_rate=fmean(soft_mask_at(i, recipe, per_epoch) for i in span) if cfg.soft else None,
        test_loss=result["test_loss"], test_acc1=result["test_acc1"], test_acc5=result["test_acc5"],
        n_parameters=n_parameters)


def print_row(row):
    print_rank0(f"epoch {row['epoch']}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  top-1 "
                f"{row['test_acc1']:.2f} %  top-5 {row['test_acc5']:.2f} %  {row['time_images_per_s']:,.0f} images/s  "
                f"{row['time_s']:,.0f} s")


@report_errors()
def main(argv=None, architecture=VisionTransformer):
    """Train. Experiments may replace the class of the model."""
    started = time.perf_counter()

    # Flags, and the run to resume
    given = parse(argv)
    folder = RunFolder(given, architecture)
    run, recipe, cfg = resolve(given, folder.checkpoint)
    machine, state = Machine(**pick(Machine, given)), State(**pick(State, folder.checkpoint or {}))
    rank, world, device, dtype = setup(machine.device, run.dtype)
    run = replace(run, dtype=str(dtype).removeprefix("torch."))

    # Data
    micro_batch, accumulate = split_batch(recipe, world, strict="micro_batch" in given)
    train = once_per_node(open_data, run.data, "train", recipe.img_size)
    val = once_per_node(open_data, run.data, "val", recipe.img_size, train.classes)
    cfg = replace(cfg, num_classes=len(train.classes))
    folder.check(settings_of(run, recipe, cfg, train, val, world), state)
    train_images, val_images = images_of(run, recipe, train, val)
    order = train_batches(len(train), recipe.batch_size, accumulate, rank, world, run.seed,
                          recipe.epochs, state.iteration)
    train_loader = loader(train_images, order, machine.workers, device)
    order = eval_batches(len(val), micro_batch, rank, world)
    val_loader = loader(val_images, order, machine.workers, device)
    per_epoch = len(train) // recipe.batch_size                  # iterations

    # Model and optimizer
    model, notes = make_model(run, cfg, folder.checkpoint, train.classes, architecture)
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder.open(model, optimizer, scaler)
    monitor = Monitor(folder, started, losses=accumulate * world)
    net = wrap(model, model.blocks, machine, world)
    batches = monitor.watch(train_loader)
    folder.announce(RECIPES[run.recipe], machine, micro_batch, notes, recipe.epochs, per_epoch)

    last_alpha = soft_mask_at(recipe.epochs * per_epoch - 1, recipe, per_epoch) if cfg.soft else None
    for epoch in range(state.epoch, recipe.epochs):
        model.train()
        monitor.start(f"epoch {epoch}", state.iteration - epoch * per_epoch, per_epoch)
        while state.iteration < (epoch + 1) * per_epoch:
            lr = lr_at(state.iteration, recipe, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if cfg.soft:
                state.alpha = soft_mask_at(state.iteration, recipe, per_epoch)
                model.set_soft_mask(state.alpha)
            torch.manual_seed(seed_of("drop path", run.seed, state.iteration, rank))
            # Forward and backward, micro-batch by micro-batch
            loss_sum = torch.zeros((), device=device)
            for micro in range(accumulate):
                images, labels = (x.to(device, non_blocking=True) for x in next(batches))
                rng = random.Random(f"{run.seed} {state.iteration} {rank} {micro}")
                images, labels = augment_batch(images, labels, recipe, cfg.num_classes, rng)
                net.require_backward_grad_sync = micro == accumulate - 1     # average once
                with autocast:
                    logits = net(images)
                    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                scaler.scale(loss / accumulate).backward()
                loss_sum += loss.detach()
            # Update
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
            state.loss_sum += monitor.check(loss_sum, grad_norm, scaler)     # waits for the device
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.iteration += 1
            monitor.update(lr, state.alpha)
            if monitor.stopping or machine.save_every and state.iteration % machine.save_every == 0:
                folder.save()
            if monitor.stopping:
                folder.end_early()
        monitor.end()

        # Evaluate
        folder.save()                                    # before the evaluation, which may fail
        result = evaluate(model, val_loader, device, dtype)
        if result is None:                               # asked to stop
            folder.end_early()
        row = metrics_row(run, recipe, cfg, state, per_epoch, result, folder.n_parameters)
        row |= monitor.times()
        print_row(row)
        folder.log(row)
        # The best so far, once alpha is that of the end: other masks do not compare
        improved = state.alpha == last_alpha and row["test_acc1"] > state.best_acc1
        if improved:
            state.best_acc1 = row["test_acc1"]
        state.epoch, state.loss_sum = epoch + 1, 0.0
        folder.save(improved)

    program = "python eval.py" if architecture is VisionTransformer else ""
    folder.finish(f"top-1 {state.best_acc1:.2f} %", program, run.data)


if __name__ == "__main__":
    main()
