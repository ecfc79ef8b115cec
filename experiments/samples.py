"""Look at the data: a labelled sheet of training images, as the model takes them.

    python -m experiments.samples --data cifar10                            # with crop and flip
    python -m experiments.samples --data IMAGENET --img-size 224 --augment  # and with RandAugment
"""
import random
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF

from data import DATASETS, Images, open_data, train_transform
from harness.flags import Parser, check_bounds, report_errors, require

COLUMNS, ROWS, CELL = 10, 6, 96    # images in a row, rows, pixels of an image


def sheet(images, classes):
    """Images drawn at random, the same each time, each above the name of its class, as one PIL image."""
    rng = random.Random("samples")
    page = Image.new("RGB", (COLUMNS * (CELL + 2), ROWS * (CELL + 16)), "white")
    for place in range(ROWS * COLUMNS):
        pixels, label, _ = images[0, rng.randrange(len(images.source))]
        x, y = place % COLUMNS * (CELL + 2), place // COLUMNS * (CELL + 16)
        page.paste(TF.to_pil_image(pixels).resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(page).text((x + 2, y + CELL + 1), classes[label][:15], fill="black")
    return page


@report_errors()
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", default="shapes", help=f"{', '.join(DATASETS)}, or a folder with train/ and val/")
    parser.add_argument("--img-size", type=int, default=32, help="resolution, pixels")
    parser.add_argument("--augment", action="store_true", help="crop, flip and RandAugment, as published")
    parser.add_argument("--out", default="samples.png", help="where the sheet goes")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    require(Path(args.out).suffix == ".png" and Path(args.out).parent.is_dir(),
            f"--out {args.out}: give the path of a .png, in a folder that exists")
    source = open_data(args.data, "train", args.img_size)
    transform = partial(train_transform, size=args.img_size, augment=args.augment)
    sheet(Images(source, transform), source.classes).save(args.out)
    print(f"{len(source):,} images in {len(source.classes)} classes; a sample of them is in {args.out}")


if __name__ == "__main__":
    main()
