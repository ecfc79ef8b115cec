"""The properties that the paper claims of iLLaMA, measured on any checkpoint beside its accuracy.

    python -m replication.properties out/ladder-3/*-0/last.pt --measure calibration rank
    python -m replication.properties out/a --measure attention leak
    # DIR/SHAPE/shapeN-textureN.png
    python -m replication.properties CHECKPOINT --measure shape_bias --cue DIR
    python -m replication.properties illama-tiny-in1k-75.0 --data PATH --measure macs

Each checkpoint gives one line of JSON; --out appends it to a file as well. All is computed in
float32, in one process.

[1] calibration: Guo et al., arXiv 1706.04599
[2] shape or texture: Geirhos et al., arXiv 1811.12231
[3] loss landscape: Li et al., arXiv 1712.09913
"""
import copy
import json
import math
import random
import re
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from data import Images, eval_batches, eval_transform, loader, normalize, seed_of
from downstream.attention import class_token_attention
from eval import open_model, open_val, predict, score
from harness.checkpoint import describe
from harness.files import open_folder
from harness.flags import Parser, check_bounds, nonempty, require, shorten
from harness.processes import report_errors, setup
from harness.run import add_eval_flags
from harness.shapes import DRAWN, Shapes
from model import VisionTransformer
from replication.ladder import commit

CUE = ("shapes-cue", "shapes-cue-centred")


@dataclass
class Subject:
    """A trained model and the images that it is measured on."""
    path: str                    # of its checkpoint
    checkpoint: dict
    model: VisionTransformer
    source: Dataset              # the validation split: pairs (PIL image, label), and .classes
    device: torch.device
    args: Namespace              # flags

    def described(self):
        """What a row says of the model beside what was measured."""
        return describe(self.model.cfg, self.checkpoint, torch.float32)

    def images(self, source):
        """A data set as the model takes it, before normalize()."""
        return Images(source, partial(eval_transform, size=self.model.cfg.img_size))

    def batches(self, source):
        batches = eval_batches(len(source), self.args.batch_size)
        return loader(self.images(source), batches, self.args.workers, self.device)

    def examples(self, places):
        """Images (n, 3, H, W), uint8, and labels (n,) of the validation split."""
        images = self.images(self.source)
        pixels, labels = zip(*(images[0, place] for place in places))
        return torch.stack(pixels).to(self.device), torch.tensor(labels, device=self.device)

    @cached_property
    def predictions(self):
        """(logits, labels) of each batch of the validation split."""
        return list(predict(self.model, self.batches(self.source), self.device))

    @cached_property
    def conflict(self):
        """open_conflict() of the cue-conflict images, and {category: its classes} of the model."""
        own = self.checkpoint["run"]["data"]
        cue = self.args.cue or (own if own in CUE else "shapes-cue")
        source, shapes, textures = open_conflict(cue, self.model.cfg.img_size)
        known = categories(self.source.classes)
        unknown = sorted({*shapes, *textures} - known.keys())
        require(not unknown, f"--cue {cue} has the categories {shorten(unknown)}, but the model "
                f"knows {shorten(known)}: use a model of these, or of ImageNet's 1,000 classes")
        return source, shapes, textures, known

    @cached_property
    def sample(self):
        """30 images drawn at random, the same each time; all of them if there are fewer."""
        count = len(self.source)
        images, _ = self.examples(random.Random("sample").sample(range(count), min(30, count)))
        return images


# --------------------------------------------------------------------------------------------------
# Calibration


def calibration(logits, labels, bins=15):
    """Expected calibration error [1]: the mean over images of |accuracy - confidence| of their bin.

    logits (n, classes), labels (n,). Confidence is the largest probability, from i / bins to
    (i + 1) / bins in bin i. Returns dict(ece, reliability): ece from 0 to 1; (images, confidence,
    accuracy) of each bin that has any. InputError if a logit is not finite.
    """
    require(logits.isfinite().all(), "some logits are not finite, so they hold no confidence: use "
            "another checkpoint")
    confidence, guess = logits.cpu().double().softmax(-1).max(-1)
    place, hits = (confidence * bins).ceil() - 1, (guess == labels.cpu()).double()
    inside = [place == i for i in range(bins)]
    rows = [(int(i.sum()), confidence[i].mean().item(), hits[i].mean().item())
            for i in inside if i.any()]
    ece = sum(n * abs(accuracy - confidence) for n, confidence, accuracy in rows) / len(labels)
    return dict(ece=ece, reliability=rows)


