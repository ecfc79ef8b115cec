"""What is true of the data: one property a test."""
import math
import random
import runpy
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data import (MEAN, STD, EvalSampler, Images, Shapes, TrainSampler, crop_flip, eval_transform, fit, loader,
                  normalize, open_data)


def pixels(image):
    return np.asarray(image, dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def test_a_shape_is_a_function_of_seed_split_and_index():
    one, label = Shapes("train", 32)[7]
    assert Shapes("train", 32)[7] == (one, label)
    others = [Shapes("val", 32)[7], Shapes("train", 32, seed=1)[7], Shapes("train", 32)[17]]
    assert all(other_label == label and other != one for other, other_label in others)


def test_a_shape_is_the_same_picture_at_every_size():
    for index in range(10):
        small, large = (Shapes("train", size)[index][0] for size in (32, 256))
        difference = np.abs(pixels(small) - pixels(large.resize((32, 32), Image.BOX)))
        assert difference.mean() < 0.02 and difference.max() < 0.35          # edges and stripes are a little softer


def test_every_class_is_equally_frequent():
    for split, count in (("train", 10_000), ("val", 2_000), ("conflict", 2_000)):
        shapes = Shapes(split, 8)
        labels = [shapes.kinds(index, random.Random(index))[0] for index in range(len(shapes))]
        assert np.bincount(labels).tolist() == [count // 10] * 10


def test_shapes_and_textures_are_independent_by_default_and_cue_ties_or_parts_them():
    def share(split, cue):
        """How often the texture is the shape's own."""
        shapes = Shapes(split, 8, cue)
        kinds = [shapes.kinds(index, random.Random(f"test {index}")) for index in range(len(shapes))]
        return np.mean([shape == texture for shape, texture in kinds])
    assert 0.08 < share("train", cue=False) < 0.12
    assert share("train", cue=True) == share("val", cue=True) == 1
    assert share("conflict", cue=True) == 0


def test_a_linear_classifier_on_the_pixels_stays_under_40_percent():
    def arrays(split, count):
        pairs = [Shapes(split, 32)[index] for index in range(count)]
        x = torch.from_numpy(np.stack([pixels(image).ravel() for image, _ in pairs]))
        return torch.cat([x - 0.5, torch.ones(count, 1)], 1), torch.tensor([label for _, label in pairs])
    (x, y), (x_val, y_val) = arrays("train", 5000), arrays("val", 1000)
    gram, target = x.T @ x, x.T @ torch.nn.functional.one_hot(y).float()
    accuracies = []
    for ridge in (30, 100, 300, 1000):                                       # the best of them, chosen on val itself
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), target)
        accuracies.append(((x_val @ weights).argmax(1) == y_val).float().mean().item())
    assert 0.15 < max(accuracies) < 0.40


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def test_crop_flip_of_a_small_picture_is_a_window_on_it_with_a_black_border():
    image = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3))
    bordered = pixels(ImageOps.expand(image, 4))
    places = {}                                                              # what each crop looks like: where it is
    for y, x in np.ndindex(9, 9):
        window = bordered[y: y + 32, x: x + 32]
        places |= {window.tobytes(): (y, x, False), window[:, ::-1].tobytes(): (y, x, True)}
    seen = [places[pixels(crop_flip(image, random.Random(draw), 32)).tobytes()] for draw in range(1000)]
    assert {(y, x) for y, x, _ in seen} == set(np.ndindex(9, 9))             # every place, and half of them flipped
    assert 450 < sum(flipped for *_, flipped in seen) < 550


def test_crop_flip_of_a_large_picture_is_a_window_on_what_evaluation_crops_too():
    image = Image.frombytes("RGB", (70, 64), random.Random(0).randbytes(70 * 64 * 3))
    crops = {crop_flip(image, random.Random(draw), 56).tobytes() for draw in range(5000)}
    middle = eval_transform(image, None, 56)
    assert middle.tobytes() in crops and ImageOps.mirror(middle).tobytes() in crops
    assert len(crops) == 2 * 9 * 15 and all(len(crop) == 56 * 56 * 3 for crop in crops)      # of 70 x 64


@pytest.mark.parametrize("size", [32, 224, 384])
def test_evaluation_crops_by_the_size(size):
    image = Image.frombytes("RGB", (301, 203), random.Random(0).randbytes(301 * 203 * 3))
    if size == 32:
        expected = image.resize((int(32 * 301 / 203), 32), Image.BICUBIC).crop((8, 0, 40, 32))
    elif size == 224:
        expected = image.resize((int(256 * 301 / 203), 256), Image.BICUBIC).crop((78, 16, 302, 240))
    else:
        expected = image.resize((384, 384), Image.BICUBIC)
    assert np.array_equal(pixels(eval_transform(image, None, size)), pixels(expected))


def test_a_picture_of_the_right_size_is_left_alone():
    image, _ = Shapes("val", 32)[0]
    assert fit(image, 32) is image and eval_transform(image, None, 32) is image


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = normalize(images)
    for channel in range(3):
        torch.testing.assert_close(out[:, channel], (images[:, channel] / 255 - MEAN[channel]) / STD[channel])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def global_batches(images, batch_size, accumulate, world, epoch=0):
    """The set of keys of each iteration, over all ranks and micro-batches."""
    per_rank = []
    for rank in range(world):
        sampler = TrainSampler(images, batch_size, accumulate, rank, world, seed=3)
        sampler.epoch = epoch
        micro = list(sampler)
        assert len(micro) == len(sampler)
        per_rank.append([sum(micro[i: i + accumulate], []) for i in range(0, len(micro), accumulate)])
    batches = [sum(parts, []) for parts in zip(*per_rank)]
    assert all(len(batch) == batch_size for batch in batches)
    return [set(batch) for batch in batches]


