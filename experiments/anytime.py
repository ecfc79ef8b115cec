"""Read an image row by row, as it arrives, and ask for the answer at any moment. What was read is not computed again.

    python -m experiments.anytime read out/a --image cat.jpg             # what it says after each row of patches
    python -m experiments.anytime train --step abs_pos --out out/b       # train.py, half of the batches cut after a row
    python -m experiments.anytime measure out/a out/b --out out/rows.jsonl   # accuracy after each row, and early exit
    python -m experiments.anytime cost                                   # work and time against computing all again

Under an exact causal mask (`causal`, or `soft_log` at alpha 0) with the class token last, patches do not depend on what
comes after them: their keys and values are kept, and the class token is appended whenever an answer is wanted. It has
its own learned position and always stands, for RoPE, where it stands after a whole image. With the published `soft`
mask this cannot be exact: each row of attention weights is divided by a sum over keys that are still to come.
"""
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from data import Images, check_readable, eval_batches, eval_transform, loader, normalize
from eval import add_flags, most_likely, open_model, open_val
from experiments.properties import one_process
from harness.checkpoint import describe
from harness.files import read_image
from harness.flags import Parser, check_bounds, checked_config, printable, report_errors, require
from harness.processes import stop_on_signals
from harness.run import append_row
from model import VisionTransformer, config


class Reader:
    """Reads images from the top, any number of rows of patches at a time, and answers after any of them.

        reader = Reader(model)
        reader.read(images[:, :, :16])        # the first row of patches of 16 pixels, (B, 3, 16, W)
        logits = reader.answer()              # (B, classes), what the model gives for this row alone

    InputError if the model's mask is not exactly causal, its class token not last, or a row is not there.
    """
    def __init__(self, model):
        require(model.is_causal and model.cfg.cls_last, "reading row by row needs a class token at the end and an "
                f"exactly causal mask, not {model.cfg.mask!r}: use a model with mask causal, or soft_log at alpha 0")
        self.model, self.count = model, 0                            # patches read
        self.cache = [()] * len(model.blocks)                        # for each block keys and values, (B, h, count, d)

    def read(self, strip):
        """The next rows of patches: normalized pixels (B, 3, rows * patch_size, img_size)."""
        cfg, rows = self.model.cfg, strip.shape[2] // self.model.cfg.patch_size
        end = self.count + rows * cfg.grid
        require(strip.shape[1:] == (3, rows * cfg.patch_size, cfg.img_size) and self.count < end < cfg.tokens,
                f"pixels {tuple(strip.shape)} after {self.count // cfg.grid} rows of patches: this model's images have "
                f"{cfg.grid} rows of (B, 3, {cfg.patch_size}, {cfg.img_size})")
        x = self.model.patch_embed.proj(strip).flatten(2).transpose(1, 2)                # B, n, D
        self.through_blocks(x, slice(self.count, end), keep=True)
        self.count = end

    def answer(self):
        """Logits (B, classes) for what has been read. InputError if that is nothing."""
        require(self.count, "nothing has been read: there is no answer before the first row")
        cls = self.model.cls_token.expand(len(self.cache[0][0]), -1, -1)                 # B, 1, D
        x = self.through_blocks(cls, slice(-1, None), keep=False)
        return self.model.head(self.model.norm(x))[:, 0]

    def through_blocks(self, x, place, keep):
        """Tokens x (B, n, D) at a place of the sequence, after those read: each attends to these and up to itself."""
        model, n = self.model, x.shape[1]
        x = x if model.pos_embed is None else x + model.pos_embed[:, place]
        rope = None if model.rope is None else model.rope[:, place]
        attn_bias = torch.full((n, self.count + n), -torch.inf, device=x.device).triu(1 + self.count)
        for i, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv_heads(block.norm1(x), rope)     # B, h, n, d
            if self.cache[i]:
                k, v = (torch.cat(pair, dim=2) for pair in zip(self.cache[i], (k, v)))   # B, h, count + n, d
            if keep:
                self.cache[i] = k, v
                if block is model.blocks[-1]:                        # of its output only the class token's is ever read
                    return None
            y = F.scaled_dot_product_attention(q, k, v, attn_bias.type_as(q))
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        return x


