"""What is true of the data: one property a test."""
import math
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from data import (FILL, MEAN, OPERATIONS, STD, Images, erase, eval_batches, eval_transform, fit, loader, mix, normalize,
                  open_data, rand_augment, resized_crop, train_batches, train_transform)
from harness.files import read_image
from harness.shapes import Shapes


BICUBIC = InterpolationMode.BICUBIC


def pixels(image):
    return np.asarray(image, dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def test_a_shape_is_a_function_of_seed_split_and_index():
    one, label = Shapes("train", 32)[7]
    assert Shapes("train", 32)[7] == (one, label)
    others = [Shapes("val", 32)[7], Shapes("train", 32, seed=1)[7], Shapes("train", 32)[17]]
    assert all(other_label == label and other != one for other, other_label in others)


def test_a_shape_is_the_same_image_at_every_size():
    for index in range(10):
        small, large = (Shapes("train", size)[index][0] for size in (32, 256))
        difference = np.abs(pixels(small) - pixels(large.resize((32, 32), Image.BOX)))
        assert difference.mean() < 0.02 and difference.max() < 0.35          # edges and stripes are a little softer


def test_every_class_is_equally_frequent():
    for split, count in (("train", 10_000), ("val", 2_000), ("conflict", 2_000)):
        shapes = Shapes(split, 8)
        labels = [shapes.shape_and_texture(index, random.Random(index))[0] for index in range(len(shapes))]
        assert np.bincount(labels).tolist() == [count // 10] * 10


def test_centred_shapes_are_the_same_ones_in_the_middle():
    for index in (0, 5, 50, 1005):                                           # circles and squares
        images = [np.asarray(open_data(data, "val", 64)[index][0]) for data in ("shapes-cue", "shapes-cue-centred")]
        assert (images[0][0, 0] == images[1][0, 0]).all() and (images[0] != images[1]).any()     # the same background
        scattered, centred = (image.max(2) > 90 for image in images)
        assert np.argwhere(centred).mean(0) == pytest.approx([31.5, 31.5], abs=1)
        assert centred.sum() == pytest.approx(scattered.sum(), rel=0.1)
    assert np.argwhere(scattered).mean(0) != pytest.approx([31.5, 31.5], abs=3)


def test_shapes_and_textures_are_independent_by_default_and_cue_ties_or_parts_them():
    def share(split, cue):
        """How often the texture is the shape's own."""
        shapes = Shapes(split, 8, cue)
        pairs = [shapes.shape_and_texture(index, random.Random(f"test {index}")) for index in range(len(shapes))]
        return np.mean([shape == texture for shape, texture in pairs])
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


def test_a_small_image_is_cropped_with_a_black_border_and_flipped():
    image = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3))
    bordered = pixels(ImageOps.expand(image, 4))
    places = {}                                                              # what each crop looks like: where it is
    for y, x in np.ndindex(9, 9):
        window = bordered[y: y + 32, x: x + 32]
        places |= {window.tobytes(): (y, x, False), window[:, ::-1].tobytes(): (y, x, True)}
    seen = [places[pixels(train_transform(image, random.Random(draw), 32)).tobytes()] for draw in range(1000)]
    assert {(y, x) for y, x, _ in seen} == set(np.ndindex(9, 9))             # every place, and half of them flipped
    assert 450 < sum(flipped for *_, flipped in seen) < 550


def noise(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def photo(width=96, height=96):
    """Something with edges, gradients and all three colours."""
    return Shapes("train", 96)[4][0].resize((width, height), Image.BICUBIC)


def test_the_resized_crop_has_inceptions_areas_and_ratios(monkeypatch):
    boxes, rng, image = [], random.Random(0), Image.new("RGB", (500, 375))
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or Image.new("RGB", (2, 2)))
    for _ in range(20_000):
        resized_crop(image, rng, 2)
    left, top, right, bottom = np.array(boxes).T
    areas, ratios = (right - left) * (bottom - top) / (500 * 375), (right - left) / (bottom - top)
    assert left.min() == top.min() == 0 and right.max() == 500 and bottom.max() == 375
    assert 0.078 < areas.min() < 0.082 and areas.max() > 0.98 and 0.425 < areas.mean() < 0.440
    assert 0.74 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.35


@pytest.fixture
def boxes(monkeypatch):
    """The boxes that are cropped."""
    seen, crop = [], Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: seen.append(box) or crop(self, box))
    return seen


