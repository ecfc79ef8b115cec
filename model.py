"""A vision transformer that becomes a LLaMA decoder, one flag at a time.

`Config()` is ViT [1] as DeiT [2] trains it. Each rung of `STEPS` changes one thing, and the last one is iLLaMA [3]: the
decoder block of LLaMA [4] reading image patches. Weights carry the names of the published checkpoints.

    model = VisionTransformer(config("tiny"))                  # iLLaMA-T/16, the last rung
    model = VisionTransformer(config("tiny", step="vit"))      # ViT-T/16, the first
    logits = model(images)                                     # (B, 3, 224, 224) -> (B, 1000)

`python model.py` prints the ladder.

Symbols in shape comments: B images, P patches, N = P + 1 tokens, D width, h heads, d = D / h, M queries.

[1] ViT, arXiv 2010.11929       [2] DeiT, arXiv 2012.12877       [3] iLLaMA, arXiv 2404.06773
[4] LLaMA, arXiv 2302.13971     [5] SwiGLU, arXiv 2002.05202     [6] RMSNorm, arXiv 1910.07467
[7] RoPE, arXiv 2104.09864      [8] stochastic depth, arXiv 1603.09382
"""
import argparse
import math
import pickle
import re
import sys
import textwrap
import uuid
import zipfile
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torchvision.ops import StochasticDepth


