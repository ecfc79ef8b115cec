"""Weight selection [1]: a checkpoint of a small model, made of some of the weights of a larger one.

    python -m downstream.selection out/tiny --size nano --depth 4 --out small.pt           # of a run of this repository
    python -m downstream.selection Llama-2-7b-hf --size tiny --rule aligned --out small.pt # of LLaMA 2
    python train.py --size nano --depth 4 --data cifar10 --init-from small.pt           # then train it

Block i starts from block i of the larger model, and of every dimension evenly spaced elements are kept: of each tensor
as it is (`uniform`, the published rule), or of heads and of RoPE's pairs in them (`aligned`), so that what is kept
computes what it did in the larger model. See docs/downstream.md.

[1] Xu et al., arXiv 2311.18823
"""
import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from data import seed_of
from harness.checkpoint import (load_strictly, open_checkpoint, read_safetensors, resize_positions,
                                weights_of)
from harness.files import replacing
from harness.flags import (InputError, Parser, add_flags, check_bounds, checked_config, flags_of, nonempty, overrides,
                           pick, require, shorten)
from harness.processes import report_errors
from harness.run import packed
from model import MASKS, SIZES, STEPS, Config, VisionTransformer, config

LLAMA = {  # Hugging Face's names in a layer: ours in a block
    "input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight",
    "self_attn.o_proj.weight": "attn.proj.weight", "mlp.gate_proj.weight": "mlp.fc1.weight",
    "mlp.up_proj.weight": "mlp.fc3.weight", "mlp.down_proj.weight": "mlp.fc2.weight",
    **{f"self_attn.{name}_proj.weight": f"attn.{name}.weight" for name in "qkv"}}


