"""What a model's class token attends to, as a picture.

    python -m downstream.attention RUN cat.jpg cat.png

Beside the image the same for each block, bright where the class token looks most and dark where least.
"""
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from data import Images, eval_transform, normalize
from eval import open_model
from harness.files import read_image, save_png
from harness.flags import Parser, nonempty, require
from harness.processes import report_errors


@torch.no_grad()
def class_token_attention(model, images):
    """What the class token attends to among the patches, mean over heads: normalized (B, 3, H, W) -> (depth, B, P)."""
    maps = model.attention_maps(images).mean(2)                      # depth, B, N, N
    return maps[:, :, model.cls, model.patches].squeeze(2)


def draw_attention(model, pixels, path):
    """Write the picture of an image as the model takes it, before normalize(): pixels (3, H, W), uint8."""
    require(Path(path).suffix == ".png", f"{path}: give a name that ends in .png")
    image, grid = to_pil_image(pixels), model.cfg.grid
    side = max(image.width, 224)
    image = image.resize((side, side))
    dark = Image.eval(image, lambda value: value // 5)
    weights = class_token_attention(model, normalize(pixels[None]))[:, 0]        # depth, P
    page = Image.new("RGB", (side * (1 + len(weights)), side))
    page.paste(image, (0, 0))
    for block, patches in enumerate(weights, start=1):
        heat = (patches - patches.min()) / (patches.max() - patches.min()).clamp(min=1e-12)
        heat = (255 * heat).byte().view(grid, grid).numpy()
        mask = Image.fromarray(heat).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(Image.composite(image, dark, mask), (block * side, 0))
    save_png(page, path, "downstream.attention")


@report_errors()
def main(argv=None):
    parser = Parser(__doc__, prog="python -m downstream.attention")
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt, or published weights")
    parser.add_argument("image", type=nonempty, help="the image to look at")
    parser.add_argument("picture", type=nonempty, help="the .png to write")
    args = parser.parse_args(argv)
    model, _ = open_model(args.checkpoint, torch.device("cpu"))
    transform = partial(eval_transform, size=model.cfg.img_size)
    pixels, _ = Images([(read_image(args.image, upright=True), 0)], transform)[0, 0]
    draw_attention(model, pixels, args.picture)


if __name__ == "__main__":
    main()
