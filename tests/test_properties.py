"""What is true of the properties that are measured beside the accuracy: one a test."""
import json
import math
import random
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import by_hand, in_ranks, refused
from data import eval_transform, normalize, open_data
from harness.checkpoint import build
from harness.flags import InputError
from harness.shapes import TEXTURES, Shapes
from model import VisionTransformer, config
from replication import properties
from replication.properties import categories, open_conflict


def measured(capsys, checkpoint, *flags):
    """The row that the program prints."""
    properties.main([str(arg) for arg in (checkpoint, *flags, "--workers", 0, "--device", "cpu")])
    return json.loads(capsys.readouterr().out)


def pixels(image):
    return np.asarray(image, dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def with_confidence(*confidences):
    """Logits of two classes, the first of which is as likely as is said."""
    return torch.tensor([[math.log(c), math.log(1 - c)] for c in confidences])


def test_a_model_that_is_as_often_right_as_it_is_sure_is_calibrated():
    result = properties.calibration(with_confidence(*[0.75] * 4), torch.tensor([0, 0, 0, 1]))
    assert result["ece"] == pytest.approx(0, abs=1e-6) and len(result["reliability"]) == 1
    assert result["reliability"][0] == pytest.approx((4, 0.75, 0.75))


def test_the_calibration_error_weighs_the_gap_of_each_of_15_equal_bins_by_its_images():
    sure = [0.61, 0.65, 0.78, 0.79, 0.81, 0.99]             # bins end at 0.6, 0.667, 0.733, 0.8 ...
    right = [1, 0, 0, 0, 1, 1]
    labels = torch.tensor([0 if hit else 1 for hit in right])
    result = properties.calibration(with_confidence(*sure), labels)
    assert [row[0] for row in result["reliability"]] == [2, 2, 1, 1]
    assert result["reliability"][1] == pytest.approx((2, 0.785, 0), rel=1e-6)
    gaps = 2 * abs(0.5 - 0.63) + 2 * 0.785 + (1 - 0.81) + (1 - 0.99)
    assert result["ece"] == pytest.approx(gaps / 6, rel=1e-6)
    assert properties.calibration(with_confidence(*sure), labels, bins=1)["ece"] == pytest.approx(
        abs(sum(right) - sum(sure)) / 6, rel=1e-6)


def test_logits_that_are_no_numbers_have_no_calibration():
    with pytest.raises(ValueError, match="some logits are not finite"):
        properties.calibration(torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))


def test_the_calibration_of_a_checkpoint_is_that_of_its_logits(photos, finished, capsys):
    result = measured(capsys, finished / "best.pt", "--measure", "calibration", "--batch-size", 4)
    expected = properties.calibration(*by_hand(photos, finished / "best.pt"))
    assert result["ece"] == pytest.approx(expected["ece"], rel=1e-4)
    assert sum(row[0] for row in result["reliability"]) == 11


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Maps(torch.nn.Module):
    """A model of one block and one head, whose attention map is the image."""
    def attention_maps(self, images):
        return images[None]


def test_the_rank_counts_singular_values_up_to_a_share_of_their_sum():
    for values, at_80, at_90 in (([1.] * 11, 9, 10), ([1., 0, 0, 0], 1, 1), ([8.1, 1, 0.9], 1, 2), ([6, 3.1, 0.9], 2, 2)):
        turn, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)))
        result = properties.attention_rank(Maps(), (turn @ torch.tensor(values).diag())[None, None])
        assert result == {"rank_80": [[at_80]], "rank_90": [[at_90]]}


def test_maps_are_averaged_over_images_before_they_are_decomposed():
    one, other = torch.eye(10), torch.eye(10).flip(0)                       # each of full rank, their mean of half
    both = torch.stack([one, other])[:, None]
    assert properties.attention_rank(Maps(), both[:1])["rank_90"] == [[9]]
    assert properties.attention_rank(Maps(), both)["rank_90"] == [[5]]


def saved(path, data="shapes", classes=tuple(Shapes.classes), step="soft_mask", **fields):
    """A checkpoint of random weights, large enough to tell images apart."""
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
        result = measured(capsys, tmp_path / "a.pt", "--measure", "attention")
        assert (result["step"], result["seed"]) == (step, 7)
        assert all((fraction > 0) == (step != "causal") for fraction in result["attention_to_patches"])
        seen[step] = result["logit_variance"]
    assert seen["causal"] < 1e-10 and min(seen["rmsnorm"], seen["ps_cls"]) > 1e-3


