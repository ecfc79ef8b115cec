"""A vision transformer that becomes a LLaMA decoder, one flag at a time.

`Config()` is ViT [1] as DeiT [2] trains it. Each of the `STEPS` changes one thing, and the last one
is iLLaMA [3]: the decoder block of LLaMA [4] reading image patches. Weights carry the names of the
published checkpoints.

    model = VisionTransformer(config("tiny"))                  # iLLaMA-T/16, the last step
    model = VisionTransformer(config("tiny", step="vit"))      # ViT-T/16, the first
    logits = model(images)                                     # (B, 3, 224, 224) -> (B, 1000)

`python model.py` prints the steps and sizes. Files of weights are read in harness/checkpoint.py.

Symbols in shape comments: B images, P patches, N = P + 1 tokens, M of them as queries, D width,
h heads, d = D / h.

[1] ViT, arXiv 2010.11929       [2] DeiT, arXiv 2012.12877       [3] iLLaMA, arXiv 2404.06773
[4] LLaMA, arXiv 2302.13971     [5] SwiGLU, arXiv 2002.05202     [6] RMSNorm, arXiv 1910.07467
[7] RoPE, arXiv 2104.09864      [8] stochastic depth, arXiv 1603.09382
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

MASKS = ("none", "causal", "modified", "soft", "soft_log")


@dataclass(frozen=True)
class Config:
    """Everything that defines a model. The defaults are ViT-T/16 for ImageNet."""
    img_size: int = 224       # resolution of the square input, pixels
    patch_size: int = 16      # side of a patch, pixels; img_size is a multiple of it
    num_classes: int = 1000   # outputs of the head; 0: no head, features (B, D) in place of logits
    width: int = 192          # channels of a token, D
    depth: int = 12           # blocks
    heads: int = 3            # attention heads; D / heads channels each, 64 in all published sizes
    drop_path: float = 0.0    # stochastic depth [8] of the last block; the first has 0
    # What the steps change, in their order:
    swiglu: bool = False      # MLP gated by a SiLU [5], without biases, in place of GELU
    rmsnorm: bool = False     # RMSNorm [6] in place of LayerNorm
    mask: str = "none"        # attention mask, one of MASKS; see VisionTransformer.mask
    cls_last: bool = False    # post-sequence class token: after the patches instead of before them
    rope: bool = False        # rotary position embedding [7] of queries and keys
    abs_pos: bool = True      # learned position embedding, added to the tokens

    def __post_init__(self):
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size "
                             f"{self.patch_size}: change one of them")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}: change one")
        if self.rope and self.width // self.heads % 2:
            raise ValueError(f"RoPE: width {self.width} / heads {self.heads} must be even")
        if self.mask not in MASKS:
            raise ValueError(f"unknown mask {self.mask!r}; choose one of {', '.join(MASKS)}")

    @property
    def grid(self):
        """Patches along a side of the image."""
        return self.img_size // self.patch_size

    @property
    def tokens(self):
        """N: the patches and the class token."""
        return self.grid ** 2 + 1

    @property
    def soft(self):
        """Whether the mask has an alpha."""
        return self.mask in ("soft", "soft_log")


SIZES = {  # the published ones; nano has no published weights
    "nano": dict(width=128, depth=12, heads=2),
    "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
}

STEPS = {  # what each step changes against the one before
    "vit": dict(),
    "swiglu": dict(swiglu=True),
    "rmsnorm": dict(rmsnorm=True),
    "causal": dict(mask="causal"),          # collapse: the class token, first, attends to itself
    "ps_cls": dict(cls_last=True),          # the cure: it comes last and attends to every patch
    "rope": dict(rope=True, abs_pos=False),
    "abs_pos": dict(abs_pos=True),          # learned and rotary positions together
    "soft_mask": dict(mask="soft"),         # iLLaMA: bidirectional at first, causal later
}


def config(size="tiny", step="soft_mask", **overrides):
    """The Config of a size with all steps up to one; any field can be overridden."""
    for kind, name, known in (("size", size, SIZES), ("step", step, STEPS)):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    names = list(STEPS)
    values = dict(SIZES[size])
    for name in names[: names.index(step) + 1]:
        values |= STEPS[name]
    return Config(**values | overrides)


def norm(cfg):
    """LayerNorm, (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over each token's channels; or
    RMSNorm [6], x / sqrt(mean(x^2) + eps) * weight."""
    return (nn.RMSNorm if cfg.rmsnorm else nn.LayerNorm)(cfg.width, eps=1e-6)


def rope_table(tokens, dim, theta=10000.0):
    """(2, N, d): cos, and sin with rotate()'s signs, of the angle t * theta^(-2k/d) of token t and
    channel pair k [7]. t counts along the sequence: patches in raster order, and class token."""
    t = torch.arange(tokens, dtype=torch.float32)
    k = torch.arange(dim // 2, dtype=torch.float32)
    angle = torch.outer(t, theta ** (-2 * k / dim))                  # N, d/2
    cos, sin = angle.cos(), angle.sin()
    signed = torch.stack([-sin, sin], dim=-1).flatten(-2)            # N, d
    return torch.stack([cos.repeat_interleave(2, dim=-1), signed])


def rotate(x, table):
    """Rotate each pair of adjacent channels of x (..., N, d) by its token's angle, as LLaMA does:
    then positions enter the product of a query and a key only through their difference. In real
    numbers and float32, (a + ib)(cos + i sin) is (a, b) * cos + (b, a) * (-sin, sin)."""
    cos, sin = table                                                 # N, d
    y = x.float()
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)                       # ..., N, d/2
    return (y * cos + torch.stack([b, a], dim=-1).flatten(-2) * sin).type_as(x)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), hidden 4 D: ViT's."""
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """fc2(silu(fc1(x)) * fc3(x)) [5]: LLaMA's. Three matrices, so hidden is 8/3 D, rounded up to a
    multiple of 256."""
    def __init__(self, dim):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.fc1 = nn.Linear(dim, hidden, bias=False)                # gate
        self.fc3 = nn.Linear(dim, hidden, bias=False)                # up
        self.fc2 = nn.Linear(hidden, dim, bias=False)                # down

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Mask(NamedTuple):
    """What queries attend to: softmax(q k' / sqrt(d) + attn_bias) * attn_scale, tables (M, N).
    is_causal stands for an attn_bias of -inf above the diagonal: fused kernels skip what it hides.
    """
    is_causal: bool = False
    attn_bias: torch.Tensor | None = None
    attn_scale: torch.Tensor | None = None


def attention_weights(q, k, attn_bias):
    """softmax(q k' / sqrt(d) + attn_bias): q (B, h, M, d), k (B, h, N, d) -> (B, h, M, N)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attn_bias is not None:
        scores = scores + attn_bias
    return scores.softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention. The output of `queries` is computed, the mask has a row for each."""
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def qkv_heads(self, x, rope):
        """x: (B, N, D) -> q, k and v: (B, h, N, d), q and k rotated."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))         # B, N, 3, h, d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # each B, h, N, d
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
            v = v.contiguous()                       # a view would keep the unrotated q and k, too
        return q, k, v

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        q = q[:, :, queries]                                         # B, h, M, d
        bias = None if mask.attn_bias is None else mask.attn_bias.type_as(q)
        if mask.attn_scale is None:                                  # one fused kernel
            y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask.is_causal)
        else:                                                        # the published soft mask
            attn, scale = attention_weights(q, k, bias), mask.attn_scale.type_as(q)
            y = (attn * scale) @ v                                   # B, h, M, d
        return self.proj(y.transpose(1, 2).flatten(2))               # B, M, D


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), in training with stochastic depth [8]."""
    def __init__(self, cfg, drop_path):
        super().__init__()
        self.norm1 = norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = norm(cfg)
        self.mlp = SwiGLU(cfg.width) if cfg.swiglu else MLP(cfg.width)
        self.drop_path = StochasticDepth(drop_path, mode="row")      # drawn by sample and branch

    def forward(self, x, rope, mask, queries=slice(None)):
        y = self.attn(self.norm1(x), rope, mask, queries)            # B, M, D
        x = x[:, queries] + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT, iLLaMA and every step between them: images (B, 3, H, W) -> logits (B, num_classes)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        patches = nn.Conv2d(3, cfg.width, kernel_size=cfg.patch_size, stride=cfg.patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=patches))         # its published name
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        pos_embed = torch.zeros(1, cfg.tokens, cfg.width)
        self.pos_embed = nn.Parameter(pos_embed) if cfg.abs_pos else None
        rate = cfg.drop_path / max(1, cfg.depth - 1)
        self.blocks = nn.ModuleList(Block(cfg, i * rate) for i in range(cfg.depth))
        self.norm = norm(cfg)
        self.head = nn.Linear(cfg.width, cfg.num_classes) if cfg.num_classes else nn.Identity()
        # Where class token and patches stand in the sequence
        self.cls = slice(-1, None) if cfg.cls_last else slice(0, 1)
        self.patches = slice(0, -1) if cfg.cls_last else slice(1, None)

        # Not in the state dict, as they follow from the configuration
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32), persistent=False)
        if cfg.rope:
            table = rope_table(cfg.tokens, cfg.width // cfg.heads)
            self.register_buffer("rope", table, persistent=False)
        else:
            self.rope = None
        self.apply(init_weights)
        self.reset_parameters()

    def reset_parameters(self):
        """What is the model's own, and not a part's, made anew: after to_empty(), for instance."""
        self.alpha.zero_()
        if self.cfg.rope:
            self.rope.copy_(rope_table(self.cfg.tokens, self.cfg.width // self.cfg.heads))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.cfg.abs_pos:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self):
        """Names of the parameters without weight decay: vectors (norms, biases) and tokens."""
        return {name for name, p in self.named_parameters()
                if p.ndim == 1 or name in ("pos_embed", "cls_token")}

    def set_soft_mask(self, alpha):
        """How much attention later tokens get: all of it at alpha 1, at alpha 0 (as built) none."""
        if not self.cfg.soft:
            raise ValueError(f"mask {self.cfg.mask!r} has no alpha; use mask 'soft' or 'soft_log'")
        if not 0 <= alpha <= 1:
            raise ValueError(f"the soft mask's alpha is {alpha}; it must be between 0 and 1")
        self.alpha.fill_(alpha)

    @property
    def exactly_causal(self):
        """Whether tokens never depend on later ones, as in a LLaMA. Waits for the device."""
        return self.cfg.mask == "causal" or self.cfg.mask == "soft_log" and self.alpha.item() == 0

    def mask(self, queries=None):
        """What some tokens, a slice of the sequence, attend to. By default all tokens, for which
        `causal` needs no table.

        `soft`, the published mask, scales the weights of later tokens after the softmax. Their keys
        stay in its denominator, so even at alpha 0 a token's output depends on later ones. Instead
        `soft_log` adds log(alpha) to the scores: at alpha 0 that is -inf, LLaMA's causal mask.
        """
        mask = self.cfg.mask
        if mask == "none":
            return Mask()
        if mask == "causal" and queries is None:
            return Mask(is_causal=True)
        key = torch.arange(self.cfg.tokens, device=self.alpha.device)            # N
        query = key[:, None] if queries is None else key[queries, None]          # M, 1
        future = key > query                                                     # M, N
        if mask == "soft":
            return Mask(attn_scale=torch.where(future, self.alpha, 1.0))
        if mask == "soft_log":
            return Mask(attn_bias=torch.where(future, self.alpha.log(), 0.0))
        if mask == "modified":           # causal, except that the class token attends to all
            future = future & (query != key[self.cls])
        return Mask(attn_bias=torch.where(future, -math.inf, 0.0))

    def embed(self, images):
        """(B, 3, H, W) -> (B, N, D): patches and class token, with learned positions."""
        size = self.cfg.img_size
        torch._assert(images.shape[1:] == (3, size, size),           # which torch.fx can trace
                      f"images must be (B, 3, {size}, {size}): resize them")
        patches = self.patch_embed.proj(images)                      # B, D, H/patch, W/patch
        patches = patches.flatten(2).transpose(1, 2)                 # B, P, D, in raster order
        cls = self.cls_token.expand(images.shape[0], -1, -1)         # B, 1, D
        x = torch.cat([patches, cls] if self.cfg.cls_last else [cls, patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def forward(self, images):
        """Logits. Only the class token is read, so the last block computes no other (6 % less)."""
        x, mask = self.embed(images), self.mask()
        for block in self.blocks[:-1]:
            x = block(x, self.rope, mask)                            # B, N, D
        x = self.blocks[-1](x, self.rope, self.mask(self.cls), self.cls)         # B, 1, D
        return self.head(self.norm(x))[:, 0]                         # B, num_classes

    def forward_features(self, images):
        """Tokens after the last norm: (B, N, D)."""
        x, mask = self.embed(images), self.mask()
        for block in self.blocks:
            x = block(x, self.rope, mask)
        return self.norm(x)

    def attention_maps(self, images):
        """The attention maps (depth, B, h, N, N) as they multiply the values; row i is query i."""
        x, mask, maps = self.embed(images), self.mask(slice(None)), []           # always a table
        for block in self.blocks:
            q, k, _ = block.attn.qkv_heads(block.norm1(x), self.rope)
            maps.append(attention_weights(q, k, mask.attn_bias))
            x = block(x, self.rope, mask)
        return torch.stack(maps) * (1 if mask.attn_scale is None else mask.attn_scale)


def init_weights(module):
    """DeiT's: linear weights truncated normal, std 0.02, biases 0; the convolution has torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


if __name__ == "__main__":
    print("parameters at resolution 224, 1,000 classes\n")
    print(f"{'step':10}", *(f"{size:>12}" for size in SIZES), "  changes")
    for step, changes in STEPS.items():
        with torch.device("meta"):                                   # shapes without memory
            models = [VisionTransformer(config(size, step)) for size in SIZES]
        counts = [sum(p.numel() for p in model.parameters()) for model in models]
        print(f"{step:10}", *(f"{count:12,}" for count in counts), " ", changes or "")