@dataclass(frozen=True)
class Config:
    """Everything that fixes a model. The defaults are ViT-T/16 for ImageNet; for the rest see SIZES and STEPS."""
    img_size: int = 224       # resolution of the square input, pixels
    patch_size: int = 16      # side of a patch, pixels; img_size is a multiple of it
    num_classes: int = 1000   # outputs of the head
    width: int = 192          # channels of a token, D
    depth: int = 12           # blocks
    heads: int = 3            # attention heads; D / heads channels each, 64 in all published sizes
    drop_path: float = 0.0    # stochastic depth [8]: probability in the last block, falling linearly to 0 in the first
    # The ladder, in the order in which it is climbed:
    swiglu: bool = False      # MLP gated by a SiLU [5], without biases, in place of GELU
    rmsnorm: bool = False     # RMSNorm [6] in place of LayerNorm
    mask: str = "none"        # attention mask, see MASKS
    cls_last: bool = False    # post-sequence class token: after the patches instead of before them
    rope: bool = False        # rotary position embedding [7] of queries and keys
    abs_pos: bool = True      # learned position embedding, added to the tokens

    def __post_init__(self):
        for name in ("img_size", "patch_size", "num_classes", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}; "
                             f"{self.img_size // self.patch_size * self.patch_size or self.patch_size} is")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; change one of them")
        if self.rope and self.width // self.heads % 2:
            raise ValueError(f"rope turns pairs of channels, but a head has {self.width // self.heads}: "
                             "choose width and heads that make it even")
        if self.depth > 1000:                                        # 100,000 would be built for minutes
            raise ValueError(f"depth is {self.depth}; it must be at most 1,000")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must be at least 0 and less than 1")
        if self.mask not in MASKS:
            raise ValueError(f"unknown mask {self.mask!r}; choose one of {', '.join(MASKS)}")

    @property
    def soft(self):
        """Whether the mask has an alpha."""
        return self.mask.startswith("soft")

    @property
    def tokens(self):
        """N: the patches and the class token."""
        return (self.img_size // self.patch_size) ** 2 + 1


SIZES = {  # the published widths, depths and heads; nano has no published weights, and its SwiGLU is 4 D wide
    "nano": dict(width=128, depth=12, heads=2),
    "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
}

STEPS = {  # each rung: what it changes against the one before
    "vit": dict(),
    "swiglu": dict(swiglu=True),
    "rmsnorm": dict(rmsnorm=True),
    "causal": dict(mask="causal"),                # collapses: the class token comes first and attends to itself alone
    "ps_cls": dict(cls_last=True),                # the cure: the class token comes last and attends to every patch
    "rope": dict(rope=True, abs_pos=False),
    "abs_pos": dict(abs_pos=True),                # learned and rotary positions together
    "soft_mask": dict(mask="soft"),               # iLLaMA: bidirectional at first, causal later (see set_soft_mask)
}


def config(size="tiny", step="soft_mask", **overrides):
    """The Config of a size on a rung of the ladder, all rungs up to it applied; any field can be overridden."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    if step not in STEPS:
        raise ValueError(f"unknown step {step!r}; choose one of {', '.join(STEPS)}")
    known = [f.name for f in fields(Config)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown field {name!r}; a Config has {', '.join(known)}")
    rungs = list(STEPS)[: list(STEPS).index(step) + 1]
    changes = {name: value for rung in rungs for name, value in STEPS[rung].items()}
    return Config(**SIZES[size] | changes | overrides)


def overrides(cfg, size, step):
    """{name: value} of the fields of a Config that differ from those of a size on a rung: what flags changed on top.

    What data and recipe determine (resolution, patches, classes, drop path) does not count.
    """
    usual = config(size, step)
    return {field.name: getattr(cfg, field.name) for field in fields(Config)
            if field.name not in ("img_size", "patch_size", "num_classes", "drop_path")
            and getattr(cfg, field.name) != getattr(usual, field.name)}


# ---------------------------------------------------------------------------------------------------------------------
# Small parts, each with its formula


def norm(cfg):
    """LayerNorm, (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, with the statistics of each token's channels; or
    RMSNorm [6], x / sqrt(mean(x^2) + eps) * weight."""
    return (nn.RMSNorm if cfg.rmsnorm else nn.LayerNorm)(cfg.width, eps=1e-6)


def rope_table(tokens, dim, theta=10000.0):
    """(2, N, d): cos, and sin with rotate()'s signs, of the angle t * theta^(-2k/d) of token t and channel pair k [7].

    t is the position in the sequence: patches in raster order over their 2-D grid, the class token like any other.
    """
    frequency = theta ** (-torch.arange(0, dim, 2) / dim)            # d/2
    angle = torch.outer(torch.arange(tokens), frequency)             # N, d/2
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)]).flatten(-2)


def rotate(x, table):
    """Rotate each pair of adjacent channels by its token's angle, as LLaMA does.

    A query's product with a key depends on positions only through their difference. x: (..., N, d), table: (2, N, d).
    (a + ib) * (cos + i sin) in real numbers, (a, b) * cos + (b, a) * (-sin, sin), computed in float32.
    """
    cos, sin = table                                                 # N, d
    y = x.float()
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)                       # ..., N, d/2
    return (y * cos + torch.stack([b, a], dim=-1).flatten(-2) * sin).type_as(x)


# ---------------------------------------------------------------------------------------------------------------------
# The two MLPs


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), hidden 4 D: ViT's."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """fc2(silu(fc1(x)) * fc3(x)) [5]: LLaMA's. Three matrices, so hidden is 8/3 D, rounded up to a multiple of 256."""

    def __init__(self, dim):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.fc1 = nn.Linear(dim, hidden, bias=False)                # gate
        self.fc3 = nn.Linear(dim, hidden, bias=False)                # up
        self.fc2 = nn.Linear(hidden, dim, bias=False)                # down

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


# ---------------------------------------------------------------------------------------------------------------------
# Attention, block, model


class Mask(NamedTuple):
    """What each query attends to: softmax(q k' / sqrt(d) + attn_bias) * attn_scale, tables (N, N) with a row per query.

    is_causal stands for an attn_bias of -inf above the diagonal. That table is never made: the fused kernels know it,
    and skip what it hides.
    """
    is_causal: bool = False
    attn_bias: torch.Tensor | None = None
    attn_scale: torch.Tensor | None = None


# `soft` is the published mask: the weights of future values are scaled by alpha after the softmax. Future keys stay in
# its denominator, and even at alpha 0 a token's output depends on what comes after it. `soft_log` scales exp(score)
# instead, by adding log(alpha): at alpha 0 that is -inf, LLaMA's causal mask.
MASKS = {  # name: function of future, cls and alpha, see make_mask
    "none": lambda future, cls, alpha: Mask(),
    "causal": lambda future, cls, alpha: Mask(is_causal=True),
    "modified": lambda future, cls, alpha: Mask(attn_bias=torch.where(future() & ~cls, -math.inf, 0.0)),
    "soft": lambda future, cls, alpha: Mask(attn_scale=torch.where(future(), float(alpha), 1.0)),
    "soft_log": lambda future, cls, alpha: (
        Mask(attn_bias=torch.where(future(), math.log(alpha), 0.0)) if alpha else Mask(is_causal=True)),
}


def make_mask(cfg, alpha=0.0, device=None):
    """The Mask of a Config. Its function in MASKS gets future(), which makes the table (N, N) that is True where a key
    comes after its query (`none` and `causal` need none); cls (N, 1), True in the class token's row; and alpha."""
    position = torch.arange(cfg.tokens, device=device)               # on the device: no copy from the CPU
    cls = (position == (cfg.tokens - 1 if cfg.cls_last else 0))[:, None]
    return MASKS[cfg.mask](lambda: position > position[:, None], cls, alpha)


class Attention(nn.Module):
    """Multi-head attention: softmax of the scores, masked as Mask says, times v.

    `queries` picks the tokens whose output is computed, all or the class token: of the last block only the class token
    is read, and computing the others would be 6 % of the work.
    """

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def qkv_heads(self, x, rope):
        """x: (B, N, D) -> q, k and v: (B, h, N, d), q and k rotated."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))  # 2 + 1, B, h, N, d
        if rope is not None:
            qk, v = rotate(qk, rope), v.contiguous()        # as a view v would hold the memory of the unrotated q and k
        return *qk, *v

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        q = q[:, :, queries]                                         # B, h, M, d
        attn_bias, attn_scale = (m if m is None else m[queries].type_as(q) for m in (mask.attn_bias, mask.attn_scale))
        if attn_scale is None:                                       # nothing after the softmax: one fused kernel
            is_causal = mask.is_causal and queries != slice(-1, None)            # torch would align it to the first key
            y = F.scaled_dot_product_attention(q, k, v, attn_bias, is_causal=is_causal)
        else:                                            # save attn alone for backward, not attn * attn_scale, too
            attn = attention_weights(q, k, attn_bias)
            y = torch.utils.checkpoint.checkpoint(scaled_sum, attn, attn_scale, v, use_reentrant=False,
                                                  preserve_rng_state=False)
        return self.proj(y.transpose(1, 2).flatten(2))               # B, M, D


def attention_weights(q, k, attn_bias):
    """q (B, h, M, d), k (B, h, N, d) -> (B, h, M, N): softmax(q k' / sqrt(d) + attn_bias), whose rows sum to 1."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if attn_bias is None else scores + attn_bias).softmax(dim=-1)


def scaled_sum(attn, attn_scale, v):
    return (attn * attn_scale) @ v                                   # B, h, M, d


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each branch with stochastic depth in training [8]."""

    def __init__(self, cfg, drop_path):
        super().__init__()
        self.norm1 = norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = norm(cfg)
        self.mlp = SwiGLU(cfg.width) if cfg.swiglu else MLP(cfg.width)
        self.drop_path = StochasticDepth(drop_path, mode="row")      # an independent draw for each sample and branch

    def forward(self, x, rope, mask, queries=slice(None)):
        x = x[:, queries] + self.drop_path(self.attn(self.norm1(x), rope, mask, queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))           # B, M, D


class PatchEmbed(nn.Module):
    """Cut the image into patches, in raster order, and project each to D channels: one strided convolution."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch_size, stride=cfg.patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)          # B, P, D


class VisionTransformer(nn.Module):
    """ViT, iLLaMA and every rung between them: images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.width)) if cfg.abs_pos else None
        rate = cfg.drop_path / max(1, cfg.depth - 1)
        self.blocks = nn.ModuleList(Block(cfg, i * rate) for i in range(cfg.depth))
        self.norm = norm(cfg)
        self.head = nn.Linear(cfg.width, cfg.num_classes)
        self.cls = slice(-1, None) if cfg.cls_last else slice(0, 1)  # the class token's position in the sequence

        self.mask = make_mask(cfg)                                 # the largest table first: too large, it fails here
        rope = rope_table(cfg.tokens, cfg.width // cfg.heads) if cfg.rope else None
        self.register_buffer("rope", rope, persistent=False)         # can be computed, so is not in the state dict

        self.apply(init_weights)
        for p in (self.cls_token, self.pos_embed):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    @property
    def mask(self):
        return Mask(self.is_causal, self.attn_bias, self.attn_scale)

    @mask.setter
    def mask(self, mask):
        """Its tables become buffers, which model.to(device) moves."""
        self.is_causal = mask.is_causal
        self.register_buffer("attn_bias", mask.attn_bias, persistent=False)
        self.register_buffer("attn_scale", mask.attn_scale, persistent=False)

    def set_soft_mask(self, alpha):
        """The factor of the attention to later tokens: 1 is bidirectional, 0 (as built) the mask's final form."""
        if not self.cfg.soft:
            raise ValueError(f"mask {self.cfg.mask!r} has no alpha to set; use mask 'soft' or 'soft_log'")
        if not 0 <= alpha <= 1:
            raise ValueError(f"the soft mask's alpha is {alpha}; it must be between 0 and 1")
        self.mask = make_mask(self.cfg, alpha, self.cls_token.device)

    def embed(self, images):
        """(B, 3, H, W) -> (B, N, D): patches and class token in their order, with learned positions."""
        if images.shape[1:] != (3, self.cfg.img_size, self.cfg.img_size):
            raise ValueError(f"images are {tuple(images.shape)}; this model takes (B, 3, {self.cfg.img_size}, "
                             f"{self.cfg.img_size}): resize them, or build it with another img_size")
        patches = self.patch_embed(images)                           # B, P, D
        cls = self.cls_token.expand(len(images), -1, -1)             # B, 1, D
        x = torch.cat([patches, cls] if self.cfg.cls_last else [cls, patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def forward(self, images):
        """Logits. Only the class token is read, so the last block computes its output alone."""
        return self.head(self.forward_features(images, self.cls)).squeeze(1)     # B, num_classes

    def forward_features(self, images, queries=slice(None)):
        """Tokens after the last norm: (B, N, D), or those of the `queries` of the last block."""
        x = self.embed(images)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, self.rope, self.mask)
        return self.norm(last(x, self.rope, self.mask, queries))

    def attention_maps(self, images):
        """The maps as they multiply the values, (depth, B, heads, N, N): row i is what token i attends to."""
        x, maps = self.embed(images), []
        N = x.shape[1]
        attn_bias = x.new_full((N, N), -math.inf).triu(1) if self.is_causal else self.attn_bias
        for block in self.blocks:
            q, k, _ = block.attn.qkv_heads(block.norm1(x), self.rope)
            maps.append(attention_weights(q, k, attn_bias))
            x = block(x, self.rope, self.mask)
        return torch.stack(maps) * (1 if self.attn_scale is None else self.attn_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out


def init_weights(module):
    """DeiT's initialization: linear weights normal with deviation 0.02, biases 0; the convolution keeps torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
    """The file of published weights, downloaded once into torch.hub's folder. ValueError if that fails."""
    file = Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth")
    if not file.exists():
        part = file.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{PUBLISHED_URL}/{name}.pth", str(part), progress=sys.stderr.isatty())
            read_file(part)
            part.replace(file)
        except (OSError, HTTPException, ValueError) as error:
            with suppress(OSError):
                part.unlink()
            reason = "it was cut short or is another file" if isinstance(error, ValueError) else error
            raise ValueError(f"{PUBLISHED_URL}/{name}.pth could not be downloaded to {file} ({reason}): connect to a "
                             "network, or give the path of the file") from error
    return file


def read_checkpoint(source):
    """The dict in a file, by its path, its run's folder (best.pt) or published name. ValueError if there is none."""
    path = fetch(source) if str(source) in PUBLISHED else Path(source)
    if path.is_dir():
        path /= "best.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: check the path, or give one of the names {', '.join(PUBLISHED)}")
    return read_file(path)


def read_file(path):
    """The dict in a file. Only weights and plain types are read: a pickle that would run code is refused, and so is a
    corrupted file, or a compressed one, which torch.save does not write and which could be of any size.

    Published files also hold an argparse.Namespace, and numpy scalars where schedules set the optimizer's groups.
    """
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
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged or foreign file
        code = re.search(r"GLOBAL (\S+)", str(error))                      # torch's own text advises to trust the file
        reason = (f"it holds {code[1]}, which could run code" if code else
                  "it is not a file of torch.save" if isinstance(error, pickle.UnpicklingError) else
                  (str(error).splitlines() or ["it is empty"])[0])
        raise ValueError(f"{path} cannot be read as a checkpoint of weights and plain types ({reason}): delete or "
                         "replace it") from error
    validate(checkpoint, dict, str(path))
    return checkpoint


def validate(value, kind, name):
    """ValueError with its `name` if a value is not of a kind; so what a file says is checked once, where it is read.

    A kind is a type or a union of types (an int is a float, a bool is no int, a list is one of strings), a dict {key:
    kind} of what must be there, or a dataclass: its fields' annotations are the kinds, and other keys are unknown.
    """
    if isinstance(kind, dict) or is_dataclass(kind):
        validate(value, dict, name)
        if is_dataclass(kind):
            unknown = value.keys() - {field.name for field in fields(kind)}
            if unknown:
                raise ValueError(f"{name} has the unknown field {min(map(str, unknown))!r}: use another file")
            kind = {f.name: f.type for f in fields(kind) if f.name in value or f.default is MISSING}
        missing = [key for key in kind if key not in value]
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}: use a checkpoint that train.py wrote "
                             "(--resume takes a run's last.pt)")
        for key, inner in kind.items():
            validate(value[key], inner, f"{name}: {key}")
        return
    fits = isinstance(value, float | int if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits or isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, which is not of the kind {getattr(kind, '__name__', kind)}: "
                         "use another file")


def is_dense(value):
    """Whether it is a floating-point tensor whose storage holds every element (an expanded one's does not)."""
    return (isinstance(value, torch.Tensor) and value.layout is torch.strided and value.is_floating_point()
            and not value.is_quantized and not value.is_meta and value.nbytes <= value.untyped_storage().nbytes())


def weights_of(checkpoint):
    """The state dict in a checkpoint, without the prefixes of DDP and torch.compile. ValueError if there is none."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(k, str) and is_dense(v) and v.ndim for k, v in state.items()):
        raise ValueError("what should be weights is not a dict of tensors, dense and floating-point, by their names: "
                         "use another file")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}


def open_checkpoint(source):
    """A checkpoint of train.py as it is; published weights, which are bare, as train.py would have saved them."""
    checkpoint = read_checkpoint(source)
    if "config" in checkpoint:
        validate(checkpoint, CHECKPOINT, source)
        return checkpoint
    state = weights_of(checkpoint)
    try:  # size, patches and resolution follow from the shapes
        shape = state["cls_token"].shape[-1], sum(name.endswith("norm1.weight") for name in state)
        size = next(name for name, sizes in SIZES.items() if (sizes["width"], sizes["depth"]) == shape)
        patch_size, grid = state["patch_embed.proj.weight"].shape[-1], math.isqrt(state["pos_embed"].shape[1] - 1)
        cfg = config(size, img_size=patch_size * grid, patch_size=patch_size, num_classes=len(state["head.weight"]))
    except (KeyError, IndexError, StopIteration, ValueError) as error:
        raise ValueError(f"{source} is neither a checkpoint that train.py wrote nor published iLLaMA weights: "
                         "use another file") from error
    return dict(config=asdict(cfg), model=state, classes=None, alpha=0.0, run=dict(size=size, dtype="float32"))


def build(checkpoint):
    """The model of a checkpoint, with its weights and its soft mask."""
    state, cfg = weights_of(checkpoint), Config(**checkpoint["config"])
    try:
        with torch.device("meta"):                     # shapes alone: a wrong configuration takes no memory
            load_state(VisionTransformer(cfg), state, assign=True)
    except RuntimeError as error:                      # shapes beyond all bounds
        raise ValueError(f"the checkpoint's config is none of this model's ({error}): use another file") from error
    model = VisionTransformer(cfg)
    model.load_state_dict(state)
    if checkpoint["alpha"] is not None:
        model.set_soft_mask(checkpoint["alpha"])
    return model


def load_state(model, state, assign=False):
    """model.load_state_dict, strictly; a ValueError in one line if the weights do not fit."""
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        wrong = textwrap.shorten(str(error).partition(":")[2], 600)
        raise ValueError(f"the weights do not fit the model: {wrong} Use the model that they are of") from error


def load_weights(model, source, new_head=False, classes=None):
    """Load a checkpoint's path, a published name or a state dict. Returns sentences about what had to be adapted.

    Learned positions are resized to the model's grid. Everything else must fit exactly, but for the head where
    `new_head` is set: if it is of other classes, by their number or by the names in `classes`, it keeps the model's
    fresh weights. ValueError lists what is wrong.
    """
    source = source if isinstance(source, dict) else read_checkpoint(source)
    state, own, notes = weights_of(source), model.state_dict(), []

    pos, own_pos = state.get("pos_embed"), own.get("pos_embed")
    if pos is not None and own_pos is not None and pos.ndim == 3 and pos.shape[1] != own_pos.shape[1]:
        state["pos_embed"] = resize_positions(pos, own_pos.shape[1], model.cfg.cls_last)
        notes.append(f"learned positions resized from {pos.shape[1] - 1} to {own_pos.shape[1] - 1} patches")
    before = source.get("config", {})
    validate(before, Config, "config")
    for name in ("heads", "mask", "cls_last", "rope"):               # no weight's shape tells these
        now = getattr(model.cfg, name)
        if before.get(name, now) != now:
            notes.append(f"{name} {before[name]} before, {now} now")
    if new_head and "head.weight" in state and (state["head.weight"].shape != own["head.weight"].shape
                                                or other_classes(source, classes)):
        others = " others" * (len(state["head.weight"]) == len(own["head.weight"]))
        notes.append(f"new head: {len(state['head.weight'])} classes before, {len(own['head.weight'])}{others} now")
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    load_state(model, state)
    return notes


def other_classes(checkpoint, classes):
    """Whether a checkpoint names its classes, and they are not these."""
    return classes is not None and checkpoint.get("classes") not in (None, list(classes))


def resize_positions(pos, tokens, cls_last):
    """Bicubic resize of the patches' positions, (1, P + 1, D) -> (1, tokens, D); the class token's is kept as it is."""
    old, new = math.isqrt(max(0, pos.shape[1] - 1)), math.isqrt(tokens - 1)
    if not old or old ** 2 + 1 != pos.shape[1]:
        raise ValueError(f"pos_embed has {pos.shape[1]} rows, which is no square grid of patches and a class token")
    grid, cls = (pos[:, :-1], pos[:, -1:]) if cls_last else (pos[:, 1:], pos[:, :1])
    grid = grid.unflatten(1, (old, old)).permute(0, 3, 1, 2)         # 1, D, old, old
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2)                           # 1, P, D
    return torch.cat([grid, cls] if cls_last else [cls, grid], dim=1)


if __name__ == "__main__":
    print("parameters of each rung at resolution 224, 1,000 classes")
    print(f"{'step':10} {'changes':28}", *(f"{size:>12}" for size in SIZES))
    for step, changes in STEPS.items():
        with torch.device("meta"):                                   # shapes without memory
            counts = [sum(p.numel() for p in VisionTransformer(config(size, step)).parameters()) for size in SIZES]
        print(f"{step:10} {', '.join(f'{k}={v}' for k, v in changes.items()):28}", *(f"{n:12,}" for n in counts))