def on_rows(model, images, rows):
    """Logits of the model run on the first rows of patches alone, whatever its mask: (B, 3, H, W) -> (B, classes)."""
    cfg = model.cfg
    require(1 <= rows <= cfg.grid, f"there is no row {rows}: this model's images have rows 1 to {cfg.grid}")
    keep = list(range(rows * cfg.grid + 1))                          # the class token and the first patches
    if cfg.cls_last:
        keep[-1] = cfg.tokens - 1
    x, rope, mask = model.embed(images)[:, keep], model.rope, model.mask()
    if rope is not None:
        rope = rope[:, keep]
    if mask.attn_bias is not None:
        mask = mask._replace(attn_bias=mask.attn_bias[keep][:, keep])
    if mask.attn_scale is not None:
        mask = mask._replace(attn_scale=mask.attn_scale[keep][:, keep])
    for block in model.blocks[:-1]:
        x = block(x, rope, mask)
    x = model.blocks[-1](x, rope, mask.of_class_token(cfg.cls_last), model.cls)
    return model.head(model.norm(x))[:, 0]


def forward_on_prefixes(model, images):
    """Logits; in training every second batch, by chance, is cut after a random row. train.py's loop seeds the draw."""
    grid = model.cfg.grid
    if not model.training or grid == 1 or torch.rand(()) < 0.5:
        return VisionTransformer.forward(model, images)
    return on_rows(model, images, int(torch.randint(1, grid, ())))


def train_on_prefixes(argv):
    stop_on_signals()
    train.main(argv, forward=forward_on_prefixes)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy after each row, and early exit


@torch.no_grad()
def logits_by_row(model, batches, device):
    """Logits after each row of patches (rows, n, classes), and labels (n,), on the CPU. InputError if an image cannot
    be read."""
    logits, labels = [], []
    for images, targets, errors in batches:
        check_readable(errors)
        images = normalize(images.to(device))
        logits.append(torch.stack([on_rows(model, images, 1 + row) for row in range(model.cfg.grid)]).cpu())
        labels.append(targets)
    return torch.cat(logits, dim=1), torch.cat(labels)


def work(cfg, rows, answers):
    """Multiply-accumulates of reading so many rows of an image and answering after those in `answers`. All rows and one
    answer are those of the ordinary forward pass, less what its mask hides."""
    with torch.device("meta"):
        block = VisionTransformer(cfg).blocks[0]
    D, row = cfg.width, cfg.grid
    mlp = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
    patches = rows * row
    reading = patches * (3 * cfg.patch_size ** 2 * D + 3 * D ** 2)           # embedding; q, k and v of the last block
    reading += (cfg.depth - 1) * (patches * (4 * D ** 2 + mlp) + D * patches * (patches + 1))
    return reading + sum(cfg.depth * (4 * D ** 2 + mlp + 2 * D * (n * row + 1)) + D * cfg.num_classes for n in answers)


def stop_early(logits, labels, threshold, cost):
    """(accuracy in percent, mean rows read, mean cost) if reading ends once a probability is above a threshold.

    logits (rows, n, classes), labels (n,), cost (rows,): that of stopping after each row.
    """
    sure, guess = logits.softmax(-1).max(-1)                                             # rows, n
    done = sure > threshold
    done[-1] = True
    row = done.float().argmax(0)                                                         # n: the first that is
    hits = guess.gather(0, row[None])[0] == labels
    return 100 * hits.float().mean().item(), 1 + row.float().mean().item(), cost[row].mean().item()


def early_exit(logits, labels, cfg, loss=0.5):
    """The lowest threshold that costs at most `loss` points of accuracy on the images of even index, and what it gives
    on the others; beside it (accuracy, rows, work) there for a range of thresholds. Work is relative to one ordinary
    forward pass, and includes an answer after each row read."""
    once = work(cfg, cfg.grid, [cfg.grid])
    cost = torch.tensor([work(cfg, rows, range(1, rows + 1)) / once for rows in range(1, cfg.grid + 1)])
    chosen_on, others = ((logits[:, start::2], labels[start::2]) for start in (0, 1))
    thresholds = [i / 100 for i in range(10, 100)] + [0.995, 0.999, 1.0]
    whole = stop_early(*chosen_on, 1.0, cost)[0]
    best = next(t for t in thresholds if stop_early(*chosen_on, t, cost)[0] >= whole - loss)
    accuracy, rows, spent = stop_early(*others, best, cost)
    return dict(threshold=best, exit_acc1=accuracy, exit_rows=rows, exit_work=spent,
                whole_acc1=stop_early(*others, 1.0, cost)[0],
                curve=[[round(value, 4) for value in stop_early(*others, t, cost)] for t in thresholds[::5]])