# --------------------------------------------------------------------------------------------------
# Attention


def singular_values_for(fraction, maps):
    """How many singular values, largest first and not squared, reach a fraction of their sum:
    (..., N, N) -> (...)."""
    values = torch.linalg.svdvals(maps.cpu().double())               # ..., N
    return (values.cumsum(-1) / values.sum(-1, keepdim=True) < fraction).sum(-1) + 1


@torch.no_grad()
def attention_rank(model, images):
    """How many singular values of each attention map reach 80 and 90 % of their sum.

    images (B, 3, H, W). As in the published analysis, a head's maps are averaged over the images
    before they are decomposed. Returns dict(rank_80, rank_90), depth x heads each.
    """
    total = sum(model.attention_maps(image[None])[:, 0] for image in images)
    mean = total / len(images)                                       # depth, heads, N, N
    return dict(rank_80=singular_values_for(0.8, mean).tolist(),
                rank_90=singular_values_for(0.9, mean).tolist())


@torch.no_grad()
def attention(subject):
    """What collapses under a causal mask with the class token first: the variance of a logit over
    images, and the fraction of the class token's attention that goes to patches, of each block."""
    images = normalize(subject.sample)
    variance = subject.model(images).var(0).mean().item()
    to_patches = class_token_attention(subject.model, images).sum(-1).mean(1).tolist()
    return dict(logit_variance=variance, attention_to_patches=to_patches)


@torch.no_grad()
def output_change(model, images):
    """How far each token's output moves when the last patch is inverted: |change| / |output| in
    percent, N numbers.

    images (B, 3, H, W), uint8; mean over them. Under an exact causal mask all tokens before that
    patch have 0.
    """
    inverted = images.clone()
    last = slice(-model.cfg.patch_size, None)
    inverted[..., last, last] = 255 - inverted[..., last, last]
    before = model.forward_features(normalize(images))               # B, N, D
    after = model.forward_features(normalize(inverted))
    return (100 * (after - before).norm(dim=-1) / before.norm(dim=-1)).mean(0).tolist()


def leak(subject):
    """output_change() over the first ten images of each class, of at most ten classes."""
    labels = torch.cat([labels for _, labels in subject.predictions])
    classes = range(min(10, len(subject.source.classes)))
    places = torch.cat([(labels == label).nonzero()[:10, 0] for label in classes])
    images, _ = subject.examples(places.tolist())
    return dict(leak=output_change(subject.model, images))


# --------------------------------------------------------------------------------------------------
# Shape or texture


def to_categories(logits, known):
    """The most likely category of each image: the highest mean probability over a category's
    classes [2].

    logits (n, classes), known {category: its classes} -> n categories.
    """
    probabilities = logits.softmax(-1)
    means = torch.stack([probabilities[:, classes].mean(-1) for classes in known.values()])
    return [list(known)[best] for best in means.argmax(0).tolist()]


def shape_bias(decisions, shapes, textures):
    """The fraction of shape among the decisions that were for an image's shape or for its texture
    [2].

    Three lists of category names. Images whose shape and texture agree do not count. nan if no
    decision counts.
    """
    by_shape = sum(d == s != t for d, s, t in zip(decisions, shapes, textures, strict=True))
    by_texture = sum(d == t != s for d, s, t in zip(decisions, shapes, textures))
    return by_shape / (by_shape + by_texture) if by_shape + by_texture else math.nan


