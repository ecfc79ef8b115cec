"""Weight selection [1]: a model starts from some of the weights of a larger one.

    python train.py --size nano --data cifar10 --init-from out/tiny --select uniform          # one of this repository
    python train.py --size tiny --data IMAGENET --recipe tiny --init-from Llama-2-7b-hf --select aligned    # LLaMA 2
    python -m downstream.select --data cifar10        # is it worth it? stopped and started again, it goes on

Block i starts from block i of the larger model, and of every dimension evenly spaced elements are kept. `uniform`
applies that to each tensor as it is, as the published repository does: rows of queries, keys and values are picked from
the three stacked, so that a head of the small model mixes rows of several heads, and channels that RoPE rotates as a
pair are separated. `aligned` picks heads, and in each head pairs of channels, the same for queries and keys, and single
channels, the same for values and the projection behind them: what is kept computes what it did in the larger model.

[1] Xu et al., arXiv 2311.18823
"""
import json
import re
import sys
from pathlib import Path

import torch

from data import open_data, shorten
from eval import Parser, report_errors, stop_on_signals
from experiments.ladder import ROOT, add_flags, train_all
from model import Config, load_state, open_checkpoint, other_classes, resize_positions, weights_of

LLAMA = {  # Hugging Face's names in a layer: ours in a block
    "input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight",
    "self_attn.o_proj.weight": "attn.proj.weight", "mlp.gate_proj.weight": "mlp.fc1.weight",
    "mlp.up_proj.weight": "mlp.fc3.weight", "mlp.down_proj.weight": "mlp.fc2.weight",
    **{f"self_attn.{name}_proj.weight": f"attn.{name}.weight" for name in "qkv"}}


def places(larger, smaller):
    """Which of `larger` elements are kept, `smaller` of them: every k-th, or where that does not divide evenly spaced
    ones from the first to the last, rounded."""
    if larger < smaller:
        raise ValueError(f"weights cannot be selected where the larger model has {larger} and this one {smaller}: "
                         "start from a larger one")
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
    if heads < own_heads or width // heads < own_width // own_heads:
        raise ValueError(f"the larger model has {heads} heads of {width // heads} channels, this one {own_heads} of "
                         f"{own_width // own_heads}: use --select uniform, or other --heads")
    d, own_d = width // heads, own_width // own_heads
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


def select_weights(model, source, rule, classes=None):
    """Load into a model what a rule selects of a larger one: a checkpoint, a published name or a folder of LLaMA 2.
    The head stays fresh if it is of other `classes`.

    Returns sentences about what was not there to select, and so is fresh. ValueError if the two do not fit.
    """
    cfg, own = model.cfg, model.state_dict()
    if is_llama(source):
        larger, heads, halves = *read_llama(Path(source), cfg.depth), True
        if not (cfg.swiglu and cfg.rmsnorm):
            raise ValueError(f"--init-from {source} has SwiGLU and RMSNorm: use --step rmsnorm or a later one")
        fresh = [name for name in own if not name.startswith("blocks.") or name.endswith("bias")]
    else:
        checkpoint = open_checkpoint(source)
        larger, heads, halves = weights_of(checkpoint), checkpoint["config"]["heads"], False
        fresh, theirs = [], Config(**checkpoint["config"])
        for field in ("patch_size", "swiglu", "rmsnorm", "cls_last", "rope", "abs_pos"):
            if getattr(theirs, field) != getattr(cfg, field):
                raise ValueError(f"--init-from {source} has {field} {getattr(theirs, field)}, this model "
                                 f"{getattr(cfg, field)}: change --step or the flag")
        pos = larger.get("pos_embed")
        if pos is not None and cfg.abs_pos and pos.shape[1] != cfg.tokens:
            larger["pos_embed"] = resize_positions(pos, cfg.tokens, cfg.cls_last)
        if "head.weight" in larger and (len(larger["head.weight"]) != cfg.num_classes
                                        or other_classes(checkpoint, classes)):
            fresh = ["head.weight", "head.bias"]
    missing = [name for name in own if name not in larger and name not in fresh]
    if missing:
        raise ValueError(f"--init-from {source} lacks {missing[0]} to select from: use a model at least as deep")
    selected = {}
    for name in [name for name in own if name not in fresh]:
        tensor, shape = larger[name], own[name].shape
        if tensor.ndim != len(shape):
            raise ValueError(f"{name} of --init-from {source} has {tensor.ndim} dimensions, not {len(shape)}: use "
                             "other weights")
        part = uniform(tensor, shape) if rule == "uniform" else aligned(
            name, tensor, shape, heads, cfg.heads, cfg.rope, halves)
        selected[name] = part.float()
    load_state(model, own | selected)
    return [f"{rule} selection of larger weights"] + ([f"fresh: {shorten(fresh)}"] if fresh else [])


