"""What users of comparable trainers met: each test is one such case."""
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import DEADLINE, ROOT, SMALL, Program, environment, equal, load, metrics, refused
from downstream import anytime, attention, export, segment, selection
from downstream.scenes import open_scenes, read_annotation, read_classes
from harness.checkpoint import build as build_checkpoint
from harness.checkpoint import load_weights, open_checkpoint
from harness.files import open_folder, read_image
from harness.processes import stop_requests
from harness.run import Monitor
from model import VisionTransformer, config
from replication import bench_data, ladder, properties
from test_model import build


def flags(photos, out):
    return ["--data", str(photos), "--out", str(out), *SMALL]


# ---------------------------------------------------------------------------------------------------------------------
# Data as people have them


def test_files_that_are_left_out_are_named_and_hidden_ones_are_not(tmp_path, capsys):
    (tmp_path / "train" / "cat" / "more").mkdir(parents=True)
    for name in ("cat/a.png", "cat/b.gif", "cat/more/c.avif", "cat/.hidden.gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name, "PNG")
    assert len(open_folder(tmp_path, "train", ["cat"])) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"warning: 2 files in {tmp_path}/train are left out (cat/b.gif, cat/more/c.avif): images end in .jpg")


def test_weights_that_do_not_name_their_classes_say_which_order_they_are_taken_to_be_in(tmp_path, capsys):
    net = torch.nn.Module()
    net.cfg = type("Cfg", (), dict(img_size=8, num_classes=3))
    for names, warned in ((["0", "1", "10"], "in this order: 0, 1, 10"), (["n01440764", "n01443537", "n01484850"], "")):
        for name in names:
            (tmp_path / names[0] / "val" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / names[0] / "val" / name / "a.png")
        evaluation.open_val("weights", dict(classes=None, run={}), net, str(tmp_path / names[0]))
        said = capsys.readouterr().err
        assert warned in said and bool(warned) == bool(said)


def test_a_single_class_folder_is_refused(photos, tmp_path, capsys):
    shutil.copytree(photos / "train" / "cat", tmp_path / "one" / "train" / "cat")
    said = refused(train, flags(tmp_path / "one", tmp_path / "run"), capsys)
    assert f"{tmp_path}/one/train has one class folder, cat, and there is nothing to tell apart" in said


def test_validation_images_as_they_come_are_told_how_to_sort(tmp_path, capsys):
    shutil.os.makedirs(tmp_path / "val")
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="has no class folders.*torchvision.datasets.ImageNet.PATH, 'val'., from their archive"):
        open_folder(tmp_path, "val")


def test_a_palette_with_transparency_and_a_corrupt_exif_give_their_colours_and_no_warning(tmp_path):
    page = Image.new("P", (4, 4), 1)
    page.putpalette([0, 0, 0, 200, 30, 40])
    page.save(tmp_path / "a.png", transparency=b"\x80\x10")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (200, 30, 40)
        assert read_image(tmp_path / "b.jpg").size == (40, 30)


@pytest.mark.parametrize("pixels, said", [
    (np.full((4, 4), 0.5, np.float32), "pixels of float32, 0.5 to 0.5, are neither 8 nor 16 bits"),
    (np.full((4, 4), 70_000, np.int32), "pixels of int32, 70000 to 70000, are neither"), (np.full((4, 4), 0x8000, np.int32), "")])
