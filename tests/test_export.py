"""A model leaves the repository, and other people's weights come in."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import SMALL, environment, load, refused
from downstream import attention, export
from harness.checkpoint import build, load_weights, open_checkpoint
from harness.files import read_image
from model import VisionTransformer, config
from test_model import hashed_images, hashed_weights


def logits_of(folder, images):
    with torch.no_grad():
        return build(open_checkpoint(folder)).eval()(images)


def test_an_exported_program_takes_any_number_of_images(finished, tmp_path):
    export.main([str(finished), str(tmp_path / "a.pt2")])
    about = dict({"about.json": ""})
    program = torch.export.load(tmp_path / "a.pt2", extra_files=about).module()
    for count in (1, 5):
        torch.testing.assert_close(program(hashed_images(count, 16)), logits_of(finished, hashed_images(count, 16)), atol=1e-6, rtol=0)
    about = json.loads(about["about.json"])
    assert about["classes"] == ["cat", "dog", "owl"] and about["config"]["img_size"] == 16 and len(about["mean"]) == 3 and about["alpha"] == 0


def test_an_onnx_file_gives_the_same_logits(finished, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    export.main([str(finished), str(tmp_path / "a.onnx")])
    file = onnx.load(tmp_path / "a.onnx")
    from onnx.reference import ReferenceEvaluator
    for count in (1, 3):
        images = hashed_images(count, 16)
        (logits,) = ReferenceEvaluator(file).run(None, dict(images=images.numpy()))
        np.testing.assert_allclose(logits, logits_of(finished, images), atol=1e-5)
    assert "classes" in json.loads(file.metadata_props[0].value)


def test_safetensors_are_a_checkpoint_wherever_one_is_taken(photos, finished, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    export.main([str(finished), str(tmp_path / "a.safetensors")])
    found = []
    for source in (finished, tmp_path / "a.safetensors"):
        capsys.readouterr()
        evaluation.main([str(source), "--device", "cpu", "--workers", "0", "--json"])
        found.append(json.loads(capsys.readouterr().out)["test_loss"])
    assert found[0] == found[1]
    train.main(["--data", str(photos), "--out", str(tmp_path / "run"), *SMALL, "--init-from", str(tmp_path / "a.safetensors")])
    safetensors.save_file(load(finished / "best.pt")["model"], tmp_path / "bare.safetensors")
    net = VisionTransformer(config("nano", depth=2, img_size=16, patch_size=8, num_classes=3))
    load_weights(net, tmp_path / "bare.safetensors")
    torch.testing.assert_close(net.eval()(hashed_images(2, 16)), logits_of(finished, hashed_images(2, 16)))
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    capsys.readouterr()
    assert "b.safetensors cannot be read as a checkpoint" in refused(evaluation, [tmp_path / "b.safetensors"], capsys)


def test_exporting_overwrites_nothing_and_names_its_kinds(finished, tmp_path, capsys):
    (tmp_path / "a.pt2").write_text("mine")
    assert "a.pt2 is there, and not of downstream.export" in refused(export, [finished, tmp_path / "a.pt2"], capsys)
    assert "ends in one of .pt2, .onnx, .safetensors" in refused(export, [finished, tmp_path / "a.pth"], capsys)


def test_attention_over_a_picture_is_drawn_block_by_block(photos, finished, tmp_path, capsys):
    image = photos / "val" / "cat" / "00.png"
    attention.main([str(finished), str(image), str(tmp_path / "a.png")])
    page = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert page.shape == (224, 3 * 224, 3)
    whole, *blocks = np.split(page, 3, axis=1)
    for block in blocks:
        assert (block <= whole + 1).all() and (np.abs(block - whole).max(-1) <= 2).any() and (block < whole // 2).any()
    assert "a.jpg: give a name that ends in .png" in refused(attention, [finished, image, tmp_path / "a.jpg"], capsys)


def test_a_single_picture_is_turned_as_its_exif_says_and_a_data_set_is_not(tmp_path):
    page = Image.new("RGB", (40, 20), (200, 0, 0))
    exif = page.getexif()
    exif[0x0112] = 6                                     # taken with the camera on its side
    page.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", upright=True).size == (20, 40) and read_image(tmp_path / "a.jpg").size == (40, 20)


def test_torch_hub_builds_and_loads(finished, tmp_path):
    program = f"""
import torch
net = torch.hub.load({str(train.Path(train.__file__).parent)!r}, "illama", source="local", size="nano", depth=2, img_size=16, patch_size=8,
                     num_classes=3, pretrained={str(finished / "best.pt")!r})
print(tuple(net(torch.zeros(2, 3, 16, 16)).shape))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment(PYTHONPATH=""))
    assert ended.stdout.strip() == "(2, 3)", ended.stderr


def test_timms_vision_transformer_is_the_step_vit(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).eval()
    own = VisionTransformer(config("tiny", "vit", img_size=32, num_classes=10)).eval()
    theirs.load_state_dict(hashed_weights(own))
    torch.save(dict(model=theirs.state_dict()), tmp_path / "deit.pth")       # as DeiT's files are
    load_weights(own, tmp_path / "deit.pth")
    with torch.no_grad():
        torch.testing.assert_close(own(hashed_images(2)), theirs(hashed_images(2)), atol=1e-5, rtol=0)


def test_encoders_without_a_head_load_and_what_else_they_have_is_named(tmp_path):
    own = VisionTransformer(config("nano", "vit", depth=2, img_size=32, num_classes=10))
    encoder = {name: value for name, value in hashed_weights(own).items() if not name.startswith("head.")}
    assert load_weights(own, encoder, new_head=True) == ["new head: 0 classes before, 10 now"]           # DINO's
    assert all(torch.equal(own.state_dict()[name], value) for name, value in encoder.items())
    with pytest.raises(ValueError, match='Unexpected key.s. in state_dict: "mask_token", "decoder_embed.weight"'):       # MAE's
        load_weights(own, encoder | {"mask_token": torch.zeros(1, 1, 128), "decoder_embed.weight": torch.zeros(2, 2)}, new_head=True)
    with pytest.raises(ValueError, match='Missing key.s. in state_dict: "head.weight", "head.bias"'):
        load_weights(own, encoder)
