"""A model as a file for other programs.

    python -m downstream.export RUN model.pt2           # torch.export.load("model.pt2").module()(images)
    python -m downstream.export RUN model.onnx          # needs onnx and onnxscript
    python -m downstream.export RUN model.safetensors   # the weights; needs safetensors

The file also holds, as JSON, what evaluation needs beside the model: its configuration, classes, mean and so on.
"""
import json
from pathlib import Path

import torch

from data import MEAN, STD
from eval import open_model
from harness.checkpoint import CHECKPOINT
from harness.files import replacing
from harness.flags import Parser, needs, nonempty, require
from harness.processes import report_errors

KINDS = (".pt2", ".onnx", ".safetensors")


def export(model, path, checkpoint, more):
    """Write the file: from normalized images (B, 3, img_size, img_size), any number of them, to logits, on a CPU or
    wherever it is moved. InputError for another kind of file, a missing package, or a file of another program. `more` is
    for the JSON."""
    path, model = Path(path), model.cpu().eval()
    about = {name: checkpoint[name] for name in CHECKPOINT if name != "model"} | more
    about = json.dumps(about | dict(made_by="downstream.export"))
    require(path.suffix in KINDS, f"{path}: give a name that ends in one of {', '.join(KINDS)}")
    with replacing(path, "downstream.export") as file:
        write_model(model, file, about)


def write_model(model, path, about):
    if path.suffix == ".safetensors":
        with needs(path.suffix, "safetensors"):
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
    with needs(path.suffix, "onnx onnxscript"):
        import onnx
        import onnxscript  # noqa: F401, of torch.onnx
    names = dict(input_names=["images"], output_names=["logits"])
    torch.onnx.export(program, dynamo=True, verbose=False, **names).save(path)
    file = onnx.load(path)
    onnx.helper.set_model_props(file, dict(about=about))
    onnx.save(file, path)


@report_errors()
def main(argv=None):
    parser = Parser(__doc__, prog="python -m downstream.export")
    parser.add_argument("checkpoint", help="a run's folder, its best.pt or last.pt, or published weights")
    parser.add_argument("file", type=nonempty, help="what to write: a .pt2, .onnx or .safetensors")
    args = parser.parse_args(argv)
    model, checkpoint = open_model(args.checkpoint, torch.device("cpu"))
    export(model, args.file, checkpoint, dict(mean=MEAN, std=STD))


if __name__ == "__main__":
    main()
