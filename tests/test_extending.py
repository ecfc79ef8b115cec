"""The changes of docs/extending.md apply, train, resume, and do what they say: each as its reader would make it."""
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, SMALL, environment

PAGE = (ROOT / "docs" / "extending.md").read_text()
DIFFS = {title: diff for title, diff in re.findall(r"^## (.*?)\n[^`]*?(?:`[^`\n]+`[^`]*?)*```diff\n(.*?)```", PAGE, re.M | re.S)}

# Before each check: a run that is stopped after its second iteration and resumed ends with the same bits.
TRAIN = """
import sys
from copy import deepcopy

import torch
from torch.testing import assert_close

import train
from harness import processes, run
from harness.checkpoint import build, load_weights, read_checkpoint
from model import VisionTransformer, config

FLAGS = sys.argv[1:]


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def trained(*flags):
    train.main([*FLAGS, *flags, "--out", "whole"])
    update = run.Monitor.update

    def stop(monitor, *args):
        update(monitor, *args)
        processes.stop_requests.append(15)
    run.Monitor.update = stop
    try:
        train.main([*FLAGS, *flags, "--out", "stopped"])
    except SystemExit as end:
        assert end.code == 75
    run.Monitor.update = update
    assert read_checkpoint("stopped/last.pt")["iteration"] == 2
    train.main(["--resume", "stopped", "--workers", "0", "--device", "cpu"])
    whole, resumed = read_checkpoint("whole/last.pt"), read_checkpoint("stopped/last.pt")
    assert whole["iteration"] == resumed["iteration"] == 6
    for part in {"model", "optimizer", "average"} & set(whole):
        assert equal(resumed[part], whole[part])
    return whole


torch.manual_seed(0)
images = torch.randn(8, 3, 32, 32)


def small(step="abs_pos", **fields):
    cfg = config("nano", step, depth=2, img_size=32, patch_size=8, num_classes=3, **fields)
    return VisionTransformer(cfg).eval()
"""

WINDOW = """
trained("--step", "abs_pos", "--mask", "window")
model, other = small(mask="window"), images.clone()
other[:, :, :8, :8] += 1                                     # the first patch
moved = (model.forward_features(images) != model.forward_features(other)).any(-1)[0]     # N
assert moved[: 9].all() and not moved[9: 16].any() and moved[16]         # four patches a block, and the class token
assert (model.mask(model.cls).attn_bias == 0).all()
"""

REGISTERS = """
whole = trained("--registers", "4")
assert whole["model"]["registers"].shape == (1, 4, 128) and len(whole["model"]["pos_embed"][0]) == 4 + 4 + 1
for step in ("abs_pos", "rmsnorm"):
    model = small(step, registers=4)
    assert "registers" in model.no_weight_decay()
    maps = model.attention_maps(images)
    assert maps.shape[-1] == 21 and maps[..., model.patches].shape[-1] == 16
    assert_close(model.embed(images)[:, model.patches], model.patch_embed.proj(images).flatten(2).mT + model.pos_embed[:, model.patches])
    larger = VisionTransformer(config("nano", step, depth=2, img_size=64, patch_size=8, num_classes=3, registers=4))
    assert load_weights(larger, model.state_dict()) == ["learned positions resized from 16 to 64 patches"]
    rest = [i for i in range(21) if i not in range(21)[model.patches]]
    others = [i for i in range(69) if i not in range(69)[larger.patches]]
    assert torch.equal(larger.pos_embed[:, others], model.pos_embed[:, rest])
from downstream.segmenter import Segmenter
assert Segmenter(config("nano", img_size=32, patch_size=8, num_classes=3, registers=4), "linear")(images)[0].shape == (8, 3, 32, 32)
"""

