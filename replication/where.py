"""Where in an image does a causal mask cost accuracy? mIoU and pixel accuracy by row and by column.

    python -m replication.where out/segment/*/last.pt --out out/where.jsonl

Measured twice: over whole images, predicted by overlapping windows as in evaluation, in eight bands; and over the
windows, each on its own, by the rows and columns of its patches, as the sequence begins anew in each window.
"""
from statistics import fmean

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from downstream.segment import open_segmenter, open_validation, validation
from downstream.segmenter import by_window, confusion, resize, scores, stitch
from harness.flags import Parser, nonempty, overrides
from harness.processes import report_errors
from replication.properties import append_row, one_process

BANDS = 8    # of whole images


def by_cell(labels, predicted, classes, bands):
    """(bands, bands, classes, classes): the confusion matrix in each cell of a grid over (H, W)."""
    edges = [[length * k // bands for k in range(bands + 1)] for length in labels.shape]
    boxes = [(slice(top, bottom), slice(left, right)) for top, bottom in zip(edges[0], edges[0][1:])
             for left, right in zip(edges[1], edges[1][1:])]
    return torch.stack([confusion(labels[box], predicted[box], classes) for box in boxes]).view(
        bands, bands, classes, classes)


def band_scores(matrix):
    """(mIoU, pixel accuracy) in a band: the mean over the classes that occur there, the same ones for every model."""
    result = scores(matrix)
    known = [iou for iou, pixels in zip(result["test_iou"], matrix.sum(1)) if pixels]
    return round(fmean(known or [0]), 3), round(result["test_pixel_acc"], 3)


def profile(counts):
    """mIoU and pixel accuracy by row and by column of by_cell()'s counts."""
    found = {}
    for side, matrices in dict(rows=counts.sum(1), columns=counts.sum(0)).items():
        miou, accuracy = zip(*(band_scores(matrix) for matrix in matrices))
        found |= {f"{side}_miou": miou, f"{side}_pixel_acc": accuracy}
    return found


@torch.no_grad()
def measure(model, batches, short_side):
    """dict(image, window) of profiles. InputError if an image or annotation cannot be read."""
    cfg = model.backbone.cfg
    image_counts = window_counts = 0
    for images, labels in tqdm(batches, leave=False, disable=None):
        image = TF.resize(images[0], max(cfg.img_size, short_side))              # as predict() does
        windows = list(by_window(model, image))
        predicted = resize(stitch(windows, *image.shape[1:])[None], labels.shape[1:])[0].argmax(0)
        image_counts = image_counts + by_cell(labels[0], predicted, cfg.num_classes, BANDS)
        labels = TF.resize(labels, image.shape[1:], InterpolationMode.NEAREST)[0]
        for box, logits in windows:
            window_counts = window_counts + by_cell(labels[box], logits.argmax(0), cfg.num_classes, cfg.grid)
    return dict(image=profile(image_counts), window=profile(window_counts))


@report_errors()
def main(argv=None):
    parser = Parser(prog="python -m replication.where", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", help="runs of downstream.segment")
    parser.add_argument("--data", help="a folder in ADE20K's layout; default: each run's own")
    parser.add_argument("--out", type=nonempty, help="append the rows to this file")
    args = parser.parse_args(argv)
    device = one_process("cpu")
    for source in args.checkpoints:
        model, checkpoint = open_segmenter(source, device)
        run, short_side = checkpoint["run"], checkpoint["recipe"]["short_side"]
        val = open_validation(checkpoint, args.data)
        row = dict(step=run["step"], overrides=overrides(model.backbone.cfg, run["size"], run["step"]),
                   seed=run["seed"], init_from=run["init_from"])
        append_row(row | measure(model, validation(val), short_side), args.out)


if __name__ == "__main__":
    main()
