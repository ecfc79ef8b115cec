"""How accurate is a checkpoint, and what does it say of one image?

    python eval.py out/tiny-soft_mask-shapes-1                       # a run's best.pt, on the data it was trained on
    python eval.py out/tiny-soft_mask-shapes-1/last.pt --data PATH   # on PATH/val
    python eval.py RUN --image cat.jpg                               # its likely classes; or a folder's
    python eval.py illama-tiny-in1k-75.0 --data PATH                 # the published weights
    torchrun --nproc_per_node=8 eval.py ...                          # the same numbers, sooner

A checkpoint knows its model, classes and soft mask. Export and attention maps are in downstream/, the paper's
properties in replication/.
"""
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import ResNet50_Weights

from data import Images, eval_batches, eval_transform, loader, normalize, open_data
from harness.checkpoint import build, describe, open_checkpoint
from harness.files import image_files, read_image
from harness.flags import Parser, check_bounds, nonempty, require, shorten
from harness.processes import (DTYPES, all_gather, once_per_node, print_rank0, progress, report_errors, setup,
                               shut_down, stop_requests)
from harness.run import add_eval_flags


@torch.no_grad()
def predict(model, batches, device, dtype=torch.float32):
    """Logits (B, classes) in float32 and labels (B,) of each batch, until the program is asked to stop. InputError if
    an image cannot be read. Leaves the model in eval mode."""
    model.eval()
    for images, labels in progress(batches, "evaluate"):
        if stop_requests:
            return
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(normalize(images))
        yield logits.float(), labels


def score(predictions, device):
    """Accuracy in percent and mean cross-entropy of what predict() yields on all ranks; every image counts once.

    Returns dict(test_acc1, test_acc5, test_loss, images), or None if some rank was asked to stop. One wait for the GPU.
    """
    images, rows = 0, [torch.zeros(3, device=device)]
    for logits, labels in predictions:
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).float()         # B, 5
        loss = F.cross_entropy(logits, labels, reduction="sum")
        rows.append(torch.stack([hits[:, 0].sum(), hits.sum(), loss]))
        images += len(labels)
    hits1, hits5, loss = torch.stack(rows).cpu().double().sum(0).tolist()
    by_rank = all_gather([hits1, hits5, loss, images, len(stop_requests)])
    hits1, hits5, loss, images, stops = (sum(values) for values in zip(*by_rank))
    if stops:
        return None
    require(math.isfinite(loss), f"the loss of {images:,} images is {loss}: the weights hold numbers that are not "
            "finite, or lead to such; use an earlier checkpoint, or train again with a smaller --lr")
    return dict(test_acc1=100 * hits1 / images, test_acc5=100 * hits5 / images, test_loss=loss / images, images=images)


def evaluate(model, batches, device, dtype=torch.float32):
    """score() of a model, and how long it took: time_images_per_s. None if some rank was asked to stop."""
    start = time.perf_counter()
    result = score(predict(model, batches, device, dtype), device)
    if result:
        result["time_images_per_s"] = result["images"] / (time.perf_counter() - start)
    return result


def most_likely(logits, classes):
    """{class: probability} of the five most likely classes, logits (classes,)."""
    top = logits.softmax(-1).topk(min(5, len(logits)))
    return {classes[i]: p for i, p in zip(top.indices.tolist(), top.values.tolist())}


def percent(likely, separator):
    """What most_likely() says, in words."""
    return separator.join(f"{100 * p:5.1f} %  {name}" for name, p in likely.items())


def classify(model, files, classes, transform, device, dtype=torch.float32):
    """most_likely() of each of some image files, whatever their sizes."""
    images = (Images([(read_image(file, upright=True), 0)], transform)[0, 0] for file in files)
    batches = ((pixels[None], torch.tensor([label])) for pixels, label in images)
    return [most_likely(logits[0], classes)
            for logits, _ in predict(model, batches, device, dtype)]


