"""What is true of evaluation: one property a test."""
import argparse
import json
import math
import random
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
from conftest import ROOT, refused, torchrun
from data import Shapes, categories, eval_transform, normalize, open_data, read_image
from model import VisionTransformer, config


def printed(argv, capsys):
    evaluation.main([str(arg) for arg in argv] + ["--workers", "0", "--device", "cpu"])
    return capsys.readouterr().out


def by_hand(photos, checkpoint, alpha=None):
    """Logits and labels of all pictures, one at a time."""
    model = evaluation.build(torch.load(checkpoint, weights_only=True)).eval()
    if alpha is not None:
        model.set_soft_mask(alpha)
    logits, labels = [], []
    for image, label in open_data(str(photos), "val", 16):
        pixels = torch.from_numpy(np.array(eval_transform(image.convert("RGB"), None, 16))).permute(2, 0, 1)
        with torch.no_grad():
            logits.append(model(normalize(pixels[None])))
        labels.append(label)
    return torch.cat(logits), torch.tensor(labels)


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
    batches = [(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), part, ["", "", ""]) for part in labels.split(3)]
    result = evaluation.evaluate(Ranked(), batches, torch.device("cpu"))
    assert result["test_acc1"] == pytest.approx(100 * 2 / 6) and result["test_acc5"] == pytest.approx(100 * 4 / 6)
    assert result["images"] == 6


def test_a_request_to_stop_ends_an_evaluation_before_its_next_batch():
    class Asked(torch.nn.Module):
        def forward(self, images):
            stop.append("a signal")
            seen.append(len(images))
            return torch.zeros(len(images), 10)
    stop, seen = [], []
    batches = 5 * [(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ["", "", ""])]
    assert evaluation.evaluate(Asked(), batches, torch.device("cpu"), stop=stop) is None and seen == [3]


def test_the_line_for_people_says_the_same_as_the_json(finished, capsys):
    result = json.loads(printed([finished / "best.pt", "--json"], capsys))
    line = printed([finished / "best.pt"], capsys)
    assert line.startswith(f"top-1 {result['test_acc1']:.3f} %  top-5 100.000 %  loss {result['test_loss']:.4f}  "
                           "11 images at 16 x 16, mask soft alpha 0, float32, ") and line.endswith(" images/s\n")


@pytest.mark.slow
@pytest.mark.parametrize("pictures, all_ranks", [(7, (1, 2, 3)), (1, (2,))])
def test_every_picture_counts_once_on_one_two_and_three_ranks(pictures, all_ranks, photos, finished, tmp_path):
    for path in sorted((photos / "val").glob("*/*.png"))[:pictures]:
        (tmp_path / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "val" / path.parent.name)
    results = []
    for ranks in all_ranks:
        flags = [finished / "best.pt", "--data", tmp_path, "--json", "--workers", 0, "--batch-size", 2]
        code, said, errors = torchrun(ranks, ROOT / "eval.py", *flags)
        assert code == 0, errors
        results.append(json.loads(said))                                     # one line, whatever the ranks
        assert results[-1]["images"] == pictures
        for name in ("test_acc1", "test_acc5"):
            assert results[-1][name] == results[0][name]
        assert results[-1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-6)


def test_a_runs_folder_stands_for_its_best_checkpoint(finished, tmp_path, capsys):
    by_file, by_folder = (json.loads(printed([path, "--json"], capsys)) for path in (finished / "best.pt", finished))
    assert by_folder["test_loss"] == by_file["test_loss"] and by_folder["overrides"] == dict(depth=2)
    assert f"no checkpoint at {tmp_path}/best.pt" in refused(evaluation, [tmp_path], capsys)


def test_the_best_checkpoint_scores_what_training_said(finished, capsys):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(printed([finished / "best.pt", "--json"], capsys))
    assert result["test_acc1"] == max(row["test_acc1"] for row in rows)