def places(larger, smaller):
    """Which of `larger` elements are kept, `smaller` of them: every k-th, or where that does not divide evenly spaced
    ones from the first to the last, rounded."""
    require(larger >= smaller, f"weights cannot be selected where the larger model has {larger} and this one "
            f"{smaller}: start from a larger one")
    if larger % smaller == 0:
        return torch.arange(0, larger, larger // smaller)
    return torch.linspace(0, larger - 1, smaller).round().long()


def take(tensor, *indices):
    """The elements at these indices of each dimension."""
    for dim, index in enumerate(indices):
        tensor = tensor.index_select(dim, index)
    return tensor


def uniform(tensor, shape):
    return take(tensor, *(places(*sizes) for sizes in zip(tensor.shape, shape)))


def channels(width, heads, own_width, own_heads, rotated, halves):
    """Which of the larger model's `width` channels, rows of q, k or v, are kept: of evenly spaced heads evenly spaced
    pairs if they are `rotated`, else single channels. `halves`: a pair is not adjacent, but half a head apart."""
    d, own_d = width // heads, own_width // own_heads
    require(heads >= own_heads and d >= own_d, f"the larger model has {heads} heads of {d} channels, this one "
            f"{own_heads} of {own_d}: use --rule uniform, or other --heads")
    if rotated:
        first = places(d // 2, own_d // 2)                           # RoPE's frequencies: spaced alike, so kept
        inside = torch.stack([first, first + d // 2] if halves else [2 * first, 2 * first + 1], dim=1).flatten()
    else:
        inside = places(d, own_d)
    return (places(heads, own_heads)[:, None] * d + inside).flatten()


def aligned(name, tensor, shape, heads, own_heads, rope, halves):
    """The part of a weight. But for those of attention that is what uniform() keeps, as it depends on the sizes alone
    and so is the same wherever a dimension occurs."""
    part = name.split("attn.")[-1]
    if part.startswith("qkv"):
        width, own = len(tensor) // 3, shape[0] // 3
        rows = [channels(width, heads, own, own_heads, rotated, halves) for rotated in (rope, rope, False)]
        rows = torch.cat([i * width + index for i, index in enumerate(rows)])
        return take(tensor, rows, *(places(*sizes) for sizes in zip(tensor.shape[1:], shape[1:])))
    if part == "proj.weight":
        columns = channels(tensor.shape[1], heads, shape[1], own_heads, False, halves)
        return take(tensor, places(len(tensor), shape[0]), columns)
    return uniform(tensor, shape)


def select_weights(model, source, rule):
    """Load into a model what a rule selects of a larger one: a checkpoint, or the path of a folder of LLaMA 2.

    Returns the names of what was not there to select, and so is fresh. InputError if the two do not fit.
    """
    cfg, own = model.cfg, model.state_dict()
    if isinstance(source, dict):
        larger, heads, halves = weights_of(source), source["config"]["heads"], False
        theirs, fresh = checked_config(Config, **source["config"]), []
        for name in ("patch_size", "swiglu", "rmsnorm", "cls_last", "rope", "abs_pos"):
            before, now = getattr(theirs, name), getattr(cfg, name)
            require(before == now, f"the larger model has {name} {before}, this one {now}: change --step or the flag")
        if theirs.num_classes != cfg.num_classes:
            fresh = ["head.weight", "head.bias"]
        pos = larger.get("pos_embed")
        if pos is not None and cfg.abs_pos and pos.shape[1] != cfg.tokens:
            larger["pos_embed"] = resize_positions(pos, model.patches, cfg.grid)
    else:
        require(cfg.swiglu and cfg.rmsnorm, f"{source} has SwiGLU and RMSNorm: use --step rmsnorm or a later one")
        larger, heads = read_llama(Path(source), cfg.depth)
        halves = True
        fresh = [name for name in own if not name.startswith("blocks.") or name.endswith("bias")]
    selected = {}
    for name in own:
        if name in fresh:
            continue
        require(name in larger, f"the larger model lacks {name} to select from: use one at least as deep")
        tensor, shape = larger[name], own[name].shape
        require(tensor.ndim == len(shape), f"{name} of the larger model has {tensor.ndim} dimensions, not "
                f"{len(shape)}: use other weights")
        if rule == "uniform":
            selected[name] = uniform(tensor, shape).float()
        else:
            selected[name] = aligned(name, tensor, shape, heads, cfg.heads, cfg.rope, halves).float()
    load_strictly(model, own | selected)
    return fresh


# ---------------------------------------------------------------------------------------------------------------------
# LLaMA 2 in Hugging Face's layout


def is_llama(source):
    """Whether it is a folder of a Hugging Face model. A run of train.py has a config.json of its own."""
    path = Path(source, "config.json")
    return path.is_file() and '"hidden_size"' in path.read_text(errors="replace")


def read_llama(folder, depth):
    """({our name: tensor} of the first `depth` layers, heads) of a folder with config.json and shards, *.safetensors or
    *.bin. No code that a file might hold is run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is not that of LLaMA 2 ({error}): use another folder") from error
    require(layers >= depth, f"{folder} has {layers} layers, this model {depth}: use a deeper one")
    require(config.get("model_type", "llama") == "llama" and config.get("num_key_value_heads", heads) == heads,
            f"{folder} is another model than LLaMA, or shares keys and values between heads, which this model does "
            "not: use LLaMA 2 7B or 13B")
    shards = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    require(shards, f"{folder} holds neither *.safetensors nor *.bin: use a folder with the weights")
    theirs, found = {}, {}
    for path in shards:
        theirs |= open_shard(path)
    for i in range(depth):
        for name, part in LLAMA.items():
            source = f"model.layers.{i}.{name}"
            require(source in theirs, f"{folder} lacks {source}: download all of its files")
            found[f"blocks.{i}.{part}"] = theirs[source]
        qkv = [found.pop(f"blocks.{i}.attn.{name}.weight") for name in "qkv"]
        found[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
    return found, heads


def open_shard(path):
    """{name: tensor} of a file, mapped into memory: only the tensors that are used are read."""
    try:
        if path.suffix == ".bin":
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        weights, _ = read_safetensors(path)
        return weights
    except InputError:
        raise
    except Exception as error:  # torch and safetensors raise half a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as weights ({reason}): use another file") from error


# ---------------------------------------------------------------------------------------------------------------------
# The program


def small_config(given, step, larger):
    """The Config of the small model: what the flags say; where they do not, patches, resolution, classes and, unless
    they name a step, the parts of `larger`, the Config of the larger model."""
    kept = ["img_size", "patch_size", "num_classes"]
    if "step" not in given:
        kept += ["swiglu", "rmsnorm", "mask", "cls_last", "rope", "abs_pos"]
    values = {name: getattr(larger, name) for name in kept} | pick(Config, given)
    return checked_config(config, size=given["size"], step=step, **values)


@report_errors()
def main(argv=None):
    parser = Parser(prog="python -m downstream.selection",
                    description="Make a checkpoint of a small model from some of the weights of a larger one.")
    parser.add_argument("larger", help="a run's folder, a checkpoint, published weights, or a folder of LLaMA 2")
    parser.add_argument("--size", choices=SIZES, required=True, help="width, depth and heads, see model.py")
    parser.add_argument("--step", choices=STEPS, default=argparse.SUPPRESS, help="default: the larger model's")
    parser.add_argument("--rule", choices=("uniform", "aligned"), default="uniform", help="what is kept, see above")
    parser.add_argument("--seed", type=int, default=0, help="random seed of what is not selected")
    parser.add_argument("--out", type=nonempty, required=True, help="the checkpoint to write, for train.py --init-from")
    model_flags = parser.add_argument_group("model (default: as --size says, and as the larger model)")
    add_flags(model_flags, Config, skip=("drop_path",), choices=dict(mask=MASKS))
    given = vars(parser.parse_args(argv))
    check_bounds(given)

    source, run, larger, classes = given["larger"], dict(step="soft_mask", data=""), config(), None
    if not is_llama(source):
        source = open_checkpoint(source)
        run |= source["run"]
        larger, classes = checked_config(Config, **source["config"]), source["classes"]
    run |= dict(size=given["size"], step=given.get("step", run["step"]), seed=given["seed"], dtype="float32")
    cfg = small_config(given, run["step"], larger)
    torch.manual_seed(seed_of("weights", run["seed"]))
    model = VisionTransformer(cfg)
    fresh = select_weights(model, source, given["rule"])
    if "head.weight" in fresh:
        classes = None
    checkpoint = dict(model=model.state_dict(), config=asdict(cfg), classes=classes, alpha=0.0 if cfg.soft else None,
                      run={name: run[name] for name in ("size", "step", "data", "dtype", "seed")})
    with replacing(given["out"], "downstream.selection") as file:
        file.write_bytes(packed(checkpoint | dict(made_by="downstream.selection")))
    flags = dict(size=run["size"], step=run["step"]) | overrides(cfg, run["size"], run["step"])
    flags |= dict(img_size=cfg.img_size, patch_size=cfg.patch_size, init_from=shlex.quote(given["out"]))
    print(f"weights of {given['larger']}, selected by the rule {given['rule']}; fresh: {shorten(fresh) or 'none'}\n"
          f"train it: python train.py{flags_of(flags)}")


if __name__ == "__main__":
    main()
