"""The same decoder reads an image and writes what is in it: "a large star top left ."

    python -m downstream.caption --out out/words              # train: five minutes on 2 CPU cores
    python -m downstream.caption --say two                    # "a star above a ring ."
    python -m downstream.caption show out/words               # what it writes of eight images
    python -m downstream.caption show out/words --image FILE --rows   # after each row of patches

The class token at the end of the sequence is the start-of-text token, the head is a language
model's, and a class is a sentence of one word. Images are drawn anew in each epoch, by the words
that describe them.
"""
import random
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from data import eval_batches, eval_transform, loader, normalize, seed_of, train_batches
from downstream.anytime import Reader
from harness.checkpoint import build, load_strictly, read_checkpoint
from harness.files import read_image, save_png
from harness.flags import (Parser, check_bounds, checked_config, nonempty, overrides, parse_flags,
                           pick, require, split_batch, with_saved)
from harness.processes import (DEVICES, DTYPES, all_gather, print_rank0, progress, report_errors,
                               setup, stop_requests, wrap)
from harness.run import Machine, Monitor, RunFolder, settings_of
from harness.shapes import SHAPES, TEXTURES, coordinates, draw_background, draw_shape, to_image
from model import MASKS, SIZES, STEPS, Config, Mask, VisionTransformer, config, rope_table
from train import lr_at, make_optimizer

# ------------------------------------------------------------------------------------------------
# Words and images

KINDS = dict(size=("small", "large"), shape=tuple(SHAPES), place=("top", "middle", "bottom", "left",
             "centre", "right"), relation=("above", "beside"))
WORDS = ["<pad>", ".", "a", *(word for words in KINDS.values() for word in words)]
PAD, END = 0, 1
LONGEST = 6                           # words of a sentence, its full stop included
SENTENCES = ("one", "two", "name")    # "a large star top left .", "a star above a ring .", "star ."
RADII = dict(small=(0.28, 0.34), large=(0.5, 0.56), either=(0.36, 0.44))     # with a gap between


class Captioned(Dataset):
    """captioned[epoch, index] -> (uint8 (3, H, W), indices of LONGEST words): both follow from
    (seed, split, epoch, index)."""
    classes = WORDS

    def __init__(self, say, split, img_size, count, seed=0):
        self.say, self.split, self.img_size = say, split, img_size
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        rng = random.Random(f"{self.seed} {self.split} {key}")
        x, y = coordinates(self.img_size, self.img_size)
        if self.say == "two":                    # the first one is the upper or the left one
            names, relation = rng.choices(KINDS["shape"], k=2), rng.choice(KINDS["relation"])
            sentence = f"a {names[0]} {relation} a {names[1]} ."
            places = [(0, -1), (0, 1)] if relation == "above" else [(-1, 0), (1, 0)]
            drawn = [(name, "either", 0.5 * dx, 0.5 * dy) for name, (dx, dy) in zip(names, places)]
        else:
            size, name = rng.choice(KINDS["size"]), rng.choice(KINDS["shape"])
            row, column = rng.randrange(3), rng.randrange(3)
            sentence = f"a {size} {name} {KINDS['place'][row]} {KINDS['place'][3 + column]} ."
            if self.say == "name":               # of the same image
                sentence = f"{name} ."
            drawn = [(name, size, 0.36 * (column - 1), 0.36 * (row - 1))]
        pixels = draw_background(rng, x, y)
        for name, size, dx, dy in drawn:
            texture = rng.randrange(len(TEXTURES))
            colours, inside = draw_shape(rng, x - dx, y - dy, KINDS["shape"].index(name), texture,
                                         RADII[size], spread=0.15)
            pixels = colours * inside + pixels * (1 - inside)
        words = [WORDS.index(word) for word in sentence.split()]
        words += [PAD] * (LONGEST - len(words))
        return TF.pil_to_tensor(to_image(pixels)), torch.tensor(words)


def text_of(words):
    return " ".join(WORDS[word] for word in words if word != PAD)


# ------------------------------------------------------------------------------------------------
# The model