def test_alpha_is_the_checkpoints_unless_it_is_given(photos, finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    torch.save(checkpoint | dict(alpha=0.75), tmp_path / "soft.pt")
    losses = []
    for alpha, flags in ((0.75, []), (0.25, ["--soft-mask", "0.25"])):
        result = json.loads(printed([tmp_path / "soft.pt", "--json", *flags], capsys))
        logits, labels = by_hand(photos, finished / "best.pt", alpha)
        assert result["alpha"] == alpha and result["test_loss"] not in losses
        losses.append(result["test_loss"])
        assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_it_names_the_most_likely_classes_of_one_picture(photos, finished, capsys):
    logits, _ = by_hand(photos, finished / "best.pt")
    file = open_data(str(photos), "val", 16).path(4)
    named = json.loads(printed([finished / "best.pt", "--image", file, "--json"], capsys))
    expected = logits[4].softmax(0)
    assert [*named] == [["cat", "dog", "owl"][i] for i in expected.argsort(descending=True)]
    assert [*named.values()] == pytest.approx(expected.sort(descending=True).values.tolist(), rel=1e-4)
    first, *_ = printed([finished / "best.pt", "--image", file], capsys).splitlines()
    assert first == f"{100 * expected.max():5.1f} %  {[*named][0]}"


def test_a_grey_picture_with_transparency_is_read_as_colour(finished, tmp_path, capsys):
    Image.new("LA", (40, 30), (120, 80)).save(tmp_path / "grey.png")
    assert len(printed([finished / "best.pt", "--image", tmp_path / "grey.png"], capsys).splitlines()) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def with_confidence(*confidences):
    """Logits of two classes, the first of which is as likely as is said."""
    return torch.tensor([[math.log(c), math.log(1 - c)] for c in confidences])


def test_a_model_that_is_as_often_right_as_it_is_sure_is_calibrated():
    result = evaluation.calibration(with_confidence(*[0.75] * 4), torch.tensor([0, 0, 0, 1]))
    assert result["ece"] == pytest.approx(0, abs=1e-6) and len(result["reliability"]) == 1
    assert result["reliability"][0] == pytest.approx((4, 0.75, 0.75))


def test_the_calibration_error_weighs_the_gap_of_each_of_15_equal_bins_by_its_pictures():
    sure = [0.61, 0.65, 0.78, 0.79, 0.81, 0.99]             # bins end at 0.6, 0.667, 0.733, 0.8 ...
    right = [1, 0, 0, 0, 1, 1]
    labels = torch.tensor([0 if hit else 1 for hit in right])
    result = evaluation.calibration(with_confidence(*sure), labels)
    assert [row[0] for row in result["reliability"]] == [2, 2, 1, 1]
    assert result["reliability"][1] == pytest.approx((2, 0.785, 0), rel=1e-6)
    gaps = 2 * abs(0.5 - 0.63) + 2 * 0.785 + (1 - 0.81) + (1 - 0.99)
    assert result["ece"] == pytest.approx(gaps / 6, rel=1e-6)
    assert evaluation.calibration(with_confidence(*sure), labels, bins=1)["ece"] == pytest.approx(
        abs(sum(right) - sum(sure)) / 6, rel=1e-6)


def test_logits_that_are_no_numbers_have_no_calibration():
    with pytest.raises(ValueError, match="some logits are not finite numbers"):
        evaluation.calibration(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))


def test_the_calibration_of_a_checkpoint_is_that_of_its_logits(photos, finished, capsys):
    result = json.loads(printed([finished / "best.pt", "--calibration", "--json", "--batch-size", 4], capsys))
    expected = evaluation.calibration(*by_hand(photos, finished / "best.pt"))
    assert result["ece"] == pytest.approx(expected["ece"], rel=1e-4)
    assert sum(row[0] for row in result["reliability"]) == 11


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Maps(torch.nn.Module):
    """A model of one block and one head, whose attention map is the picture."""
    def attention_maps(self, images):
        return images[None]


