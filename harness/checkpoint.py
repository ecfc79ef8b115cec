"""Weights and checkpoints in and out: files are read without running code that they might hold.

    checkpoint = open_checkpoint("out/a")              # a run's folder, a file, a published name
    model = build(checkpoint)                          # with its weights and its soft mask
    notes = load_weights(model, "illama-tiny-in1k-75.0")     # into a model built otherwise

A checkpoint is a dict of plain types and tensors; ["model"] is the state dict.
"""
import argparse
import json
import math
import re
import sys
import textwrap
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness.flags import (InputError, checked_config, flags_of, needs, overrides, require,
                           shorten)
from model import SIZES, Config, VisionTransformer, config

PUBLISHED = (  # the authors' weights, by the names of their files
    "illama-tiny-in1k-75.0", "illama-small-in1k-79.9",
    "illama-base-in1k-81.6", "illama-base-in1k-384-83.0",
    "illama-base-in21kin1k-224-83.6", "illama-base-in21kin1k-384-85.0",
    "illama-large-in21kin1k-224-84.8", "illama-large-in21kin1k-384-86.0")
PUBLISHED_URL = "https://huggingface.co/techmonsterwang/iLLaMA/resolve/main"

SCALAR = np.float64(0).__reduce__()[0]     # rebuilds a pickled numpy scalar; it has had two names
SAFE = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)), np.dtype,
        argparse.Namespace]                # what published files hold beside plain types

# Where trainers keep weights, and what they, DDP and torch.compile write before names
WHERE = ("model", "state_dict", "module", "teacher", "model_ema")
PREFIXES = r"^((module|_orig_mod|model|backbone|encoder)\.)+"
SHAPES = ("width", "depth", "patch_size", "swiglu", "rmsnorm", "abs_pos")      # names and shapes
CHECKPOINT = ("model", "config", "classes", "alpha", "run")    # what evaluation needs


def fetch(name):
    """The file of published weights, downloaded once into torch.hub's folder. InputError if that
    fails."""
    file = Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth")
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{PUBLISHED_URL}/{name}.pth", str(file),
                                           progress=sys.stderr.isatty())
        except OSError as error:
            raise InputError(f"{PUBLISHED_URL}/{name}.pth could not be downloaded to {file} "
                             f"({error}): connect to a network, or give the path of the "
                             "file") from error
    return file


def read_checkpoint(source):
    """The dict in a file, by its path, its run's folder (best.pt) or published name. InputError if
    there is none."""
    path = fetch(source) if str(source) in PUBLISHED else Path(source)
    if path.is_dir():
        path, last = path / "best.pt", path / "last.pt"
        require(path.exists() or not last.exists(), f"{path} is written with the first accuracy "
                f"under the soft mask's final alpha: wait for that, or give {last}")
    require(path.is_file(), f"no checkpoint at {path}: check the path, or give one of the names "
            f"{', '.join(PUBLISHED)}")
    return read_file(path)


def read_file(path):
    """The dict in a file. Only weights and plain types are read: a pickle that would run code is
    refused, and so is a damaged file. Published files also hold an argparse.Namespace, and numpy
    scalars in the optimizer's groups."""
    try:
        if path.suffix == ".safetensors":
            weights, metadata = read_safetensors(path)
            about = json.loads(metadata.get("checkpoint", "{}"))         # of downstream/export.py
            return about | dict(model=weights)
        if zipfile.is_zipfile(path):                     # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                pickled = any(name.endswith("data.pkl") for name in file.namelist())
                damaged = file.testzip()
            require(pickled, f"{path} is an archive of NumPy arrays or of other files, not of "
                    "PyTorch: convert it to a state dict, and save that with torch.save")
            if damaged:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load raises half a dozen types for a damaged or foreign file
        code = re.search(r"GLOBAL (\S+)", str(error))    # torch's own text: trust the file
        reason = (str(error).splitlines() or ["it is empty"])[0]
        if code:
            reason = f"it holds {code[1]}, which could run code"
        raise InputError(f"{path} cannot be read as a checkpoint of weights and plain types "
                         f"({reason}): delete or replace it") from error
    require(isinstance(checkpoint, dict), f"{path} holds no dict of weights: use another file")
    return checkpoint