def test_an_epoch_takes_each_picture_at_most_once_and_leaves_less_than_a_batch():
    keys = set.union(*global_batches(103, 12, 2, 3))
    assert len(keys) == 96 and {index for _, index in keys} < set(range(103))


def test_an_iteration_takes_the_same_pictures_whatever_the_ranks_and_micro_batches():
    alone = global_batches(103, 12, 1, 1)
    assert all(global_batches(103, 12, accumulate, world) == alone for accumulate, world in ((4, 1), (1, 2), (2, 3)))


def test_every_epoch_has_an_order_of_its_own_and_the_same_each_time():
    first, again, second = ([sorted(index for _, index in batch) for batch in global_batches(103, 12, 1, 1, epoch)]
                            for epoch in (0, 0, 1))
    assert first == again != second


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 10, 11, 12])
def test_evaluation_takes_each_picture_once(images, world):
    taken = [key for rank in range(world) for batch in EvalSampler(images, 4, rank, world) for key in batch]
    assert sorted(taken) == [(0, index) for index in range(images)]
    for rank in range(world):
        sampler = EvalSampler(images, 4, rank, world)
        assert len(sampler) == len(list(sampler))


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    source = Shapes("train", 32)
    images = Images(source, partial(crop_flip, size=32), seed=1)
    again = Images(source, partial(crop_flip, size=32), seed=1)
    assert torch.equal(images[2, 5][0], again[2, 5][0])
    draws = {images[epoch, 5][0].numpy().tobytes() for epoch in range(20)}
    assert len(draws) > 15


def test_workers_change_nothing():
    source, batches = Shapes("train", 16), []
    for workers in (0, 2):
        sampler = TrainSampler(40, 8, seed=1)
        batches.append(list(loader(Images(source, partial(crop_flip, size=16)), sampler, workers)))
    for (one, one_labels), (two, two_labels) in zip(*batches, strict=True):
        assert torch.equal(one, two) and torch.equal(one_labels, two_labels)
        assert one.dtype == torch.uint8


# ---------------------------------------------------------------------------------------------------------------------
# Folders, and bad input


def test_a_folder_has_labels_by_its_class_names(photos):
    source = open_data(str(photos), "val", 32)
    assert source.classes == ["cat", "dog", "owl"] and len(source) == 11
    reds = [pixels(image.convert("RGB"))[..., 0].mean() for image, label in source if label == 0]
    assert min(reds) > 0.5                                                   # cats are red there


def test_labels_stay_in_place_when_a_split_lacks_a_class(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "val" / "cat")
    source = open_data(str(tmp_path / "some"), "val", 32, classes=["cat", "dog", "owl"])
    assert {label for _, label in source.samples} == {1, 2} and source.classes == ["cat", "dog", "owl"]


def spoil(root, how):
    val = root / "val"
    if how == "missing":
        shutil.rmtree(val)
    elif how == "empty":
        shutil.rmtree(val)
        val.mkdir()
    elif how == "flat":
        for folder in list(val.iterdir()):
            for file in folder.iterdir():
                file.rename(val / f"{folder.name}-{file.name}")
            folder.rmdir()
    elif how == "empty class":
        for file in (val / "dog").iterdir():
            file.unlink()
    elif how == "unknown class":
        (val / "dog").rename(val / "wolf")


@pytest.mark.parametrize("how, said", [
    ("missing", "val is missing: put pictures into"),
    ("empty", "val has no class folders: put pictures into"),
    ("flat", "val has no class folders: put pictures into"),
    ("empty class", "has class folders without pictures .*dog.*: fill or remove them"),
    ("unknown class", r"has the class folders wolf, which are not among the 3 classes that are known \(cat, dog"),
])
def test_a_bad_folder_is_told_in_one_sentence(photos, tmp_path, how, said):
    shutil.copytree(photos, tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    with pytest.raises(ValueError, match=said) as error:
        open_data(str(tmp_path / "bad"), "val", 32, classes=["cat", "dog", "owl"])
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(ValueError, match="cifar11 is neither one of shapes, shapes-cue, cifar10, cifar100 nor a"):
        open_data("cifar11", "train", 32)


def test_data_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="--data shapes has the classes circle, .* but the model knows cat, dog"):
        open_data("shapes", "val", 32, classes=["cat", "dog"])


def test_a_download_without_a_network_is_told_in_one_sentence(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    said = r"--data cifar10 could not be downloaded to datasets/ \(no route to host\): connect to a network, or"
    with pytest.raises(ValueError, match=said) as error:
        open_data("cifar10", "train", 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_command_saves_a_grid_of_pictures(split, monkeypatch, tmp_path, capsys):
    flags = ["--img-size", "16", "--split", split, "--out", str(tmp_path / "grid.png")]
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    runpy.run_module("data", run_name="__main__")
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.width > 500 and len(sheet.getcolors(1 << 24)) > 100
    assert "pictures in 10 classes" in capsys.readouterr().out