CATEGORIES = {  # the 16 of [2] in ImageNet's classes, first-last of several
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914", "bottle": "440 720 737 898-899 901 907", "car": "436 511 817",
    "cat": "281-286", "chair": "423 559 765 857", "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386", "keyboard": "508 878", "knife": "499", "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}


def categories(classes):
    """{category: its places among a model's classes}: of 1,000 those above, else each class is its
    own."""
    if len(classes) != 1000:
        return {name: [label] for label, name in enumerate(classes)}
    require(all(re.fullmatch(r"n\d{8}", name) for name in classes), "which of 1,000 classes belong "
            "to a category is known of ImageNet's, by the order of their folders, n01440764 and so "
            f"on, not of {shorten(classes)}: give --data with those")
    spans = {name: [span.split("-") for span in spans.split()]
             for name, spans in CATEGORIES.items()}
    return {name: [label for span in spans[name]
                   for label in range(int(span[0]), int(span[-1]) + 1)] for name in spans}


def open_conflict(data, img_size):
    """(data set, shapes, textures): what each image's shape and texture show, two lists of category
    names.

    `data` is shapes-cue or shapes-cue-centred, whose conflict split it then is, or a folder of
    SHAPE/shapeN-textureN.png. InputError if it is neither.
    """
    if data in CUE:
        source = Shapes("conflict", img_size, **DRAWN[data])
        pairs = [source.shape_and_texture(index, source.rng(index)) for index in range(len(source))]
        names = [(source.classes[shape], source.classes[texture]) for shape, texture in pairs]
    else:
        require(Path(data).is_dir(), f"--cue {data} is neither shapes-cue nor a folder: give one "
                "with images SHAPE/shapeN-textureN.png")
        source, names = open_folder(Path(data).parent, Path(data).name), []
        for path in (Path(source.path(index)) for index in range(len(source))):
            match = re.fullmatch(r"(.+?)\d*-(.+?)\d*", path.stem)
            require(match and match[1] == path.parent.name,
                    f"{path} is not named as SHAPE/shapeN-textureN.png says: rename or remove it")
            names.append(match.groups())
    return source, [shape for shape, _ in names], [texture for _, texture in names]


def shape_or_texture(subject):
    source, shapes, textures, known = subject.conflict
    predictions = predict(subject.model, subject.batches(source), subject.device)
    logits = torch.cat([logits for logits, _ in predictions])
    decisions = to_categories(logits, known)
    decided = sum(s != t and d in (s, t) for d, s, t in zip(decisions, shapes, textures))
    return dict(shape_bias=shape_bias(decisions, shapes, textures) if decided else None,
                decided=decided, conflicts=sum(s != t for s, t in zip(shapes, textures)))


# --------------------------------------------------------------------------------------------------
# Loss landscape


OFFSETS = [i / 5 for i in range(-5, 6)]    # along a direction, in lengths of the weights


def random_direction(model, *purpose):
    """{name: tensor}: noise in which each filter, a row of a weight, is as long as the model's own,
    and so are the positions together and the class token; norms and biases, which have one
    dimension, stay as they are [3]. Drawn by the parameter's name: models of other steps have the
    same noise where their weights have the same shapes."""
    direction = {}
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(seed_of("landscape", *purpose, name))
        noise = torch.randn(p.shape, generator=generator).to(p.device)
        if p.ndim == 1:
            direction[name] = torch.zeros_like(p)
        else:
            dim = tuple(range(1, p.ndim))
            length, of_noise = (torch.linalg.vector_norm(x, dim=dim, keepdim=True)
                                for x in (p, noise))
            direction[name] = noise * length / of_noise
    return direction


@torch.no_grad()
def landscape(subject, pairs=3):
    """Cross-entropy of 500 images, drawn at random, along pairs of random directions from the
    trained weights: for each pair a row for each offset along the first, a column for each along
    the second."""
    model, count = copy.deepcopy(subject.model), len(subject.source)
    places = random.Random("landscape").sample(range(count), min(500, count))
    images, labels = subject.examples(places)
    size = subject.args.batch_size
    batches = list(zip(normalize(images).split(size), labels.split(size)))
    trained = {name: p.clone() for name, p in model.named_parameters()}

    def loss(a, first, b, second):
        for name, p in model.named_parameters():
            p.copy_(trained[name] + a * first[name] + b * second[name])
        total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
        return round(total / len(places), 4)

    grids = []
    for pair in range(pairs):
        first, second = (random_direction(subject.model, pair, which) for which in range(2))
        grids.append([[loss(a, first, b, second) for b in OFFSETS] for a in OFFSETS])
    return dict(landscape=grids)


# --------------------------------------------------------------------------------------------------
# Work


def multiply_accumulates(cfg):
    """Those of one image, in linear layers, patches and attention. The authors count the same, and
    ViT's norms besides.

    `published`: all tokens in all blocks, all pairs of them in attention. `as_run`: of the last
    block only what the class token needs. `causal`: and of attention in the others only what the
    mask at alpha 0 leaves, which dense matrix multiplications do not save. A pair masked before the
    softmax needs neither of the two, one masked after it the first.
    """
    with torch.device("meta"):
        model = VisionTransformer(replace(cfg, depth=1))
    N, D = cfg.tokens, cfg.width
    mlp = sum(p.numel() for p in model.blocks[0].mlp.parameters() if p.ndim == 2)
    ends = model.patch_embed.proj.weight.numel() * (N - 1) + model.head.weight.numel()
    block = N * (4 * D ** 2 + mlp) + 2 * N ** 2 * D
    last = 3 * N * D ** 2 + D ** 2 + mlp + 2 * N * D    # q, k and v of all tokens, the rest of one
    pairs = N * (N - 1) // 2                            # of a query and a later key
    if cfg.mask == "modified" and not cfg.cls_last:
        pairs -= N - 1                                  # the class token's
    saved = {"none": 0, "soft": 1}.get(cfg.mask, 2)     # products that a hidden pair does not need
    hidden = saved * D * pairs
    return dict(published=ends + cfg.depth * block, as_run=ends + (cfg.depth - 1) * block + last,
                causal=ends + (cfg.depth - 1) * (block - hidden) + last)


# --------------------------------------------------------------------------------------------------
# The table and the command line


PROPERTIES = {  # name: function of a Subject -> dict, whose entries join the row
    "calibration": lambda subject: calibration(
        *(torch.cat(part) for part in zip(*subject.predictions))),
    "rank": lambda subject: attention_rank(subject.model, normalize(subject.sample)),
    "attention": attention,
    "leak": leak,
    "shape_bias": shape_or_texture,
    "landscape": landscape,
    "macs": lambda subject: dict(macs=multiply_accumulates(subject.model.cfg)),
}


def append_row(row, file=None):
    """Print a dict as a line of JSON, and append it to a file, with the program's flags, torch's
    version and the commit."""
    made_by = dict(flags=shlex.join(sys.argv[1:]), torch=torch.__version__, commit=commit())
    line = json.dumps(row | made_by, allow_nan=False)
    print(line, flush=True)
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as rows:
            rows.write(line + "\n")


def one_process(device):
    """The torch.device of a flag. InputError under torchrun."""
    _, world, device, _ = setup(device, "float32")
    require(world == 1, "rows are measured in one process: use python, not torchrun")
    return device


def parser_of_checkpoints(program, description):
    """The flags of programs that measure a row for each checkpoint."""
    parser = Parser(prog=f"python -m replication.{program}", description=description)
    parser.add_argument("checkpoints", nargs="+",
                        help="runs' folders, their checkpoints, or published weights")
    add_eval_flags(parser)
    parser.add_argument("--out", type=nonempty, help="append the rows to this file")
    return parser


def open_subjects(args):
    """All of them, so that what is wrong with one is reported before anything is measured."""
    device, subjects = one_process(args.device), []
    for path in args.checkpoints:
        model, checkpoint = open_model(path, device, args.alpha)
        val = open_val(path, checkpoint, model, args.data)
        subjects.append(Subject(path, checkpoint, model, val, device, args))
    return subjects


@report_errors()
def main(argv=None):
    parser = parser_of_checkpoints("properties", __doc__)
    parser.add_argument("--measure", nargs="+", choices=PROPERTIES, required=True)
    parser.add_argument("--cue", help=f"shape_bias: {' or '.join(CUE)} (default: as trained), or a "
                        "folder of SHAPE/shapeN-textureN.png")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    subjects = open_subjects(args)
    if "shape_bias" in args.measure:
        for subject in subjects:
            subject.conflict         # opened now, for the same reason
    for subject in subjects:
        row = subject.described() | score(subject.predictions, subject.device)
        for name in args.measure:
            row |= PROPERTIES[name](subject)
        append_row(row, args.out)


if __name__ == "__main__":
    main()
