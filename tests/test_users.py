"""What users of comparable trainers met: each test is one such case."""
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import DEADLINE, SMALL, Program, environment, refused
from downstream import segment
from downstream.scenes import read_annotation, read_classes
from harness.files import open_folder, read_image
from replication import ladder


def flags(photos, out):
    return ["--data", str(photos), "--out", str(out), *SMALL]


# ---------------------------------------------------------------------------------------------------------------------
# Data as people have them


def test_files_that_are_left_out_are_named_and_hidden_ones_are_not(tmp_path, capsys):
    (tmp_path / "train" / "cat" / "more").mkdir(parents=True)
    for name in ("cat/a.png", "cat/b.gif", "cat/more/c.avif", "cat/.hidden.gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name, "PNG")
    assert len(open_folder(tmp_path, "train")) == 1
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


def test_a_drawing_does_not_overwrite_its_image_and_says_what_it_replaces(tmp_path, capsys):
    root = annotated(tmp_path / "data")
    segment.main(["--data", str(root), "--out", str(tmp_path / "run"), *SEGMENT])
    image = root / "images" / "validation" / "0.png"
    before = image.read_bytes()
    capsys.readouterr()
    evaluate = ["eval", tmp_path / "run", "--image", image, "--device", "cpu"]
    assert f"--draw {image} is the image itself: give another name" in refused(segment, [*evaluate, "--draw", image], capsys)
    assert image.read_bytes() == before
    for said in ("and the legend\n", "and the legend; it replaces what was there\n"):
        segment.main([*map(str, evaluate), "--draw", str(tmp_path / "drawn.png")])
        assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize("wrong, said", [
    (["--layer-decay", "1e308"], "--layer-decay is 1e+308; it must be from 0 to 1"),    (["--img-size", "1", "--patch-size", "1"], "--img-size 1 is too small for windows that overlap: give 8 or more"),
    (["--short-side", "9" * 40], "it must be at least 1")])
def test_absurd_numbers_of_segmentation_are_refused(wrong, said, tmp_path, capsys):
    assert said in refused(segment, ["--out", tmp_path / "run", *SEGMENT, *wrong], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and resuming


def test_resume_with_a_path_does_not_look_below_it(photos, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "run" / "backup")                   # newer
    os.utime(tmp_path / "run" / "last.pt", (0, 0))
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert f"resume  {tmp_path}/run/last.pt at iteration 6" in capsys.readouterr().out
    shutil.copytree(finished, tmp_path / "new" / "old")
    train.main([*flags(photos, tmp_path / "new"), "--resume"])
    assert f"run     {tmp_path}/new, nothing to resume" in capsys.readouterr().out


def test_a_run_of_segmentation_is_no_run_of_train_py(tmp_path, capsys):
    segment.main(["--data", str(annotated(tmp_path / "data")), "--out", str(tmp_path / "run"), *SEGMENT])
    capsys.readouterr()
    said = refused(train, ["--resume", tmp_path / "run", "--device", "cpu"], capsys)
    assert said == (f"error: {tmp_path}/run/last.pt is a run of downstream.segment: resume it with that program, or start from its "
                    "weights with --init-from\n")


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