def test_the_resized_crop_is_pils_bicubic_but_for_rounding(boxes):
    image, off = photo(300, 200), []
    for draw in range(20):
        out = np.array(resized_crop(image, random.Random(draw), 48)).astype(int)
        off.append(np.abs(out - np.array(image.crop(boxes[-1]).resize((48, 48), Image.BICUBIC))))
    assert np.max(off) <= 2 and (np.array(off) > 0).mean() < 0.01


@pytest.mark.parametrize("width, height, box", [(1000, 3, (498, 0, 502, 3)), (3, 1000, (0, 498, 3, 502))])
def test_a_very_long_image_is_cropped_in_the_middle(width, height, box, boxes):
    resized_crop(noise(width, height), random.Random(0), 8)
    assert boxes == [box]


# What each operation of RandAugment is, by torchvision's functions and by formula.
REFERENCES = {
    "AutoContrast": lambda image, level, sign: TF.autocontrast(image),
    "Equalize": lambda image, level, sign: TF.equalize(image),
    "Invert": lambda image, level, sign: TF.invert(image),
    "Rotate": lambda image, level, sign: TF.rotate(image, 30 * level * sign, BICUBIC, fill=FILL),
    "Posterize": lambda image, level, sign: TF.posterize(image, 4 - int(4 * level)),
    "Solarize": lambda image, level, sign: TF.solarize(image, 256 - int(256 * level)),
    "SolarizeAdd": lambda image, level, sign: Image.fromarray(np.where(
        np.array(image) < 128, np.minimum(np.array(image).astype(int) + int(110 * level), 255), image).astype(np.uint8)),
    "Color": lambda image, level, sign: TF.adjust_saturation(image, max(0.1, 1 + 0.9 * level * sign)),
    "Contrast": lambda image, level, sign: TF.adjust_contrast(image, max(0.1, 1 + 0.9 * level * sign)),
    "Brightness": lambda image, level, sign: TF.adjust_brightness(image, max(0.1, 1 + 0.9 * level * sign)),
    "Sharpness": lambda image, level, sign: TF.adjust_sharpness(image, max(0.1, 1 + 0.9 * level * sign)),
    "ShearX": lambda image, level, sign: moved(image, shear=[math.degrees(math.atan(0.3 * level * sign)), 0]),
    "ShearY": lambda image, level, sign: moved(image, shear=[0, math.degrees(math.atan(0.3 * level * sign))]),
    "TranslateX": lambda image, level, sign: moved(image, translate=[-0.45 * level * sign * image.width, 0]),
    "TranslateY": lambda image, level, sign: moved(image, translate=[0, -0.45 * level * sign * image.height]),
}


def moved(image, translate=(0, 0), shear=(0, 0)):
    return TF.affine(image, 0, list(translate), 1, list(shear), BICUBIC, FILL, center=[0, 0])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.74, 0.9, 0.95])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_what_its_definition_says(name, level, sign):
    image = photo(80, 96)
    out, expected = (np.array(f(image, level, sign)).astype(int) for f in (OPERATIONS[name], REFERENCES[name]))
    off = np.abs(out - expected)
    assert off.max() <= 1 and (off > 0).mean() < 1e-3                        # rounding of fractional moves
    assert (out != np.array(image)).any()


def test_posterising_to_no_bits_is_black():
    assert OPERATIONS["Posterize"](photo(), 1.0, 1).getextrema() == ((0, 0),) * 3


def test_rand_augment_draws_two_of_fifteen_and_does_each_half_of_the_time(monkeypatch):
    done = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda _, level, sign, name=name: done.append((name, level, sign)))
    rng, counts = random.Random(0), []
    for _ in range(20_000):
        before = len(done)
        rand_augment(None, rng)
        counts.append(len(done) - before)
    shares = np.bincount(counts) / len(counts)
    assert np.abs(shares - [0.25, 0.5, 0.25]).max() < 0.01
    names, levels, signs = zip(*done)
    frequency = np.array([names.count(name) for name in OPERATIONS]) / len(names)
    assert len(OPERATIONS) == 15 and np.abs(frequency - 1 / 15).max() < 0.006
    assert abs(np.mean(levels) - 0.8996) < 0.002 and abs(np.mean(np.array(levels) == 1) - 0.0228) < 0.004
    assert abs(np.mean(signs)) < 0.02


def test_rand_augment_is_a_function_of_its_generator():
    image = photo()
    outs = [rand_augment(image, random.Random(seed)).tobytes() for seed in (*range(40), *range(40))]
    assert outs[:40] == outs[40:] and len(set(outs)) > 20


