"""Labelled images in, batches out: data sets, transforms, the order of images and the loader.

    train = open_data("cifar10", "train", img_size=32)         # 50,000 pairs (PIL image, label), and .classes
    images = Images(train, partial(train_transform, size=32), seed=0)
    batches = train_batches(len(train), batch_size=128)        # which images: lists of (epoch, index)
    for batch, labels in loader(images, batches, workers=2):   # uint8 (128, 3, 32, 32), int64 (128,)
        logits = model(normalize(batch))

Every random draw is seeded by its purpose: the order of an epoch by (seed, epoch), the augmentation of an image by
(seed, epoch, index). So no generator has a state to be saved, and the number of workers changes nothing.
"""
import math
import random
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from harness.files import open_folder
from harness.flags import InputError, require, shorten
from harness.processes import print_line, start_worker
from harness.shapes import DRAWN, Shapes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # ImageNet's, for all data, as the published runs have it
DOWNLOADS = Path("datasets")                               # where downloaded ones are kept


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: pairs (PIL image, label), and .classes


def download(dataset, **split):
    """A data set of torchvision, which is a class that takes a folder and a split."""
    name = dataset.__name__.lower()
    try:
        return dataset(DOWNLOADS, download=True, **split)
    except ModuleNotFoundError as error:
        raise InputError(f"--data {name} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # no network shows as any of a dozen types
        raise InputError(f"--data {name} could not be downloaded to {DOWNLOADS}/ ({error}): connect to a network, or "
                         "give --data a folder with train/ and val/ class folders") from error


def open_cifar10(split, img_size):
    return download(datasets.CIFAR10, train=split == "train")


def open_cifar100(split, img_size):
    return download(datasets.CIFAR100, train=split == "train")


def open_flowers102(split, img_size):
    """2,040 images to train, in two parts of the original, and 6,149 to test."""
    parts = ("train", "val") if split == "train" else ("test",)
    source = ConcatDataset([download(datasets.Flowers102, split=part) for part in parts])
    source.classes = [f"flower {n}" for n in range(1, 103)]          # as the original numbers them
    return source


OPENERS = {  # what --data may name beside folders: a function of split and resolution
    **{name: partial(Shapes, **style) for name, style in DRAWN.items()},
    "cifar10": open_cifar10,
    "cifar100": open_cifar100,
    "flowers102": open_flowers102,
}


def open_data(data, split, img_size, classes=None):
    """A split, "train" or "val", of a data set of OPENERS or of a folder PATH/SPLIT/CLASS/IMAGE.

    Labels are indices into `classes`, by default the names of this data set's own classes.
    InputError in one sentence if there is nothing to open, or a class that is not among them.
    """
    if data not in OPENERS:
        return open_folder(Path(data), split, classes, OPENERS)
    source = OPENERS[data](split, img_size)
    require(classes is None or list(classes) == list(source.classes), f"--data {data} has the "
            f"classes {shorten(source.classes)}, but the model knows {shorten(classes or [])}: use "
            "the data that it was trained on")
    return source


# ---------------------------------------------------------------------------------------------------------------------
# Transforms: PIL image in, PIL image of size x size out; `rng` is their only source of randomness


def fit(image, size, crop=None):
    """Resize the shorter side to `size` and cut out the central square of side `crop`, by default `size`; an image of
    that size stays as it is. One longer than 16:1 is cropped to that first: resized, it could take gigabytes.
    """
    if image.size == (size, size) and not crop:
        return image
    longest = 16 * min(image.size)
    if max(image.size) > longest:
        image = TF.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return TF.center_crop(TF.resize(image, size, InterpolationMode.BICUBIC), crop or size)


def eval_transform(image, rng, size, trained=None):
    """The published evaluation of a model that was trained at a resolution, by default `size`: up
    to 32 pixels the central square, below 384 its central 7/8; from 384 on the whole image,
    squeezed to a square."""
    trained = trained or size
    if trained <= 32:
        return fit(image, size)
    if trained >= 384:
        return TF.resize(image, [size, size], InterpolationMode.BICUBIC)
    return fit(image, int(size / 0.875), size)


def train_transform(image, rng, size, augment=False, flip=True):
    """The published training transform: crop, flip half of the images, and with `augment` RandAugment."""
    image = padded_crop(image, rng, size) if size <= 32 else resized_crop(image, rng, size)
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    return rand_augment(image, rng) if augment else image


def padded_crop(image, rng, size):
    """A black border of an eighth, and a crop anywhere."""
    pad = size // 8
    image = ImageOps.expand(fit(image, size), pad)
    left, top = rng.randint(0, 2 * pad), rng.randint(0, 2 * pad)
    return image.crop((left, top, left + size, top + size))


def random_box(rng, W, H, areas, ratios, margin=0):
    """(left, top, w, h) of a box in W x H: a fraction of the area and a ratio w / h, both drawn between two bounds, the
    ratio on a log scale; at least `margin` narrower and lower than W x H. None if none of ten draws fits."""
    for _ in range(10):
        area, ratio = rng.uniform(*areas) * W * H, math.exp(rng.uniform(*map(math.log, ratios)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= W - margin and 0 < h <= H - margin:
            return rng.randint(0, W - w), rng.randint(0, H - h), w, h


def resized_crop(image, rng, size):
    """Inception's crop: 8 to 100 % of the area, between 3:4 and 4:3, anywhere; resized to size x size.

    After ten draws that do not fit, the middle of the image, as much of it as those ratios allow.
    """
    W, H = image.size
    w, h = min(W, round(H * 4 / 3)), min(H, round(W * 4 / 3))
    middle = (W - w) // 2, (H - h) // 2, w, h
    left, top, w, h = random_box(rng, W, H, areas=(0.08, 1), ratios=(3 / 4, 4 / 3)) or middle
    crop = TF.pil_to_tensor(image.crop((left, top, left + w, top + h)))
    # Three times as fast as PIL's own resize. Over 1,000 images 0.3 % of the values differ, by at most two levels; from
    # Pillow 13, which takes the vertical pass first for some tall crops, 2.6 %, by at most 22, without a shift (2e-7).
    return TF.to_pil_image(TF.resize(crop, [size, size], InterpolationMode.BICUBIC))


def affine(image, *matrix):
    """Pixel (x, y) comes from (a x + b y + c, d x + e y + f), bicubic; ImageNet's mean colour where that is outside."""
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=FILL)


def enhanced(enhancer):
    return lambda image, level, sign: enhancer(image).enhance(max(0.1, 1 + 0.9 * level * sign))


FILL = tuple(round(255 * mean) for mean in MEAN)
# Posterize keeps 4 - int(4 * level) bits, as ImageOps.posterize does; but they may be 0, which Pillow 13 refuses.
OPERATIONS = {  # RandAugment's, as functions of an image, a level from 0 to 1 and a sign: timm 0.5.4's "increasing" set
    "AutoContrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, sign: ImageOps.equalize(image),
    "Invert": lambda image, level, sign: ImageOps.invert(image),
    "Rotate": lambda image, level, sign: image.rotate(30 * level * sign, Image.BICUBIC, fillcolor=FILL),
    "Posterize": lambda image, level, sign: image.point([v & (256 - (16 << int(4 * level))) for v in range(256)] * 3),
    "Solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "SolarizeAdd": lambda image, level, sign: image.point(
        [min(255, v + int(110 * level)) if v < 128 else v for v in range(256)] * 3),
    "Color": enhanced(ImageEnhance.Color),
    "Contrast": enhanced(ImageEnhance.Contrast),
    "Brightness": enhanced(ImageEnhance.Brightness),
    "Sharpness": enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, sign: affine(image, 1, 0.3 * level * sign, 0, 0, 1, 0),
    "ShearY": lambda image, level, sign: affine(image, 1, 0, 0, 0.3 * level * sign, 1, 0),
    "TranslateX": lambda image, level, sign: affine(image, 1, 0, 0.45 * level * sign * image.width, 0, 1, 0),
    "TranslateY": lambda image, level, sign: affine(image, 1, 0, 0, 0, 1, 0.45 * level * sign * image.height),
}


def rand_augment(image, rng):
    """Two operations, each done with probability 1/2, near the top of its range: timm's rand-m9-mstd0.5-inc1."""
    for operation in rng.choices(list(OPERATIONS.values()), k=2):
        if rng.random() < 0.5:
            level = min(max(rng.gauss(9, 0.5), 0), 10) / 10
            image = operation(image, level, rng.choice((-1, 1)))
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Transforms of a batch, on its device


def normalize(images):
    """Bytes to what the model takes: uint8 (B, 3, H, W) -> float32 (B, 3, H, W)."""
    images = TF.to_dtype(images, torch.float32, scale=True)                      # new, so it may be changed in place
    for channel, mean, std in zip(images.unbind(1), MEAN, STD):                  # numbers, which need no copy to a GPU
        channel.sub_(mean).div_(std)
    return images


def erase(images, rng, probability):
    """Random erasing: in some images, a box of 2 to 33 % of the area becomes normal noise. Changes images in place."""
    noise = torch.Generator(images.device).manual_seed(rng.getrandbits(63))
    H, W = images.shape[2:]
    for image in images:
        if rng.random() < probability:                         # a box's ratio is h / w here, its sides change places
            box = random_box(rng, H, W, areas=(0.02, 1 / 3), ratios=(0.3, 1 / 0.3), margin=1)
            if box:
                top, left, h, w = box
                image[:, top: top + h, left: left + w].normal_(generator=noise)
    return images


def mix(images, labels, classes, rng, mixup, cutmix):
    """Mixup or CutMix, an even chance where both are on, of each image with its opposite in the batch.

    images (B, 3, H, W), labels (B,) -> images, and targets (B, classes): probabilities of the classes. mixup and cutmix
    are the alphas of Beta(alpha, alpha), from which lambda, the first image's weight, is drawn; 0 is off.
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    lam = rng.betavariate(cutmix, cutmix) if cut else rng.betavariate(mixup, mixup)
    opposite, targets = images.flip(0), F.one_hot(labels, classes).float()
    if cut:
        H, W = images.shape[2:]
        h, w = int(H * math.sqrt(1 - lam)) // 2, int(W * math.sqrt(1 - lam)) // 2
        y, x = rng.randrange(H), rng.randrange(W)
        top, bottom, left, right = max(0, y - h), min(H, y + h), max(0, x - w), min(W, x + w)
        images = images.clone()
        images[:, :, top:bottom, left:right] = opposite[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (H * W)                      # at a border the box is smaller
    else:
        images = lam * images + (1 - lam) * opposite
    return images, lam * targets + (1 - lam) * targets.flip(0)


# ---------------------------------------------------------------------------------------------------------------------
# Loading: lists of (epoch, index) say what a batch holds, a data set turns each into (uint8 tensor, label)


class Images(Dataset):
    """images[epoch, index] -> (uint8 (3, H, W), label). What is drawn follows from (seed, epoch, index).

    An image that cannot be read is an error. With `replace`, in training, each process warns of it
    once, and the next one that can be read takes its place, of at most ten.
    """

    def __init__(self, source, transform, seed=0, replace=False):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace
        self.warned = set()

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.read(index)
        image = self.transform(image, random.Random(f"{self.seed} {epoch} {index}"))
        return TF.pil_to_tensor(image), label

    def read(self, index):
        """(image, label) at an index, or of the next image that can be read."""
        first_error = None
        for other in range(index, index + (11 if self.replace else 1)):
            try:
                return self.source[other % len(self.source)]
            except (InputError, OSError) as error:
                first_error = first_error or error
                if self.replace and str(error) not in self.warned:
                    self.warned.add(str(error))
                    print_line(f"warning: {error}; until then the next one takes its place",
                               sys.stderr)
        raise first_error


def train_batches(n_images, batch_size, accumulate=1, rank=0, world=1, seed=0, epochs=1, start=0):
    """This rank's micro-batches, lists of (epoch, index), of a run of so many epochs, from iteration `start` on.

    Iteration k of an epoch takes the k-th global batch of a shuffled order, whatever the ranks and the micro-batches
    that share it; what is left of the last global batch is dropped.
    """
    per_epoch = n_images // batch_size                                           # iterations
    first, done = divmod(start, per_epoch)
    for epoch in range(first, epochs):
        shuffle = torch.Generator().manual_seed(seed_of("order", seed, epoch))
        order = torch.randperm(n_images, generator=shuffle)[: per_epoch * batch_size]
        order = order.view(-1, world, batch_size // accumulate // world)         # micro-batches, ranks, images
        for batch in order[done * accumulate:, rank].tolist():
            yield [(epoch, index) for index in batch]
        done = 0


def eval_batches(n_images, batch_size, rank=0, world=1):
    """This rank's part of all images, in batches, the last one short: every image once, whatever the ranks."""
    keys = [(0, index) for index in range(rank, n_images, world)]
    return [keys[start: start + batch_size] for start in range(0, len(keys), batch_size)]


def loader(images, batches, workers, device=torch.device("cpu")):
    """Batches (uint8 (B, 3, H, W), int64 (B,)), ready to be copied to the device without a wait."""
    return DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=start_worker)


def seed_of(*key):
    """A seed for torch's generators that is a function of what the draw is for."""
    return random.Random(repr(key)).getrandbits(63)
