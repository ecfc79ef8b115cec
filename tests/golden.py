"""Make golden.json anew: what the published models answer to weights and images by formula.

    git clone https://github.com/techmonsterwang/iLLaMA
    pip install --no-deps timm==0.5.4                # the authors' code needs it
    python -m tests.golden iLLaMA                    # from the root; runs code of that clone

The last step is the clone's newest commit, the steps below it are in its first one. Logits are in float32, computed on
a CPU; the first eight of each image are kept, and the sum of all.
"""
import importlib.util
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from harness.flags import needs
from test_model import hashed_images, hashed_weights

LADDER = "d27201c"                                       # the first commit
FILES = {"vit": "vision_transformer", "swiglu": "doit1", "rmsnorm": "doit2", "causal": "doit3", "ps_cls": "doit4",
         "modified": "doit5", "rope": "doit6", "abs_pos": "doit7"}
SMALL = dict(size="tiny", img_size=32, patch_size=4, num_classes=10, batch=2)
CASES = [SMALL | dict(step=step, seed=21) for step in FILES]
CASES += [SMALL | dict(step="soft_mask", alpha=alpha, seed=1) for alpha in (0.0, 0.5, 1.0)]
CASES += [SMALL | dict(step="soft_mask", alpha=0.0, seed=2, img_size=224, patch_size=16, num_classes=1000),
          SMALL | dict(step="soft_mask", alpha=0.25, seed=3, size="small", img_size=64, patch_size=8, num_classes=100)]


def git(clone, *command):
    return subprocess.run(["git", "-C", clone, *command], check=True, capture_output=True, text=True).stdout


def published(clone, commit, file, folder):
    """A module of the clone at a commit, imported from a folder that is not the clone."""
    path = Path(folder, f"{file}.py")
    path.write_text(git(clone, "show", f"{commit}:models/{file}.py"))
    spec = importlib.util.spec_from_file_location(file, path)
    module = sys.modules[file] = importlib.util.module_from_spec(spec)   # timm's registry looks it up
    spec.loader.exec_module(module)
    return module


def answer(case, module):
    """The case with what the published model says."""
    sizes = {"tiny": dict(embed_dim=192, num_heads=3), "small": dict(embed_dim=384, num_heads=6)}
    fields = {name: case[name] for name in ("img_size", "patch_size", "num_classes")}
    norm = partial(getattr(module, "RMSNorm", nn.LayerNorm), eps=1e-6)
    model = module.VisionTransformer(**fields, **sizes[case["size"]], depth=12, qkv_bias=True, norm_layer=norm).eval()
    model.load_state_dict(hashed_weights(model, case["seed"]))
    if "alpha" in case:
        model.update_soft_mask(case["alpha"])
    with torch.no_grad():
        logits = model(hashed_images(case["batch"], case["img_size"], case["seed"]))
    if case["step"] == "modified":
        case = case | dict(step="rmsnorm", mask="modified")
    return case | dict(n_parameters=sum(p.numel() for p in model.parameters()),
                       logits=[six_digits(row[:8]) for row in logits], logit_sum=six_digits(logits.sum(1)))


def six_digits(values):
    return [float(f"{value:.6g}") for value in values.tolist()]


def main(clone):
    with needs("the authors' code", "timm"):
        import timm
    newest = git(clone, "rev-parse", "HEAD").strip()
    with tempfile.TemporaryDirectory() as folder:
        cases = [answer(case, published(clone, LADDER, FILES[case["step"]], folder) if case["step"] in FILES
                        else published(clone, newest, "illama", folder)) for case in CASES]
    about = dict(code="github.com/techmonsterwang/iLLaMA", soft_mask=newest, steps_below=git(clone, "rev-parse", LADDER).strip(),
                 torch=torch.__version__, timm=timm.__version__)
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path(__file__).with_name("golden.json").write_text(f'{{"made_with": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
