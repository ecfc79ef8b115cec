"""Images with a class for each pixel: a folder laid out as ADE20K is, or scenes that are drawn; their transforms.

    train = open_scenes("PATH", "training", short_side=180)    # pairs (PIL image, annotation), and .classes
    images = Annotated(train, partial(train_transform, size=128, short_side=180), seed=0)

An annotation is a PIL image of the same size with one channel: k is the k-th class, 0 is unlabelled and ignored, and so
is 255, as most tools mark it, if there are fewer classes. With `void` 255 classes count from 0, and 255 alone is
unlabelled. As a tensor it holds classes from 0 on, and -1 for what is ignored.
"""
import math
import random
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data import FILL, Images
from downstream.drawn import Scenes
from harness.files import read_image
from harness.flags import InputError, require, shorten
from harness.processes import print_rank0

SPLITS, IGNORED, VOID = ("training", "validation"), -1, 255


def open_scenes(data, split, short_side, void=0):
    """A split, "training" or "validation", of "scenes", drawn with that shorter side, or of a folder in ADE20K's
    layout. InputError in one sentence if there is nothing to open."""
    return Scenes(split, short_side) if data == "scenes" else AnnotatedFolder(Path(data), split, void)


class AnnotatedFolder(Dataset):
    """images/SPLIT/NAME.jpg with annotations/SPLIT/NAME.png. Classes are the lines of classes.txt."""
    def __init__(self, root, split, void=0):
        require(root.is_dir(), f"--data {root} is neither scenes nor a folder: check the path")
        self.images, self.annotations = root / "images" / split, root / "annotations" / split
        self.classes = read_classes(root)
        for folder in (self.images, self.annotations):
            require(folder.is_dir(), f"{folder} is missing: {root} needs images/ and annotations/, both with training/ "
                    "and validation/")
        names = sorted(path.name for path in self.images.glob("[!.]*") if path.suffix.lower() in IMG_EXTENSIONS)
        annotated = {path.stem for path in self.annotations.glob("[!.]*.png")}
        alone = sorted(annotated ^ {Path(name).stem for name in names})
        wrong = f"only one of them has {shorten(alone)}" if alone else "they are empty"
        require(names and not alone, f"{self.images} and {self.annotations} must hold the same names, NAME.jpg and "
                f"NAME.png, but {wrong}: add or remove files")
        self.names = np.array(names)                       # a list's objects would be copied to every worker
        self.void = void
        self.look_at_labels(warn=split == SPLITS[0])

    def look_at_labels(self, warn):
        """Of up to 200 annotations: InputError if nothing is labelled in them, a warning of classes
        that never occur."""
        counts, looked_at = np.zeros(256, int), 0
        for index in range(0, len(self), math.ceil(len(self) / 200)):
            with suppress(InputError):                     # which comes again when it is used
                counts += self.annotation(index).histogram()
                looked_at += 1
        start = ("classes count from 1, and 0 is unlabelled; if yours count from 0, add --void 255"
                 if self.void == 0 else "classes count from 0, and 255 is unlabelled")
        require(not looked_at or counts[1:].any(), f"no pixel of {looked_at} annotations in "
                f"{self.annotations} has a class: {start}")
        never = [name for name, count in zip(self.classes, counts[1:]) if not count]
        if never and warn:
            print_rank0(f"warning: {shorten(never)} never occur in {looked_at} annotations of "
                        f"{self.annotations}: {start}", sys.stderr)

    def annotation(self, index, size=None):
        path = self.annotations / f"{Path(self.names[index].item()).stem}.png"
        return read_annotation(path, size, len(self.classes), self.void)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        image = read_scene(self.images / self.names[index].item())
        return image, self.annotation(index, image.size)


def read_scene(path, upright=False):
    """read_image(), and an InputError if the longer side would take gigabytes once the shorter one is resized."""
    image = read_image(path, upright)
    require(max(image.size) <= 16 * min(image.size),
            f"{path} has {image.width} x {image.height} pixels, longer than 16:1: cut or remove it")
    return image