def read_safetensors(path):
    """({name: tensor}, metadata) of a file; the tensors are mapped into memory."""
    with needs(path, "safetensors"):
        from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def require_keys(checkpoint, keys, source):
    missing = [key for key in keys if key not in checkpoint]
    require(not missing, f"{source} lacks {', '.join(missing)}: use a checkpoint that train.py "
            "wrote (--resume takes a run's last.pt)")


def weights_of(checkpoint):
    """The state dict in a checkpoint of this project or of common trainers, without their prefixes.
    InputError if there is none."""
    places = [key for key in WHERE if isinstance(checkpoint.get(key), dict)]
    state = checkpoint[places[0]] if places else checkpoint
    require(state and all(map(torch.is_tensor, state.values())), "no weights were found under "
            f"{', '.join(WHERE)}, but {shorten(map(str, state)) or 'nothing'}: save a state dict, "
            "tensors by their names, alone or under one of these")
    lora = [name for name in state if "lora_" in name]
    require(not lora, f"these are LoRA's changes of weights ({shorten(lora)}), not the weights: "
            "merge them into their model, and save that")
    return {re.sub(PREFIXES, "", name): value for name, value in state.items()}


def open_checkpoint(source):
    """A checkpoint of train.py as it is; weights from elsewhere, which are bare, as train.py would
    have saved them."""
    checkpoint = read_checkpoint(source)
    if "config" in checkpoint:
        require_keys(checkpoint, CHECKPOINT, source)
        return checkpoint
    state = weights_of(checkpoint)
    size, step, cfg = architecture_of(state)
    require(cfg, f"{source} is neither a checkpoint that train.py wrote nor weights of a ViT or an "
            "iLLaMA of a published size: use another file")
    return dict(config=asdict(cfg), model=state, classes=None, alpha=0.0 if cfg.soft else None,
                run=dict(size=size, step=step, data="", dtype="float32", seed=0))


def architecture_of(state):
    """(size, step, Config) of bare weights, by their names and shapes: None for each if there is no
    such size."""
    try:
        width = state["cls_token"].shape[-1]
        depth = sum(name.endswith("norm1.weight") for name in state)
        size = next(name for name, sizes in SIZES.items()
                    if (sizes["width"], sizes["depth"]) == (width, depth))
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        classes = len(state.get("head.weight", ()))
    except (KeyError, StopIteration):
        return None, None, None
    step = "soft_mask"
    if "blocks.0.norm1.bias" in state:
        step = "swiglu" if "blocks.0.mlp.fc3.weight" in state else "vit"
    cfg = config(size, step, img_size=patch_size * grid, patch_size=patch_size,
                 num_classes=classes)
    return size, step, cfg


def build(checkpoint, architecture=VisionTransformer, img_size=None):
    """The model of a checkpoint, with its weights and its soft mask, perhaps at another resolution
    than it was trained at."""
    values = checkpoint["config"] | (dict(img_size=img_size) if img_size else {})
    model = architecture(checked_config(Config, **values))
    load_weights(model, checkpoint)
    if checkpoint["alpha"] is not None:
        model.set_soft_mask(checkpoint["alpha"])
    return model


def require_no_head(checkpoint):
    require("head" not in checkpoint.get("recipe", {}), "this is a model of downstream.segment, "
            "which gives each pixel a class: use that program, or a run of train.py")


def describe(cfg, checkpoint, dtype):
    """What a row of results says of a checkpoint's model beside its accuracy."""
    run = checkpoint["run"]
    return dict(mask=cfg.mask, alpha=checkpoint["alpha"], img_size=cfg.img_size, step=run["step"],
                seed=run["seed"], dtype=str(dtype).removeprefix("torch."),
                overrides=overrides(cfg, run["size"], run["step"]))