# ---------------------------------------------------------------------------------------------------------------------
# LLaMA 2 in Hugging Face's layout


def is_llama(source):
    """Whether it is a folder of a Hugging Face model. A run of train.py has a config.json of its own."""
    path = Path(source, "config.json")
    return path.is_file() and '"hidden_size"' in path.read_text(errors="replace")


def read_llama(folder, depth):
    """({our name: tensor} of the first `depth` layers, heads) of a folder with config.json and shards, *.safetensors or
    *.bin. Only these layers are read, and no code that a file might hold is run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not that of LLaMA 2 ({error}): use another folder") from error
    if layers < depth:
        raise ValueError(f"--init-from {folder} has {layers} layers, this model {depth}: use a deeper one")
    if config.get("model_type", "llama") != "llama" or config.get("num_key_value_heads", heads) != heads:
        raise ValueError(f"--init-from {folder} is another model than LLaMA, or shares keys and values between heads, "
                         "which this model does not: use LLaMA 2 7B or 13B")
    found = {}
    for name, tensor in shards(folder, lambda name: layer_of(name) < depth):
        part = LLAMA.get(name.split(".", 3)[3])
        if part:
            found[f"blocks.{layer_of(name)}.{part}"] = tensor
    for i in range(depth):
        missing = [name for name, part in LLAMA.items() if f"blocks.{i}.{part}" not in found]
        if missing:
            raise ValueError(f"--init-from {folder} lacks model.layers.{i}.{missing[0]}: download all of its files")
        qkv = [found.pop(f"blocks.{i}.attn.{name}.weight") for name in "qkv"]
        found[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
    return found, heads


def layer_of(name):
    """The number in model.layers.NUMBER.*; infinity for what belongs to no layer."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else float("inf")


def shards(folder, wanted):
    """(name, tensor) of those names in a folder's files that are wanted."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} holds neither *.safetensors nor *.bin: use a folder with the weights")
    for path in files:
        try:
            if path.suffix == ".bin":
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                yield from ((name, state[name]) for name in state if wanted(name))
            else:
                from safetensors import safe_open
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in file.keys() if wanted(name))
        except ModuleNotFoundError as error:
            raise ValueError(f"{path} needs safetensors: pip install safetensors") from error
        except Exception as error:  # torch and safetensors raise half a dozen kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path} cannot be read as weights ({reason}): use another file") from error


# ---------------------------------------------------------------------------------------------------------------------
# Is it worth it? One larger model, and smaller ones that start from it by either rule, or from random weights


FLAGS = "--batch-size 64 --lr 1e-3 --workers 0 --device cpu"
STARTS = ("random", "uniform", "aligned")


def runs(args):
    """(the larger model, the smaller ones): {name: (command, fields of the row)} as train_all() takes them."""
    command = [ROOT / "train.py", "--data", args.data, *args.flags.split()]
    larger = {"larger": ([*command, *args.larger.split(), "--epochs", str(args.larger_epochs)],
                         dict(data=args.data, start="larger", seed=0, epoch=args.larger_epochs - 1))}
    smaller = {}
    for seed in range(args.seeds):
        for start in STARTS:
            select = [] if start == "random" else ["--init-from", args.out / "larger" / "last.pt", "--select", start]
            smaller[f"{start}-{seed}"] = (
                [*command, *args.smaller.split(), "--epochs", str(args.epochs), "--seed", str(seed), *select],
                dict(data=args.data, start=start, seed=seed, epoch=args.epochs - 1))
    return larger, smaller


@report_errors()
def main(argv=None):
    parser = Parser(prog="python -m downstream.select", allow_abbrev=False,
                    description="Compare starts from a larger model's weights with random ones, over epochs.")
    add_flags(parser, "of the smaller ones, from 0 on; the larger one has 0", Path("out", "select"))
    parser.add_argument("--larger", default="--size tiny --depth 4", help="flags of train.py for the larger model")
    parser.add_argument("--smaller", default="--size nano --depth 3", help="flags of train.py for the smaller ones")
    parser.add_argument("--flags", default=FLAGS, help="flags of train.py for all")
    parser.add_argument("--larger-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(argv)
    if min(args.seeds, args.epochs, args.larger_epochs, args.jobs) < 1:
        raise ValueError("--seeds, --epochs, --larger-epochs and --jobs must be at least 1")
    open_data(args.data, "train", 32)                                # downloaded here, once, if at all
    stop_on_signals()
    larger, smaller = runs(args)
    done = train_all(larger, args.out, 1, curve=True) and train_all(smaller, args.out, args.jobs, curve=True)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
