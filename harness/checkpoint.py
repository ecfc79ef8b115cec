"""Weights and checkpoints in and out: files are read without running code that they might hold, and checked once.

    checkpoint = open_checkpoint("out/tiny-soft_mask-shapes-1")          # a run's folder, a file or a published name
    model = build(checkpoint)                                            # with its weights and its soft mask
    notes = load_weights(model, "illama-tiny-in1k-75.0")                 # into a model that was built otherwise

A checkpoint is a dict of plain types and tensors; ["model"] is the state dict.
"""
import argparse
import json
import math
import pickle
import re
import reprlib
import sys
import textwrap
import uuid
import zipfile
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import wraps
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from harness.flags import InputError, as_input_error, check_bounds, checked_config, needs, overrides, require
from model import SIZES, Config, VisionTransformer, config

PUBLISHED = (  # the authors' weights, by the names of their files
    "illama-tiny-in1k-75.0", "illama-small-in1k-79.9", "illama-base-in1k-81.6", "illama-base-in1k-384-83.0",
    "illama-base-in21kin1k-224-83.6", "illama-base-in21kin1k-384-85.0",
    "illama-large-in21kin1k-224-84.8", "illama-large-in21kin1k-384-86.0")
PUBLISHED_URL = "https://huggingface.co/techmonsterwang/iLLaMA/resolve/main"

SCALAR = np.float64(0).__reduce__()[0]     # what rebuilds a pickled numpy scalar; its module has had two names
SAFE = [(SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)), argparse.Namespace]

CHECKPOINT = dict(  # what a checkpoint of train.py holds, as far as evaluation needs it; see validate
    model=dict, config=Config, classes=list | None, alpha=float | int | None,
    run=dict(size=str, step=str, data=str, dtype=str, seed=int))


def fetch(name):
    """The file of published weights, downloaded once into torch.hub's folder. InputError if that fails."""
    file = Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth")
    if not file.exists():
        part = file.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{PUBLISHED_URL}/{name}.pth", str(part), progress=sys.stderr.isatty())
            read_file(part)
            part.replace(file)
        except (OSError, HTTPException, InputError) as error:
            with suppress(OSError):
                part.unlink()
            reason = "it was cut short or is another file" if isinstance(error, InputError) else error
            raise InputError(f"{PUBLISHED_URL}/{name}.pth could not be downloaded to {file} ({reason}): connect to a "
                             "network, or give the path of the file") from error
    return file


def open_safetensors(path):
    """({name: tensor}, metadata) of a file; the tensors are mapped into memory."""
    with needs(path, "safetensors"):
        from safetensors import safe_open
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def read_safetensors(path):
    """Weights, and what downstream/export.py writes beside them; safetensors holds no code."""
    try:
        weights, metadata = open_safetensors(path)
        about = json.loads(metadata.get("checkpoint", "null"))
    except InputError:
        raise
    except Exception as error:  # its own types
        raise InputError(f"{path} cannot be read as safetensors ({error}): delete or replace it") from error
    return Checkpoint(about | dict(model=weights) if isinstance(about, dict) else weights, path)


class Checkpoint(dict):
    """What a file holds, and its name."""

    def __init__(self, values, source):
        super().__init__(values)
        self.source = str(source)


