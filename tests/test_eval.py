"""What is true of evaluation: one property a test."""
import argparse
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import eval as evaluation
from conftest import ROOT, by_hand, in_ranks, refused
from data import eval_transform, normalize, open_data
from downstream import export
from harness.checkpoint import build, load_weights, open_checkpoint
from harness.processes import report_errors
from model import Config, VisionTransformer, config


def printed(argv, capsys):
    evaluation.main([str(arg) for arg in argv] + ["--workers", "0", "--device", "cpu"])
    return capsys.readouterr().out


def test_it_counts_hits_and_averages_the_loss(photos, finished, capsys):
    logits, labels = by_hand(photos, finished / "best.pt")
    result = json.loads(printed([finished / "best.pt", "--json", "--batch-size", 4], capsys))
    assert result["test_acc1"] == 100 * (logits.argmax(1) == labels).sum().item() / 11
    assert result["test_acc5"] == 100 and result["images"] == 11            # of three classes
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (result["img_size"], result["alpha"]) == (16, 0) and result["time_images_per_s"] > 0


def test_top_5_counts_the_five_largest_logits():
    class Ranked(torch.nn.Module):
        """Ten classes in order of likelihood: 0, 1, 2 ..."""
        def forward(self, images):
            return -torch.arange(10.).expand(len(images), 10)
    labels = torch.tensor([0, 0, 1, 4, 5, 9])
    batches = [(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), part) for part in labels.split(3)]
    result = evaluation.evaluate(Ranked(), batches, torch.device("cpu"))
    assert result["test_acc1"] == pytest.approx(100 * 2 / 6) and result["test_acc5"] == pytest.approx(100 * 4 / 6)
    assert result["images"] == 6


def test_a_request_to_stop_ends_an_evaluation_before_its_next_batch(monkeypatch):
    class Asked(torch.nn.Module):
        def forward(self, images):
            stop.append("a signal")
            seen.append(len(images))
            return torch.zeros(len(images), 10)
    stop, seen = [], []
    monkeypatch.setattr(evaluation, "stop_requests", stop)
    batches = 5 * [(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))]
    assert evaluation.evaluate(Asked(), batches, torch.device("cpu")) is None and seen == [3]


def test_the_line_for_people_says_the_same_as_the_json(finished, capsys):
    result = json.loads(printed([finished / "best.pt", "--json"], capsys))
    line = printed([finished / "best.pt"], capsys)
    assert line.startswith(f"top-1 {result['test_acc1']:.3f} %  top-5 100.000 %  loss {result['test_loss']:.4f}  "
                           "11 images at 16 x 16, mask soft alpha 0, float32, ") and line.endswith(" images/s\n")


@pytest.mark.parametrize("images, all_ranks", [(7, (1, 2, 3)), (1, (2,))])
def test_every_image_counts_once_on_one_two_and_three_ranks(images, all_ranks, photos, finished, tmp_path):
    for path in sorted((photos / "val").glob("*/*.png"))[:images]:
        (tmp_path / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "val" / path.parent.name)
    results = []
    for ranks in all_ranks:
        flags = [finished / "best.pt", "--data", tmp_path, "--json", "--workers", 0, "--batch-size", 2]
        code, said, errors = in_ranks(ranks, ROOT / "eval.py", *flags)
        assert code == 0, errors
        results.append(json.loads(said))                                     # one line, whatever the ranks
        assert results[-1]["images"] == images
        for name in ("test_acc1", "test_acc5"):
            assert results[-1][name] == results[0][name]
        assert results[-1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-6)


def test_a_runs_folder_stands_for_its_best_checkpoint(finished, tmp_path, capsys):
    by_file, by_folder = (json.loads(printed([path, "--json"], capsys)) for path in (finished / "best.pt", finished))
    assert by_folder["test_loss"] == by_file["test_loss"] and by_folder["overrides"] == dict(depth=2)
    assert f"no checkpoint at {tmp_path}/best.pt" in refused(evaluation, [tmp_path], capsys)
    (tmp_path / "last.pt").touch()
    assert f"best.pt is written with the first accuracy under the soft mask's final alpha: wait for that, or give {tmp_path}/last.pt" in (
        refused(evaluation, [tmp_path], capsys))


def test_the_best_checkpoint_scores_what_training_said(finished, capsys):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(printed([finished / "best.pt", "--json"], capsys))
    assert result["test_acc1"] == max(row["test_acc1"] for row in rows)


def test_a_folder_of_images_gets_a_line_each(photos, finished, capsys):
    folder, run = photos / "val" / "dog", finished / "best.pt"
    lines = printed([run, "--image", folder], capsys).splitlines()
    files = sorted(folder.iterdir())
    assert len(lines) == len(files) and all(line.startswith(file.name) for line, file in zip(lines, files))
    found = json.loads(printed([run, "--image", folder, "--json"], capsys))
    for row, file in zip(found, files, strict=True):
        one = json.loads(printed([run, "--image", file, "--json"], capsys))
        assert row == dict(image=str(file), classes=one)
    assert "has no image: give an image, or a folder" in refused(evaluation, [run, "--image", photos / "val"], capsys)