def open_model(source, device, alpha=None, img_size=None):
    """(model, checkpoint) of a path or published name, on a device; `alpha` and `img_size` replace
    those of the checkpoint."""
    checkpoint = once_per_node(open_checkpoint, source)
    model = build(checkpoint, img_size=img_size).to(device).eval()
    if alpha is not None:
        require(model.cfg.soft, f"--alpha needs a soft mask, but the mask of {source} is "
                f"{model.cfg.mask!r}: drop it")
        model.set_soft_mask(alpha)
        checkpoint["alpha"] = alpha
    return model, checkpoint


def open_val(source, checkpoint, model, data=None):
    """The validation split of `data`, by default of what the model was trained on. InputError if it does not fit."""
    data = data or checkpoint["run"]["data"]
    require(data, f"{source} does not say what it was trained on: give --data")
    val = once_per_node(open_data, data, "val", model.cfg.img_size, checkpoint["classes"])
    require(len(val.classes) == model.cfg.num_classes, f"--data {data} has {len(val.classes)} classes, but the model "
            f"knows {model.cfg.num_classes}: use the data that it was trained on")
    wordnet_ids = all(re.fullmatch(r"n\d{8}", name) for name in val.classes)
    if not checkpoint["classes"] and not wordnet_ids:
        print_rank0(f"warning: {source} does not name its classes; they are taken to be in this "
                    f"order: {shorten(val.classes)}", sys.stderr)
    return val


@report_errors()
def main(argv=None):
    parser = Parser(description="Evaluate a checkpoint of train.py.")
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt, or published weights")
    add_eval_flags(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was trained, if that was float32")
    parser.add_argument("--img-size", type=int, help="resolution, for that of training")
    parser.add_argument("--image", type=nonempty,
                        help="an image, or a folder of them: print the five most likely classes")
    parser.add_argument("--json", action="store_true", help="print one dict of JSON")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    require(not (args.image and args.data), "--image classifies one image alone: drop it, or --data")
    rank, world, device, dtype = setup(args.device, args.dtype)
    model, checkpoint = open_model(args.checkpoint, device, args.alpha, args.img_size)
    if args.dtype == "auto" and checkpoint["run"]["dtype"] == "float32":
        dtype = torch.float32
    transform = partial(eval_transform, size=model.cfg.img_size,
                        trained=checkpoint["config"]["img_size"])
    if args.image:
        classes = checkpoint["classes"]
        require(classes or model.cfg.num_classes == 1000, f"{args.checkpoint} does not name its "
                f"{model.cfg.num_classes} classes, so --image cannot: use a checkpoint that "
                "train.py wrote")
        classes = classes or ResNet50_Weights.IMAGENET1K_V1.meta["categories"]       # ImageNet's
        files = image_files(args.image)
        found = classify(model, files, classes, transform, device, dtype)
        if Path(args.image).is_dir():                    # a line each
            result = [dict(image=str(file), classes=top) for file, top in zip(files, found)]
            lines = "\n".join(f"{file.name}  {percent(top, '  ')}"
                              for file, top in zip(files, found))
        else:
            [result] = found
            lines = percent(result, "\n")
    else:
        val = open_val(args.checkpoint, checkpoint, model, args.data)
        batches = eval_batches(len(val), args.batch_size, rank, world)
        batches = loader(Images(val, transform), batches, args.workers, device)
        result = evaluate(model, batches, device, dtype) | describe(model.cfg, checkpoint, dtype)
        mask = "mask {mask}" if result["alpha"] is None else "mask {mask} alpha {alpha:g}"
        lines = ("top-1 {test_acc1:.3f} %  top-5 {test_acc5:.3f} %  loss {test_loss:.4f}  {images:,} images at "
                 "{img_size} x {img_size}, " + mask + ", {dtype}, {time_images_per_s:,.0f} images/s").format(**result)
    print_rank0(json.dumps(result) if args.json else lines)
    shut_down()


if __name__ == "__main__":
    main()
