"""Files: images and folders of classes, which hold an image in RGB or are an InputError that names
the file; and what programs write."""
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness.flags import InputError, plural, require, shorten
from harness.processes import print_line, print_rank0


def read_image(path, upright=False, convert=True):
    """An image file as a PIL image in RGB, without transparency, or as it is stored if not to
    `convert`; turned `upright` as its EXIF data say, or as it is stored, which is how data sets are
    read. InputError if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # of EXIF data, by every worker and epoch
            image = Image.open(path)
            if upright:
                image = ImageOps.exif_transpose(image)
            if convert and image.mode.startswith(("I", "F")):
                image = eight_bits(image, path)
            return image.convert("RGB") if convert else image.copy()
    except Exception as error:                           # decoders raise half a dozen types
        raise InputError(f"{path} cannot be read as an image ({error}): replace or remove "
                         "it") from error


def image_files(path):
    """A file's path in a list, or the images of a folder, sorted. InputError if it has none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in IMG_EXTENSIONS)
    require(files, f"{path} has no image: give an image, or a folder with some")
    return files


warned = []                  # the first file of 16 bits whose values are of fewer


def eight_bits(image, path):
    """An image of 16 bits, scaled: convert() would clip its values. Scanners and microscopes also
    write 8 or 12 bits so: a warning, once, names the first. ValueError for other ranges."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2 ** 16:
        raise ValueError(f"pixels of {pixels.dtype}, {pixels.min():g} to {pixels.max():g}, are "
                         "neither 8 nor 16 bits")
    bits = next(bits for bits in (8, 12, 16) if pixels.max() < 2 ** bits)
    if bits < 16 and not warned:
        warned.append(path)
        print_line(f"warning: {path} has 16 bits, but values up to {pixels.max()}: taken as {bits} "
                   "bits", sys.stderr)
    return Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))


def class_folders(folder):
    """The names of a folder's folders, sorted; hidden ones do not count."""
    folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return sorted(name for name in folders if not name.startswith("."))


class ImageFolder(datasets.ImageFolder):
    """torchvision's, with labels by a list of classes, which may be more than the folders, and
    without hidden files.

    Names and labels are arrays: a list's objects would be copied to every worker, for their
    reference counts change.
    """

    def __init__(self, folder, classes):
        self.known, self.others = list(classes), []
        super().__init__(folder, loader=read_image, is_valid_file=self.is_image, allow_empty=True)
        self.names = np.array([os.fsencode(path) for path, _ in self.samples])
        self.labels = np.array(self.targets)
        del self.samples, self.imgs, self.targets
        empty = set(class_folders(folder)) - {self.classes[label] for label in set(self.labels)}
        require(not empty, f"{folder} has class folders without images ({shorten(sorted(empty))}): "
                "fill or remove them")
        if self.others:
            print_rank0(f"warning: {plural(len(self.others), 'file')} in {folder} are left out "
                        f"({shorten(self.others)}): images end in "
                        f"{', '.join(IMG_EXTENSIONS)}", sys.stderr)

    def find_classes(self, folder):
        return self.known, {name: label for label, name in enumerate(self.known)}

    def is_image(self, path):
        inside = path.removeprefix(f"{self.root}{os.sep}")
        if f"{os.sep}." in f"{os.sep}{inside}":                  # hidden, or in a hidden folder
            return False
        if not path.lower().endswith(IMG_EXTENSIONS):
            self.others.append(inside)
            return False
        return True

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return os.fsdecode(self.names[index].item())

    def __getitem__(self, index):
        return read_image(self.path(index)), self.labels[index].item()


def open_folder(root, split, classes=None, known=()):
    """ROOT/SPLIT/CLASS/IMAGE as an ImageFolder, with labels by `classes`, or by the names found.
    InputError if there is nothing to open, or a class that is not among them; `known` are the data
    sets that --data could name instead."""
    folder = root / split
    require(root.is_dir(), f"--data {root} is neither one of {', '.join(known)} nor a folder: "
            "check the path")
    found = class_folders(folder) if folder.is_dir() else []
    require(found, f"{folder} has no class folders: put images into {folder}/CLASS/, a folder for "
            "each class; ImageNet's validation images are sorted by "
            "torchvision.datasets.ImageNet(PATH, 'val'), from their archive and the development "
            "kit")
    require(classes or len(found) > 1 or split != "train", f"{folder} has one class folder, "
            f"{found[0]}, and there is nothing to tell apart: give a folder with train/ and val/ "
            "that have two or more (perhaps the path is one level off)")
    classes = found if classes is None else list(classes)
    unknown = [name for name in found if name not in classes]
    require(not unknown, f"{folder} has the class folders {shorten(unknown)}, which are not among "
            f"the {len(classes)} classes that are known ({shorten(classes)}): use the data that "
            "the model was trained on")
    return ImageFolder(folder, classes)


@contextmanager
def replacing(path, program):
    """Where to write what becomes `path` at the end, a file or a folder: an interrupted program and
    a full disk leave what was there. A device is written to itself.

    InputError if it cannot be written, or if something is there that `program` did not make: the
    files of one hold its name.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if path.is_dir():
        require(not any(path.iterdir()), f"{path} is a folder that is not empty: give another name")
    elif path.exists():
        require(program.encode() in path.read_bytes(), f"{path} is there, and not of {program}: "
                "give another name, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make that possible, or "
                         "give another name") from error


def save_png(image, path, program):
    """Write a PIL image, with the name of the program in it."""
    text = PngInfo()
    text.add_text("Software", program)
    with replacing(path, program) as file:
        image.save(file, pnginfo=text)
