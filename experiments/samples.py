"""Look at the data: a labelled sheet of images, as the model takes them.

    python -m experiments.samples --data cifar10                            # training images, with crop and flip
    python -m experiments.samples --data IMAGENET --img-size 224 --augment  # and with RandAugment
"""
import random
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF

from data import DATASETS, Images, eval_transform, open_data, train_transform
from harness.flags import Parser, check_bounds, report_errors, require


def sheet(rows, cell):
    """Rows of (uint8 tensor (3, H, W), text) as one PIL image: squares of `cell` pixels, each above its text."""
    page = Image.new("RGB", (len(rows[0]) * (cell + 2), len(rows) * (cell + 16)), "white")
    for i, row in enumerate(rows):
        for j, (pixels, text) in enumerate(row):
            x, y = j * (cell + 2), i * (cell + 16)
            page.paste(TF.to_pil_image(pixels).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            ImageDraw.Draw(page).text((x + 2, y + cell + 1), text, fill="black")
    return page


def samples(images, classes, rows, columns=10):
    """Images drawn at random, the same each time, in rows of (pixels, name of the class)."""
    rng = random.Random("samples")
    picked = [images[0, rng.randrange(len(images.source))] for _ in range(rows * columns)]
    cells = [(pixels, classes[label][:15]) for pixels, label, _ in picked]
    return [cells[i: i + columns] for i in range(0, len(cells), columns)]


def check_png(flag, path):
    """InputError if nothing can be drawn there."""
    require(Path(path).suffix == ".png" and Path(path).parent.is_dir(),
            f"{flag} {path}: give the path of a .png, in a folder that exists")


@report_errors()
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="shapes", help=f"{', '.join(DATASETS)}, or a folder with train/ and val/")
    parser.add_argument("--split", default="train", choices=("train", "val", "conflict"), help="conflict: shapes-cue's")
    parser.add_argument("--img-size", type=int, default=32, help="resolution, pixels")
    parser.add_argument("--rows", type=int, default=6, help="of ten images each")
    parser.add_argument("--augment", action="store_true", help="crop, flip and RandAugment, as published")
    parser.add_argument("--out", default="samples.png", help="where the sheet goes")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    check_png("--out", args.out)
    require(args.split != "conflict" or args.data == "shapes-cue",
            f"--data {args.data} has no --split conflict: shapes-cue has one")
    transform = partial(eval_transform, size=args.img_size)
    if args.split == "train" or args.augment:
        transform = partial(train_transform, size=args.img_size, augment=args.augment)
    source = open_data(args.data, args.split, args.img_size)
    sheet(samples(Images(source, transform), source.classes, args.rows), cell=96).save(args.out)
    print(f"{len(source):,} images in {len(source.classes)} classes; a sample of them is in {args.out}")


if __name__ == "__main__":
    main()