def test_the_rank_counts_singular_values_up_to_a_share_of_their_sum():
    for values, at_80, at_90 in (([1.] * 11, 9, 10), ([1., 0, 0, 0], 1, 1), ([8.1, 1, 0.9], 1, 2), ([6, 3.1, 0.9], 2, 2)):
        turn, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)))
        result = evaluation.attention_rank(Maps(), (turn @ torch.tensor(values).diag())[None, None])
        assert result == {"rank_80": [[at_80]], "rank_90": [[at_90]]}


def test_maps_are_averaged_over_pictures_before_they_are_decomposed():
    one, other = torch.eye(10), torch.eye(10).flip(0)                       # each of full rank, their mean of half
    both = torch.stack([one, other])[:, None]
    assert evaluation.attention_rank(Maps(), both[:1])["rank_90"] == [[9]]
    assert evaluation.attention_rank(Maps(), both)["rank_90"] == [[5]]


def saved(path, data="shapes", classes=tuple(Shapes.classes), step="soft_mask", **fields):
    """A checkpoint of random weights, large enough to tell pictures apart."""
    torch.manual_seed(0)
    cfg = config("nano", step, img_size=16, patch_size=4, depth=3, num_classes=len(classes), **fields)
    model = VisionTransformer(cfg)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    alpha = 0.0 if cfg.mask.startswith("soft") else None
    torch.save(dict(model=model.state_dict(), config=asdict(cfg), classes=list(classes), alpha=alpha,
                    run=dict(data=str(data), dtype="float32", size="nano", step=step, seed=7)), path)
    return model.eval()


def test_the_collapse_shows_as_no_variance_of_the_logits_and_no_attention_to_patches(photos, tmp_path, capsys):
    seen = {}
    for step in ("rmsnorm", "causal", "ps_cls"):
        saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"), step)
        result = json.loads(printed([tmp_path / "a.pt", "--attention", tmp_path / "a.png", "--json"], capsys))
        assert (result["step"], result["seed"]) == (step, 7)
        seen[step] = result["logit_variance"], np.array(Image.open(tmp_path / "a.png"))
    assert seen["causal"][0] < 1e-10 and min(seen["rmsnorm"][0], seen["ps_cls"][0]) > 1e-3
    assert (seen["causal"][1][:128, 130:258] <= 255 / 3).all()              # nothing lit
    assert all((seen[step][1][:128, 130:258, 0] == 255).any() for step in ("rmsnorm", "ps_cls"))


def test_the_patch_that_the_class_token_sees_most_is_the_brightest(photos, finished, tmp_path, capsys):
    model = saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"))
    file = open_data(str(photos), "val", 16).path(4)
    printed([tmp_path / "a.pt", "--image", file, "--attention", tmp_path / "a.png"], capsys)
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (128 + 16, 4 * 130, 3)
    pixels = torch.from_numpy(np.array(eval_transform(read_image(file), None, 16))).permute(2, 0, 1)
    with torch.no_grad():
        seen = model.attention_maps(normalize(pixels[None]))[:, 0].mean(1)[:, -1, :-1]
    for block, row in enumerate(seen):
        cell = sheet[:128, 130 * (block + 1): 130 * (block + 1) + 128].astype(int)
        yellow = cell[16::32, 16::32, 0] + cell[16::32, 16::32, 1]          # the middle of each of 4 x 4 patches
        assert yellow.argmax() == row.argmax() and yellow.max() == 510


# ---------------------------------------------------------------------------------------------------------------------
# Shape or texture


def test_shape_bias_is_the_share_of_shape_among_decisions_for_shape_or_texture():
    shapes, textures = ["cat", "cat", "dog", "owl", "owl"], ["dog", "owl", "owl", "owl", "cat"]
    assert evaluation.shape_bias(["cat", "owl", "dog", "owl", "dog"], shapes, textures) == 2 / 3  # the last is neither
    assert evaluation.shape_bias(["cat", "cat", "dog", "cat", "owl"], shapes, textures) == 1
    assert evaluation.shape_bias(textures, shapes, textures) == 0           # where both are owls, none is counted
    assert math.isnan(evaluation.shape_bias(["owl"], ["owl"], ["owl"]))
    with pytest.raises(ValueError):
        evaluation.shape_bias(["owl"], ["owl", "cat"], ["owl", "cat"])