@pytest.mark.parametrize("size", [32, 48])
def test_augmentation_comes_after_crop_and_flip_and_only_if_asked_for(size, monkeypatch):
    monkeypatch.setattr("data.rand_augment", lambda image, rng: ImageOps.invert(image))
    plain = train_transform(photo(), random.Random(3), size)
    assert train_transform(photo(), random.Random(3), size, augment=True) == ImageOps.invert(plain)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_erasing_fills_boxes_with_normal_noise():
    images = torch.full((4000, 3, 32, 32), 7.0)
    out = erase(images, random.Random(0), 0.25)
    erased = (out != 7).all(1)                                               # B, H, W: in all channels
    assert (out[:, :, :, :] != 7).sum() == 3 * erased.sum()
    shares = erased.float().mean((1, 2))
    assert abs((shares > 0).float().mean() - 0.25) < 0.02 and abs(shares[shares > 0].mean() - 0.176) < 0.01
    assert 0.015 < shares[shares > 0].min() and shares.max() < 0.36
    for mask in erased[shares > 0][:50]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask[rows.min(): rows.max() + 1, columns.min(): columns.max() + 1].all()      # one whole box
    values = out.permute(0, 2, 3, 1)[erased]                                 # pixels, 3
    assert values.mean().abs() < 0.01 and abs(values.std() - 1) < 0.01
    assert values.T.corrcoef()[0, 1].abs() < 0.01                            # each channel on its own


def test_erasing_and_mixing_are_functions_of_their_generator():
    def once():
        rng, images = random.Random("a"), torch.ones(8, 3, 16, 16)
        return mix(erase(images, rng, 0.5), torch.arange(8), 8, rng, 0.8, 1.0)
    for one, other in zip(once(), once()):
        assert torch.equal(one, other)


def draws(mixup, cutmix, count, size=224):
    """The share of the first image of a pair, `count` times; and the batches."""
    rng, labels = random.Random(0), torch.tensor([0, 1])
    images = torch.stack([torch.zeros(1, size, size), torch.ones(1, size, size)])
    for _ in range(count):
        mixed, targets = mix(images, labels, 2, rng, mixup, cutmix)
        yield targets[0, 0].item(), mixed, targets


@pytest.mark.parametrize("alpha, mean, below, none", [(0.1, 0.712, 0.518, 0.197), (0.5, 0.692, 0.567, 0.0057),
                                                      (1.0, 0.682, 0.602, 0.0001)])
def test_cutmix_pastes_a_box_and_counts_its_area(alpha, mean, below, none):
    shares = []
    for share, mixed, targets in draws(0, alpha, 3000):
        assert mixed[0].mean().item() == pytest.approx(1 - share, abs=1e-6)  # the other image's pixels, counted
        assert torch.equal(mixed[1], 1 - mixed[0]) and targets[1, 1].item() == pytest.approx(share)
        shares.append(share)
    shares = np.array(shares)                                                # the published code's figures
    assert abs(shares.mean() - mean) < 0.02 and abs((shares < 0.75).mean() - below) < 0.03
    assert abs((shares == 1).mean() - none) < 0.025


@pytest.mark.parametrize("alpha, minor", [(0.1, 0.058), (0.5, 0.182), (1.0, 0.250)])
def test_mixup_adds_opposite_images_and_labels(alpha, minor):
    shares = []
    for share, mixed, targets in draws(alpha, 0, 5000, size=1):
        assert mixed.flatten().tolist() == pytest.approx([1 - share, share], abs=1e-6)
        shares.append(min(share, 1 - share))
    assert abs(np.mean(shares) - minor) < 0.01


def test_each_batch_takes_mixup_or_cutmix_with_even_chances():
    pasted = [set(mixed.unique().tolist()) <= {0, 1} for _, mixed, _ in draws(0.8, 1.0, 2000, size=16)]
    assert 0.47 < np.mean(pasted) < 0.53


def test_the_partner_is_the_opposite_of_the_batch():
    images, labels = torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6)
    mixed, targets = mix(images, labels, 6, random.Random(1), 1.0, 0)
    share = targets[0, 0].item()
    assert 0 < share < 1 and torch.allclose(mixed.flatten(), share * labels + (1 - share) * labels.flip(0))
    for i in range(6):
        assert targets[i, i].item() == pytest.approx(share) and targets[i, 5 - i].item() == pytest.approx(1 - share)