def measure(argv):
    parser = Parser(prog="python -m experiments.anytime measure", allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", help="runs' folders or their checkpoints")
    add_flags(parser)
    parser.add_argument("--out", help="append the rows to this file")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    device = one_process(args.device)
    for source in args.checkpoints:
        model, checkpoint = open_model(source, device, args.soft_mask)
        val = open_val(source, checkpoint, model, args.data)
        images = Images(val, partial(eval_transform, size=model.cfg.img_size))
        batches = loader(images, eval_batches(len(val), args.batch_size), args.workers, device)
        logits, labels = logits_by_row(model, batches, device)
        by_row = [100 * (guess == labels).float().mean().item() for guess in logits.argmax(-1)]
        folder = Path(source).parent if Path(source).is_file() else Path(source)
        row = describe(model.cfg, checkpoint, torch.float32)
        row |= dict(run=folder.name, test_acc1=by_row[-1], acc1_by_row=by_row)
        if model.is_causal:
            row |= early_exit(logits, labels, model.cfg)
        append_row(row, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# One image, and what reading costs


@torch.no_grad()
def read(argv):
    parser = Parser(prog="python -m experiments.anytime read", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a run's folder or its checkpoint")
    parser.add_argument("--image", required=True, help="the image to read")
    parser.add_argument("--rows", type=int, help="stop after so many rows of patches; default: all")
    parser.add_argument("--soft-mask", type=float, help="alpha, for the checkpoint's")
    args = parser.parse_args(argv)
    model, checkpoint = open_model(args.checkpoint, torch.device("cpu"), args.soft_mask)
    reader, patch, grid = Reader(model), model.cfg.patch_size, model.cfg.grid
    rows = grid if args.rows is None else args.rows
    require(1 <= rows <= grid, f"--rows {rows}: this model's images have rows 1 to {grid}")
    require(checkpoint["classes"], f"{args.checkpoint} does not name its classes: use a checkpoint that train.py wrote")
    transform = partial(eval_transform, size=model.cfg.img_size)
    image = normalize(Images([(read_image(args.image), 0)], transform)[0, 0][0][None])
    for row in range(rows):
        reader.read(image[:, :, row * patch: (row + 1) * patch])
        (name, probability), *_ = most_likely(reader.answer()[0], checkpoint["classes"]).items()
        print(f"row {row + 1:2} of {grid}  {100 * probability:5.1f} %  {printable(name)}", flush=True)


def medians_in_turns(ways, repeats, warm_up=0):
    """{name: median seconds} of functions that take turns, so that a slow minute of the machine hits all of them."""
    seconds = {name: [] for name in ways}
    for repeat in range(warm_up + repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


@torch.no_grad()
def cost(argv):
    """Size T with fresh weights, an answer after each row: by Reader, and by running the model on all rows again."""
    parser = Parser(prog="python -m experiments.anytime cost", allow_abbrev=False)
    parser.add_argument("--img-sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="append the rows to this file")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    for img_size in args.img_sizes:
        model = VisionTransformer(checked_config(config, size="tiny", step="abs_pos", img_size=img_size)).eval()
        cfg, grid, patch, image = model.cfg, model.cfg.grid, model.cfg.patch_size, torch.randn(1, 3, img_size, img_size)

        def by_reader():
            reader = Reader(model)
            for row in range(grid):
                reader.read(image[:, :, row * patch: (row + 1) * patch])
                reader.answer()

        def again():
            for row in range(grid):
                on_rows(model, image, 1 + row)
        seconds = medians_in_turns(dict(reader=by_reader, again=again, once=lambda: model(image)), args.repeats)
        macs = dict(reader=work(cfg, grid, range(1, grid + 1)), once=work(cfg, grid, [grid]),
                    again=sum(work(cfg, rows, [rows]) for rows in range(1, grid + 1)))
        append_row(dict(img_size=img_size, rows=grid, macs=macs,
                        time_s={name: round(value, 4) for name, value in seconds.items()}), args.out)


COMMANDS = dict(train=train_on_prefixes, measure=measure, read=read, cost=cost)


@report_errors()
def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    require(flags and flags[0] in COMMANDS,
            f"give a command, one of {', '.join(COMMANDS)}, and its flags; COMMAND --help lists them")
    COMMANDS[flags[0]](flags[1:])


if __name__ == "__main__":
    main()