def test_a_category_has_the_mean_probability_of_its_classes():
    logits = torch.tensor([[0.45, 0.0001, 0.3, 0.2499], [0.05, 0.05, 0.4, 0.5]]).log()
    known = {"first": [0, 1], "second": [2, 3]}
    assert evaluation.decide(logits, known) == ["second", "second"]          # 0.225 and 0.275
    assert evaluation.decide(logits, {"first": [0], "second": [1, 2, 3]}) == ["first", "second"]


def cue_conflict(root, *names):
    """Writes SHAPE/shapeN-textureN.png; returns pictures as the model takes them, and pairs [shape, texture]."""
    pixels, pairs = [], [[part.rstrip("0123456789") for part in name.split("-")] for name in names]
    for i, (name, (shape, _)) in enumerate(zip(names, pairs)):
        (root / shape).mkdir(parents=True, exist_ok=True)
        picture = Image.frombytes("RGB", (16, 16), random.Random(i).randbytes(768))
        picture.save(root / shape / f"{name}.png")
        pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return normalize(torch.stack(pixels)), pairs


def test_cue_conflict_pictures_are_read_from_their_names(photos, tmp_path, capsys):
    model = saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"))
    images, pairs = cue_conflict(tmp_path / "cue", "cat1-dog2", "cat2-cat1", "dog10-owl3", "dog2-cat11", "owl1-dog1",
                                 "owl2-owl2")
    with torch.no_grad():
        guesses = [["cat", "dog", "owl"][i] for i in model(images).argmax(1)]
    result = json.loads(printed([tmp_path / "a.pt", "--shape-bias", tmp_path / "cue", "--json"], capsys))
    decided = [guess == shape for guess, (shape, texture) in zip(guesses, pairs)
               if shape != texture and guess in (shape, texture)]
    assert (result["conflicts"], result["decided"]) == (4, len(decided)) and 0 < len(decided)
    assert result["shape_bias"] == pytest.approx(sum(decided) / len(decided))
    for name in ("owl3", "dog1-cat1"):                                      # no texture; not the folder's shape
        wrong = tmp_path / "cue" / "owl" / f"{name}.png"
        Image.new("RGB", (16, 16)).save(wrong)
        said = refused(evaluation, [tmp_path / "a.pt", "--shape-bias", tmp_path / "cue"], capsys)
        assert f"owl/{name}.png is not named as SHAPE/shapeN-textureN.png says: rename or remove it" in said
        wrong.unlink()


def test_a_model_of_a_thousand_classes_decides_by_the_sixteen_categories(photos, tmp_path, capsys):
    classes = ["cat", "dog", "owl", *map(str, range(997))]
    model = saved(tmp_path / "a.pt", photos, classes)
    images, pairs = cue_conflict(tmp_path / "cue", "cat1-dog2", "bear3-cat1", "dog2-truck4", "oven1-dog9", "bird1-boat1",
                                 "truck2-bird2")
    with torch.no_grad():
        guesses = evaluation.decide(model(images), categories(classes))
    result = json.loads(printed([tmp_path / "a.pt", "--shape-bias", tmp_path / "cue", "--json"], capsys))
    assert result["decided"] == sum(guess in pair for guess, pair in zip(guesses, pairs)) and result["conflicts"] == 6


def test_a_shape_bias_without_decisions_is_undefined(photos, tmp_path, capsys):
    saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"))
    cue_conflict(tmp_path / "cue", "cat1-cat2")
    flags = [tmp_path / "a.pt", "--shape-bias", tmp_path / "cue"]
    result = json.loads(printed([*flags, "--json"], capsys))
    assert (result["shape_bias"], result["conflicts"], result["decided"]) == (None, 0, 0)
    assert "shape bias undefined, of 0 decisions for shape or texture on 0 pictures" in printed(flags, capsys)


