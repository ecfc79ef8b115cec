"""Image files and folders, read robustly: what a data set holds is an image in RGB, or an InputError that names it."""
import io
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import ResNet50_Weights

from harness.flags import InputError, plural, printable, require, shorten
from harness.processes import print_rank0

Image.init()
IMAGENET = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]             # what its 1,000 classes are, in their order
FORMATS = [name for name in Image.OPEN if name != "EPS"]   # told by content, not by name; EPS would start Ghostscript


def read_bytes(path):
    """What is in a regular file. InputError for a pipe, which would be waited for."""
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is not a regular file: remove it")
    with open(path, "rb") as file:
        return file.read()


def decode(path, what):
    """An image file as PIL has it. InputError that names it if it is none; `what` is what it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # of every worker and epoch, where the pixels are right
            image = Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS)
            image.stored = image.tile[0][3] if image.tile else None          # how its pixels are; load() forgets it
            image.load()
        return image
    except InputError:
        raise
    except Exception as error:                             # decoders raise half a dozen types for a damaged file
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{path} cannot be read as {what} ({reason}): replace or remove it") from error


def read_image(path, upright=False):
    """An image file as a PIL image in RGB, without transparency, turned `upright` as its EXIF data say, or as it is
    stored, which is how data sets are read. InputError that names it if it is none."""
    image = decode(path, "an image")
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":
        pixels = np.asarray(image)
        require(image.mode[0] == "I" and pixels.min() >= 0 and pixels.max() < 2 ** 16, f"{path} has pixels of "
                f"{pixels.dtype}, {pixels.min():g} to {pixels.max():g}: convert it to 8 or 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))              # convert would clip them, not scale
    if image.mode == "P":                                  # by way of its transparency, which convert would warn of
        image = image.convert("RGBA")
    return image.convert("RGB")


def class_folders(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def is_image(name):
    """Whether a file's name is that of an image; hidden files do not count."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def walk(top, seen):
    """(folder, its files, sorted) of a folder and those below it, links followed; hidden ones do not count.

    An error if a folder cannot be read; InputError if it is one of `seen`: a link that leads back would be followed for
    ever, or double the data.
    """
    def refuse(error):                                     # os.walk would leave the folder out
        raise error
    for folder, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        require(real not in seen, f"{folder} links to a folder that is already among the data, {real}: remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, sorted(name for name in files if not name.startswith("."))


class ImageFolder(Dataset):
    """The images in FOLDER/CLASS/ and its subfolders, in torchvision's order, with labels by a list of classes.

    Names and labels are arrays: a list's objects would be copied to every worker, for their reference counts change.
    """

    def __init__(self, folder, found, classes):
        names, labels, seen, self.folder, self.classes = [], [], set(), folder, list(classes)
        others = [entry.name for entry in folder.iterdir() if not entry.is_dir() and entry.name[0] != "."]
        for name in found:
            for subfolder, files in sorted(walk(folder / name, seen)):
                inside = os.path.relpath(subfolder, folder)
                for file in files:
                    (names if is_image(file) else others).append(os.path.join(inside, file))
            labels += [self.classes.index(name)] * (len(names) - len(labels))
        empty = set(found) - {self.classes[label] for label in set(labels)}
        require(not empty, f"{folder} has class folders without images ({shorten(sorted(empty))}): fill or remove them")
        if others:
            print_rank0(f"warning: {plural(len(others), 'file')} in {folder} are left out "
                        f"({printable(shorten(others))}): images are those in class folders that end in "
                        f"{', '.join(IMG_EXTENSIONS)}", sys.stderr)
        self.names, self.labels = np.array([os.fsencode(name) for name in names]), np.array(labels)

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return os.path.join(self.folder, os.fsdecode(self.names[index].item()))

    def __getitem__(self, index):
        return read_image(self.path(index)), self.labels[index].item()


def imagenet_classes(data):
    """The 1,000 class folders of DATA/val in the order of ImageNet's classes, for weights that do not name theirs, and
    a warning; None for WordNet ids and for other data, whose own order counts."""
    folder = Path(data, "val")
    found = class_folders(folder) if folder.is_dir() else []
    names = [simple(name) for name in IMAGENET]
    folders = {simple(name): name for name in found}
    if len(found) not in (1000, len(set(names))) or all(re.fullmatch(r"n\d{8}", name) for name in found):
        return None
    if set(map(str, range(1000))) == {name.lstrip("0") or "0" for name in found}:
        classes, order = sorted(found, key=int), "their numbers"
    elif folders.keys() <= set(names):
        classes = [folders.pop(name, f"{name} {place}") for place, name in enumerate(names)]     # some mean two classes
        order = "their names in torchvision's list"
    else:
        classes, order = found, "the alphabet, which is right for WordNet ids (n01440764 ...) alone"
    print_rank0(f"warning: the weights do not name their classes, and the folders in {folder} are no WordNet ids: they "
                f"are taken to be ImageNet's classes by {order}", sys.stderr)
    return classes


def simple(name):
    return re.sub(r"\W+|_", " ", name).strip()


def open_folder(root, split, classes=None, known=()):
    """ROOT/SPLIT/CLASS/IMAGE as an ImageFolder, with labels by `classes`, or by the names found. InputError if there is
    nothing to open, or a class that is not among them; `known` are the data sets that --data could name instead."""
    folder = root / split
    require(root.is_dir(), f"--data {root} is neither one of {', '.join(known)} nor a folder: check the path")
    require(folder.is_dir(), f"{folder} is missing: put images into {folder}/CLASS/, a folder for each class")
    found = class_folders(folder)
    hint = ""
    if not found and any(map(is_image, os.listdir(folder))):
        hint = ("; ImageNet's validation images are sorted by torchvision.datasets.ImageNet(PATH, 'val'), from their "
                "archive and the development kit")
    require(found, f"{folder} has no class folders: put images into {folder}/CLASS/, a folder for each class{hint}")
    classes = found if classes is None else list(classes)
    unknown = [name for name in found if name not in classes]
    require(not unknown, f"{folder} has the class folders {shorten(unknown)}, which are not among the {len(classes)} "
            f"classes that are known ({shorten(classes)}): use the data that the model was trained on")
    return ImageFolder(folder, found, classes)