def test_smoothing_mixed_targets_in_the_loss_is_smoothing_each_label_first():
    logits, labels, share = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4), 0.3
    hard = F.one_hot(labels, 10).float()
    smooth = hard * 0.9 + 0.1 / 10                                           # as published
    target = share * smooth + (1 - share) * smooth.flip(0)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    mixed = share * hard + (1 - share) * hard.flip(0)
    torch.testing.assert_close(F.cross_entropy(logits, mixed, label_smoothing=0.1), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("size", [32, 224, 384])
@pytest.mark.parametrize("width, height", [(500, 375), (301, 203), (97, 640), (40, 33)])
def test_evaluation_is_the_published_one_written_with_pil_alone(size, width, height):
    image = photo(width, height)
    short = size if size <= 32 else int(size / (224 / 256))
    if size >= 384:
        expected = image.resize((size, size), Image.BICUBIC)
    else:
        w, h = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        left, top = int(round((w - size) / 2)), int(round((h - size) / 2))
        expected = image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
    expected = (pixels(expected) - MEAN) / STD                               # H, W, 3
    out = normalize(TF.pil_to_tensor(eval_transform(image, None, size))[None])[0].permute(1, 2, 0)
    assert np.abs(out.numpy() - expected).max() < 1e-6


def test_an_image_of_the_right_size_is_left_alone():
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
        start = epoch * (images // batch_size)
        micro = list(train_batches(images, batch_size, accumulate, rank, world, seed=3, epochs=epoch + 1, start=start))
        assert len(micro) == images // batch_size * accumulate
        per_rank.append([sum(micro[i: i + accumulate], []) for i in range(0, len(micro), accumulate)])
    batches = [sum(parts, []) for parts in zip(*per_rank)]
    assert all(len(batch) == batch_size for batch in batches)
    return [set(batch) for batch in batches]


def test_an_epoch_takes_each_image_at_most_once_and_leaves_less_than_a_batch():
    keys = set.union(*global_batches(103, 12, 2, 3))
    assert len(keys) == 96 and {index for _, index in keys} < set(range(103))


def test_an_iteration_takes_the_same_images_whatever_the_ranks_and_micro_batches():
    alone = global_batches(103, 12, 1, 1)
    assert all(global_batches(103, 12, accumulate, world) == alone for accumulate, world in ((4, 1), (1, 2), (2, 3)))


def test_every_epoch_has_an_order_of_its_own_and_the_same_each_time():
    first, again, second = ([sorted(index for _, index in batch) for batch in global_batches(103, 12, 1, 1, epoch)]
                            for epoch in (0, 0, 1))
    assert first == again != second


def test_a_run_goes_on_with_the_micro_batches_that_it_would_have_had():
    whole = list(train_batches(103, 12, 2, rank=1, world=3, epochs=3))
    assert len(whole) == 3 * 8 * 2
    for start in (0, 5, 8, 23, 24):
        left = list(train_batches(103, 12, 2, rank=1, world=3, epochs=3, start=start))
        assert left == whole[2 * start:] and len(left) == len(whole) - 2 * start


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 10, 11, 12])
def test_evaluation_takes_each_image_once(images, world):
    batches = [batch for rank in range(world) for batch in eval_batches(images, 4, rank, world)]
    assert sorted(key for batch in batches for key in batch) == [(0, index) for index in range(images)]
    assert all(0 < len(batch) <= 4 for batch in batches)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    source = Shapes("train", 32)
    images = Images(source, partial(train_transform, size=32), seed=1)
    again = Images(source, partial(train_transform, size=32), seed=1)
    assert torch.equal(images[2, 5][0], again[2, 5][0])
    draws = {images[epoch, 5][0].numpy().tobytes() for epoch in range(20)}
    assert len(draws) > 15


def test_workers_change_nothing():
    source, batches = Shapes("train", 16), []
    for workers in (0, 2):
        order = train_batches(40, 8, seed=1)
        batches.append(list(loader(Images(source, partial(train_transform, size=16)), order, workers)))
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


@pytest.mark.parametrize("mode, name", [
    ("L", "a.jpg"), ("CMYK", "a.jpg"), ("RGB", "a.png"), ("1", "a.png"), ("P", "a.png"), ("LA", "a.png"),
    ("RGBA", "a.png"), ("RGBA", "png.JPEG")])
def test_images_of_every_kind_are_read_in_colour(mode, name, tmp_path):
    photo(70, 50).convert(mode).save(tmp_path / name, format="PNG" if name == "png.JPEG" else None)
    image, expected = read_image(tmp_path / name), Image.open(tmp_path / name).convert("RGB")
    assert image.mode == "RGB" and np.array_equal(np.array(image), np.array(expected))
    pixels, _ = Images([(read_image(tmp_path / name), 0)], partial(train_transform, size=48))[0, 0]
    assert pixels.shape == (3, 48, 48) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut short", "half"])