def load_strictly(module, state):
    """module.load_state_dict(); an InputError in one line if the weights do not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        wrong = textwrap.shorten(str(error).partition(":")[2], 600)
        raise InputError(f"the weights do not fit the model: {wrong} Use the model that they are "
                         "of") from error


def load_weights(model, source, new_head=False, classes=None):
    """Load a checkpoint's path, a published name or a state dict. Returns sentences about what had
    to be adapted.

    Learned positions are resized to the model's grid. Everything else must fit exactly, but for the
    head where `new_head` is set: if it is of other classes, by their number or by the names in
    `classes`, it keeps the model's fresh weights. InputError lists what is wrong.
    """
    source = source if isinstance(source, dict) else read_checkpoint(source)
    require_no_head(source)
    state, own, notes = weights_of(source), model.state_dict(), []

    # Other architectures: some fit no weight, of others no weight's shape tells
    size, step, cfg = architecture_of(state)
    if "run" in source:
        size, step = source["run"]["size"], source["run"]["step"]
        cfg = checked_config(Config, **source["config"])
    if cfg:
        flags = dict(size=size, step=step, **overrides(cfg, size, step), img_size=cfg.img_size,
                     patch_size=cfg.patch_size)
        require(all(getattr(cfg, name) == getattr(model.cfg, name) for name in SHAPES),
                f"the weights to start from are of another model: give{flags_of(flags)}")
    before = source.get("config", {})
    for name in ("heads", "mask", "cls_last", "rope"):
        now = getattr(model.cfg, name)
        if before.get(name, now) != now:
            notes.append(f"{name} {before[name]} before, {now} now")

    # Positions
    pos, grid = state.get("pos_embed"), model.cfg.grid
    if pos is not None and model.cfg.abs_pos and pos.shape[1] != model.cfg.tokens:
        state["pos_embed"] = resize_positions(pos, model.patches, grid)
        notes.append(f"learned positions resized from {pos[:, model.patches].shape[1]} to "
                     f"{grid ** 2} patches")

    # Head
    head = {name: value for name, value in own.items() if name.startswith("head.")}
    old, new = len(state.get("head.weight", ())), model.cfg.num_classes
    others = classes is not None and source.get("classes") not in (None, list(classes))
    if new_head and (others or old != new):
        notes.append(f"new head: {old} classes before, {new} {'others ' if old == new else ''}now")
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= head
    load_strictly(model, state)
    return notes


def resize_positions(pos, patches, grid):
    """Bicubic resize of learned positions (1, N, D): those of the patches, a slice of the sequence,
    to grid x grid; the class token's is kept as it is."""
    first, end, _ = patches.indices(pos.shape[1])
    old = math.isqrt(end - first)
    require(old ** 2 == end - first, f"pos_embed has {pos.shape[1]} rows, which is no square grid "
            "of patches and a class token")
    maps = pos[:, patches].unflatten(1, (old, old)).permute(0, 3, 1, 2)          # 1, D, old, old
    maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos[:, :first], maps.flatten(2).transpose(1, 2), pos[:, end:]], dim=1)


def load_optimizer(optimizer, state, source):
    """What any optimizer keeps of each parameter, {index: {name: value}}, into one that has not
    taken a step.

    InputError unless names and shapes are those that the optimizer itself would keep: the fused
    AdamW does not check, and would write beyond a tensor's end. A step of learning rate 0 on
    gradients of 0 shows them, and moves nothing.
    """
    groups = optimizer.state_dict()["param_groups"]                  # they follow from the recipe
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    require(shapes_of(state) == shapes_of(optimizer.state_dict()["state"]), f"{source}: what the "
            "optimizer has saved is of another optimizer or model: use the code and the flags "
            "that the run was started with")
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def shapes_of(state):
    """{(index, name): shape} of what an optimizer keeps."""
    return {(index, name): getattr(value, "shape", None) for index, values in state.items()
            for name, value in values.items()}
