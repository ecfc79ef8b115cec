"""Eight bits from the start: quantization-aware training as the paper has it, of any step [1, 2].

    python -m experiments.quantize --data cifar10      # ViT and iLLaMA; stopped and started again, it continues
    python -m experiments.quantize train --step ps_cls --data cifar10     # train.py, for a model in 8 bits

Of each block all that enters a matrix multiplication is quantized, simulated in float: weights and inputs of the linear
layers, queries, keys, values and attention maps. Patch embedding, norms, head and residual stream are not. A step size
is learned for each row of a weight, each channel of an input, each head, and a zero point for all but the weights. As
in the authors' code a head's queries and keys are normalized after RoPE. Here step sizes start from noise instead of
the first batch, zero points at 0. eval.py does not know such models: their accuracy is in metrics.jsonl.

[1] LSQ, arXiv 1902.08153       [2] LSQ+, arXiv 2004.09576
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from experiments.ladder import FLAGS, parse_runs, parser_of_runs, train_all
from harness.flags import report_errors
from harness.processes import stop_on_signals
from model import Attention, VisionTransformer, attention_weights

COMPARED = ("vit", "soft_mask")


def rounded(x):
    """x.round(), with the gradient of x."""
    return x + (x.round() - x).detach()


def scaled_gradient(x, factor):
    """x, with its gradient times a factor."""
    return x * factor + (x - x * factor).detach()


class Quantizer(nn.Module):
    """(round(clamp(x / step + zero)) - zero) * step, integers of 8 bits, with or without a sign.

    count: how many steps, and zero points unless `symmetric`, are learned; `shape` is what they broadcast as. Gradients
    of both are divided by sqrt(x.numel() * largest integer) [1].
    """
    def __init__(self, count, shape, symmetric=False, signed=True):
        super().__init__()
        self.low, self.high = (-128, 127) if signed else (0, 255)
        self.shape, self.started = shape, False
        self.step = nn.Parameter(torch.ones(count))                  # 1-D: no weight decay
        self.zero = None if symmetric else nn.Parameter(torch.zeros(count))

    def forward(self, x):
        if not self.started:                                         # once, by QuantizedTransformer
            self.step.data.fill_(2 * x.abs().mean() / math.sqrt(self.high))
            self.started = True
        factor = 1 / math.sqrt(x.numel() * self.high)
        step, zero = scaled_gradient(self.step, factor).view(self.shape), 0
        if self.zero is not None:
            zero = rounded(scaled_gradient(self.zero, factor)).view(self.shape)
        return (rounded((x / step + zero).clamp(self.low, self.high)) - zero) * step


class QuantizedLinear(nn.Module):
    """A linear layer, and its weight and bias, whose weight and input are quantized."""
    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.quantize_weight = Quantizer(layer.out_features, (-1, 1), symmetric=True)
        self.quantize_input = Quantizer(layer.in_features, (-1,))

    def forward(self, x):
        return F.linear(self.quantize_input(x), self.quantize_weight(self.weight), self.bias)


class QuantizedAttention(Attention):
    """Attention whose two products have quantized factors."""
    def __init__(self, cfg):
        super().__init__(cfg)
        head = cfg.width // cfg.heads
        self.norm_q, self.norm_k = nn.RMSNorm(head, eps=1e-6), nn.RMSNorm(head, eps=1e-6)
        self.quantize_q, self.quantize_k, self.quantize_v = (Quantizer(cfg.heads, (-1, 1, 1)) for _ in range(3))
        self.quantize_attn = Quantizer(cfg.heads, (-1, 1, 1), signed=False)

    def qkv_heads(self, x, rope):
        q, k, v = super().qkv_heads(x, rope)                         # B, h, N, d
        return self.quantize_q(self.norm_q(q.float())), self.quantize_k(self.norm_k(k.float())), self.quantize_v(v)

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        q, attn_bias = q[:, :, queries], mask.attn_bias
        if mask.is_causal:
            attn_bias = torch.full((q.shape[2], k.shape[2]), -math.inf, device=q.device).triu(1)
        attn = attention_weights(q, k, attn_bias)                    # B, h, M, N
        if mask.attn_scale is not None:
            attn = attn * mask.attn_scale
        return self.proj((self.quantize_attn(attn) @ v).transpose(1, 2).flatten(2))


class QuantizedTransformer(VisionTransformer):
    """A model of any step with 8 bits in its blocks."""
    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.blocks:
            attn = QuantizedAttention(cfg)
            attn.qkv, attn.proj = QuantizedLinear(block.attn.qkv), QuantizedLinear(block.attn.proj)
            block.attn = attn
            for name, layer in block.mlp.named_children():
                setattr(block.mlp, name, QuantizedLinear(layer))
        with torch.no_grad():
            self(torch.randn(8, 3, cfg.img_size, cfg.img_size))      # step sizes from what fresh weights make of noise


@report_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        stop_on_signals()
        return train.main(argv[1:], architecture=QuantizedTransformer)
    args = parse_runs(parser_of_runs("quantize", __doc__, Path("out", "quantize")), argv)
    runs = {}
    for seed in range(args.seeds):
        for step in COMPARED:
            command = ["-m", "experiments.quantize", "train", "--data", args.data, *FLAGS.split(),
                       "--epochs", str(args.epochs), "--step", step, "--seed", str(seed)]
            runs[f"{step}-{seed}"] = command, dict(step=step, seed=seed, epoch=args.epochs - 1)
    sys.exit(0 if train_all(runs, args) else 1)


if __name__ == "__main__":
    main()