def test_another_resolution_resizes_positions_and_makes_rope_for_its_grid(photos, finished, capsys):
    result = json.loads(printed([finished / "best.pt", "--img-size", "32", "--json"], capsys))
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    model = VisionTransformer(Config(**checkpoint["config"] | dict(img_size=32))).eval()
    assert load_weights(model, checkpoint) == ["learned positions resized from 4 to 16 patches"]
    model.set_soft_mask(checkpoint["alpha"])
    source = open_data(str(photos), "val", 32)
    images = torch.stack([pil_to_tensor(eval_transform(image, None, 32)) for image, _ in source])
    with torch.no_grad():
        logits = model(normalize(images))
    labels = torch.tensor([label for _, label in source])
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["img_size"] == 32 and result["images"] == 11
    assert "not a multiple of patch_size 8" in refused(evaluation, [finished / "best.pt", "--img-size", "20"], capsys)


def test_alpha_is_the_checkpoints_unless_it_is_given(photos, finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    torch.save(checkpoint | dict(alpha=0.75), tmp_path / "soft.pt")
    losses = []
    for alpha, flags in ((0.75, []), (0.25, ["--alpha", "0.25"])):
        result = json.loads(printed([tmp_path / "soft.pt", "--json", *flags], capsys))
        logits, labels = by_hand(photos, finished / "best.pt", alpha)
        assert result["alpha"] == alpha and result["test_loss"] not in losses
        losses.append(result["test_loss"])
        assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_it_names_the_most_likely_classes_of_one_image(photos, finished, capsys):
    logits, _ = by_hand(photos, finished / "best.pt")
    file = open_data(str(photos), "val", 16).path(4)
    named = json.loads(printed([finished / "best.pt", "--image", file, "--json"], capsys))
    expected = logits[4].softmax(0)
    assert [*named] == [["cat", "dog", "owl"][i] for i in expected.argsort(descending=True)]
    assert [*named.values()] == pytest.approx(expected.sort(descending=True).values.tolist(), rel=1e-4)
    first, *_ = printed([finished / "best.pt", "--image", file], capsys).splitlines()
    assert first == f"{100 * expected.max():5.1f} %  {[*named][0]}"


def test_a_grey_image_with_transparency_is_read_as_colour(finished, tmp_path, capsys):
    Image.new("LA", (40, 30), (120, 80)).save(tmp_path / "grey.png")
    assert len(printed([finished / "best.pt", "--image", tmp_path / "grey.png"], capsys).splitlines()) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A file as the authors publish theirs, behind a file:// address: a model of size T, for 16 pixels and 3 classes."""
    model = VisionTransformer(config("tiny", img_size=16, patch_size=8, num_classes=3))
    arguments = argparse.Namespace(model="illama_tiny", lr=0.004, finetune=None)
    torch.save({"model": model.state_dict(), "epoch": 299, "args": arguments}, tmp_path / "illama-tiny-in1k-75.0.pth")
    monkeypatch.setattr("harness.checkpoint.PUBLISHED_URL", tmp_path.as_uri())
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    return model


def test_published_weights_are_fetched_by_name_once_and_evaluated(published, photos, tmp_path, capsys):
    by_name = json.loads(printed(["illama-tiny-in1k-75.0", "--data", photos, "--json"], capsys))
    assert by_name["images"] == 11 and by_name["alpha"] == 0 and by_name["img_size"] == 16
    file = tmp_path / "illama-tiny-in1k-75.0.pth"
    by_path = json.loads(printed([file, "--data", photos, "--json"], capsys))
    file.unlink()
    again = json.loads(printed(["illama-tiny-in1k-75.0", "--data", photos, "--json"], capsys))
    assert by_name["test_loss"] == by_path["test_loss"] == again["test_loss"]
    loaded = build(open_checkpoint("illama-tiny-in1k-75.0"))
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_published_weights_can_be_exported_and_opened_again(published, photos, tmp_path, capsys):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    export.main(["illama-tiny-in1k-75.0", str(tmp_path / "a.safetensors")])
    losses = [json.loads(printed([source, "--data", photos, "--json"], capsys))["test_loss"]
              for source in ("illama-tiny-in1k-75.0", tmp_path / "a.safetensors")]
    assert losses[0] == losses[1]


def test_a_full_checkpoint_of_the_published_training_is_read(published, photos, tmp_path, capsys):
    optimizer = torch.optim.AdamW(published.parameters())
    for group in optimizer.param_groups:                                     # as the published engine sets them
        group["lr"], group["weight_decay"] = np.linspace(0, 4e-3, 9)[3], np.float64(0.05)
    published(torch.zeros(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    full = dict(model=published.state_dict(), optimizer=optimizer.state_dict(), epoch=299, scaler={},
                args=argparse.Namespace(lr=np.float32(0.004)), model_ema=None)
    file = tmp_path / "illama-tiny-in1k-75.0.pth"
    torch.save(full, file)
    assert json.loads(printed([file, "--data", photos, "--json"], capsys))["images"] == 11
    with open(file, "rb") as archive:                                        # the module's other name, of another numpy
        content = archive.read()
    names = b"numpy._core.multiarray", b"numpy.core.multiarray"
    old, new = names if names[0] in content else names[::-1]
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name).replace(old + b"\n", new + b"\n"))
    assert json.loads(printed([tmp_path / "other.pth", "--data", photos, "--json"], capsys))["images"] == 11


def test_published_weights_are_loaded_strictly_and_need_their_classes(published, photos, tmp_path, capsys):
    said = refused(evaluation, ["illama-tiny-in1k-75.0", "--data", "shapes"], capsys)
    assert "--data shapes has 10 classes, but the model knows 3" in said
    assert "illama-tiny-in1k-75.0 does not say what it was trained on: give --data" in refused(
        evaluation, ["illama-tiny-in1k-75.0"], capsys)
    said = refused(evaluation, ["illama-tiny-in1k-75.0", "--image", photos / "val" / "cat" / "00.png"], capsys)
    assert "illama-tiny-in1k-75.0 does not name its 3 classes, so --image cannot: use a checkpoint that train.py" in said
    state = published.state_dict()
    state.pop("blocks.3.attn.qkv.bias")
    torch.save({"model": state}, tmp_path / "part.pth")
    assert 'Missing key(s) in state_dict: "blocks.3.attn.qkv.bias"' in refused(evaluation, [tmp_path / "part.pth", "--data", photos], capsys)


def test_a_download_without_a_network_is_told_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("harness.checkpoint.PUBLISHED_URL", (tmp_path / "nowhere").as_uri())
    said = refused(evaluation, ["illama-small-in1k-79.9", "--data", "shapes"], capsys)
    assert "illama-small-in1k-79.9.pth could not be downloaded to" in said and "connect to a network, or give" in said


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    said = refused(evaluation, ["illama-huge"], capsys)
    assert "no checkpoint at illama-huge: check the path, or give one of the names illama-tiny-in1k-75.0, illama" in said


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("flags, said", [
    (["--data", "nowhere"], "--data nowhere is neither one of shapes"),
    (["--data", "shapes"], "shapes has the classes circle, ring, crescent, bar, triangle and 5 more, but the model"),
    (["--image", ""], "argument --image: it is empty: give a value, or drop the flag"),
    (["--image", "nowhere.png"], "nowhere.png cannot be read as an image"),
    (["--alpha", "2"], "--alpha is 2.0; it must be from 0 to 1"),
    (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    (["--image", "a.png", "--data", "shapes"], "--image classifies one image alone: drop it, or --data"),
])
def test_bad_flags_are_refused(flags, said, finished, capsys):
    assert said in refused(evaluation, [finished / "best.pt", *flags], capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(workers, photos, finished, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "val" / "dog" / "01.png").write_bytes(b"no image")
    said = refused(evaluation, [finished / "best.pt", "--data", tmp_path / "photos", "--workers", workers], capsys)
    assert "dog/01.png cannot be read as an image" in said


def test_a_soft_mask_for_a_model_without_one_is_refused(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    torch.save(checkpoint | dict(alpha=None, config=checkpoint["config"] | dict(mask="causal")), tmp_path / "causal.pt")
    said = refused(evaluation, [tmp_path / "causal.pt", "--alpha", "0"], capsys)
    assert "--alpha needs a soft mask, but the mask of" in said and "is 'causal': drop it" in said


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    for changes, said in ((dict(depth=3), 'Missing key(s) in state_dict: "blocks.2.'),
                          (dict(swiglu=False), 'Missing key(s) in state_dict: "blocks.0.mlp.fc1.bias"'),
                          (dict(patch_size=4), "the weights do not fit the model: size mismatch for patch_embed.proj.weight")):
        torch.save(checkpoint | dict(config=checkpoint["config"] | changes), tmp_path / "other.pt")
        assert said in refused(evaluation, [tmp_path / "other.pt"], capsys)
    torch.save(dict(config=checkpoint["config"], model=checkpoint["model"]), tmp_path / "part.pt")
    assert "part.pt lacks classes, alpha, run: use a checkpoint that train.py wrote" in refused(
        evaluation, [tmp_path / "part.pt"], capsys)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    assert "weights.pt is neither a checkpoint that train.py wrote nor weights of a ViT or an iLLaMA" in refused(
        evaluation, [tmp_path / "weights.pt"], capsys)


def test_an_error_in_the_code_is_not_reported_as_bad_input(capsys):
    with pytest.raises(ValueError, match="unpack"), report_errors():
        _, _ = (1,)
    assert capsys.readouterr().err == ""


def test_data_with_a_class_that_the_model_does_not_know_is_refused(photos, finished, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "val" / "owl").rename(tmp_path / "data" / "val" / "wolf")
    assert "has the class folders wolf, which are not among" in refused(
        evaluation, [finished / "best.pt", "--data", tmp_path / "data"], capsys)
