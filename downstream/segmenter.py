"""A class for each pixel: a backbone of the ladder, a head on its patches, prediction by windows, and mIoU.

    model = Segmenter(config("tiny", img_size=512, num_classes=150), head="upernet")
    logits, auxiliary = model(images)                          # (B, 3, 512, 512) -> twice (B, 150, 512, 512)

Symbols in shape comments: B images, D width, H x W pixels or patches.

[1] iLLaMA, arXiv 2404.06773: the protocol, from its repository       [2] UPerNet, arXiv 1807.10221
"""
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2 import functional as TF

from data import normalize
from downstream.scenes import IGNORED
from harness.flags import require
from harness.processes import all_gather, progress, stop_requests
from model import VisionTransformer

# ---------------------------------------------------------------------------------------------------------------------
# Heads: maps (B, D, H, W) of the patches after some blocks, the `taps` -> list of logits (B, classes, H', W')


class LinearHead(nn.Module):
    """A linear layer on each patch of the last block, after the model's last norm."""
    final_norm = True

    def __init__(self, width, classes):
        super().__init__()
        self.classify = nn.Conv2d(width, classes, kernel_size=1)

    @staticmethod
    def taps(depth):
        return [depth - 1]

    def forward(self, maps):
        return [self.classify(maps[0])]