def test_a_model_of_shapes_is_asked_on_their_conflict_split(tmp_path, capsys):
    saved(tmp_path / "a.pt")
    result = json.loads(printed([tmp_path / "a.pt", "--shape-bias", "shapes-cue", "--json"], capsys))
    assert result["conflicts"] == 2000 and 0 < result["decided"] < 2000 and 0 <= result["shape_bias"] <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Size and work


def test_int8_values_are_within_half_a_step_and_use_the_whole_range():
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.], [10], [0.1], [3], [0]])
    values, scale = evaluation.to_int8(x, dim=1)
    assert scale.shape == (5, 1) and torch.equal(values, values.round())
    assert ((values * scale - x).abs() <= scale / 2 + 1e-7).all()
    assert values.abs().amax(1).tolist() == [127, 127, 127, 127, 0]
    assert evaluation.to_int8(x)[1].numel() == 1


def test_quantised_layers_see_and_hold_256_levels_and_the_rest_stays(tmp_path):
    model = saved(tmp_path / "a.pt")
    small, size = evaluation.quantize(model)
    entered = {}
    for name, layer in small.named_modules():
        if isinstance(layer, torch.nn.Linear):
            def look(_, inputs, __, name=name):
                entered[name] = len(inputs[0].unique())
            layer.register_forward_hook(look)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, rounded = model(images), small(images)
    assert 0 < (rounded - exact).abs().mean() < 0.1 * exact.std()
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.fc3")
    names = [f"blocks.{i}.{layer}" for i in range(3) for layer in layers]
    for name in names:
        assert entered.pop(name) <= 256 and all(len(row.unique()) <= 256 for row in small.get_submodule(name).weight)
    assert entered.pop("head") > 1000 and not entered
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    channels = sum(len(model.get_submodule(name).weight) for name in names)
    assert size == weights + 4 * channels + 4 * (sum(p.numel() for p in model.parameters()) - weights)
    with torch.no_grad():
        assert torch.equal(model(images), exact)                            # the model itself is as it was


def test_int8_accuracy_is_that_of_the_quantised_model(finished, monkeypatch, capsys):
    result = json.loads(printed([finished / "best.pt", "--int8", "--json"], capsys))
    assert abs(result["int8_acc1"] - result["test_acc1"]) <= 100 / 11 + 1e-9
    assert result["int8_mb"] < 0.35 * result["float32_mb"]

    def all_owls(model):
        model = evaluation.copy.deepcopy(model)
        model.head.bias.data += torch.tensor([0, 0, 1e6])
        return model, 5_000_000
    monkeypatch.setattr(evaluation, "quantize", all_owls)
    other = json.loads(printed([finished / "best.pt", "--int8", "--json"], capsys))
    assert other["int8_acc1"] == pytest.approx(300 / 11) and other["int8_mb"] == 5 and other["dtype"] == "float32"
    assert other["test_acc1"] == result["test_acc1"]


@pytest.mark.parametrize("size, published", [("tiny", 1.2536832), ("small", 4.598882304), ("base", 17.563828224),
                                             ("large", 62.794129408)])
def test_multiply_accumulates_are_the_published_ones(size, published):
    assert evaluation.multiply_accumulates(config(size))["published"] == round(published * 1e9)


@pytest.mark.parametrize("mask, spared", [("none", 0), ("causal", 2), ("soft_log", 2), ("soft", 1)])
def test_multiply_accumulates_as_run_are_those_that_torch_counts(mask, spared):
    cfg = config("nano", "vit" if mask == "none" else "soft_mask", mask=mask, img_size=32, patch_size=8, depth=3)
    # Plain matrix multiplications: which fused kernels the counter knows depends on torch's version.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        VisionTransformer(cfg).eval()(torch.zeros(1, 3, 32, 32))
    macs = evaluation.multiply_accumulates(cfg)
    assert counter.get_total_flops() == 2 * macs["as_run"]
    unseen = sum(j > i for i in range(17) for j in range(17))
    assert macs["as_run"] - macs["causal"] == spared * unseen * 2 * 128     # of two products, in two blocks read in full


