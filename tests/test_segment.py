"""Segmentation: one property per test."""
import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import SMALL, equal, in_ranks, load, metrics, refused
from data import normalize
from downstream import segment
from downstream.drawn import Scenes
from downstream.scenes import Annotated, AnnotatedFolder, crop, distort, open_scenes, train_transform
from downstream.segment import RECIPES, lr_at, make_optimizer, open_segmenter
from downstream.segmenter import Segmenter, UPerNet, confusion, evaluate, pixel_loss, predict, scores, slide, starts
from harness.run import RunFolder
from model import STEPS, config
from test_model import CASES, every_step, hashed, hashed_images, hashed_weights

CLASSES = ["red", "green", "blue"]
COLOURS = np.array([(0, 0, 0), (200, 60, 60), (60, 200, 60), (60, 60, 200)], dtype=np.uint8)
TINY = ("--size nano --depth 2 --img-size 16 --patch-size 4 --short-side 20 --batch-size 4 --iterations 4 --eval-every 2 "
        "--warmup 1 --workers 0 --device cpu").split()


@pytest.fixture(scope="session")
def streets(tmp_path_factory):
    """A folder in ADE20K's layout: halves of two colours, with their classes, below a stripe that is not labelled."""
    root = tmp_path_factory.mktemp("streets")
    for split, count in (("training", 8), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            rng = random.Random(f"{split} {i}")
            mask = np.zeros((rng.randint(22, 30), rng.randint(24, 40)), dtype=np.uint8)
            mask[4:, : mask.shape[1] // 2], mask[4:, mask.shape[1] // 2:] = 1 + i % 3, 1 + (i + 1) % 3
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
            Image.fromarray(COLOURS[mask]).save(root / "images" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def run(data, out, *flags):
    segment.main([str(arg) for arg in ("--data", data, "--out", out, *TINY, *flags)])
    return load(out / "last.pt")


@pytest.fixture(scope="session")
def trained(streets, tmp_path_factory):
    """The folder of a finished run on `streets`."""
    folder = tmp_path_factory.mktemp("segment") / "trained"
    run(streets, folder)
    return folder


def build(step="soft_mask", head="linear", depth=4):
    """A small Segmenter of a step: 16 patches of 8 pixels, 5 classes."""
    cfg = config(**dict(size="nano", depth=depth, img_size=32, patch_size=8, num_classes=5) | CASES[step])
    model = Segmenter(cfg, head).eval()
    model.backbone.load_state_dict(hashed_weights(model.backbone))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Model


@every_step
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_every_step_and_head_gives_logits_for_each_pixel_and_upernet_a_second_time_in_training(step, head):
    model, images = build(step, head), hashed_images(2)
    outputs = model(images), model.train()(images)
    assert [len(output) for output in outputs] == [1, 1 + (head == "upernet")]
    assert all(logits.shape == (2, 5, 32, 32) for output in outputs for logits in output)


@every_step
def test_the_linear_head_reads_the_last_blocks_patches_at_their_places(step):
    model, images = build(step), hashed_images(2)
    tokens = model.backbone.forward_features(images)
    patches = tokens[:, :-1] if model.backbone.cfg.cls_last else tokens[:, 1:]
    (features,) = model.features(images)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(features[:, :, row, column], patches[:, 4 * row + column])


def test_upernet_taps_the_published_blocks_without_the_last_norm():
    assert UPerNet.taps(12) == [3, 5, 7, 11] and UPerNet.taps(24) == [7, 11, 15, 23]
    model, seen = build(head="upernet", depth=12), []
    for i in (3, 5, 7, 11):
        model.backbone.blocks[i].register_forward_hook(lambda module, inputs, output: seen.append(output[:, :-1]))
    features = model.features(hashed_images(1))
    for maps, tokens in zip(features, seen, strict=True):
        assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)


def test_upernet_has_the_parameters_of_the_published_configuration():
    D, classes = 192, 150

    def conv(inputs, outputs, kernel):                                       # mmsegmentation's ConvModule: norm, no bias
        return inputs * outputs * kernel ** 2 + 2 * outputs
    deconv = D * D * 4 + D
    pyramid = 3 * deconv + 2 * D
    head = 4 * conv(D, D, 1) + conv(5 * D, D, 3) + 3 * conv(D, D, 1) + 3 * conv(D, D, 3) + conv(4 * D, D, 3)
    head += D * classes + classes
    auxiliary = conv(D, 256, 3) + 256 * classes + classes
    with torch.device("meta"):
        model = Segmenter(config("tiny", img_size=512, num_classes=classes), "upernet")
    assert sum(p.numel() for p in model.decode.parameters()) == pyramid + head + auxiliary
    backbone = 769 * D + 1025 * D + D + 12 * (4 * D ** 2 + 3 * D * 512 + 4 * D + 2 * D)      # without last norm and head
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone


def test_upernet_pools_as_published_and_its_second_output_is_of_the_third_tapped_block():
    model = build(head="upernet", depth=12).train()
    assert [pool[0].output_size for pool in model.decode.pools] == [1, 2, 3, 6]
    model(hashed_images(2))[1].sum().backward()
    reached = [block.mlp.fc2.weight.grad is not None for block in model.backbone.blocks]
    assert reached == [True] * 8 + [False] * 4


def test_a_causal_mask_hides_later_patches_from_earlier_ones_and_the_head_too():
    images = hashed_images(1)
    changed = images.clone()
    changed[:, :, 24:] *= -1                                                 # the last row of patches
    for step, same in (("ps_cls", True), ("rmsnorm", False)):
        model = build(step)
        one, other = model.features(images)[0], model.features(changed)[0]
        assert torch.equal(one[:, :, :3], other[:, :, :3]) == same and not torch.equal(one[:, :, 3], other[:, :, 3])


def test_pixels_that_do_not_count_add_nothing_to_the_loss_and_none_at_all_is_no_division_by_0():
    logits, labels = hashed((2, 5, 4, 4), 1), torch.randint(5, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels[:, 2:] = -1
    expected = -sum(logits[b, :, y, x].log_softmax(0)[labels[b, y, x]] for b in (0, 1) for y in (0, 1) for x in range(4)) / 32
    torch.testing.assert_close(pixel_loss([logits], labels), expected)
    torch.testing.assert_close(pixel_loss([logits, logits], labels), 1.4 * expected)
    assert pixel_loss([logits], torch.full_like(labels, -1)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and evaluation


def test_windows_are_those_of_the_published_evaluation_and_cover_everything():
    assert starts(512, 512) == [0] and starts(683, 512) == [0, 171] and starts(1024, 512) == [0, 341, 512]
    for length in range(128, 400, 7):
        covered = {place for start in starts(length, 128) for place in range(start, start + 128)}
        assert covered == set(range(length)) and max(starts(length, 128)) + 128 == length


class Painter(torch.nn.Module):
    """Logits that are the pixels themselves, so that predictions can be told beforehand."""

    def __init__(self, size):
        super().__init__()
        self.backbone = torch.nn.Identity()
        self.backbone.cfg = config("nano", img_size=size, patch_size=4, num_classes=3)

    def forward(self, images):
        return [images]


def noise(H, W, seed=0):
    return torch.randint(256, (3, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_overlapping_windows_are_averaged_and_put_back_in_their_places():
    image = noise(50, 75)
    torch.testing.assert_close(slide(Painter(32), image), normalize(image[None])[0])

    class Column(Painter):                                                   # of the window, so that windows disagree
        def forward(self, images):
            return [torch.arange(8.).expand_as(images)]
    assert slide(Column(8), noise(8, 10))[0, 0].tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 6, 7]


def test_an_image_of_a_windows_size_is_predicted_at_once():
    model, image = build(), noise(32, 32)
    torch.testing.assert_close(predict(model, image, 32), model(normalize(image[None]))[0][0].softmax(0))


def test_multi_scale_prediction_is_the_mean_over_scales_and_mirror_images():
    image, model = noise(40, 48), build()
    views = [predict(model, image, 40, scales=[scale]) for scale in (1, 1.5)]
    assert not torch.allclose(*views, atol=1e-3)
    torch.testing.assert_close(predict(model, image, 40, scales=(1, 1.5)), sum(views) / 2)
    views = [predict(model, mirrored, 40) for mirrored in (image, image.flip(-1))]          # resized, they may round apart
    torch.testing.assert_close(predict(model, image, 40, flip=True), (views[0] + views[1].flip(-1)) / 2)
    assert predict(model, image, 40, scales=[0.1]).shape == (5, 40, 48)      # smaller than a window: raised to it


def test_confusion_and_scores_agree_with_counting_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    labels, predicted = (torch.randint(low, 4, (37, 23), generator=generator) for low in (-1, 0))
    labels[labels == 3], predicted[predicted == 3] = 0, 1                    # class 3 neither occurs nor is predicted
    pairs = [(t, p) for t, p in zip(labels.flatten().tolist(), predicted.flatten().tolist()) if t != -1]
    matrix = confusion(labels, predicted, 4)
    assert matrix.tolist() == [[pairs.count((t, p)) for p in range(4)] for t in range(4)]
    iou = [100 * sum(t == c == p for t, p in pairs) / sum(c in pair for pair in pairs) for c in range(3)]
    result = scores(matrix)
    assert result["test_iou"] == pytest.approx([*iou, None]) and result["test_miou"] == pytest.approx(sum(iou) / 3)
    assert result["test_pixel_acc"] == pytest.approx(100 * sum(t == p for t, p in pairs) / len(pairs))


def test_evaluation_is_at_each_images_own_resolution_with_its_own_annotation(streets):
    val = AnnotatedFolder(streets, "validation")
    result = evaluate(Painter(16), segment.validation(val), 64, torch.device("cpu"))
    assert result["test_miou"] > 95                                          # the colours are the classes; edges blur


def test_the_same_from_one_rank_as_from_two(streets, trained):
    flags = "eval", trained, "--json", "--workers", 0
    code, said, errors = in_ranks(2, "-m", "downstream.segment", *flags)
    assert code == 0, errors
    rows = [json.loads(line) for line in said.splitlines()]
    model, val = open_segmenter(str(trained), "cpu")[0], open_scenes(str(streets), "validation", 20)
    result = evaluate(model, segment.validation(val), 20, torch.device("cpu"))
    assert rows == [result | dict(images=3, multi_scale=False)]


def test_evaluation_at_several_scales_from_the_command_line(streets, trained, capsys):
    segment.main(["eval", str(trained), "--json", "--multi-scale", "--workers", "0", "--device", "cpu"])
    model, val = open_segmenter(str(trained), "cpu")[0], open_scenes(str(streets), "validation", 20)
    views = dict(scales=segment.SCALES, flip=True)
    result = evaluate(model, segment.validation(val), 20, torch.device("cpu"), **views)
    assert json.loads(capsys.readouterr().out) == result | dict(images=3, multi_scale=True)
    assert result != evaluate(model, segment.validation(val), 20, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_image_and_annotation_are_transformed_together():
    source = Scenes("training", 48)
    mask = source[0][1]
    image = Image.fromarray(np.repeat(np.asarray(mask)[..., None] * 20, 3, axis=2))          # the class is the grey level
    for seed in range(8):
        small, labels = train_transform(image, mask, random.Random(seed), 32, 48)
        grey, labels = np.asarray(small)[..., 1] / 20, np.asarray(labels)
        flat = np.abs(np.diff(grey, append=0)) + np.abs(np.diff(grey, axis=0, append=0)) < 0.05  # not at an edge
        assert small.size == (32, 32) and labels.shape == (32, 32)
        for level in np.unique(labels[flat & (labels > 0)]):                 # one class, one grey
            assert np.ptp(grey[flat & (labels == level)]) < 1.0


def test_a_transform_is_a_function_of_its_random_numbers(streets):
    source = AnnotatedFolder(streets, "training")
    one, same, other = (Annotated(source, lambda image, mask, rng: train_transform(image, mask, rng, 16, 20), seed)[0, 1]
                        for seed in (0, 0, 1))
    assert equal(list(one[:2]), list(same[:2])) and not torch.equal(one[0], other[0])
    assert one[0].shape == (3, 16, 16) and one[1].shape == (16, 16) and one[1].dtype == torch.int64


def test_what_padding_adds_does_not_count():
    image, mask = Image.new("RGB", (10, 8), "white"), Image.new("L", (10, 8), 2)
    image, mask = crop(image, mask, random.Random(0), 16)
    assert np.asarray(mask)[:8, :10].min() == 2 and (np.asarray(mask) > 0).sum() == 80
    assert np.asarray(image)[8:].max() < 130                                 # ImageNet's mean colour


def test_a_crop_shows_more_than_one_class_where_it_can():
    mask = np.ones((64, 64), dtype=np.uint8)
    mask[:, 48:] = 2
    image, mask = Image.new("RGB", (64, 64)), Image.fromarray(mask)
    shares = [np.mean(np.asarray(crop(image, mask, random.Random(seed), 16)[1]) == 1) for seed in range(40)]
    assert np.mean([0.25 <= share <= 0.75 for share in shares]) > 0.6        # of single draws 18 %
    alone = crop(image, Image.new("L", (64, 64), 1), random.Random(0), 16)   # it cannot: no endless search
    assert alone[0].size == (16, 16)


def test_distortion_changes_colours_half_of_the_time_each():
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    same = sum(np.array_equal(np.asarray(distort(image, random.Random(seed))), np.asarray(image)) for seed in range(400))
    assert 10 < same < 50                                                    # 1 in 16


def test_scenes_show_what_their_annotations_say_at_any_size():
    one, other = Scenes("training", 48)[3], Scenes("training", 48)[3]
    assert one[0].tobytes() == other[0].tobytes() and one[0].size == one[1].size == (64, 48)
    assert Scenes("validation", 48)[3][0].tobytes() != one[0].tobytes()
    small, large = (np.bincount(np.asarray(Scenes("training", size)[3][1]).ravel(), minlength=12) / (size ** 2 * 4 / 3)
                    for size in (48, 96))
    assert np.abs(small - large).max() < 0.02
    seen = {value for i in range(40) for value in np.unique(np.asarray(Scenes("training", 32)[i][1]))}
    assert seen == set(range(1, 12))
    for i in range(20):                                                      # shapes are light, the background dark
        image, mask = (np.asarray(part, dtype=float) for part in Scenes("training", 64)[i])
        assert image[mask > 1].mean() > 120 > 80 > image[mask == 1].mean()


def spoil(folder, what):
    """A copy's one fault: (what to write where, what the sentence says)."""
    annotation = folder / "annotations" / "validation" / "0.png"
    size = Image.open(annotation).size
    if what == "missing":
        annotation.unlink()
    elif what == "size":
        Image.new("L", (5, 5)).save(annotation)
    elif what == "label":
        Image.new("L", size, 4).save(annotation)
    elif what == "rgb":
        Image.new("RGB", size).save(annotation)
    elif what == "broken":
        annotation.write_bytes(b"no image")
    elif what == "image":
        (folder / "images" / "validation" / "0.png").unlink()
    elif what == "long":
        Image.new("RGB", (340, 20)).save(folder / "images" / "validation" / "0.png")
    elif what == "classes":
        (folder / "classes.txt").unlink()
    elif what == "encoding":
        (folder / "classes.txt").write_bytes("rot\ngrün\nblau".encode("latin-1"))
    elif what == "split":
        (folder / "images" / "validation").rename(folder / "images" / "val")


@pytest.mark.parametrize("what, said", [
    ("missing", "only one of them has 0"), ("image", "only one of them has 0"), ("size", "has (5, 5) pixels, its image"),
    ("label", "holds class 4, but there are 3"), ("long", "has 340 x 20 pixels, longer than 16:1"), ("rgb", "has the mode RGB"), ("broken", "cannot be read as an image"),
    ("classes", "classes.txt is missing"), ("split", "is missing"), ("encoding", "is not text in UTF-8")])
def test_bad_annotations_are_refused_in_one_sentence(what, said, streets, trained, tmp_path, capsys):
    shutil.copytree(streets, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", what)
    message = refused(segment, ["eval", trained, "--data", tmp_path / "spoilt", "--workers", 0], capsys)
    assert said in message and str(tmp_path) in message


def test_a_bad_annotation_in_training_is_replaced_by_the_next_and_reported(streets, tmp_path, capsys):
    shutil.copytree(streets, tmp_path / "spoilt")
    Image.new("RGB", (9, 9)).save(tmp_path / "spoilt" / "annotations" / "training" / "5.png")
    run(tmp_path / "spoilt", tmp_path / "run")
    assert capsys.readouterr().err.count("5.png has the mode RGB") == 1      # of two passes


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_the_learning_rate_is_mmsegmentations_warm_up_and_linear_decay():
    recipe = RECIPES["ade20k"]
    assert lr_at(0, recipe) == pytest.approx(6e-5 * 1e-6)
    assert lr_at(750, recipe) == pytest.approx(6e-5 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6)))
    assert lr_at(1500, recipe) == pytest.approx(6e-5 * (1 - 1500 / 160000))
    assert lr_at(159_999, recipe) == pytest.approx(6e-5 / 160000)


def test_the_learning_rate_decays_by_block_and_norms_and_biases_have_no_weight_decay():
    model = build(head="upernet")
    recipe = RECIPES["ade20k"]
    groups = make_optimizer(model, recipe).param_groups
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        layer = 0 if name.split(".")[1] in ("patch_embed", "cls_token", "pos_embed") else 5
        if ".blocks." in name:
            layer = 1 + int(name.split(".")[2])
        assert found[id(p)] == (pytest.approx(0.9 ** (5 - layer)), 0.01 if p.ndim > 1 else 0)
    assert len(found) == len(list(model.parameters()))


def test_a_first_update_is_as_large_as_the_learning_rate_of_its_block(streets, tmp_path):
    flags = "--iterations 1 --eval-every 1 --warmup 0 --weight-decay 0 --layer-decay 0.5".split()
    before = run(streets, tmp_path / "before", *flags, "--lr", 0)["model"]
    after = run(streets, tmp_path / "after", *flags, "--lr", 1e-3)["model"]
    for name, layer in (("decode.classify.weight", 3), ("backbone.blocks.1.mlp.fc2.weight", 2),
                        ("backbone.blocks.0.mlp.fc2.weight", 1), ("backbone.patch_embed.proj.weight", 0)):
        assert (after[name] - before[name]).abs().max() == pytest.approx(1e-3 * 0.5 ** (3 - layer), rel=0.01)


def test_training_learns_and_says_how_well(streets, tmp_path):
    run(streets, tmp_path / "run", "--iterations", 60, "--eval-every", 30)
    first, last = metrics(tmp_path / "run")
    assert last["iteration"] == 60 and last["train_loss"] < first["train_loss"]
    assert last["test_miou"] > 60 and last["step"] == "soft_mask" and last["seed"] == 0


@pytest.mark.parametrize("step", STEPS)
def test_every_step_trains(step, streets, tmp_path):
    state = run(streets, tmp_path / "run", "--step", step)
    assert state["iteration"] == 4 and state["run"]["step"] == step


def test_a_resumed_run_ends_as_the_run_left_alone(streets, monkeypatch, tmp_path):
    flags = ["--head", "upernet", "--depth", 3, "--drop-path", 0.5]          # randomness and running statistics
    alone = run(streets, tmp_path / "alone", *flags)
    assert alone["model"]["decode.pyramid.0.1.num_batches_tracked"] == 4     # trained in training mode

    class Stop(Exception):
        pass

    def save_and_stop(folder, *rest):
        save(folder, *rest)
        if folder.state.iteration == 2:
            raise Stop
    save = RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunFolder, "save", save_and_stop)
        run(streets, tmp_path / "run", *flags)
    torch.rand(7)
    segment.main(["--resume", str(tmp_path / "run"), "--workers", "1", "--device", "cpu"])
    assert equal(load(tmp_path / "run" / "last.pt"), alone)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


def test_a_finished_run_resumes_to_its_end(trained, capsys):
    segment.main(["--resume", str(trained), "--device", "cpu"])
    assert "done    mIoU" in capsys.readouterr().out


def test_micro_batches_give_the_same_loss(streets, tmp_path):
    run(streets, tmp_path / "one", "--warmup", 0)
    run(streets, tmp_path / "two", "--warmup", 0, "--micro-batch", 2)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)


def test_bfloat16_computes_differently_but_stores_float32(streets, trained, tmp_path):
    state = run(streets, tmp_path / "run", "--dtype", "bfloat16")
    assert all(value.dtype in (torch.float32, torch.int64) for value in state["model"].values())
    assert not equal(state["model"], load(trained / "last.pt")["model"])


def test_two_ranks_train_as_one(streets, tmp_path):
    run(streets, tmp_path / "alone")
    code, said, errors = in_ranks(2, "-m", "downstream.segment", "--data", streets, "--out", tmp_path / "two", *TINY)
    assert code == 0, errors
    for alone, shared in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "two"), strict=True):
        assert shared["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)


def test_two_ranks_evaluate_with_the_statistics_that_they_save(streets, tmp_path):
    flags = "--data", streets, "--out", tmp_path / "two", *TINY, "--head", "upernet", "--depth", 3
    code, said, errors = in_ranks(2, "-m", "downstream.segment", *flags)
    assert code == 0, errors
    model, val = open_segmenter(str(tmp_path / "two" / "last.pt"), "cpu")[0], open_scenes(str(streets), "validation", 20)
    result = evaluate(model, segment.validation(val), 20, torch.device("cpu"))
    assert metrics(tmp_path / "two")[-1]["test_iou"] == result["test_iou"]


def test_it_starts_from_a_classifiers_weights_which_say_what_the_model_is(photos, streets, tmp_path, capsys):
    train.main(["--data", str(photos), "--out", str(tmp_path / "a"), *SMALL, "--epochs", "1", "--step", "rope", "--abs-pos"])
    source = load(tmp_path / "a" / "best.pt")["model"]
    segment.main([*map(str, ("--data", streets, "--out", tmp_path / "b", "--init-from", tmp_path / "a", "--img-size", 32)),
                  *"--short-side 32 --batch-size 4 --iterations 1 --eval-every 1 --warmup 0 --lr 0 --workers 0 --device cpu".split()])
    assert "learned positions resized from 4 to 16 patches" in capsys.readouterr().out
    checkpoint = load(tmp_path / "b" / "last.pt")
    assert checkpoint["run"]["step"] == "rope" and checkpoint["config"]["depth"] == 2 and checkpoint["recipe"]["patch_size"] == 8
    for name, value in checkpoint["model"].items():
        if name.startswith("backbone.") and "pos_embed" not in name:
            assert torch.equal(value, source[name.removeprefix("backbone.")]), name


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_it_starts_from_a_run_of_its_own_with_the_head_if_that_is_the_same(head, streets, tmp_path, capsys):
    source = run(streets, tmp_path / "a", "--depth", 3, "--head", head, "--iterations", 2)["model"]
    for other, same in (("linear", head == "linear"), ("upernet", head == "upernet")):
        flags = ["--lr", 0, "--head", other, "--init-from", tmp_path / "a" / "last.pt", "--depth", 3]
        state = run(streets, tmp_path / other, *flags)["model"]
        names = [name for name in state if "running" not in name and "tracked" not in name]
        kept = [name in source and torch.equal(state[name], source[name]) for name in names]
        assert all(kept) == same and all(one for one, name in zip(kept, names) if ".blocks." in name)
        assert ("new head" in capsys.readouterr().out) != same


def test_settings_that_do_not_fit_are_refused(photos, streets, trained, finished, tmp_path, capsys):
    data = "--data", streets
    for flags, said in [
        ([*data, "--iterations", 5, "--eval-every", 2], "--iterations 5 is not a multiple of --eval-every 2"),
        ([*data, "--batch-size", 9], "8 training images, less than one --batch-size 9"),
        ([*data, *TINY, "--head", "upernet", "--micro-batch", 1], "leave each rank 2 or more"),
        ([*data, *TINY, "--recipe", "ade20k"], "--recipe ade20k is for fine-tuning"),
        ([*data, *TINY, "--head", "upernet", "--depth", 2], "needs at least 3 blocks"),
        ([*data, *TINY, "--init-from", finished], "does not fit the weights of --init-from"),
        (["--data", photos, "--device", "cpu"], "classes.txt is missing"),
        (["--data", "nowhere"], "neither scenes nor a folder"),
        ([*data, "--lr", "nan"], "--lr is nan"),
        ([*data, *TINY, "--warmup", 5], "--iterations 4 would end before --warmup 5: lower that, too"),
        (["--resume", trained, "--lr", 1], "--resume continues the run as it was started"),
        (["--resume", finished], "last.pt is a run of another program, which trains VisionTransformer, not Segmenter"),
        (["eval", finished], "is no run of downstream.segment: start one with --init-from"),
        (["eval", trained, "--image", "a.png", "--draw", "a.xyz"], "a name that ends in .png"),
        (["eval", trained, "--workers", -1], "--workers is -1"),
        ([*data, *TINY, "--head", "upernet", "--depth", 3, "--patch-size", 16], "at least 2 x 2 patches"),
        (["eval", trained, "--image", "nowhere.png"], "nowhere.png cannot be read"),
        (["eval", trained, "--image", "a.png", "--data", streets], "--image segments one image alone"),
        (["eval", trained, "--data", "scenes"], "but the model knows"),
    ]:
        assert said in refused(segment, flags, capsys), flags


def test_weights_that_are_not_finite_have_no_miou(trained, tmp_path, capsys):
    checkpoint = load(trained / "last.pt")
    next(value for name, value in checkpoint["model"].items() if name.startswith("decode."))[:] = float("nan")
    torch.save(checkpoint, tmp_path / "last.pt")
    assert "the logits of an image are not finite" in refused(segment, ["eval", tmp_path / "last.pt", "--workers", 0], capsys)


def test_the_classes_of_an_image_are_drawn_beside_it_upright_with_a_legend(streets, trained, tmp_path, capsys):
    upright, exif = Image.open(streets / "images" / "validation" / "1.png"), Image.Exif()
    exif[0x0112] = 6                                                         # taken with the camera on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    segment.main(["eval", str(trained), "--image", str(tmp_path / "a.png"), "--draw", str(tmp_path / "drawn.png"), "--device", "cpu"])
    page, shown = np.asarray(Image.open(tmp_path / "drawn.png")), np.asarray(upright)
    H, W = shown.shape[:2]
    assert np.array_equal(page[:H, :W], shown)
    assert len(np.unique(page[:H, W: 2 * W].reshape(-1, 3), axis=0)) <= 3 and page.shape[1] > 2 * W


def test_without_out_runs_have_a_folder_of_their_own(streets, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    segment.main(["--data", str(streets), *TINY])
    (folder,) = (tmp_path / "out" / "segment").iterdir()
    assert folder.name.startswith("nano-soft_mask-depth-2") and (folder / "best.pt").exists()
    segment.main(["--resume", "--device", "cpu"])                            # the newest there, and no other program's
