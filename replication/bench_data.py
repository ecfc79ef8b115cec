"""How many training images a second the cores prepare, from file to batch, beside timm's pipeline.

    # One core, images in PATH/train/CLASS/
    python -m replication.bench_data PATH --out out/data.jsonl
    # What that many data-loading workers deliver
    python -m replication.bench_data PATH --workers 16 --models ours
    # With photos that are drawn into PATH first
    python -m replication.bench_data PATH --make 100000

Both read the same images with the published augmentation at 224 pixels and take turns; the rows are
medians. timm's pipeline (pip install --no-deps timm==0.5.4) normalises and erases each image, ours
leaves that to the device, a batch at a time.
"""
import os
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from data import MEAN, STD, Images, loader, train_batches, train_transform
from harness.files import open_folder, replacing
from harness.flags import Parser, check_bounds, nonempty, require
from harness.processes import report_errors
from replication.bench_model import medians_in_turns, peer
from replication.properties import append_row

DIFFERENT = 256                    # drawn photos; the others are links to them


def make(root, count):
    """PATH/train and PATH/val with 1,000 class folders of JPEGs as large as ImageNet's: 500 x 375
    pixels, 90 kB, of coarse and fine noise."""
    names = []
    for i in range(DIFFERENT):
        rng, photo = np.random.default_rng(i), np.full((375, 500, 3), 127.0)
        for size in (4, 12, 36, 108, 500):
            noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            photo += (np.asarray(noise.resize((500, 375))) - 127.0) * 0.7 / size ** 0.2
        names.append(root / f"{i}.jpg")
        root.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(names[-1], quality=90)
    for split, images in (("train", count), ("val", 1000)):
        for i in range(images):
            folder = root / split / f"class{i % 1000:03}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(names[i % DIFFERENT], folder / f"{i}.jpg")


def timm_images(path):
    auto_augment = peer("timm.data.auto_augment")
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    # Pillow 13 refuses 0 bits, which are black
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = (
        lambda image, bits, **kwargs: posterize(image, bits, **kwargs) if bits
        else Image.new("RGB", image.size))
    transform = peer("timm.data").create_transform(
        224, is_training=True, color_jitter=0.4, interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", re_count=1,
        mean=MEAN, std=STD)
    return datasets.ImageFolder(path / "train", transform=transform)


def consume(batches):
    for _ in batches:
        pass


def ways_to_load(args):
    """({name: function that loads images}, how many)"""
    images = Images(open_folder(args.path, "train"),
                    partial(train_transform, size=224, augment=True))
    count = min(len(images.source), args.images * max(1, args.workers))
    n_batches = count // args.batch_size
    require(n_batches, f"{count} images are less than one --batch-size {args.batch_size}: make "
            "that smaller, or --images larger")
    ours = list(islice(train_batches(len(images.source), args.batch_size), n_batches))
    theirs = [[index for _, index in batch] for batch in ours]
    ways = {}
    if "ours" in args.models:
        ways["ours"] = lambda: consume(loader(images, ours, args.workers))
    if "timm" in args.models:
        source = timm_images(args.path)
        ways["timm"] = lambda: consume(DataLoader(source, batch_sampler=theirs,
                                                  num_workers=args.workers))
    return ways, n_batches * args.batch_size


@report_errors()
def main(argv=None):
    parser = Parser(prog="python -m replication.bench_data", description=__doc__)
    parser.add_argument("path", type=Path, help="folder with train/ of class folders")
    parser.add_argument("--make", type=int, default=0,
                        help="make the folder, with so many training images")
    parser.add_argument("--models", nargs="+", choices=("timm", "ours"), default=["timm", "ours"])
    parser.add_argument("--workers", type=int, default=0,
                        help="data-loading workers; 0: this process")
    parser.add_argument("--images", type=int, default=320, help="how many, per worker")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=nonempty, help="append the rows to this file as well")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    if args.make:
        with replacing(args.path, "replication.bench_data") as folder:
            make(folder, args.make)
    torch.set_num_threads(1)
    ways, count = ways_to_load(args)
    medians = medians_in_turns(ways, args.repeats, warm_up=1)        # which fills the file cache
    for name, seconds in medians.items():
        rate = round(count / seconds)
        row = dict(pipeline=name, workers=args.workers, images=count, images_per_s=rate)
        append_row(row, args.out)


if __name__ == "__main__":
    main()
