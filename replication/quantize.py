"""Quantization-aware training with 8 bits, as in the paper, on any step; and the same with 32 bits.

    # ViT and iLLaMA; stopped and started again, it continues
    python -m replication.quantize --data cifar10
    # train.py, with 8 bits
    python -m replication.quantize train --step ps_cls --data cifar10
    # The same without rounding
    python -m replication.quantize control --step ps_cls --data cifar10

All that enters a matrix multiplication in the blocks is quantized, simulated in float: weights and
inputs of the linear layers, queries, keys, values and attention maps. A step size is learned (LSQ,
arXiv 1902.08153; LSQ+, 2004.09576) for each row of a weight, each channel of an input and each
head, and a zero point for all but the weights. As in the authors' code these share the weights'
learning rate, may change sign, and have gradients that depend on the micro-batch size; and a head's
queries and keys are normalized after RoPE. That alone changes much: so does `control`. Other than
there, step sizes start from Gaussian noise as images, zero points at 0; and --dtype bfloat16 rounds
what is quantized once more. eval.py does not take such models: their accuracy is in metrics.jsonl.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from harness.processes import report_errors
from model import Attention, VisionTransformer, attention_weights
from replication.ladder import FLAGS, parse_runs, parser_of_runs, train_all


def rounded(x):
    """x.round(), with the gradient of x."""
    return x + (x.round() - x).detach()


def scale_gradient(x, factor):
    """x, with its gradient times a factor."""
    return x * factor + (x - x * factor).detach()


class Quantizer(nn.Module):
    """(round(clamp(x / step_size + zero)) - zero) * step_size, integers of 8 bits, with or without
    a sign.

    count: how many step sizes, and zero points unless `symmetric`, are learned; `shape` is what
    they broadcast as. Gradients of both are divided by sqrt(x.numel() * largest integer).
    """
    def __init__(self, count, shape, symmetric=False, signed=True):
        super().__init__()
        self.low, self.high = (-128, 127) if signed else (0, 255)
        self.shape, self.started = shape, False
        self.step_size = nn.Parameter(torch.ones(count))             # 1-D: no weight decay
        self.zero = None if symmetric else nn.Parameter(torch.zeros(count))

    def forward(self, x):
        if not self.started:                                         # once, by QuantizedTransformer
            self.step_size.data.fill_(2 * x.abs().mean() / math.sqrt(self.high))
            self.started = True
        factor = 1 / math.sqrt(x.numel() * self.high)
        step_size = scale_gradient(self.step_size, factor).view(self.shape)
        zero = (0 if self.zero is None
                else rounded(scale_gradient(self.zero, factor)).view(self.shape))
        return (rounded((x / step_size + zero).clamp(self.low, self.high)) - zero) * step_size


class QuantizedLinear(nn.Module):
    """A linear layer, with its weight and bias, whose weight and input are quantized."""
    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.quantize_weight = Quantizer(layer.out_features, (-1, 1), symmetric=True)
        self.quantize_input = Quantizer(layer.in_features, (-1,))

    def forward(self, x):
        return F.linear(self.quantize_input(x), self.quantize_weight(self.weight), self.bias)


class NormalizedAttention(Attention):
    """Attention with RMSNorm of each head's queries and keys after RoPE; layers are those of
    `attention`."""
    def __init__(self, cfg, attention):
        super().__init__(cfg)
        self.qkv, self.proj = attention.qkv, attention.proj
        self.norm_q, self.norm_k = (nn.RMSNorm(cfg.width // cfg.heads, eps=1e-6) for _ in range(2))

    def qkv_heads(self, x, rope):
        q, k, v = super().qkv_heads(x, rope)                         # B, h, N, d
        return self.norm_q(q.float()), self.norm_k(k.float()), v.float()


class QuantizedAttention(NormalizedAttention):
    """And all factors of its matrix multiplications quantized."""
    def __init__(self, cfg, attention):
        super().__init__(cfg, attention)
        self.qkv, self.proj = QuantizedLinear(self.qkv), QuantizedLinear(self.proj)
        self.quantize_q, self.quantize_k, self.quantize_v = (
            Quantizer(cfg.heads, (-1, 1, 1)) for _ in range(3))
        self.quantize_attn = Quantizer(cfg.heads, (-1, 1, 1), signed=False)

    def qkv_heads(self, x, rope):
        q, k, v = super().qkv_heads(x, rope)
        return self.quantize_q(q), self.quantize_k(k), self.quantize_v(v)

    def forward(self, x, rope, mask, queries=slice(None)):
        q, k, v = self.qkv_heads(x, rope)
        attn = attention_weights(q[:, :, queries], k, mask.attn_bias)            # B, h, M, N
        if mask.attn_scale is not None:
            attn = attn * mask.attn_scale
        return self.proj((self.quantize_attn(attn) @ v).transpose(1, 2).flatten(2))


class NormalizedTransformer(VisionTransformer):
    """The quantized model without rounding."""
    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.blocks:
            block.attn = NormalizedAttention(cfg, block.attn)


class QuantizedTransformer(VisionTransformer):
    """A model of any step with 8 bits in its blocks."""
    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.blocks:
            block.attn = QuantizedAttention(cfg, block.attn)
            for name, layer in block.mlp.named_children():
                setattr(block.mlp, name, QuantizedLinear(layer))
        if cfg.soft:
            self.set_soft_mask(1.0)                      # as in the authors' first forward pass
        with torch.no_grad():
            self(torch.randn(8, 3, cfg.img_size, cfg.img_size))      # sets the step sizes
        if cfg.soft:
            self.set_soft_mask(0.0)

    def forward(self, images):
        """With all tokens in the last block, too: the gradients of its step sizes depend on their
        number."""
        return self.head(self.forward_features(images)[:, self.cls])[:, 0]

    def mask(self, queries=slice(None)):
        return super().mask(queries)                     # with its table, under `causal`, too


PROGRAMS = {  # the model and its bits
    "train": (QuantizedTransformer, 8), "control": (NormalizedTransformer, 32)}


@report_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        return train.main(argv[1:], architecture=PROGRAMS[argv[0]][0])
    args = parse_runs(parser_of_runs("quantize", __doc__, Path("out", "quantize")), argv)
    runs = {}
    for seed in range(args.seeds):
        for step in ("vit", "soft_mask"):
            for program, (_, bits) in PROGRAMS.items():
                command = ["-m", "replication.quantize", program, "--data", args.data,
                           *FLAGS.split(), "--epochs", str(args.epochs), "--step", step,
                           "--seed", str(seed)]
                row = dict(step=step, bits=bits, seed=seed, epoch=args.epochs - 1)
                runs[f"{step}-{bits}-{seed}"] = command, row
    sys.exit(0 if train_all(runs, args) else 1)


if __name__ == "__main__":
    main()