class Captioner(VisionTransformer):
    """Images (B, 3, H, W) and words (B, T) -> logits (B, T, words): of each word after the image
    and the words before it. The sequence is patches, class token, words."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.head = nn.Linear(cfg.width, len(WORDS), bias=False)     # LLaMA's has no bias
        self.words = nn.Embedding(len(WORDS), cfg.width)
        for weight in (self.head.weight, self.words.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        table = rope_table(cfg.tokens + LONGEST, cfg.width // cfg.heads)
        self.register_buffer("rope", table, persistent=False)

    def forward(self, images, words):
        x = torch.cat([self.embed(images), self.words(words[:, :-1])], dim=1)    # B, N + T - 1, D
        for block in self.blocks:
            x = block(x, self.rope[:, : x.shape[1]], Mask(is_causal=True))
        return self.head(self.norm(x[:, self.cfg.tokens - 1:]))

    @torch.no_grad()
    def write(self, images):
        """The likeliest word, one after another, to the full stop: indices, a list for each of
        images (B, 3, H, W)."""
        words = torch.full((len(images), LONGEST), PAD, device=images.device)
        for place in range(LONGEST):
            words[:, place] = self(images, words)[:, place].argmax(-1)
        return [until_end(sentence) for sentence in words.tolist()]


def until_end(words):
    return words[: words.index(END) + 1] if END in words else words


class ReadingWriter(Reader):
    """Reads an image row by row and writes a sentence after any of them."""
    def write(self):
        """The words (indices) of what has been read of one image."""
        model, cache, words = self.model, self.cache, []
        x, rope = self.start()
        while len(words) < LONGEST and END not in words:
            x, cache = self.through_blocks(x, rope, cache)
            words.append(model.head(model.norm(x))[0, 0].argmax().item())
            x, place = model.words(torch.tensor([words[-1:]])), model.cfg.tokens - 1 + len(words)
            rope = model.rope[:, place: place + 1]
        return words


# ------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Recipe:
    """How to train."""
    img_size: int = 32           # resolution, pixels
    patch_size: int = 8          # side of a patch, pixels
    epochs: int = 8              # each ends with an evaluation
    images: int = 10_000         # of an epoch, drawn anew in each
    batch_size: int = 64         # images per iteration (global batch size)
    micro_batch: int = 64        # micro-batch size (per rank); gradients accumulate
    lr: float = 1e-3             # peak learning rate of AdamW
    min_lr: float = 1e-5         # learning rate in the end
    warmup_epochs: int = 1       # epochs of linear warm-up
    weight_decay: float = 0.05   # AdamW's, on all but norms, biases and tokens
    clip_grad: float = 1.0       # largest norm of the gradient; 0 does not clip
    drop_path: float = 0.0       # stochastic depth of the last block


@dataclass
class Run:
    """What to train, on what."""
    size: str = "tiny"           # width and heads, see model.py; 6 blocks unless --depth says else
    step: str = "abs_pos"        # step from ViT to iLLaMA, see model.py: abs_pos or rope
    say: str = "one"             # a sentence about one shape, about two, or the name of one
    recipe: str = "words"        # the only one
    data: str = "shapes"         # drawn, nothing to download
    init_from: str = ""          # another run of this program to start from
    seed: int = 0                # random seed of weights, order and images
    dtype: str = "auto"          # of autocast; weights stay in float32


@dataclass
class State:
    """Where a run stands, the same on all ranks."""
    iteration: int = 0
    epoch: int = 0
    best_exact: float = -1.0
    loss_sum: float = 0.0        # of this epoch's iterations


def parse(argv=None):
    """{name: value} of the flags that were given."""
    choices = dict(size=SIZES, step=STEPS, say=SENTENCES, recipe=["words"], data=["shapes"],
                   mask=MASKS, device=DEVICES, dtype=DTYPES)
    return parse_flags(argv, "Train a model that writes; `show` as the first word shows what.", {
        "": [Run, Machine], "how to train": [Recipe],
        "model (default: as --size and --step say)": [Config]}, choices, "out/caption",
        prog="python -m downstream.caption")


def resolve(given, checkpoint):
    """(Run, Recipe, Config). InputError for what does not fit together."""
    given = dict(depth=6) | with_saved(given, checkpoint, Run, Recipe, ["shapes"])
    run, recipe = Run(**pick(Run, given)), Recipe(**pick(Recipe, given))
    require(recipe.warmup_epochs <= recipe.epochs, f"--epochs {recipe.epochs} would end before "
            f"--warmup-epochs {recipe.warmup_epochs}: lower that, too")
    values = pick(Config, asdict(recipe)) | pick(Config, given) | dict(num_classes=len(WORDS))
    cfg = checked_config(config, size=run.size, step=run.step, **values)
    require(cfg.cls_last and cfg.rope and cfg.mask in ("causal", "soft_log"), "a model that writes "
            "has the class token last, RoPE and an exactly causal mask, without which words would "
            "see the answer: use --step rope or abs_pos, or a later one with --mask soft_log, "
            "whose alpha is 0 throughout")
    return run, recipe, cfg


def loss_of(logits, words):
    """Cross-entropy of the words, mean over them."""
    return F.cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=PAD)


@torch.no_grad()
def evaluate(model, batches, device, dtype):
    """dict(test_exact, test_KIND, images): how many sentences are right to the letter, and how many
    words of a kind where those before them are, in percent. None if asked to stop.

    A sentence whose every word is the likeliest after the right ones is what write() writes.
    """
    model.eval()
    kinds = {kind: torch.tensor([word in words for word in WORDS], device=device)
             for kind, words in KINDS.items()}
    counts = dict.fromkeys(["images", "exact", *KINDS, *(f"{kind} words" for kind in KINDS)], 0)
    for images, words in progress(batches, "evaluate"):
        if stop_requests:
            break
        images, words = images.to(device), words.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            right = model(normalize(images), words).argmax(-1) == words          # B, T
        counts["images"] += len(images)
        counts["exact"] += (right | (words == PAD)).all(1).sum().item()
        for kind, belongs in kinds.items():
            counts[kind] += (right & belongs[words]).sum().item()
            counts[f"{kind} words"] += belongs[words].sum().item()
    by_rank = all_gather(counts | dict(stops=len(stop_requests)))
    total = {name: sum(counts[name] for counts in by_rank) for name in by_rank[0]}
    if total["stops"]:
        return None
    found = {f"test_{kind}": 100 * total[kind] / total[f"{kind} words"]
             for kind in KINDS if total[f"{kind} words"]}
    return dict(test_exact=100 * total["exact"] / total["images"], **found, images=total["images"])


def train(argv):
    started = time.perf_counter()

    # Flags, and the run to resume
    given = parse(argv)
    folder = RunFolder(given, Captioner, below="out/caption")
    run, recipe, cfg = resolve(given, folder.checkpoint)
    machine, state = Machine(**pick(Machine, given)), State(**pick(State, folder.checkpoint or {}))
    rank, world, device, dtype = setup(machine.device, run.dtype)
    run = replace(run, dtype=str(dtype).removeprefix("torch."))

    # Data
    micro_batch, accumulate = split_batch(recipe, world, "micro_batch" in given)
    images = Captioned(run.say, "train", cfg.img_size, recipe.images, run.seed)
    val = Captioned(run.say, "val", cfg.img_size, 1000)
    settings = settings_of(run, recipe, cfg, images, val, world)
    folder.check(settings | dict(alpha=0.0 if cfg.soft else None), state)
    order = train_batches(len(images), recipe.batch_size, accumulate, rank, world, run.seed,
                          recipe.epochs, state.iteration)
    train_loader = loader(images, order, machine.workers, device)
    order = eval_batches(len(val), micro_batch, rank, world)
    val_loader = loader(val, order, machine.workers, device)
    per_epoch = len(images) // recipe.batch_size                 # iterations

    # Model and optimizer
    torch.manual_seed(seed_of("weights", run.seed))
    model = build(folder.checkpoint, Captioner) if folder.checkpoint else Captioner(cfg)
    if run.init_from and not folder.checkpoint:
        load_strictly(model, open_captioner(run.init_from)[1]["model"])
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder.open(model, optimizer, scaler)
    monitor = Monitor(folder, started, losses=accumulate * world)
    net = wrap(model, model.blocks, machine, world)
    batches = monitor.watch(train_loader)
    folder.announce(Recipe(), machine, micro_batch, [], recipe.epochs, per_epoch)

    for epoch in range(state.epoch, recipe.epochs):
        model.train()
        monitor.start(f"epoch {epoch}", state.iteration - epoch * per_epoch, per_epoch)
        while state.iteration < (epoch + 1) * per_epoch:
            lr = lr_at(state.iteration, recipe, per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(seed_of("drop path", run.seed, state.iteration, rank))
            loss_sum = torch.zeros((), device=device)
            for micro in range(accumulate):
                images, words = (x.to(device, non_blocking=True) for x in next(batches))
                net.require_backward_grad_sync = micro == accumulate - 1         # average once
                with autocast:
                    loss = loss_of(net(normalize(images), words), words)
                scaler.scale(loss / accumulate).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(model.parameters(), recipe.clip_grad or float("inf"))
            state.loss_sum += monitor.check(loss_sum, grad_norm, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            state.iteration += 1
            monitor.update(lr)
            if monitor.stopping or machine.save_every and state.iteration % machine.save_every == 0:
                folder.save()
            if monitor.stopping:
                folder.end_early()
        monitor.end()

        # Evaluate
        folder.save()
        result = evaluate(model, val_loader, device, dtype)
        if result is None:                               # asked to stop
            folder.end_early()
        row = dict(step=run.step, overrides=overrides(cfg, run.size, run.step), say=run.say,
                   seed=run.seed, epoch=epoch, train_loss=state.loss_sum / per_epoch, **result,
                   n_parameters=folder.n_parameters, **monitor.times())
        parts = "  ".join(f"{kind} {row[f'test_{kind}']:.1f} %" for kind in KINDS
                          if f"test_{kind}" in row)
        print_rank0(f"epoch {epoch}  train loss {row['train_loss']:.4f}  exact sentences "
                    f"{row['test_exact']:.1f} %  {parts}  {row['time_images_per_s']:,.0f} "
                    f"images/s  {row['time_s']:,.0f} s")
        folder.log(row)
        improved = row["test_exact"] > state.best_exact
        state.best_exact = max(state.best_exact, row["test_exact"])
        state.epoch, state.loss_sum = epoch + 1, 0.0
        folder.save(improved)

    folder.finish(f"{state.best_exact:.1f} % exact sentences", "", "")


# ------------------------------------------------------------------------------------------------
# What it writes


def open_captioner(source):
    """(model, checkpoint) of a run's folder or file."""
    checkpoint = read_checkpoint(source)
    require(checkpoint.get("architecture") == "Captioner", f"{source} is no run of "
            "downstream.caption: give one")
    return build(checkpoint, Captioner).eval(), checkpoint


