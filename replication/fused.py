"""The published soft mask from fused kernels, two ways: timed by bench_model.py, beside model.py's.

softmax(q k' / sqrt(d)) * scale is a product after the softmax, which no fused kernel has, so its
maps go to memory and back. Both ways compute the same, up to rounding.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from model import Attention


def mixture(full, full_lse, causal, causal_lse, alpha):
    """The output (B, h, N, d) of the soft mask, from those of full and of causal attention and the
    logarithms (B, h, N) of their softmax denominators:

        soft = alpha full + (1 - alpha) Z_causal / Z_full causal

    since weights above the diagonal are scaled, and nothing is normalized again."""
    share = (causal_lse - full_lse).exp().unsqueeze(-1)              # B, h, N, 1
    return alpha * full + (1 - alpha) * share * causal


def causal_scores(score, batch, head, query, key):
    return torch.where(key > query, -math.inf, score)


class TwoPasses(Attention):
    """Full and causal attention, mixed. Needs torch.compile, and a GPU to train."""

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        alpha = mask.attn_scale[0, -1]
        full = flex_attention(q, k, v, return_lse=True)
        causal = flex_attention(q, k, v, causal_scores, return_lse=True)
        y = mixture(*full, *causal, alpha).type_as(v)
        return self.proj(y.transpose(1, 2).flatten(2))


class DoubledKeys(Attention):
    """Each key twice: with its value and the share `scale` of its weight, and with no value and the
    rest. The denominator is that of all keys, as published; any scale from 0 to 1 will do."""

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        bias = torch.cat([mask.attn_scale, 1 - mask.attn_scale], dim=-1).log()       # N, 2 N
        twice, values = torch.cat([k, k], dim=2), torch.cat([v, torch.zeros_like(v)], dim=2)
        y = F.scaled_dot_product_attention(q, twice, values, bias.type_as(q))
        return self.proj(y.transpose(1, 2).flatten(2))