def test_the_rank_of_a_checkpoint_is_that_on_pictures_as_the_model_takes_them(photos, finished, capsys):
    result = json.loads(printed([finished / "best.pt", "--rank", "--json"], capsys))
    model = evaluation.build(torch.load(finished / "best.pt", weights_only=True)).eval()
    pictures = [eval_transform(image, None, 16) for image, _ in open_data(str(photos), "val", 16)]      # all of them
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    expected = evaluation.attention_rank(model, normalize(pixels))
    assert {name: result[name] for name in expected} == expected


def test_the_lines_for_people_hold_every_property_that_was_asked_for(finished, tmp_path, capsys):
    flags = ["--calibration", "--rank", "--attention", tmp_path / "a.png", "--int8", "--macs"]
    result = json.loads(printed([finished / "best.pt", *flags, "--json"], capsys))
    said = printed([finished / "best.pt", *flags], capsys)
    for text in (f"attention drawn in {tmp_path / 'a.png'}", f"calibration error {100 * result['ece']:.2f} %", f"8 bits: top-1 {result['int8_acc1']:.3f} %",
                 f"block  2{result['rank_80'][1][0]:6} / {result['rank_90'][1][0]:3}",
                 f"variance of the logits over pictures: {result['logit_variance']:.3g}",
                 f"{result['macs']['published'] / 1e9:.4f} G published"):
        assert text in said


@pytest.mark.slow
def test_properties_of_all_pictures_are_measured_in_one_process(finished):
    code, _, errors = torchrun(2, ROOT / "eval.py", finished / "best.pt", "--rank")
    assert code and "error: --rank is measured in one process: use python, not torchrun" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A file as the authors publish theirs, behind a file:// address: a model of size T, for 16 pixels and 3 classes."""
    model = VisionTransformer(config("tiny", img_size=16, patch_size=8, num_classes=3))
    arguments = argparse.Namespace(model="illama_tiny", lr=0.004, finetune=None)
    torch.save({"model": model.state_dict(), "epoch": 299, "args": arguments}, tmp_path / "illama-tiny-in1k-75.0.pth")
    monkeypatch.setattr("model.PUBLISHED_URL", tmp_path.as_uri())
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
    loaded = evaluation.build(evaluation.open_checkpoint("illama-tiny-in1k-75.0"))
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in loaded.state_dict().items())


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
    assert "illama-tiny-in1k-75.0 does not say what it was trained on: give --data or --image" in refused(
        evaluation, ["illama-tiny-in1k-75.0"], capsys)
    said = refused(evaluation, ["illama-tiny-in1k-75.0", "--image", photos / "val" / "cat" / "00.png"], capsys)
    assert "illama-tiny-in1k-75.0 does not name its 3 classes, so --image cannot: use a checkpoint that train.py" in said
    state = published.state_dict()
    state.pop("blocks.3.attn.qkv.bias")
    torch.save({"model": state}, tmp_path / "part.pth")
    assert "blocks.3.attn.qkv.bias is missing" in refused(evaluation, [tmp_path / "part.pth", "--data", photos], capsys)


def test_a_download_without_a_network_is_told_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("model.PUBLISHED_URL", (tmp_path / "nowhere").as_uri())
    said = refused(evaluation, ["illama-small-in1k-79.9", "--data", "shapes"], capsys)
    assert "illama-small-in1k-79.9.pth could not be downloaded to" in said and "connect to a network, or give" in said


