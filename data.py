"""Labelled images in, batches out: data sets, transforms, the order of images and the loader.

    train = open_data("cifar10", "train", img_size=32)         # 50,000 pairs (PIL image, label), and .classes
    images = Images(train, partial(train_transform, size=32), seed=0)
    batches = train_batches(len(train), batch_size=128)        # which images: lists of (epoch, index)
    for batch, labels, faults in loader(images, batches, workers=2):    # uint8 (128, 3, 32, 32), int64 (128,), 128 str
        logits = model(normalize(batch))

Every random draw is seeded by its purpose: the order of an epoch of (seed, epoch), the augmentation of an image
of (seed, epoch, index). So no generator has a state to be saved, and the number of workers changes nothing.
"""
import atexit
import gc
import io
import math
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]   # told by content, not by name; EPS would start Ghostscript
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]   # see eval.py
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # ImageNet's, for all data, as the published runs have it


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: pairs (PIL image, label), and .classes


DATASETS = {  # the built-in ones: functions of a split and a size
    "shapes": lambda split, img_size: Shapes(split, img_size),
    "shapes-cue": lambda split, img_size: Shapes(split, img_size, cue=True),
    "cifar10": lambda split, _: download(datasets.CIFAR10, train=split == "train"),
    "cifar100": lambda split, _: download(datasets.CIFAR100, train=split == "train"),
    "flowers102": lambda split, _: Flowers(split),
}
DOWNLOADS = Path("datasets")                               # where they are kept


def open_data(data, split, img_size, classes=None):
    """A split, "train" or "val", of a built-in data set or of a folder PATH/SPLIT/CLASS/IMAGE.

    Labels are indices into `classes`, by default the names of this data set's own classes. ValueError in one sentence
    if there is nothing to open, or a class that is not among them.
    """
    if data not in DATASETS:
        return open_folder(Path(data), split, classes)
    source = DATASETS[data](split, img_size)
    if classes is not None and list(classes) != list(source.classes):
        raise ValueError(f"--data {data} has the classes {shorten(source.classes)}, but the model knows "
                         f"{shorten(classes)}: use the data that it was trained on")
    return source


class Flowers(ConcatDataset):
    """Flowers-102 as transfer uses it: 2,040 images to train, in two parts of the original, and 6,149 to test."""

    def __init__(self, split):
        parts = ("train", "val") if split == "train" else ("test",)
        super().__init__([download(datasets.Flowers102, split=part) for part in parts])
        self.classes = [f"flower {n}" for n in range(1, 103)]                    # torchvision 0.21 has no names


def download(dataset, **split):
    """A data set of torchvision, which is a class that takes a folder and a split."""
    name = dataset.__name__.lower()
    try:
        return dataset(DOWNLOADS, download=True, **split)
    except ModuleNotFoundError as error:
        raise ValueError(f"--data {name} needs {error.name}: pip install {error.name}") from error
    except Exception as error:  # no network shows as any of a dozen kinds
        raise ValueError(f"--data {name} could not be downloaded to {DOWNLOADS}/ ({error}): connect to a network, "
                         "or give --data a folder with train/ and val/ class folders") from error


def open_folder(root, split, classes):
    folder = root / split
    if not root.is_dir():
        raise ValueError(f"--data {root} is neither one of {', '.join(DATASETS)} nor a folder: check the path")
    found = class_folders(folder) if folder.is_dir() else []
    if not found:
        wrong = "has no class folders" if folder.is_dir() else "is missing"
        raise ValueError(f"{folder} {wrong}: put images into {folder}/CLASS/, a folder for each class")
    classes = found if classes is None else list(classes)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ValueError(f"{folder} has the class folders {shorten(unknown)}, which are not among the {len(classes)} "
                         f"classes that are known ({shorten(classes)}): use the data that the model was trained on")
    return ImageFolder(folder, found, classes)


