"""Read an image row by row, as it arrives, and ask for the answer at any moment. What was read is not computed again.

    python -m downstream.anytime read out/a --image cat.jpg             # what it says after each row of patches
    python -m downstream.anytime train --step abs_pos --out out/b       # train.py, half of the batches cut after a row

Under an exact causal mask (`causal`, or `soft_log` at alpha 0) with the class token last, patches do not depend on what
comes after them: their keys and values are kept, and the class token is appended whenever an answer is wanted. It has
its own learned position and always stands, for RoPE, where it stands after a whole image.
"""
import sys
from functools import partial

import torch
import torch.nn.functional as F

import train
from data import Images, eval_transform, normalize
from eval import most_likely, open_model
from harness.files import read_image
from harness.flags import Parser, require
from harness.processes import report_errors
from model import Mask, VisionTransformer


class Reader:
    """Reads images from the top, any number of rows of patches at a time, and answers after any of them.

        reader = Reader(model)
        reader.read(images[:, :, :16])        # the first row of patches of 16 pixels, (B, 3, 16, W)
        logits = reader.answer()              # (B, classes), what the model gives for this row alone

    InputError if the model's mask is not exactly causal, its class token not last, or a row is not there.
    """
    def __init__(self, model):
        require(model.exactly_causal and model.cfg.cls_last, "reading row by row needs a class token "
                f"at the end and an exactly causal mask, not {model.cfg.mask!r}: use a model with "
                "mask causal, or soft_log at alpha 0")
        self.model, self.count = model, 0                            # patches read
        self.cache = [()] * len(model.blocks)            # for each block keys and values, (B, h, count, d)

    def read(self, strip):
        """The next rows of patches: normalized pixels (B, 3, rows * patch_size, img_size)."""
        cfg, rows = self.model.cfg, strip.shape[2] // self.model.cfg.patch_size
        end = self.count + rows * cfg.grid
        require(strip.shape[1:] == (3, rows * cfg.patch_size, cfg.img_size) and self.count < end < cfg.tokens,
                f"pixels {tuple(strip.shape)} after {self.count // cfg.grid} rows of patches: this model's images have "
                f"{cfg.grid} rows of (B, 3, {cfg.patch_size}, {cfg.img_size})")
        place = slice(self.count, end)
        x = self.model.patch_embed.proj(strip).flatten(2).transpose(1, 2)                # B, n, D
        if self.model.pos_embed is not None:
            x = x + self.model.pos_embed[:, place]
        rope = None if self.model.rope is None else self.model.rope[:, place]
        _, self.cache = self.through_blocks(x, rope, self.cache)
        self.count = end

    def start(self):
        """The class token (B, 1, D), and its part of RoPE's table."""
        model = self.model
        require(self.count, "nothing has been read: there is no answer before the first row")
        cls = model.cls_token.expand(len(self.cache[0][0]), -1, -1)
        if model.pos_embed is not None:
            cls = cls + model.pos_embed[:, model.cls]
        last = model.cfg.tokens - 1
        return cls, None if model.rope is None else model.rope[:, last: last + 1]

    def answer(self):
        """Logits (B, classes) for what has been read. InputError if that is nothing."""
        x, _ = self.through_blocks(*self.start(), self.cache)
        return self.model.head(self.model.norm(x))[:, 0]

    def through_blocks(self, x, rope, cache):
        """(output, cache with theirs) of tokens x (B, n, D) after those whose keys and values are in a cache: each
        attends to these and up to itself."""
        n, extended = x.shape[1], []
        for block, kept in zip(self.model.blocks, cache):
            q, k, v = block.attn.qkv_heads(block.norm1(x), rope)     # B, h, n, d
            if kept:
                k, v = (torch.cat(pair, dim=2) for pair in zip(kept, (k, v)))            # B, h, count + n, d
            extended.append((k, v))
            attn_bias = torch.full((n, k.shape[2]), -torch.inf, device=x.device).triu(1 + k.shape[2] - n)
            y = F.scaled_dot_product_attention(q, k, v, attn_bias.type_as(q))
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return x, extended


def on_rows(model, images, rows):
    """Logits of the model run on the first rows of patches alone, whatever its mask: (B, 3, H, W) -> (B, classes)."""
    cfg = model.cfg
    require(1 <= rows <= cfg.grid, f"there is no row {rows}: this model's images have rows 1 to {cfg.grid}")
    tokens = list(range(cfg.tokens))
    left_out = tokens[model.patches][rows * cfg.grid:]
    keep = [token for token in tokens if token not in left_out]
    x, rope = model.embed(images)[:, keep], model.rope
    if rope is not None:
        rope = rope[:, keep]
    mask = columns(model.mask(keep), keep)
    for block in model.blocks[:-1]:
        x = block(x, rope, mask)
    x = model.blocks[-1](x, rope, columns(model.mask(model.cls), keep), model.cls)
    return model.head(model.norm(x))[:, 0]


def columns(mask, keys):
    """A mask's tables for some of the keys."""
    bias, scale = mask.attn_bias, mask.attn_scale
    return Mask(attn_bias=None if bias is None else bias[:, keys],
                attn_scale=None if scale is None else scale[:, keys])


class PrefixTransformer(VisionTransformer):
    """In training every second batch, by chance, is cut after a random row. train.py's loop seeds the draw."""
    def forward(self, images):
        grid = self.cfg.grid
        if not self.training or grid == 1 or torch.rand(()) < 0.5:
            return super().forward(images)
        return on_rows(self, images, int(torch.randint(1, grid, ())))


def train_on_prefixes(argv):
    train.main(argv, architecture=PrefixTransformer)


@torch.no_grad()
def read(argv):
    parser = Parser(prog="python -m downstream.anytime read")
    parser.add_argument("checkpoint", help="a run's folder or its checkpoint")
    parser.add_argument("--image", required=True, help="the image to read")
    args = parser.parse_args(argv)
    model, checkpoint = open_model(args.checkpoint, torch.device("cpu"))
    require(checkpoint["classes"], f"{args.checkpoint} does not name its classes: use a checkpoint that train.py wrote")
    reader, patch, grid = Reader(model), model.cfg.patch_size, model.cfg.grid
    transform = partial(eval_transform, size=model.cfg.img_size)
    pixels, _ = Images([(read_image(args.image, upright=True), 0)], transform)[0, 0]
    image = normalize(pixels[None])
    for row in range(grid):
        reader.read(image[:, :, row * patch: (row + 1) * patch])
        (name, probability), *_ = most_likely(reader.answer()[0], checkpoint["classes"]).items()
        print(f"row {row + 1:2} of {grid}  {100 * probability:5.1f} %  {name}", flush=True)


COMMANDS = dict(train=train_on_prefixes, read=read)


@report_errors()
def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    require(flags and flags[0] in COMMANDS,
            f"give a command, one of {', '.join(COMMANDS)}, and its flags; COMMAND --help lists them")
    COMMANDS[flags[0]](flags[1:])


if __name__ == "__main__":
    main()
