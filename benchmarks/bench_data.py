"""How many training images a second one core prepares, from the file to the batch, beside timm 0.5.4.

    pip install --no-deps timm==0.5.4
    python -m benchmarks.bench_data PATH --out out/bench_data.jsonl    # PATH/train or PATH/val

Both read the same images with the published augmentation at 224 pixels and take turns; the rows are medians. timm's
pipeline normalises and erases each image, ours leaves that to the device, a batch at a time.
"""
import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets

from benchmarks.bench_model import peer
from data import MEAN, STD, Images, train_transform
from experiments.anytime import medians_in_turns
from harness.files import open_folder
from harness.run import append_row


def timm_transform():
    auto_augment = peer("timm.data.auto_augment")
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = (     # Pillow 13 refuses 0 bits, which are black
        lambda image, bits, **kwargs: posterize(image, bits, **kwargs) if bits else Image.new("RGB", image.size))
    return peer("timm.data").create_transform(224, is_training=True, color_jitter=0.4, interpolation="bicubic",
                                              auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel",
                                              re_count=1, mean=MEAN, std=STD)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="folder with train/ or val/ of class folders")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="append the rows to this file as well")
    args = parser.parse_args()

    torch.set_num_threads(1)
    split = "train" if Path(args.path, "train").is_dir() else "val"
    theirs = datasets.ImageFolder(Path(args.path, split), transform=timm_transform())
    ours = Images(open_folder(Path(args.path), split), partial(train_transform, size=224, augment=True))
    indices = range(0, len(theirs), max(1, len(theirs) // args.images))

    def load_theirs():
        for index in indices:
            theirs[index]

    def load_ours():
        for index in indices:
            ours[0, index]
    ways = {"timm 0.5.4": load_theirs, "ours": load_ours}
    seconds = medians_in_turns(ways, args.repeats, warm_up=1)        # which fills the file cache
    for name in ways:
        ms = 1000 * seconds[name] / len(indices)
        append_row(dict(pipeline=name, ms_per_image=round(ms, 3), images_per_s=round(1000 / ms),
                        ratio=round(seconds["timm 0.5.4"] / seconds[name], 3)), args.out)


if __name__ == "__main__":
    main()