def class_folders(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class ImageFolder(Dataset):
    """The images in FOLDER/CLASS/ and its subfolders, in torchvision's order, with labels by a list of classes.

    Paths and labels are arrays: a list's objects would be copied to every worker, for their reference counts change.
    """

    def __init__(self, folder, found, classes):
        paths, labels, seen, self.classes = [], [], set(), list(classes)
        for name in found:
            for subfolder, files in sorted(walk(folder / name, seen)):
                paths += [os.fsencode(os.path.join(subfolder, file)) for file in files]
            labels += [self.classes.index(name)] * (len(paths) - len(labels))
        empty = set(found) - {self.classes[label] for label in set(labels)}
        if empty:
            raise ValueError(f"{folder} has class folders without images ({shorten(sorted(empty))}): "
                             "fill or remove them")
        self.paths, self.labels = np.array(paths), np.array(labels)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.fsdecode(self.paths[index].item())

    def __getitem__(self, index):
        return read_image(self.path(index)), self.labels[index].item()


def walk(top, seen):
    """(folder, its image files, sorted) of a folder and those below it, links followed; hidden ones do not count.

    ValueError if a folder is one of `seen`: a link that leads back would be followed for ever, or double the data.
    """
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise ValueError(f"{folder} links to a folder that is already among the data, {real}: remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".")


def read_image(path):
    """An image file as a PIL image in RGB. ValueError that names it if it is none."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):                   # a pipe would be waited for
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()), formats=FORMATS)
        image.load()
    except Exception as error:                             # decoders raise half a dozen kinds for a damaged file
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    if image.mode.startswith("I"):                         # 16 bits, which convert would clip to 8, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")            # convert would copy it


def shorten(names):
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def printable(text):
    """Text of files and their names, without what would steer a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


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


def eval_transform(image, rng, size):
    """The published evaluation: up to 32 pixels the central square, below 384 its central 7/8; from 384 on the whole
    image, squeezed to a square."""
    if size <= 32:
        return fit(image, size)
    if size >= 384:
        return TF.resize(image, [size, size], InterpolationMode.BICUBIC)
    return fit(image, int(size / 0.875), size)


def train_transform(image, rng, size, augment=False):
    """The published training transform: crop, flip half of the images, and with `augment` RandAugment."""
    image = padded_crop(image, rng, size) if size <= 32 else resized_crop(image, rng, size)
    if rng.random() < 0.5:
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
        box = ..., slice(max(0, y - h), min(H, y + h)), slice(max(0, x - w), min(W, x + w))
        images = images.clone()
        images[box] = opposite[box]
        lam = 1 - opposite[box][0, 0].numel() / (H * W)                          # at a border the box is smaller
    else:
        images = lam * images + (1 - lam) * opposite
    return images, lam * targets + (1 - lam) * targets.flip(0)


# ---------------------------------------------------------------------------------------------------------------------
# Loading: lists of (epoch, index) say what a batch holds, a data set turns each into (uint8 tensor, label, fault)


class Images(Dataset):
    """A data set with a transform whose randomness is a function of (seed, epoch, index).

    The fault is "", or the sentence about an image that cannot be read: then image and label are the next one's.
    """

    def __init__(self, source, transform, seed=0):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        image, label, fault = self.read(index)
        image = self.transform(image, random.Random(f"{self.seed} {epoch} {index}"))
        return TF.pil_to_tensor(image), label, fault

    def read(self, index):
        """(image, label, fault) at an index, or of the next readable image among 99 that follow; black if none is."""
        fault = ""
        for other in range(index, index + 100):
            try:
                return *self.source[other % len(self.source)], fault
            except (ValueError, OSError) as error:         # an error in a worker would come with its traceback
                fault = fault or str(error)
        return Image.new("RGB", (1, 1)), 0, fault


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
        order = order.view(-1, world, batch_size // accumulate // world)
        for batch in order[done * accumulate:, rank].tolist():
            yield [(epoch, index) for index in batch]
        done = 0


def eval_batches(n_images, batch_size, rank=0, world=1):
    """This rank's part of all images, in batches, the last one short: every image once, whatever the ranks."""
    keys = [(0, index) for index in range(rank, n_images, world)]
    return [keys[start: start + batch_size] for start in range(0, len(keys), batch_size)]


def loader(images, batches, workers, device=torch.device("cpu")):
    """Batches (uint8 (B, 3, H, W), int64 (B,), B faults), ready to be copied to the device without a wait."""
    return DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=start_worker)


def check_readable(faults):
    """ValueError with the first fault of a batch, if there is one: evaluation takes every image or none."""
    if any(faults):
        raise ValueError(next(filter(None, faults)))


def labels_of(source):
    """The labels of all images of an ImageFolder or one of torchvision's CIFARs, without reading them."""
    return source.labels if hasattr(source, "labels") else source.targets


def start_worker(_):
    """Ignore the signals that stop a run: they reach workers too, and a worker's death would end the run before it is
    saved. Freeze the garbage collector: its marks would copy the shared memory of all modules, 80 MB per worker."""
    signal.set_wakeup_fd(-1)     # inherited by fork: the worker's signals would reach the run's listen() in eval.py
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()


@atexit.register
def end_workers():
    """Kill the workers that are left: at exit multiprocessing sends SIGTERM, which they ignore, and waits for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)          # where torch would report their end as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def seed_of(*key):
    """A seed for torch's generators that is a function of what the draw is for."""
    return random.Random(repr(key)).getrandbits(63)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: a data set with nothing to download


def polygon(*points):
    """The signed distance to a closed polygon, negative inside, as a function of coordinates."""
    a = np.array(points, dtype=np.float32)
    edge = np.roll(a, -1, axis=0) - a                                            # V, 2

    def distance(x, y):                                                          # H, W
        px, py = x - a[:, :1, None], y - a[:, 1:, None]                          # V, H, W: from each corner
        ex, ey = edge[:, :1, None], edge[:, 1:, None]
        t = np.clip((px * ex + py * ey) / (ex ** 2 + ey ** 2), 0, 1)             # nearest point of each edge
        away = np.sqrt(((px - t * ex) ** 2 + (py - t * ey) ** 2).min(0))
        above, left = py < 0, px * ey - py * ex > 0
        crossing = (above != np.roll(above, -1, axis=0)) & (left == (ey > 0))    # edges that a ray to one side meets
        return np.where(crossing.sum(0) % 2, -away, away)
    return distance


def around(*radii, turn=-math.pi / 2):
    """Corners at equal angles about the centre."""
    return [(r * math.cos(turn + 2 * math.pi * i / len(radii)), r * math.sin(turn + 2 * math.pi * i / len(radii)))
            for i, r in enumerate(radii)]


def heart(t):
    return (0.95 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)


SHAPES = {  # signed distances, for x to the right and y down, in units of the shape's radius
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.22,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y)),
    "bar": lambda x, y: np.hypot(x, y - np.clip(y, -0.75, 0.75)) - 0.27,
    "triangle": polygon(*around(1, 1, 1)),
    "square": polygon(*around(1, 1, 1, 1, turn=math.pi / 4)),
    "star": polygon(*around(*[1, 0.42] * 5)),
    "plus": polygon((-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                    (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)),
    "heart": polygon(*(heart(2 * math.pi * i / 24) for i in range(24))),
    "arrow": polygon((0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)),
}

TEXTURES = {  # -1 for one tone to 1 for the other; u and v advance by 2 pi a period; none is another one mirrored
    "plain": lambda u, v: 0 * u - 1,
    "rows": lambda u, v: np.sin(v),
    "columns": lambda u, v: np.sin(u),
    "slashes": lambda u, v: np.sin((u + v) * 0.7),
    "checks": lambda u, v: 2 * np.sin(u * 0.7) * np.sin(v * 0.7),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.7,
    "grid": lambda u, v: 2 * np.maximum(np.cos(u), np.cos(v)) - 1.2,
    "rings": lambda u, v: np.sin(np.hypot(u, v)),
    "waves": lambda u, v: np.sin(v + 1.5 * np.sin(u * 0.7)),
    "fade": lambda u, v: v / 8,
}


class Shapes(Dataset):
    """Ten shapes, each filled with one of ten textures, over a darker background. An image is a function of (seed,
    split, index) at any size: drawn from the shape's signed distance, with edges as sharp as the pixels allow.

    Texture j belongs to shape j. By default the two are independent; with `cue` they go together in "train" and "val",
    and never in the third split, "conflict".
    """
    classes = list(SHAPES)
    count = {"train": 10_000, "val": 2_000, "conflict": 2_000}

    def __init__(self, split, img_size, cue=False, seed=0):
        self.split, self.img_size, self.cue, self.seed = split, img_size, cue, seed

    def __len__(self):
        return self.count[self.split]

    def rng(self, index):
        """The one source of an image's draws, the first of which are its shape and texture."""
        return random.Random(f"{self.seed} {self.split} {index}")

    def shape_and_texture(self, index, rng):
        """Which shape, which texture: indices into SHAPES and TEXTURES."""
        shape, other = index % len(SHAPES), rng.randrange(1, len(TEXTURES))
        if self.split == "conflict":
            return shape, (shape + other) % len(TEXTURES)
        return shape, shape if self.cue else rng.randrange(len(TEXTURES))

    def __getitem__(self, index):
        rng = self.rng(index)
        shape, texture = self.shape_and_texture(index, rng)
        x, y = coordinates(self.img_size, self.img_size)
        # Radius, turn and place are bounded so that a classifier needs shape, and ours can learn it in minutes.
        colours, inside = draw_shape(rng, x, y, shape, texture, radii=(0.42, 0.75))
        return to_image(colours * inside + draw_background(rng, x, y) * (1 - inside)), shape


def coordinates(H, W):
    """x (1, W) and y (H, 1) of the pixels' centres, where the shorter side spans -1 to 1."""
    pixel, (x1, y1) = 2 / min(H, W), (W / min(H, W), H / min(H, W))
    x, y = (np.arange(pixel / 2 - end, end, pixel, dtype=np.float32) for end in (x1, y1))
    return x[None, :W], y[:H, None]


def draw_shape(rng, x, y, shape, texture, radii):
    """(colours (H, W, 3), coverage (H, W, 1) from 0 to 1) of a shape and its texture, indices into SHAPES and
    TEXTURES, of a radius between two bounds, somewhere within the image."""
    radius, turn = rng.uniform(*radii), math.radians(rng.uniform(-40, 40))
    pixel = 2 / min(x.size, y.size)
    dx, dy = (axis - rng.uniform(radius - axis.size * pixel / 2, axis.size * pixel / 2 - radius) for axis in (x, y))
    dx, dy = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
    inside = 0.5 - list(SHAPES.values())[shape](dx / radius, dy / radius) * radius / pixel

    wave = 2 * math.pi / rng.uniform(0.24, 0.4)                                  # 4 to 6.4 pixels a period at 32
    u, v = wave * (dx - rng.uniform(-.1, .1)), wave * (dy - rng.uniform(-.1, .1))
    tone = np.clip(0.5 + list(TEXTURES.values())[texture](u, v), 0, 1)[..., None]
    light, middle = colour(rng, 0.75, 1), colour(rng, 0.45, 0.7)
    return middle * tone + light * (1 - tone), np.clip(inside, 0, 1)[..., None]


def draw_background(rng, x, y):
    """(H, W, 3): from one dark colour to another."""
    dark, darker = colour(rng, 0, 0.25), colour(rng, 0, 0.25)
    slope = (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))[..., None] / 4 + 0.5
    return dark * slope + darker * (1 - slope)


def colour(rng, low, high):
    return np.array([rng.uniform(low, high) for _ in range(3)], dtype=np.float32)


def to_image(pixels):
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