def test_an_unreadable_image_is_named(content, tmp_path):
    photo().save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match="a.jpg cannot be read as an image .*: replace or remove it") as error:
        read_image(tmp_path / "a.jpg")
    assert "\n" not in str(error.value)


def test_labels_stay_in_place_when_a_split_lacks_a_class(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "val" / "cat")
    source = open_data(str(tmp_path / "some"), "val", 32, classes=["cat", "dog", "owl"])
    assert set(source.labels.tolist()) == {1, 2} and source.classes == ["cat", "dog", "owl"]


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
    ("missing", "val has no class folders: put images into"),
    ("empty", "val has no class folders: put images into"),
    ("flat", "val has no class folders: put images into"),
    ("empty class", "has class folders without images .*dog.*: fill or remove them"),
    ("unknown class", r"has the class folders wolf, which are not among the 3 classes that are known \(cat, dog"),
])
def test_a_bad_folder_is_told_in_one_sentence(photos, tmp_path, how, said):
    shutil.copytree(photos, tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    with pytest.raises(ValueError, match=said) as error:
        open_data(str(tmp_path / "bad"), "val", 32, classes=["cat", "dog", "owl"])
    assert "\n" not in str(error.value)


def test_a_folder_is_read_in_torchvisions_order(photos, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "train")
    shutil.copytree(photos / "val" / "cat", tmp_path / "train" / "cat" / "1more" / "deep")
    shutil.copytree(photos / "val" / "dog", tmp_path / "train" / "cat" / "09more")
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    ours = open_data(str(tmp_path), "train", 32)
    assert [(ours.path(i), label) for i, label in enumerate(ours.labels)] == theirs.samples and len(ours) > 24


def test_hidden_files_and_folders_are_no_images(photos, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "val")
    (tmp_path / "val" / "cat" / "._00.png").touch()
    shutil.copytree(photos / "val" / "cat", tmp_path / "val" / ".cat")
    shutil.copytree(photos / "val" / "cat", tmp_path / "val" / "cat" / ".thumbnails")
    source = open_data(str(tmp_path), "val", 32)
    assert len(source) == 11 and source.classes == ["cat", "dog", "owl"]


def test_a_link_to_images_elsewhere_is_followed(photos, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(photos / "val" / name)
    assert len(open_data(str(tmp_path), "val", 32)) == 8


def test_a_folder_of_images_is_arrays_without_an_object_for_each_file(photos):
    source = open_data(str(photos), "train", 32)
    assert all(array.dtype != object and len(array) == 24 for array in (source.names, source.labels))
    assert all(len(value) <= 3 for value in vars(source).values() if isinstance(value, list | dict))


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(ValueError, match="cifar11 is neither one of shapes, shapes-cue, shapes-cue-centred, cifar10, cifar100, flowers102 nor a"):
        open_data("cifar11", "train", 32)


def test_data_of_other_classes_is_refused():
    with pytest.raises(ValueError, match="--data shapes has the classes circle, .* but the model knows cat, dog"):
        open_data("shapes", "val", 32, classes=["cat", "dog"])


def test_flowers_are_trained_on_two_parts_of_the_original_and_tested_on_the_third(monkeypatch):
    class Flowers102(list):
        def __init__(self, root, download, split):
            super().__init__((Image.new("RGB", (2, 2)), i) for i in {"train": (1, 2), "val": (3,), "test": (4, 5)}[split])
    monkeypatch.setattr("torchvision.datasets.Flowers102", Flowers102)
    train, val = (open_data("flowers102", split, 224) for split in ("train", "val"))
    assert [label for _, label in train] == [1, 2, 3] and [label for _, label in val] == [4, 5]
    assert len(train.classes) == 102


def test_a_package_that_a_data_set_needs_is_named(monkeypatch):
    def needs_scipy(*args, **kwargs):
        import no_such_package  # noqa: F401
    needs_scipy.__name__ = "Flowers102"
    monkeypatch.setattr("torchvision.datasets.Flowers102", needs_scipy)
    with pytest.raises(ValueError, match="--data flowers102 needs no_such_package: pip install no_such_package"):
        open_data("flowers102", "train", 224)


def test_a_download_without_a_network_is_told_in_one_sentence(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    said = r"--data cifar10 could not be downloaded to datasets/ \(no route to host\): connect to a network, or"
    with pytest.raises(ValueError, match=said) as error:
        open_data("cifar10", "train", 32)
    assert "\n" not in str(error.value)