def test_a_published_file_that_would_run_code_is_refused(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    torch.save({"model": {}, "args": argparse.Namespace(trap=Trap())}, tmp_path / "trap.pth")
    said = refused(evaluation, [tmp_path / "trap.pth"], capsys)
    assert re.search(r"trap.pth cannot be read as a checkpoint .* \(it holds \S+, which could run code\): use", said)
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    said = refused(evaluation, ["illama-huge"], capsys)
    assert "no checkpoint at illama-huge: check the path, or give one of the names illama-tiny-in1k-75.0, illama" in said


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("flags, said", [
    (["--data", "nowhere"], "--data nowhere is neither one of shapes"),
    (["--data", "shapes"], "shapes has the classes circle, ring, crescent, bar, triangle and 5 more, but the model"),
    (["--image", "nowhere.png"], "nowhere.png cannot be read as a picture"),
    (["--image", __file__], "test_eval.py cannot be read as a picture"),
    (["--soft-mask", "2"], "alpha is 2.0; it must be between 0 and 1"),
    (["--soft-mask", "low"], "argument --soft-mask: invalid float value: 'low'; --help lists the flags"),
    (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--image", "a.png", "--data", "shapes"], "--image looks at one picture alone: drop it, or --data"),
    (["--image", "a.png", "--shape-bias", "a"], "--image looks at one picture alone: drop it, or --shape-bias"),
    (["--attention", "nowhere/a.png"], "--attention nowhere/a.png: give the path of a .png, in a folder that exists"),
    (["--attention", "a.txt"], "--attention a.txt: give the path of a .png"),
    (["--int8", "--dtype", "bfloat16"], "--int8 is compared with float32: drop --dtype bfloat16"),
    (["--shape-bias", "nowhere"], "--shape-bias nowhere is neither shapes-cue nor a folder: give one with"),
    (["--shape-bias", "shapes-cue"], "has the categories arrow, bar, circle, crescent, heart and 5 more, but the model"),
    (["--fast"], "unrecognized arguments: --fast; --help lists the flags"),
    (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
])
def test_bad_flags_are_refused(flags, said, finished, capsys):
    assert said in refused(evaluation, [finished / "best.pt", *flags], capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_one_sentence(workers, photos, finished, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "val" / "dog" / "01.png").write_bytes(b"no picture")
    said = refused(evaluation, [finished / "best.pt", "--data", tmp_path / "photos", "--workers", workers], capsys)
    assert "dog/01.png cannot be read as a picture" in said


def test_a_soft_mask_for_a_model_without_one_is_refused(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    torch.save(checkpoint | dict(alpha=None, config=checkpoint["config"] | dict(mask="causal")), tmp_path / "causal.pt")
    said = refused(evaluation, [tmp_path / "causal.pt", "--soft-mask", "0"], capsys)
    assert "mask 'causal' has no alpha to set" in said


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "best.pt", weights_only=True)
    for changes, said in ((dict(depth=3), "blocks.2.attn.proj.bias is missing"),
                          (dict(swiglu=False), "blocks.0.mlp.fc1.bias is missing"),
                          (dict(num_classes=4), "head.bias is (3,), not (4,)"),
                          (dict(colour=1), "other.pt: config has the unknown field 'colour': use another file"),
                          (dict(depth=0), "depth is 0; it must be at least 1")):
        torch.save(checkpoint | dict(config=checkpoint["config"] | changes), tmp_path / "other.pt")
        assert said in refused(evaluation, [tmp_path / "other.pt"], capsys)
    torch.save(dict(config=checkpoint["config"], model=checkpoint["model"]), tmp_path / "part.pt")
    assert "part.pt lacks classes, alpha, run: use a checkpoint that train.py wrote" in refused(
        evaluation, [tmp_path / "part.pt"], capsys)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    assert "weights.pt is neither a checkpoint that train.py wrote nor published iLLaMA weights" in refused(
        evaluation, [tmp_path / "weights.pt"], capsys)


def test_missing_and_damaged_checkpoints_are_refused(finished, tmp_path, capsys):
    assert "no checkpoint at nowhere.pt" in refused(evaluation, ["nowhere.pt"], capsys)
    whole = (finished / "best.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "half.pt cannot be read as a checkpoint" in refused(evaluation, [tmp_path / "half.pt"], capsys)


def test_data_with_a_class_that_the_model_does_not_know_is_refused(photos, finished, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data" / "val" / "owl").rename(tmp_path / "data" / "val" / "wolf")
    assert "has the class folders wolf, which are not among" in refused(
        evaluation, [finished / "best.pt", "--data", tmp_path / "data"], capsys)
