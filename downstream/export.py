"""A model as a file for other programs, and a picture of what it attends to.

    export(model, "model.pt2", checkpoint, {})          # torch.export.load("model.pt2").module()(images)
    export(model, "model.onnx", checkpoint, {})         # needs onnx and onnxscript
    export(model, "model.safetensors", checkpoint, {})  # the weights; needs safetensors

The file also holds, as JSON, what evaluation needs beside the model: its configuration, classes, mean and so on.
"""
import json
import os
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from harness.checkpoint import CHECKPOINT
from harness.flags import needs, require

KINDS = (".pt2", ".onnx", ".safetensors")


def export(model, path, checkpoint, more):
    """Write the file: from normalized images (B, 3, img_size, img_size), any number of them, to logits, on a CPU or
    wherever it is moved. InputError for another kind of file, a missing package, or a file that is there. `more` is for
    the JSON."""
    path, model = Path(path), model.cpu().eval()
    about = json.dumps({name: checkpoint[name] for name in CHECKPOINT if name != "model"} | more)
    require(path.suffix in KINDS, f"--export {path}: give a name that ends in one of {', '.join(KINDS)}")
    require(not path.exists(), f"--export {path} exists: give another name, or remove it")
    require(path.parent.is_dir(), f"--export {path}: {path.parent} is no folder: make it, or give another name")
    part = path.with_stem(f"{path.stem}-part")           # until it is whole
    write_model(model, part, about)
    os.replace(part, path)


def write_model(model, path, about):
    if path.suffix == ".safetensors":
        with needs(f"--export {path.suffix}", "safetensors"):
            from safetensors.torch import save_file
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, path, dict(checkpoint=about))
        return
    images = torch.zeros(2, 3, model.cfg.img_size, model.cfg.img_size)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files={"about.json": about})
        return
    with needs(f"--export {path.suffix}", "onnx onnxscript"):
        import onnx
        import onnxscript  # noqa: F401, of torch.onnx
    names = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(path)
    file = onnx.load(path)
    onnx.helper.set_model_props(file, dict(about=about))
    onnx.save(file, path)


@torch.no_grad()
def class_token_attention(model, images):
    """What the class token attends to among the patches, mean over heads: normalized (B, 3, H, W) -> (depth, B, P)."""
    maps = model.attention_maps(images).mean(2)[:, :, model.cls].squeeze(2)                  # depth, B, N
    return maps[..., :-1] if model.cfg.cls_last else maps[..., 1:]


def draw_attention(model, pixels, images, path):
    """An image, and beside it for each block the same, bright where the class token looks most and dark where least.
    pixels (3, H, W), uint8; images (1, 3, H, W), the same, normalized."""
    require(Path(path).suffix == ".png", f"--attention {path}: give a name that ends in .png")
    image, grid = to_pil_image(pixels), model.cfg.grid
    side = max(image.width, 224)
    image = image.resize((side, side))
    dark = Image.eval(image, lambda value: value // 5)
    weights = class_token_attention(model, images)[:, 0].cpu()       # depth, P
    page = Image.new("RGB", (side * (1 + len(weights)), side))
    page.paste(image, (0, 0))
    for block, patches in enumerate(weights, start=1):
        heat = (patches - patches.min()) / (patches.max() - patches.min()).clamp(min=1e-12)
        heat = (255 * heat).byte().view(grid, grid).numpy()
        mask = Image.fromarray(heat).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(Image.composite(image, dark, mask), (block * side, 0))
    page.save(path)