SVHN = """
import numpy as np
import PIL.Image
import data


class SVHN(list):
    def __init__(self, root, split, download):
        assert download and split in ("train", "test")
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16] = 255                                 # bright on the left
        super().__init__((PIL.Image.fromarray(pixels), n % 10) for n in range(24))


data.datasets.SVHN = SVHN
whole = trained("--data", "svhn", "--recipe", "svhn")
assert whole["classes"][::9] == ["zero", "nine"] and not whole["recipe"]["flip"]
run, recipe, cfg = train.resolve(train.parse(["--data", "svhn", "--recipe", "svhn"]), None)
drawn, _ = train.images_of(run, recipe, data.open_data("svhn", "train", 32), [])
for epoch in range(20):
    image = drawn[epoch, 0][0].float()
    assert image[:, :, :16].mean() > image[:, :, 16:].mean()
"""

MUON = """
whole = trained("--step", "abs_pos")
kept = [set(state) for state in whole["optimizer"].values()]
assert kept.count({"momentum_buffer"}) == 2 * 5              # qkv, proj, fc1, fc2, fc3 of two blocks
assert kept.count({"step", "exp_avg", "exp_avg_sq"}) == len(kept) - 10 > 0
model = small()
before = deepcopy(model.state_dict())
optimizer = train.make_optimizer(model, train.RECIPES["small-data"])
model(images).square().sum().backward()
optimizer.step()
gradient = model.blocks[0].attn.proj.weight.grad
step = (model.blocks[0].attn.proj.weight - before["blocks.0.attn.proj.weight"]).detach()
before, after = torch.linalg.svdvals(gradient), torch.linalg.svdvals(step)
assert before[0] > 4 * before[3] and after[0] < 2 * after[3]             # it is made orthogonal
assert {group["scale"] for group in optimizer.param_groups} == {1, 20}
"""

EMA = """
whole = trained("--step", "soft_mask", "--mask", "soft_log", "--soft-mask-epochs", "1")
weights, average = whole["model"], whole["average"]
assert average["n_averaged"] == 6
assert all(not torch.equal(weights[name], average["module." + name]) for name in weights if "qkv.weight" in name)
best = read_checkpoint("whole/best.pt")
if best["epoch"] == whole["epoch"]:
    assert torch.equal(best["model"]["head.weight"], average["module.head.weight"])
model = small("soft_mask", mask="soft_log")
mean = train.AveragedModel(model, multi_avg_fn=train.get_ema_multi_avg_fn(0.999))
for alpha in (1.0, 0.5, 0.0):
    model.set_soft_mask(alpha)
    mean.update_parameters(model)
    assert_close(mean(images), model(images))                # evaluated under the mask that is trained with
"""

QK_NORM = """
trained("--step", "qk_norm")
model = small("qk_norm")
before = model(images)
for block in model.blocks:
    block.attn.qkv.weight.data[: 256] *= 7                   # of queries and keys
assert_close(model(images), before, atol=1e-4, rtol=0) and small("soft_mask").cfg.qk_norm is False
"""

CHECKS = {"A mask: sliding window": WINDOW, "Register tokens": REGISTERS, "A data set: SVHN": SVHN, "An optimizer: Muon": MUON,
          "An average of the weights": EMA, "A step: normalized queries and keys": QK_NORM}


def test_every_change_is_tested_and_short():
    assert list(DIFFS) == list(CHECKS)
    for title, diff in DIFFS.items():
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
        assert len(changed) <= (40 if "Muon" in title else 25)


def apply(diffs, folder):
    """To a copy of the tracked programs, in a new folder."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("this is no git repository")
    for file in files.stdout.splitlines():
        if file.endswith(".py") and (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    for diff in diffs:
        (folder / "change.diff").write_text(diff)
        subprocess.run(["git", "apply", "change.diff"], cwd=folder, check=True)


def test_all_of_them_apply_together(tmp_path):
    apply(DIFFS.values(), tmp_path)
    assert "registers" in (tmp_path / "model.py").read_text() and "qk_norm" in (tmp_path / "model.py").read_text()


@pytest.mark.parametrize("title", CHECKS)
def test_it_applies_trains_resumes_and_does_what_it_says(title, photos, tmp_path):
    if "Muon" in title and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    apply([DIFFS[title]], tmp_path)
    (tmp_path / "check.py").write_text(TRAIN + CHECKS[title])
    command = [sys.executable, "check.py", *SMALL, "--data", photos]
    done = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, env=environment(PYTHONPATH=tmp_path))
    assert done.returncode == 0, done.stderr
