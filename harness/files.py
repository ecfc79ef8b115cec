"""Image files and folders, read robustly: what a data set holds is an image in RGB, or an InputError that names it."""
import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness.flags import InputError, require, shorten

Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]   # told by content, not by name; EPS would start Ghostscript


def read_image(path):
    """An image file as a PIL image in RGB. InputError that names it if it is none."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):                   # a pipe would be waited for
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()), formats=FORMATS)
        image.load()
    except Exception as error:                             # decoders raise half a dozen types for a damaged file
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{path} cannot be read as an image ({reason}): replace or remove it") from error
    if image.mode.startswith("I"):                         # 16 bits, which convert would clip to 8, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")            # convert would copy it


def class_folders(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def walk(top, seen):
    """(folder, its image files, sorted) of a folder and those below it, links followed; hidden ones do not count.

    InputError if a folder is one of `seen`: a link that leads back would be followed for ever, or double the data.
    """
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        require(real not in seen, f"{folder} links to a folder that is already among the data, {real}: remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".")


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
        require(not empty, f"{folder} has class folders without images ({shorten(sorted(empty))}): fill or remove them")
        self.paths, self.labels = np.array(paths), np.array(labels)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.fsdecode(self.paths[index].item())

    def __getitem__(self, index):
        return read_image(self.path(index)), self.labels[index].item()


def open_folder(root, split, classes=None, known=()):
    """ROOT/SPLIT/CLASS/IMAGE as an ImageFolder, with labels by `classes`, or by the names found. InputError if there is
    nothing to open, or a class that is not among them; `known` are the data sets that --data could name instead."""
    folder = root / split
    require(root.is_dir(), f"--data {root} is neither one of {', '.join(known)} nor a folder: check the path")
    require(folder.is_dir(), f"{folder} is missing: put images into {folder}/CLASS/, a folder for each class")
    found = class_folders(folder)
    require(found, f"{folder} has no class folders: put images into {folder}/CLASS/, a folder for each class")
    classes = found if classes is None else list(classes)
    unknown = [name for name in found if name not in classes]
    require(not unknown, f"{folder} has the class folders {shorten(unknown)}, which are not among the {len(classes)} "
            f"classes that are known ({shorten(classes)}): use the data that the model was trained on")
    return ImageFolder(folder, found, classes)