def test_pixels_without_a_known_range_are_refused(pixels, said, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    if said:
        with pytest.raises(ValueError, match=said):
            read_image(tmp_path / "a.tiff")
    else:
        assert read_image(tmp_path / "a.tiff").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("largest, bits", [(200, 8), (3200, 12), (51200, 16)])
def test_values_of_8_or_12_bits_in_16_are_not_read_as_black(largest, bits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.files.warned", [])
    for name in ("a.png", "b.png"):
        Image.fromarray(np.array([[0, largest // 2], [largest // 4, largest]], np.uint16)).save(tmp_path / name)
        assert read_image(tmp_path / name).getpixel((1, 1)) == (200, 200, 200)
    said = f"warning: {tmp_path}/a.png has 16 bits, but values up to {largest}: taken as {bits} bits\n"
    assert capsys.readouterr().err == ("" if bits == 16 else said)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def test_255_is_void_as_0_is_unless_there_are_so_many_classes(tmp_path):
    Image.fromarray(np.array([[0, 1], [255, 2]], np.uint8)).save(tmp_path / "a.png")
    assert np.asarray(read_annotation(tmp_path / "a.png", (2, 2), 2)).tolist() == [[0, 1], [0, 2]]
    assert np.asarray(read_annotation(tmp_path / "a.png", (2, 2), 255)).tolist() == [[0, 1], [255, 2]]


def test_an_empty_line_among_the_classes_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("road\n\ntree\n")
    with pytest.raises(ValueError, match="classes.txt has an empty line between the names of classes"):
        read_classes(tmp_path)
    (tmp_path / "classes.txt").write_text("road\ntree\n\n")
    assert read_classes(tmp_path) == ["road", "tree"]


def annotated(root):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (40 * i, 90, 30)).save(root / "images" / split / f"{i}.png")
            Image.new("L", (32, 32), 1 + i % 2).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("road\ntree\n")
    return root


SEGMENT = ["--size", "nano", "--depth", "1", "--img-size", "32", "--short-side", "32", "--patch-size", "8", "--batch-size", "4",
           "--micro-batch", "4", "--iterations", "2", "--eval-every", "2", "--warmup", "1", "--workers", "0", "--device", "cpu"]


def test_a_drawing_replaces_an_earlier_one_and_no_other_image(tmp_path, capsys):
    root = annotated(tmp_path / "data")
    segment.main(["--data", str(root), "--out", str(tmp_path / "run"), *SEGMENT])
    image = root / "images" / "validation" / "0.png"
    before = image.read_bytes()
    capsys.readouterr()
    evaluate = ["eval", tmp_path / "run", "--image", image, "--device", "cpu"]
    said = refused(segment, [*evaluate, "--draw", image], capsys)
    assert f"{image} is there, and not of downstream.segment" in said and image.read_bytes() == before
    for _ in range(2):
        segment.main([*map(str, evaluate), "--draw", str(tmp_path / "drawn.png")])
        assert capsys.readouterr().out.endswith("and the legend\n")


@pytest.mark.parametrize("wrong, said", [
    (["--layer-decay", "1e308"], "--layer-decay is 1e+308; it must be from 0 to 1"),    (["--img-size", "1", "--patch-size", "1"], "--img-size 1 is too small for windows that overlap: give 8 or more"),
    (["--short-side", "9" * 40], "it must be at least 1")])
def test_absurd_numbers_of_segmentation_are_refused(wrong, said, tmp_path, capsys):
    assert said in refused(segment, ["--out", tmp_path / "run", *SEGMENT, *wrong], capsys)


def relabelled(root, change):
    """annotated(), with other numbers in its annotations."""
    annotated(root)
    for file in (root / "annotations").rglob("*.png"):
        change(np.asarray(Image.open(file))).save(file)
    return root


def test_annotations_without_a_labelled_pixel_are_refused(tmp_path, capsys):
    void = relabelled(tmp_path / "a", lambda pixels: Image.fromarray(np.where(pixels == 1, 0, 255).astype(np.uint8)))
    said = refused(segment, ["--data", void, "--out", tmp_path / "run", *SEGMENT], capsys)
    assert "no pixel of 4 annotations in" in said and "classes count from 1, and 0 is unlabelled" in said
    assert "add --void 255" in said and not (tmp_path / "run").exists()


def test_classes_that_never_occur_are_named_with_how_to_count(tmp_path, capsys):
    from_0 = relabelled(tmp_path / "a", lambda pixels: Image.fromarray(pixels - 1))
    train, said = open_scenes(str(from_0), "training", 32), capsys.readouterr().err
    assert np.unique(train[1][1]).tolist() == [1]                            # class 0 is ignored, and 1 is `road`
    assert "warning: tree never occur in 4 annotations" in said and "if yours count from 0, add --void 255" in said


@pytest.mark.parametrize("change", [lambda pixels: Image.fromarray(pixels - 1), lambda pixels: Image.fromarray(pixels == 2)])
def test_with_void_255_classes_count_from_0_in_training_and_evaluation(change, tmp_path, capsys):
    root = relabelled(tmp_path / "a", change)                                # 8 bits, and 1 bit
    train = open_scenes(str(root), "training", 32, void=255)
    assert [np.unique(train[i][1]).tolist() for i in range(2)] == [[1], [2]]
    segment.main(["--data", str(root), "--void", "255", "--out", str(tmp_path / "run"), *SEGMENT])
    trained = capsys.readouterr()
    assert "never occur" not in trained.err
    segment.main(["eval", str(tmp_path / "run"), "--json", "--workers", "0", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["test_iou"]) == 2 and None not in result["test_iou"]
    Image.fromarray(np.full((32, 32), 2, np.uint8)).save(root / "annotations" / "training" / "0.png")
    with pytest.raises(ValueError, match="holds class 2, but there are 2: correct it, with 255 for what is not labelled"):
        train[0]


# ---------------------------------------------------------------------------------------------------------------------
# Weights from elsewhere


@pytest.mark.parametrize("place", ["state_dict", "module", "teacher", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.encoder."])
def test_checkpoints_of_other_trainers_are_read(place, prefix, tmp_path):
    model = build("vit")
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({place: state, "epoch": 3, "optimizer": {}}, tmp_path / "theirs.pth")
    other = VisionTransformer(model.cfg)
    assert load_weights(other, tmp_path / "theirs.pth") == []
    assert torch.equal(other.norm.weight, model.norm.weight)


@pytest.mark.parametrize("step, alpha", [("vit", None), ("swiglu", None), ("soft_mask", 0.0)])
def test_bare_weights_say_which_step_they_are_of(step, alpha, tmp_path):
    model = VisionTransformer(config("nano", step, img_size=32, patch_size=8, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    checkpoint = open_checkpoint(tmp_path / "bare.pth")
    assert (checkpoint["run"]["step"], checkpoint["run"]["size"], checkpoint["alpha"]) == (step, "nano", alpha)
    assert checkpoint["config"] == asdict(model.cfg)
    assert torch.equal(build_checkpoint(checkpoint).head.weight, model.head.weight)


@pytest.mark.parametrize("content, said", [
    (dict(arrays={"Transformer/encoder_norm/bias": np.zeros(3)}), "is an archive of NumPy arrays or of other files, not of PyTorch"),
    (dict(weights={"blocks.0.attn.qkv.lora_A": torch.zeros(3)}), "these are LoRA's changes of weights .blocks.0.attn.qkv.lora_A., not"),
    (dict(weights={"params": [1, 2], "step": 3}), "no weights were found under model, state_dict, .*, but params, step"),
    (dict(weights={}), "no weights were found under .*, but nothing")])
def test_files_that_are_no_weights_are_named_in_our_words(content, said, tmp_path):
    if "arrays" in content:
        np.savez(tmp_path / "file", **content["arrays"])
    else:
        torch.save(content["weights"], tmp_path / "file.npz")
    with pytest.raises(ValueError, match=said) as error:
        load_weights(build(), tmp_path / "file.npz")
    assert "\n" not in str(error.value)


def test_weights_of_another_size_say_which_flags_to_give(photos, finished, tmp_path, capsys):
    start = ["--data", photos, "--init-from", finished / "best.pt", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    said = refused(train, [*start, "--out", tmp_path / "run"], capsys)
    advice = "--size nano --step soft_mask --depth 2 --img-size 16 --patch-size 8"
    assert f"the weights to start from are of another model: give {advice}\n" in said and not (tmp_path / "run").exists()
    train.main([*map(str, start), *advice.split(), "--out", str(tmp_path / "run")])      # the remedy works
    capsys.readouterr()
    bare = VisionTransformer(config("nano", img_size=32, patch_size=16, num_classes=3))
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    start[3] = tmp_path / "bare.pth"
    assert "give --size nano --step soft_mask --img-size 32 --patch-size 16\n" in refused(train, [*start, "--size", "nano"], capsys)


def test_hub_works_beside_modules_of_the_same_names(tmp_path):
    (tmp_path / "model.py").write_text("mine = 1\n")
    (tmp_path / "data.py").write_text("mine = 2\n")
    (tmp_path / "user.py").write_text(f"""
import sys, torch
def load():
    return torch.hub.load({str(ROOT)!r}, "illama", source="local", size="nano", depth=1, num_classes=0)
if sys.argv[1] == "before":
    import model, data
net = load()
import model, data
assert (model.mine, data.mine) == (1, 2) and "harness" not in sys.modules
assert net(torch.zeros(2, 3, 224, 224)).shape == (2, 128) and load() is not net
""")
    for when in ("before", "after"):
        subprocess.run([sys.executable, "user.py", when], cwd=tmp_path, check=True, env=environment(PYTHONPATH=""))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and resuming


def test_a_run_in_a_read_only_folder_continues_in_another_one(photos, tmp_path, capsys, monkeypatch):
    whole, stopped, new = tmp_path / "whole", tmp_path / "stopped", tmp_path / "new"
    train.main(flags(photos, whole))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        update = Monitor.update

        def stop_in_the_second_epoch(monitor, *args):
            update(monitor, *args)
            stop_requests.extend([15] * (monitor.state.iteration == 4))
        patch.setattr(Monitor, "update", stop_in_the_second_epoch)
        train.main(flags(photos, stopped))
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    monkeypatch.setattr("builtins.open", refuse_writing(stopped))
    said = refused(train, ["--resume", stopped, "--workers", "0"], capsys)
    assert f"{stopped} cannot be written (Read-only file system): continue in another folder with --resume {stopped} --out" in said
    train.main(["--resume", str(stopped), "--out", str(new), "--workers", "0", "--device", "cpu"])
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    assert equal(load(new / "last.pt")["model"], load(whole / "last.pt")["model"]) and metrics(new) == metrics(whole)
    capsys.readouterr()
    assert "holds another run" in refused(train, ["--resume", stopped, "--out", new], capsys)


def refuse_writing(folder):
    """open(), for which files of a folder are on a read-only file system: root may write anywhere else."""
    def opened(file, mode="r", *more, **others):
        if Path(str(file)).parent == folder and "r" not in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(file, mode, *more, **others)
    real = open
    return opened


def test_resume_with_a_path_does_not_look_below_it(photos, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "run" / "backup")                   # newer
    os.utime(tmp_path / "run" / "last.pt", (0, 0))
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert f"resume  {tmp_path}/run/last.pt at iteration 6" in capsys.readouterr().out
    shutil.copytree(finished, tmp_path / "new" / "old")
    train.main([*flags(photos, tmp_path / "new"), "--resume"])
    assert f"run     {tmp_path}/new, nothing to resume" in capsys.readouterr().out


def test_a_run_is_resumed_by_the_program_that_made_it(tmp_path, capsys):
    segment.main(["--data", str(annotated(tmp_path / "data")), "--out", str(tmp_path / "run"), *SEGMENT])
    capsys.readouterr()
    said = refused(train, ["--resume", tmp_path / "run", "--device", "cpu"], capsys)
    assert said == (f"error: {tmp_path}/run/last.pt is a run of another program, which trains Segmenter, not VisionTransformer: "
                    "resume it with that program\n")


def test_a_run_on_prefixes_is_not_resumed_without_them(photos, tmp_path, capsys):
    anytime.main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), *SMALL, "--step", "abs_pos", "--epochs", "1"])
    capsys.readouterr()
    said = refused(train, ["--resume", tmp_path / "run", "--device", "cpu"], capsys)
    assert "which trains PrefixTransformer, not VisionTransformer" in said
    anytime.main(["train", "--resume", str(tmp_path / "run"), "--device", "cpu"])


@pytest.mark.parametrize("program, command, mine", [
    (attention, ["RUN", "IMAGE", "mine.png"], "mine.png"),
    (selection, ["RUN", "--size", "nano", "--depth", "1", "--out", "RUN/best.pt"], "RUN/best.pt"),
    (export, ["RUN", "mine.pt2"], "mine.pt2"),
    (bench_data, ["folder", "--make", "1000"], "folder/mine"),
    (train, ["--out", "folder", "--resume", *SMALL], "folder/config.json")])
def test_no_program_overwrites_what_it_did_not_make(program, command, mine, photos, finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "RUN")
    shutil.copy(next(photos.glob("val/*/*.png")), "IMAGE")
    Path("folder").mkdir()
    file = Path(mine)
    if not file.exists():
        file.write_text("{}")
    before = file.read_bytes()
    said = refused(program, command, capsys)
    assert "give another" in said and file.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Processes


WITHOUT = """
import importlib, os, signal, sys
for name in ("SIGCHLD", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
for name in ("sched_getaffinity", "killpg", "getpgid", "mkfifo"):
    delattr(os, name)
sys.modules["fcntl"] = None
import train
if __name__ == "__main__":
    train.main(sys.argv[1:])
"""


def test_a_run_needs_nothing_that_windows_lacks(photos, finished, tmp_path):
    (tmp_path / "program.py").write_text(WITHOUT)
    code, said, errors = Program(tmp_path / "program.py", *flags(photos, tmp_path / "run")).wait()
    assert code == 0 and errors == "" and "done    top-1" in said
    assert [row["test_loss"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())] == [
        row["test_loss"] for row in map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(method, photos, tmp_path):
    (tmp_path / "program.py").write_text(f"""
import multiprocessing, sys
import train
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    train.main(sys.argv[1:])
""")
    command = [sys.executable, tmp_path / "program.py", *flags(photos, tmp_path / "run"), "--workers", "1", "--epochs", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, env=environment())
    assert ended.returncode == 0 and "done    top-1" in ended.stdout, ended.stderr


@pytest.mark.parametrize("rows", ["{", "7\n", "\xff"])
def test_damaged_rows_of_many_runs_are_named(rows, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(rows)
    said = refused(ladder, ["--data", "shapes", "--out", tmp_path], capsys)
    assert "rows.jsonl does not have a JSON object in each line" in said and "repair or remove it" in said


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of nothing, and pipes


def test_a_warm_up_of_one_iteration_takes_the_peak():
    recipe = replace(train.RECIPES["small-data"], warmup_epochs=1, epochs=1)
    assert train.lr_at(0, recipe, 1) == recipe.lr                            # a run of a single iteration trains
    assert train.lr_at(0, recipe, 2) == 0 and train.lr_at(1, recipe, 2) == recipe.lr


def test_fewer_images_than_a_batch_are_no_speed(photos, capsys):
    said = refused(bench_data, [photos, "--models", "ours", "--batch-size", "32"], capsys)
    assert "24 images are less than one --batch-size 32: make that smaller" in said
    assert "--images is 0; it must be at least 1" in refused(bench_data, [photos, "--images", "0"], capsys)


@pytest.mark.parametrize("program, argv", [(bench_data, ["PATH"]), (properties, ["RUN", "--measure", "rank"]), (ladder, [])])
def test_an_empty_out_is_refused(program, argv, capsys):
    assert "argument --out: it is empty: give a value, or drop the flag" in refused(program, [*argv, "--out", ""], capsys)


def test_a_pipe_that_has_read_enough_ends_a_program_quietly(finished):
    command = [sys.executable, "-m", "downstream.compare", finished]
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()                                                   # as `| head` does
    assert process.stderr.read() == b"" and process.wait() in (0, 1)
