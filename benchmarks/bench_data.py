"""How many training images a second one core prepares, from the file to the batch, beside timm 0.5.4.

    pip install --no-deps timm==0.5.4
    python -m benchmarks.bench_data PATH --out out/bench_data.jsonl    # images in PATH/train/CLASS/

Both read the same images with the published augmentation at 224 pixels and take turns; the rows are medians. timm's
pipeline normalises and erases each image, ours leaves that to the device, a batch at a time.
"""
import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision import datasets

from benchmarks.bench_model import medians_in_turns, peer
from data import MEAN, STD, Images, train_transform
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
    parser.add_argument("path", type=Path, help="folder with train/ of class folders")
    parser.add_argument("--out", help="append the rows to this file as well")
    args = parser.parse_args()

    torch.set_num_threads(1)
    theirs = datasets.ImageFolder(args.path / "train", transform=timm_transform())
    ours = Images(open_folder(args.path, "train"), partial(train_transform, size=224, augment=True))
    indices = range(0, len(theirs), max(1, len(theirs) // 300))      # some 300 images of all classes

    def load_theirs():
        for index in indices:
            theirs[index]

    def load_ours():
        for index in indices:
            ours[0, index]
    ways = {"timm 0.5.4": load_theirs, "ours": load_ours}
    for name, seconds in medians_in_turns(ways, repeats=9, warm_up=1).items():       # which fills the file cache
        append_row(dict(pipeline=name, ms_per_image=round(1000 * seconds / len(indices), 3),
                        images_per_s=round(len(indices) / seconds)), args.out)


if __name__ == "__main__":
    main()