class UPerNet(nn.Module):
    """The published head [2]: four tapped maps become a pyramid; the coarsest gets context from pooled copies of
    itself, and the finer ones are fused with it in turn. In training a second prediction comes from the third level."""
    final_norm = False

    def __init__(self, width, classes):
        super().__init__()
        conv = partial(Conv2dNormActivation, norm_layer=nn.BatchNorm2d)          # and ReLU
        double = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        self.pyramid = nn.ModuleList([                                           # strides 4, 8, 16, 32 of patches of 16
            nn.Sequential(double(), nn.BatchNorm2d(width), nn.GELU(), double()), double(), nn.Identity(),
            nn.MaxPool2d(2)])
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(width, width, 1)) for n in (1, 2, 3, 6))
        self.context = conv(5 * width, width, 3)
        self.lateral = nn.ModuleList(conv(width, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in range(3))
        self.fuse = conv(4 * width, width, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))
        self.auxiliary = nn.Sequential(conv(width, 256, 3), nn.Dropout2d(0.1), nn.Conv2d(256, classes, 1))

    @staticmethod
    def taps(depth):
        """Blocks 3, 5, 7 and 11, counted from 0, of 12."""
        return [depth * k // 12 - 1 for k in (4, 6, 8, 12)]

    def forward(self, maps):
        levels = [stage(x) for stage, x in zip(self.pyramid, maps)]
        pooled = [resize(pool(levels[3]), levels[3].shape[2:]) for pool in self.pools]
        x = self.context(torch.cat([levels[3], *pooled], dim=1))
        fused = [x]
        for i in (2, 1, 0):
            x = self.lateral[i](levels[i]) + resize(x, levels[i].shape[2:])
            fused.append(self.smooth[i](x))
        x = self.fuse(torch.cat([resize(y, x.shape[2:]) for y in reversed(fused)], dim=1))
        return [self.classify(x), self.auxiliary(levels[2])] if self.training else [self.classify(x)]


HEADS = dict(linear=LinearHead, upernet=UPerNet)


def resize(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """Images (B, 3, S, S) -> logits (B, num_classes, S, S), a list: the prediction, and in training perhaps another.

    The backbone is built for crops of S pixels, its soft mask at alpha 0; it has no head, and its last norm only where
    the new head uses it. InputError for a backbone that has too few blocks to be tapped.
    """
    def __init__(self, cfg, head):
        super().__init__()
        self.taps = HEADS[head].taps(cfg.depth)
        require(self.taps[0] >= 0,
                f"--head {head} needs at least 3 blocks, but depth is {cfg.depth}: use --head linear")
        require(head != "upernet" or cfg.grid > 1,
                f"--head {head} needs crops of at least 2 x 2 patches: make --img-size larger")
        self.backbone = VisionTransformer(cfg)
        self.backbone.head = nn.Identity()
        if not HEADS[head].final_norm:
            self.backbone.norm = nn.Identity()
        self.decode = HEADS[head](cfg.width, cfg.num_classes)

    def features(self, images):
        """The map (B, D, H, W) of the patches after each tapped block; the class token is dropped."""
        model, maps = self.backbone, {}
        x, mask, grid = model.embed(images), model.mask(), model.cfg.grid
        for i, block in enumerate(model.blocks):
            x = block(x, model.rope, mask)                                       # B, N, D
            if i in self.taps:
                patches = model.norm(x[:, model.patches])                        # B, P, D
                maps[i] = patches.transpose(1, 2).unflatten(2, (grid, grid))
        return [maps[i] for i in self.taps]

    def forward(self, images):
        logits = self.decode(self.features(images))      # in float32 from here: a patch's gradient sums over its pixels
        return [resize(maps.float(), images.shape[2:]) for maps in logits]


def pixel_loss(outputs, labels, auxiliary=0.4):
    """Cross-entropy of a Segmenter's outputs and labels (B, S, S), a second output with weight `auxiliary`.

    The mean is over all pixels, to which ignored ones contribute 0: as published, and never 0 / 0.
    """
    losses = [F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
              for logits in outputs]
    return losses[0] + auxiliary * sum(losses[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Prediction at full resolution


def starts(length, size):
    """Where the windows begin that cover a length: every two thirds of a window, the last one at the end."""
    stride = size * 2 // 3
    return [min(start, length - size) for start in range(0, length - size + stride, stride)]


def by_window(model, image):
    """The windows that cover an image, uint8 (3, H, W), no side shorter than a window, one by one: a window's box, an
    index of (..., H, W), and its logits (classes, S, S)."""
    size, (H, W) = model.backbone.cfg.img_size, image.shape[1:]
    boxes = [(..., slice(y, y + size), slice(x, x + size)) for y in starts(H, size) for x in starts(W, size)]
    for part in (boxes[start: start + 16] for start in range(0, len(boxes), 16)):
        yield from zip(part, model(normalize(torch.stack([image[box] for box in part])))[0].float())


def stitch(windows, H, W):
    """Logits (classes, H, W) of an image: the mean over by_window()'s windows."""
    total = count = None
    for box, logits in windows:
        if total is None:
            total, count = logits.new_zeros(len(logits), H, W), logits.new_zeros(H, W)
        total[box] += logits
        count[box] += 1
    return total / count


def slide(model, image):
    return stitch(by_window(model, image), *image.shape[1:])


def predict(model, image, short_side, scales=(1,), flip=False):
    """Probabilities (classes, H, W) of an image, uint8 (3, H, W), resized to `short_side` times each of the scales, at
    least to a window: the mean over scales, and with `flip` over horizontal flips too."""
    total = 0
    for scale in scales:
        scaled = TF.resize(image, max(model.backbone.cfg.img_size, round(scale * short_side)))
        total = total + probabilities(slide(model, scaled), image)
        if flip:
            total = total + probabilities(slide(model, scaled.flip(-1)).flip(-1), image)
    return total / (len(scales) * (1 + flip))


def probabilities(logits, image):
    """Logits (classes, h, w) at the resolution of an image, as probabilities."""
    return resize(logits[None], image.shape[1:])[0].softmax(0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def confusion(labels, predicted, classes):
    """(classes, classes), int64: how many pixels of each class, the row, were taken for which, the column."""
    counts = labels != IGNORED
    return (labels[counts] * classes + predicted[counts]).bincount(minlength=classes ** 2).view(classes, classes)


def scores(matrix):
    """mIoU and pixel accuracy in percent, and each class's IoU; it is None where a class neither occurs nor is
    predicted, and then not in the mean."""
    hits = matrix.diag().tolist()
    union = (matrix.sum(0) + matrix.sum(1) - matrix.diag()).tolist()
    iou = [100 * hit / every if every else None for hit, every in zip(hits, union)]
    known = [value for value in iou if value is not None]
    return dict(test_miou=sum(known) / max(1, len(known)), test_iou=iou,
                test_pixel_acc=100 * sum(hits) / max(1, matrix.sum().item()))


@torch.no_grad()
def evaluate(model, batches, short_side, device, dtype=torch.float32, **views):
    """scores() over all ranks' images, from batches of one; None if some rank was asked to stop.

    `views` are predict()'s scales and flip. InputError if an image or annotation cannot be read.
    """
    model.eval()
    classes = model.backbone.cfg.num_classes
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for images, labels in progress(batches, "evaluate"):
        if stop_requests:
            break
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = predict(model, images[0].to(device), short_side, **views)
        require(logits.isfinite().all(), "the logits of an image are not finite: the weights hold such numbers, or "
                "lead to them; use an earlier checkpoint, or train again with a smaller --lr")
        matrix += confusion(labels[0].to(device), logits.argmax(0), classes)
    if any(all_gather(len(stop_requests))):
        return None
    if dist.is_initialized():
        dist.all_reduce(matrix)
    require(matrix.any(), "no pixel of these annotations has a class, so there is nothing to score: correct them, or "
            "--void")
    return scores(matrix)