@pytest.mark.parametrize("step", ["rmsnorm", "ps_cls"])
def test_the_class_tokens_attention_is_its_row_of_the_maps_without_itself(step, tmp_path):
    model = saved(tmp_path / "a.pt", step=step)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.attention_maps(normalize(images))                      # depth, B, heads, N, N
    own = 16 if model.cfg.cls_last else 0
    patches = [i for i in range(17) if i != own]
    expected = (maps[:, :, 0, own] + maps[:, :, 1, own])[..., patches] / 2
    torch.testing.assert_close(properties.class_token_attention(model, normalize(images)), expected)


def test_the_leak_is_0_before_the_last_patch_under_an_exactly_causal_mask_alone(photos, tmp_path, capsys):
    for step, mask, leaks in (("ps_cls", "causal", False), ("soft_mask", "soft_log", False), ("soft_mask", "soft", True)):
        model = saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"), step, mask=mask)
        result = measured(capsys, tmp_path / "a.pt", "--measure", "leak")["leak"]
        assert len(result) == model.cfg.tokens == 17
        assert all((change > 0) == leaks for change in result[:15]) and min(result[15:]) > 0
    images = [eval_transform(image, None, 16) for image, _ in open_data(str(photos), "val", 16)]      # 3 or 4 of a class
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    assert result == pytest.approx(properties.output_change(model, pixels), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Shape or texture


def test_the_sixteen_categories_are_those_published():
    known = categories([f"n{label:08}" for label in range(1000)])
    assert {name: len(labels) for name, labels in known.items()} == dict(
        airplane=1, bear=4, bicycle=2, bird=49, boat=5, bottle=7, car=3, cat=6, chair=4, clock=3, dog=109, elephant=2,
        keyboard=2, knife=1, oven=1, truck=8)
    assert [sum(known[name]) for name in ("bird", "bottle", "dog", "truck")] == [4213, 5502, 22672, 5637]
    assert len({label for labels in known.values() for label in labels}) == 207          # no class is in two
    names = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    assert [names[label] for label in known["car"]] == ["beach wagon", "convertible", "sports car"]
    assert categories(["cat", "dog"]) == {"cat": [0], "dog": [1]}


def test_the_conflict_split_says_what_its_images_show():
    source, shapes, textures = open_conflict("shapes-cue", 16)
    assert len(source) == len(shapes) == len(textures) == 2000
    assert shapes == [Shapes.classes[source[index][1]] for index in range(2000)]
    assert not any(shape == texture for shape, texture in zip(shapes, textures)) and len(set(textures)) == 10
    source.img_size = 64

    def tones(index):
        """How many colours the bright part of an image has: a handful along its edge, where it is plain."""
        colours = pixels(source[index][0]).reshape(-1, 3)
        return len(np.unique(colours[colours.mean(1) > 0.45].round(2), axis=0))
    plain = Shapes.classes[list(TEXTURES).index("plain")]
    counts = {own: [tones(i) for i in range(200) if (textures[i] == plain) == own] for own in (True, False)}
    assert 1.5 * np.median(counts[True]) < np.median(counts[False])


def test_shape_bias_is_the_share_of_shape_among_decisions_for_shape_or_texture():
    shapes, textures = ["cat", "cat", "dog", "owl", "owl"], ["dog", "owl", "owl", "owl", "cat"]
    assert properties.shape_bias(["cat", "owl", "dog", "owl", "dog"], shapes, textures) == 2 / 3  # the last is neither
    assert properties.shape_bias(["cat", "cat", "dog", "cat", "owl"], shapes, textures) == 1
    assert properties.shape_bias(textures, shapes, textures) == 0           # where both are owls, none is counted
    assert math.isnan(properties.shape_bias(["owl"], ["owl"], ["owl"]))
    with pytest.raises(ValueError):
        properties.shape_bias(["owl"], ["owl", "cat"], ["owl", "cat"])


def test_a_category_has_the_mean_probability_of_its_classes():
    logits = torch.tensor([[0.45, 0.0001, 0.3, 0.2499], [0.05, 0.05, 0.4, 0.5]]).log()
    known = {"first": [0, 1], "second": [2, 3]}
    assert properties.to_categories(logits, known) == ["second", "second"]          # 0.225 and 0.275
    assert properties.to_categories(logits, {"first": [0], "second": [1, 2, 3]}) == ["first", "second"]


def cue_conflict(root, *names):
    """Writes SHAPE/shapeN-textureN.png; returns images as the model takes them, and pairs [shape, texture]."""
    pixels, pairs = [], [[part.rstrip("0123456789") for part in name.split("-")] for name in names]
    for i, (name, (shape, _)) in enumerate(zip(names, pairs)):
        (root / shape).mkdir(parents=True, exist_ok=True)
        image = Image.frombytes("RGB", (16, 16), random.Random(i).randbytes(768))
        image.save(root / shape / f"{name}.png")
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return normalize(torch.stack(pixels)), pairs


def test_cue_conflict_images_are_read_from_their_names(photos, tmp_path, capsys):
    model = saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"))
    images, pairs = cue_conflict(tmp_path / "cue", "cat1-dog2", "cat2-cat1", "dog10-owl3", "dog2-cat11", "owl1-dog1",
                                 "owl2-owl2")
    with torch.no_grad():
        guesses = [["cat", "dog", "owl"][i] for i in model(images).argmax(1)]
    result = measured(capsys, tmp_path / "a.pt", "--measure", "shape_bias", "--cue", tmp_path / "cue")
    decided = [guess == shape for guess, (shape, texture) in zip(guesses, pairs)
               if shape != texture and guess in (shape, texture)]
    assert (result["conflicts"], result["decided"]) == (4, len(decided)) and 0 < len(decided)
    assert result["shape_bias"] == pytest.approx(sum(decided) / len(decided))
    for name in ("owl3", "dog1-cat1"):                                      # no texture; not the folder's shape
        wrong = tmp_path / "cue" / "owl" / f"{name}.png"
        Image.new("RGB", (16, 16)).save(wrong)
        said = refused(properties, [tmp_path / "a.pt", "--measure", "shape_bias", "--cue", tmp_path / "cue"], capsys)
        assert f"owl/{name}.png is not named as SHAPE/shapeN-textureN.png says: rename or remove it" in said
        wrong.unlink()


def test_a_model_of_a_thousand_classes_decides_by_the_sixteen_categories(photos, tmp_path, capsys):
    classes = [f"n{label:08}" for label in range(1000)]
    for name, renamed in zip(("cat", "dog", "owl"), classes):
        shutil.copytree(photos / "val" / name, tmp_path / "data" / "val" / renamed)
    model = saved(tmp_path / "a.pt", tmp_path / "data", classes)
    images, pairs = cue_conflict(tmp_path / "cue", "cat1-dog2", "bear3-cat1", "dog2-truck4", "oven1-dog9", "bird1-boat1",
                                 "truck2-bird2")
    with torch.no_grad():
        guesses = properties.to_categories(model(images), categories(classes))
    result = measured(capsys, tmp_path / "a.pt", "--measure", "shape_bias", "--cue", tmp_path / "cue")
    assert result["decided"] == sum(guess in pair for guess, pair in zip(guesses, pairs)) and result["conflicts"] == 6


def test_a_shape_bias_without_decisions_is_undefined(photos, tmp_path, capsys):
    saved(tmp_path / "a.pt", photos, ("cat", "dog", "owl"))
    cue_conflict(tmp_path / "cue", "cat1-cat2")
    result = measured(capsys, tmp_path / "a.pt", "--measure", "shape_bias", "--cue", tmp_path / "cue")
    assert (result["shape_bias"], result["conflicts"], result["decided"]) == (None, 0, 0)


def test_a_model_of_shapes_is_asked_on_their_conflict_split(tmp_path, capsys):
    saved(tmp_path / "a.pt")
    result = measured(capsys, tmp_path / "a.pt", "--measure", "shape_bias")
    assert result["conflicts"] == 2000 and 0 < result["decided"] < 2000 and 0 <= result["shape_bias"] <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Loss landscape


def test_a_filter_of_a_direction_is_as_long_as_the_models_and_norms_and_biases_do_not_move(tmp_path):
    model = saved(tmp_path / "a.pt")
    direction = properties.random_direction(model, 0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert not direction[name].any()
        else:
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
            assert abs(F.cosine_similarity(direction[name].flatten(), p.flatten(), dim=0)) < 0.2


def test_a_direction_is_drawn_by_the_parameters_name(tmp_path):
    """The same noise where weights of two steps have the same shapes."""
    both = [VisionTransformer(config("nano", step, depth=2, img_size=16, patch_size=8)) for step in ("vit", "rope")]
    vit, rope = (properties.random_direction(model, 0) for model in both)
    for name in ("blocks.1.attn.qkv.weight", "head.weight", "cls_token"):
        assert F.cosine_similarity(vit[name].flatten(), rope[name].flatten(), dim=0) > 0.95
    again, other = (properties.random_direction(both[0], pair)["head.weight"].flatten() for pair in (0, 1))
    assert torch.equal(again, vit["head.weight"].flatten())
    assert abs(F.cosine_similarity(again, other, dim=0)) < 0.1


def test_a_landscape_has_the_models_loss_in_its_middle_and_leaves_the_model_as_it_is(photos, finished, capsys):
    result = measured(capsys, finished / "best.pt", "--measure", "landscape", "leak")
    grids, middle = np.array(result["landscape"]), properties.OFFSETS.index(0)
    assert grids.shape == (3, len(properties.OFFSETS), len(properties.OFFSETS))
    np.testing.assert_allclose(grids[:, middle, middle], result["test_loss"], atol=1e-3)     # of all, fewer than 500
    assert len(np.unique(grids)) > 300
    assert result["leak"] == measured(capsys, finished / "best.pt", "--measure", "leak")["leak"]
    batched = measured(capsys, finished / "best.pt", "--measure", "landscape", "--batch-size", 4)
    np.testing.assert_allclose(batched["landscape"], grids, atol=2e-3)


def test_a_row_of_a_landscape_is_along_the_second_direction(finished, monkeypatch, capsys):
    plain = properties.random_direction

    def first_is_none(model, pair, which):
        return {name: which * value for name, value in plain(model, pair, which).items()}
    monkeypatch.setattr(properties, "random_direction", first_is_none)
    grid = np.array(measured(capsys, finished / "best.pt", "--measure", "landscape")["landscape"])[0]
    assert np.ptp(grid, axis=0).max() < 1e-3 and np.ptp(grid, axis=1).min() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Work


@pytest.mark.parametrize("size, published", [("tiny", 1.2536832), ("small", 4.598882304), ("base", 17.563828224),
                                             ("large", 62.794129408)])
def test_multiply_accumulates_are_the_published_ones(size, published):
    assert properties.multiply_accumulates(config(size))["published"] == round(published * 1e9)


@pytest.mark.parametrize("mask, spared", [("none", 0), ("causal", 2), ("soft_log", 2), ("soft", 1), ("modified", 2)])
def test_multiply_accumulates_as_run_are_those_that_torch_counts(mask, spared):
    cfg = config("nano", "vit" if mask == "none" else "soft_mask", mask=mask, img_size=32, patch_size=8, depth=3)
    # Plain matrix multiplications: which fused kernels the counter knows depends on torch's version.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        VisionTransformer(cfg).eval()(torch.zeros(1, 3, 32, 32))
    macs = properties.multiply_accumulates(cfg)
    assert counter.get_total_flops() == 2 * macs["as_run"]
    unseen = sum(j > i for i in range(17) for j in range(17))
    assert macs["as_run"] - macs["causal"] == spared * unseen * 2 * 128     # of two products, in two blocks read in full


def test_the_rank_of_a_checkpoint_is_that_on_images_as_the_model_takes_them(photos, finished, capsys):
    result = measured(capsys, finished / "best.pt", "--measure", "rank")
    model = build(torch.load(finished / "best.pt", weights_only=True)).eval()
    images = [eval_transform(image, None, 16) for image, _ in open_data(str(photos), "val", 16)]      # all of them
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = properties.attention_rank(model, normalize(pixels))
    assert {name: result[name] for name in expected} == expected


def test_properties_of_all_images_are_measured_in_one_process(finished):
    code, _, errors = in_ranks(2, "-m", "replication.properties", finished / "best.pt", "--measure", "rank")
    assert code and "error: rows are measured in one process: use python, not torchrun" in errors


def test_several_checkpoints_and_properties_are_a_row_each_and_are_appended_to_a_file(finished, tmp_path, capsys):
    flags = ["--measure", "macs", "calibration", "--workers", "0", "--device", "cpu", "--out", tmp_path / "out" / "rows.jsonl"]
    properties.main(list(map(str, [finished, finished / "last.pt", *flags])))
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in printed.splitlines()]
    assert len(rows) == 2 and all(row["step"] == "soft_mask" and row["test_acc1"] > 0 for row in rows)
    assert all({"macs", "ece", "seed", "overrides"} < row.keys() and row["images"] == 11 for row in rows)


@pytest.mark.parametrize("flags, said", [
    (["--measure", "speed"], "argument --measure: invalid choice: 'speed'"),
    ([], "the following arguments are required: --measure"),
    (["--measure", "shape_bias", "--cue", "nowhere"], "--cue nowhere is neither shapes-cue nor a folder: give one with"),
    (["--measure", "shape_bias"], "has the categories arrow, bar, circle, crescent, heart and 5 more, but the model"),
    (["--measure", "rank", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
])
def test_bad_flags_are_refused(flags, said, finished, capsys):
    assert said in refused(properties, [finished / "best.pt", *flags], capsys)


def test_a_thousand_classes_that_are_not_imagenets_have_no_categories():
    with pytest.raises(InputError, match="n01440764 and so on, not of class0, class1"):
        categories([f"class{label}" for label in range(1000)])