def read_classes(root):
    """The names of the classes 1, 2, ...: the lines of classes.txt."""
    file = root / "classes.txt"
    require(file.is_file(), f"{file} is missing: write the names of the classes into it, a line for each, in the order "
            "of their numbers in the annotations, from 1 on")
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not text in UTF-8 ({error}): save it as that") from error
    classes = [line.strip() for line in lines]
    require("" not in classes, f"{file} has an empty line between the names of classes: remove it, or name that class")
    require(2 <= len(classes) <= 255, f"{file} names {len(classes)} classes; it must be 2 to 255, one per line")
    return classes


def read_annotation(path, size, classes, void=0):
    """An annotation as a PIL image of mode L, 0 for what is unlabelled. InputError that names it if it is none, or not
    of that size, where one is given."""
    annotation = read_image(path, convert=False)
    require(annotation.mode in ("1", "L", "P"),            # P: a palette, whose colours do not matter
            f"{path} has the mode {annotation.mode}; an annotation has one channel of 8 bits, the number of a class in "
            "each pixel: convert it")
    require(size in (None, annotation.size), f"{path} has {annotation.size} pixels, its image {size}: replace one of "
            "them")
    pixels = np.asarray(annotation).astype(int)            # of mode 1: 0 and 1
    largest = pixels.max(where=pixels != VOID, initial=0)
    if void == VOID:
        pixels = np.where(pixels == VOID, 0, pixels + 1)
    elif classes < VOID:
        pixels = np.where(pixels == VOID, 0, pixels)
    require(pixels.max() <= classes, f"{path} holds class {largest}, but there are {classes}: correct it, with {void} "
            "for what is not labelled, or the list of classes")
    return Image.fromarray(pixels.astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


class Annotated(Images):
    """A data set with a transform of image and annotation, whose randomness is a function of (seed, epoch, index).

    Items are (uint8 (3, H, W), int64 (H, W)); what cannot be read is treated as in Images.
    """
    def __getitem__(self, key):
        epoch, index = key
        image, mask = self.read(index)
        image, mask = self.transform(image, mask, random.Random(f"{self.seed} {epoch} {index}"))
        return TF.pil_to_tensor(image), TF.pil_to_tensor(mask)[0].long() - 1


def eval_transform(image, mask, rng):
    return image, mask


def train_transform(image, mask, rng, size, short_side):
    """Published: resize to 0.5 to 2 times the shorter side, crop, flip half of the images, distort their colours."""
    short = max(1, round(short_side * rng.uniform(0.5, 2)))
    longest = 4 * short + 1                                # a panorama is made smaller: its longer side is that long
    image = TF.resize(image, short, InterpolationMode.BILINEAR, max_size=longest)
    mask = TF.resize(mask, short, InterpolationMode.NEAREST, max_size=longest)
    image, mask = crop(image, mask, rng, size)
    if rng.random() < 0.5:
        image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
    return distort(image, rng), mask


def crop(image, mask, rng, size, most=0.75):
    """size x size from anywhere, padded at the right and the bottom where the image is smaller; drawn again, up to ten
    times, if a single class covers more than `most` of what is labelled."""
    padding = [0, 0, *(max(0, size - side) for side in image.size)]
    image, mask = TF.pad(image, padding, fill=FILL), TF.pad(mask, padding, fill=0)
    for _ in range(10):
        left, top = rng.randint(0, image.width - size), rng.randint(0, image.height - size)
        box = left, top, left + size, top + size
        part = mask.crop(box)
        labelled = part.histogram()[1:]
        if 0 < max(labelled) <= most * sum(labelled):
            break
    return image.crop(box), part


DISTORTIONS = (  # torchvision's, with mmsegmentation's bounds: see docs/downstream.md for how these differ
    (TF.adjust_brightness, 0.875, 1.125), (TF.adjust_contrast, 0.5, 1.5),
    (TF.adjust_saturation, 0.5, 1.5), (TF.adjust_hue, -0.1, 0.1))


def distort(image, rng):
    """Photometric distortion: each of four changes with probability 1/2."""
    for adjust, low, high in DISTORTIONS:
        if rng.random() < 0.5:
            image = adjust(image, rng.uniform(low, high))
    return image