def names_file(function):
    """InputErrors of a function name the file of the Checkpoint, or the path, that it is given."""
    @wraps(function)
    def naming(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except InputError as error:
            files = [str(getattr(arg, "source", arg)) for arg in args if isinstance(arg, Checkpoint | str | Path)]
            source = files[0] if files else ""
            raise InputError(str(error) if source in str(error) else f"{source}: {error}") from error
    return naming


def read_checkpoint(source):
    """The Checkpoint in a file, by its path, its run's folder (best.pt) or published name. InputError if there is none.
    """
    path = fetch(source) if str(source) in PUBLISHED else Path(source)
    if path.is_dir():
        path, last = path / "best.pt", path / "last.pt"
        require(path.exists() or not last.exists(), f"{path} is written with the first accuracy under the soft "
                f"mask's final alpha: wait for that, or give {last}")
    require(path.is_file(), f"no checkpoint at {path}: check the path, or give one of the names {', '.join(PUBLISHED)}")
    return read_file(path)


def read_file(path):
    """The dict in a file. Only weights and plain types are read: a pickle that would run code is refused, and so is a
    corrupted file, or a compressed one, which torch.save does not write and which could be of any size.

    Published files also hold an argparse.Namespace, and numpy scalars where schedules set the optimizer's groups.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        if zipfile.is_zipfile(path):                                       # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                    raise ValueError("it is compressed")
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        with torch.serialization.safe_globals(SAFE):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged or foreign file
        code = re.search(r"GLOBAL (\S+)", str(error))                      # torch's own text advises to trust the file
        reason = (f"it holds {code[1]}, which could run code" if code else
                  "it is not a file of torch.save" if isinstance(error, pickle.UnpicklingError) else
                  (str(error).splitlines() or ["it is empty"])[0])
        raise InputError(f"{path} cannot be read as a checkpoint of weights and plain types ({reason}): delete or "
                         "replace it") from error
    validate(checkpoint, dict, str(path))
    return Checkpoint(checkpoint, path)


def validate(value, kind, name):
    """InputError with its `name` if a value is not of a type; so what a file says is checked once, where it is read.

    `kind` is a type or a union of types (an int is a float, a bool is no int, a list is one of strings), a dict {key:
    kind} of what must be there, or a dataclass: its fields' annotations are the types, numbers are within BOUNDS of
    flags.py, and other keys are unknown.
    """
    if not isinstance(kind, dict) and not is_dataclass(kind):
        fits = isinstance(value, float | int if kind is float else kind)
        if isinstance(value, bool):
            fits = kind is bool
        if isinstance(value, list):
            fits = fits and all(isinstance(item, str) for item in value)
        if not fits:                                         # only then: to write a value in words can take long
            raise InputError(f"{name} is {reprlib.repr(value)}, which is not of the type "
                             f"{getattr(kind, '__name__', kind)}: use another file")
        return
    validate(value, dict, name)
    inner = kind
    if is_dataclass(kind):
        unknown = value.keys() - {field.name for field in fields(kind)}
        require(not unknown, f"{name} has the unknown field {min(map(str, unknown), default='')!r}: use another file")
        inner = {f.name: f.type for f in fields(kind) if f.name in value or f.default is MISSING}
    missing = [key for key in inner if key not in value]
    require(not missing, f"{name} lacks {', '.join(missing)}: use a checkpoint that train.py wrote (--resume takes a "
            "run's last.pt)")
    for key, inner_kind in inner.items():
        validate(value[key], inner_kind, f"{name}: {key}")
    if is_dataclass(kind):
        check_bounds(value, lambda key: f"{name}: {key}")


def is_dense(value):
    """Whether it is a floating-point tensor whose storage holds every element (an expanded one's does not)."""
    return (isinstance(value, torch.Tensor) and value.layout is torch.strided and value.is_floating_point()
            and not value.is_quantized and not value.is_meta and value.nbytes <= value.untyped_storage().nbytes())


def weights_of(checkpoint):
    """The state dict in a checkpoint, without the prefixes of DDP and torch.compile. InputError if there is none."""
    state = checkpoint.get("model", checkpoint)
    fits = isinstance(state, dict)
    for name, value in state.items() if fits else ():
        fits = fits and isinstance(name, str) and is_dense(value) and value.ndim > 0
    require(fits, "what should be weights is not a dict of tensors, dense and floating-point, by their names: use "
            "another file")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}


@names_file
def open_checkpoint(source):
    """A checkpoint of train.py as it is; published weights, which are bare, as train.py would have saved them."""
    checkpoint = read_checkpoint(source)
    if "config" in checkpoint:
        validate(checkpoint, CHECKPOINT, source)
        classes, count = checkpoint["classes"], checkpoint["config"].get("num_classes", 1000)
        require(classes is None or len(classes) == count, f"{len(classes or ())} classes are named, but the model "
                f"knows {count}: use another file")
        return checkpoint
    state = weights_of(checkpoint)
    try:  # size, patches and resolution follow from the shapes
        shape = state["cls_token"].shape[-1], sum(name.endswith("norm1.weight") for name in state)
        size = next(name for name, sizes in SIZES.items() if (sizes["width"], sizes["depth"]) == shape)
        patch_size, grid = state["patch_embed.proj.weight"].shape[-1], math.isqrt(state["pos_embed"].shape[1] - 1)
        cfg = config(size, img_size=patch_size * grid, patch_size=patch_size, num_classes=len(state["head.weight"]))
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise InputError(f"{source} is neither a checkpoint that train.py wrote nor published iLLaMA weights: use "
                         "another file") from error
    return Checkpoint(dict(config=asdict(cfg), model=state, classes=None, alpha=0.0,
                           run=dict(size=size, step="soft_mask", data="", dtype="float32", seed=0)), source)


@names_file
def build(checkpoint, architecture=VisionTransformer):
    """The model of a checkpoint, with its weights and its soft mask."""
    state, cfg = weights_of(checkpoint), checked_config(Config, **checkpoint["config"])
    try:
        with torch.device("meta"):                     # shapes alone: a wrong configuration takes no memory
            load_strictly(architecture(cfg), state, assign=True)
    except RuntimeError as error:                      # shapes beyond all bounds
        raise InputError(f"the checkpoint's config is none of this model's ({error}): use another file") from error
    model = architecture(cfg)
    model.load_state_dict(state)
    if checkpoint["alpha"] is not None:
        set_alpha(model, checkpoint["alpha"])
    return model


def describe(cfg, checkpoint, dtype):
    """What a row of results says of a checkpoint's model beside its accuracy."""
    run = checkpoint["run"]
    return dict(mask=cfg.mask, alpha=checkpoint["alpha"], img_size=cfg.img_size, step=run["step"], seed=run["seed"],
                dtype=str(dtype).removeprefix("torch."), overrides=overrides(cfg, run["size"], run["step"]))


def set_alpha(model, alpha):
    """model.set_soft_mask(), for what flags or a file say."""
    with as_input_error():
        model.set_soft_mask(alpha)


def load_strictly(module, state, assign=False):
    """module.load_state_dict(); an InputError in one line if the weights do not fit, or are not finite."""
    for name, value in state.items():
        require(not isinstance(value, torch.Tensor) or value.isfinite().all(), f"the weights {name} hold numbers that "
                "are not finite: use an earlier checkpoint, or train again with a smaller --lr")
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        wrong = textwrap.shorten(str(error).partition(":")[2], 600)
        raise InputError(f"the weights do not fit the model: {wrong} Use the model that they are of") from error


@names_file
def load_weights(model, source, new_head=False, classes=None):
    """Load a checkpoint's path, a published name or a state dict. Returns sentences about what had to be adapted.

    Learned positions are resized to the model's grid. Everything else must fit exactly, but for the head where
    `new_head` is set: if it is of other classes, by their number or by the names in `classes`, it keeps the model's
    fresh weights. InputError lists what is wrong.
    """
    source = source if isinstance(source, dict) else read_checkpoint(source)
    state, own, notes = weights_of(source), model.state_dict(), []

    pos, tokens = state.get("pos_embed"), model.cfg.tokens
    if pos is not None and model.cfg.abs_pos and pos.ndim == 3 and pos.shape[1] != tokens:
        state["pos_embed"] = resize_positions(pos, tokens, model.cfg.cls_last)
        notes.append(f"learned positions resized from {pos.shape[1] - 1} to {tokens - 1} patches")
    before = source.get("config", {})
    validate(before, Config, "config")
    for name in ("heads", "mask", "cls_last", "rope"):               # no weight's shape tells these
        now = getattr(model.cfg, name)
        if before.get(name, now) != now:
            notes.append(f"{name} {before[name]} before, {now} now")
    head = {name: value for name, value in own.items() if name.startswith("head.")}
    if new_head and not head.keys() & state.keys():                  # of an encoder
        notes.append(f"new head: none before, {model.cfg.num_classes} classes now")
        state |= head
    elif new_head and "head.weight" in state:
        old, new = len(state["head.weight"]), model.cfg.num_classes
        others = other_classes(source, classes)
        if others or state["head.weight"].shape != own["head.weight"].shape:
            notes.append(f"new head: {old} classes before, {new} {'others ' if old == new else ''}now")
            state |= head
    load_strictly(model, state)
    return notes


def other_classes(checkpoint, classes):
    """Whether a checkpoint names its classes, and they are not these."""
    return classes is not None and checkpoint.get("classes") not in (None, list(classes))


def resize_positions(pos, tokens, cls_last):
    """Bicubic resize of the patches' positions, (1, P + 1, D) -> (1, tokens, D); the class token's is kept as it is."""
    old, new = math.isqrt(max(0, pos.shape[1] - 1)), math.isqrt(tokens - 1)
    require(old and old ** 2 + 1 == pos.shape[1],
            f"pos_embed has {pos.shape[1]} rows, which is no square grid of patches and a class token")
    grid, cls = (pos[:, :-1], pos[:, -1:]) if cls_last else (pos[:, 1:], pos[:, :1])
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)         # 1, D, old, old
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2)                           # 1, P, D
    return torch.cat([grid, cls] if cls_last else [cls, grid], dim=1)


def load_optimizer(optimizer, moments):
    """AdamW's moments of each parameter, {index: {name: tensor}}, into the optimizer. InputError if they do not fit:
    the fused AdamW does not check, and would write beyond a tensor's end."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        own = moments.get(i)
        validate(own, dict(step=torch.Tensor, exp_avg=torch.Tensor, exp_avg_sq=torch.Tensor), f"the optimizer: {i}")
        for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
            require(own[name].shape == shape and is_dense(own[name]),
                    f"the optimizer: {i} does not fit a parameter of shape {tuple(p.shape)}: use another file")
            require(own[name].dtype == torch.float32 and own[name].is_contiguous(),
                    f"the optimizer: {i} is not contiguous float32: use another file")
    groups = optimizer.state_dict()["param_groups"]                             # they follow from the recipe
    optimizer.load_state_dict(dict(state={i: moments[i] for i in range(len(params))}, param_groups=groups))