def sheet(images, sentences):
    """A PIL image of some images (n, 3, H, W), uint8, four in a row, a sentence below each."""
    page = Image.new("RGB", (4 * 200, -(-len(images) // 4) * 160), "white")
    pen = ImageDraw.Draw(page)
    for i, (pixels, sentence) in enumerate(zip(images, sentences)):
        x, y = 200 * (i % 4), 160 * (i // 4)
        image = TF.to_pil_image(pixels).resize((128, 128), Image.Resampling.NEAREST)
        page.paste(image, (x + 36, y + 8))
        pen.text((x + 100, y + 140), sentence, fill="black", anchor="ma")
    return page


@torch.no_grad()
def show(argv):
    parser = Parser(prog="python -m downstream.caption show")
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt")
    parser.add_argument("--image", type=nonempty, help="an image; default: eight drawn ones")
    parser.add_argument("--rows", action="store_true", help="after each row of patches, too")
    parser.add_argument("--draw", type=nonempty, help="a .png to draw the images and sentences in")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    model, checkpoint = open_captioner(args.checkpoint)
    size = model.cfg.img_size
    if args.image:
        image = eval_transform(read_image(args.image, upright=True), None, size)
        images = TF.pil_to_tensor(image)[None]
    else:
        val = Captioned(checkpoint["run"]["say"], "val", size, 8)
        images, right = (torch.stack(part) for part in zip(*(val[0, index] for index in range(8))))
    written = model.write(normalize(images))
    for i, words in enumerate(written):
        expected = "" if args.image else f"   ({text_of(right[i].tolist())})"
        print(text_of(words) + expected)
        if args.rows:
            reader = ReadingWriter(model)
            for row, strip in enumerate(normalize(images[i: i + 1]).split(model.cfg.patch_size, 2)):
                reader.read(strip)
                print(f"    row {row + 1} of {model.cfg.grid}   {text_of(reader.write())}")
    if args.draw:
        save_png(sheet(images, map(text_of, written)), args.draw, "downstream.caption")


@report_errors()
def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if flags[:1] == ["show"]:
        show(flags[1:])
    else:
        train(flags)


if __name__ == "__main__":
    main()
