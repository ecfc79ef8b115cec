"""What users of comparable trainers met: each test is one such case."""
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from conftest import DEADLINE, ROOT, SMALL, Program, environment, in_ranks, load, refused, wait_until
from downstream import segment
from downstream.scenes import open_scenes, read_annotation, read_classes
from harness.files import IMAGENET, imagenet_classes, open_folder, read_image
from replication import ladder


def flags(photos, out):
    return ["--data", str(photos), "--out", str(out), *SMALL]


# ---------------------------------------------------------------------------------------------------------------------
# Data as people have them


def folders(root, names):
    for name in names:
        (root / "val" / name).mkdir(parents=True)
    return str(root)


@pytest.mark.parametrize("names, said", [
    ([f"n{i:08}" for i in range(1000)], ""),
    ([f"{i:03}" for i in range(1000)], "by their numbers"), ([str(i) for i in range(1000)], "by their numbers"),
    (sorted({name.replace(" ", "_") for name in IMAGENET}), "by their names in torchvision's list"),
    ([f"thing {i:03}" for i in range(1000)], "by the alphabet, which is right for WordNet ids (n01440764 ...) alone"),
    (["cat", "dog"], "")])
def test_weights_that_do_not_name_their_classes_know_imagenets_order(names, said, tmp_path, capsys):
    classes = imagenet_classes(folders(tmp_path, names))
    told = capsys.readouterr().err
    assert said in told and bool(said) == bool(told)
    if "numbers" in said:
        assert [int(name) for name in classes] == list(range(1000))
    elif "torchvision" in said:
        assert len(set(classes)) == 1000 and classes[0] == "tench"
        assert all(name.replace("_", " ") == known for name, known in zip(classes, IMAGENET) if name in names)
    elif "alphabet" in said:
        assert classes == sorted(names)
    else:
        assert classes is None


def test_published_weights_are_evaluated_in_imagenets_order(monkeypatch, tmp_path, capsys):
    """On folders 0 ... 999, whose alphabetical order is another one."""
    root = folders(tmp_path, map(str, range(1000)))
    for i in range(1000):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 7)).save(tmp_path / "val" / str(i) / "a.png")
    net = torch.nn.Module()
    net.cfg = type("Cfg", (), dict(img_size=8, num_classes=1000))
    val = evaluation.open_val("weights", dict(classes=None, run={}), net, root)
    assert [label for _, label in (val[i] for i in range(0, 1000, 50))] == [int(val.path(i).split("/")[-2]) for i in range(0, 1000, 50)]
    assert capsys.readouterr().err.count("warning") == 1


def test_validation_images_as_they_come_are_told_how_to_sort(tmp_path, capsys):
    shutil.os.makedirs(tmp_path / "val")
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="has no class folders.*torchvision.datasets.ImageNet.PATH, 'val'., from their archive"):
        open_folder(tmp_path, "val")


def test_files_that_are_left_out_are_counted_and_a_folder_that_cannot_be_read_is_an_error(tmp_path, capsys, monkeypatch):
    (tmp_path / "train" / "cat" / "more").mkdir(parents=True)
    for name in ("cat/a.png", "cat/b.gif", "cat/more/c.avif", "d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name, "PNG")
    (tmp_path / "train" / "cat" / ".hidden.png").touch()
    assert len(open_folder(tmp_path, "train")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"warning: 3 files in {tmp_path}/train are left out (d.png, cat/b.gif, cat/more/c.avif): images are")
    scandir = os.scandir

    def denied(folder):
        if str(folder).endswith("more"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)
    monkeypatch.setattr(os, "scandir", denied)
    assert "more: Permission denied: give another path" in refused(train, flags(tmp_path, tmp_path / "run"), capsys)


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
    (np.full((4, 4), 0.5, np.float32), "has pixels of float32, 0.5 to 0.5: convert it to 8 or 16 bits"),
    (np.full((4, 4), 70_000, np.int32), "has pixels of int32, 70000 to 70000: convert it"), (np.full((4, 4), 0x8000, np.int32), "")])
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


def test_an_annotation_of_two_bits_is_refused_and_a_palette_of_two_is_not(tmp_path):
    page = Image.new("P", (4, 4), 2)
    page.putpalette(list(range(12)))
    page.save(tmp_path / "palette.png", bits=2)
    assert np.asarray(read_annotation(tmp_path / "palette.png", (4, 4), 3)).max() == 2
    grey = (tmp_path / "palette.png").read_bytes()                           # the same without colours: type 3 becomes 0
    from struct import pack
    from zlib import crc32
    header = grey[12:25] + b"\x00" + grey[26:29]
    start = grey.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(grey[start:start + 4], "big")
    (tmp_path / "grey.png").write_bytes(grey[:12] + header + pack(">I", crc32(header)) + grey[33:start] + grey[end:])
    with pytest.raises(ValueError, match="has the mode L;2; an annotation has one channel of 8 bits"):
        read_annotation(tmp_path / "grey.png", (4, 4), 3)


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


def test_a_pipe_as_an_annotation_is_named_and_not_waited_for(tmp_path):
    root = annotated(tmp_path / "data")
    (root / "annotations" / "training" / "0.png").unlink()
    os.mkfifo(root / "annotations" / "training" / "0.png")
    with pytest.raises(ValueError, match="annotations/training/0.png is not a regular file: remove it"):
        open_scenes(str(root), "training", 32)[0]


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
    (["--layer-decay", "1e308"], "--layer-decay is 1e+308; it must be from 0 to 1"),
    (["--img-size", "1", "--patch-size", "1"], "--img-size 1 is too small for windows that overlap: give 8 or more"),
    (["--short-side", "9" * 40], "it must be from 1 to 10,000"), (["--short-side", "100000"], "it must be from 1 to 10,000")])
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


def test_a_run_does_not_go_on_with_other_images_of_the_same_number(photos, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for split in ("train", "val"):
        data = tmp_path / split
        shutil.copytree(photos, data)
        first = min((data / split / "cat").iterdir())
        first.rename(first.with_name("other.png"))
        said = refused(train, ["--resume", tmp_path / "run", "--data", data, "--device", "cpu"], capsys)
        assert "has images of other names than the run to resume had, or other validation images" in said
    older = load(tmp_path / "run" / "last.pt")
    del older["images"]                                                      # as earlier versions wrote it
    torch.save(older, tmp_path / "run" / "last.pt")
    train.main(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "val"), "--device", "cpu"])


def test_a_checkpoint_beyond_the_end_is_refused(finished, tmp_path, capsys):
    torch.save(load(finished / "last.pt") | dict(iteration=7), tmp_path / "last.pt")
    said = refused(train, ["--resume", tmp_path, "--device", "cpu"], capsys)
    assert "the checkpoint is at iteration 7 of 6: use another one" in said


@pytest.mark.parametrize("spoil", [lambda moment: moment.double(), lambda moment: moment.half(),
                                   lambda moment: torch.stack([moment, moment], -1)[..., 0]])
def test_moments_that_are_no_contiguous_float32_are_refused(spoil, finished, tmp_path, capsys):
    checkpoint = load(finished / "last.pt")
    moments = next(m for m in checkpoint["optimizer"].values() if m["exp_avg"].ndim == 2)
    moments["exp_avg"] = spoil(moments["exp_avg"])
    torch.save(checkpoint, tmp_path / "last.pt")
    said = refused(train, ["--resume", tmp_path, "--device", "cpu"], capsys)
    assert "is not contiguous float32: use another file" in said or "does not fit a parameter" in said


def test_a_list_that_holds_itself_many_times_over_is_refused_at_once(finished, tmp_path, capsys):
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    for name in ("classes", "alpha"):
        torch.save(load(finished / "best.pt") | {name: bomb}, tmp_path / "a.pt")
        assert f"{name} is [" in refused(evaluation, [tmp_path / "a.pt"], capsys)


def test_a_run_of_segmentation_is_no_run_of_train_py(tmp_path, capsys):
    segment.main(["--data", str(annotated(tmp_path / "data")), "--out", str(tmp_path / "run"), *SEGMENT])
    capsys.readouterr()
    said = refused(train, ["--resume", tmp_path / "run", "--device", "cpu"], capsys)
    assert said == (f"error: {tmp_path}/run/last.pt is a run of downstream.segment: resume it with that program, or start from its "
                    "weights with --init-from\n")


def test_a_pipe_in_place_of_metrics_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    assert "metrics.jsonl is not a regular file" in refused(train, ["--resume", tmp_path / "run", "--device", "cpu"], capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize("program, own", [("train.py", ["--init-from", "{weights}"]), ("train.py", ["--seed", "1"]),
                                          ("downstream.segment", ["--init-from", "{weights}"])])
def test_a_flag_that_one_rank_alone_is_given_is_named_and_not_waited_for(program, own, photos, finished, tmp_path):
    data = ["--data", photos, *SMALL] if program == "train.py" else ["--data", annotated(tmp_path / "data"), *SEGMENT[2:]]
    own = [flag.format(weights=finished / "best.pt") for flag in own]
    module = "train" if program == "train.py" else "downstream.segment"
    (tmp_path / "node.py").write_text(f"""
import os, sys, {module} as program
own = {own!r} if os.environ["RANK"] == "1" else []
program.main([*sys.argv[1:], *own])
""")
    code, _, errors = in_ranks(2, tmp_path / "node.py", *data, "--out", tmp_path / "run")
    name = own[0].removeprefix("--").replace("-", "_")
    assert code == 2 and f"error: {name} is " in errors and "on rank 0, but" in errors


def test_a_signal_after_all_is_saved_does_not_change_the_exit_code(photos, tmp_path):
    program = Program(ROOT / "tests" / "saboteur.py", 0, "train", 2, "SIGTERM", *flags(photos, tmp_path / "run"))
    wait_until(lambda: "preempted at iteration" in program.said())
    for _ in range(20):
        try:
            os.kill(program.pid, signal.SIGTERM)
        except ProcessLookupError:
            break
    assert program.wait()[0] == 75


def test_ctrl_c_in_a_program_with_nothing_to_save_is_one_line(finished, tmp_path):
    (tmp_path / "program.py").write_text("""
import os, signal, sys
import eval
eval.open_model = lambda *_: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
eval.main(sys.argv[1:])
""")
    assert Program(tmp_path / "program.py", finished).wait() == (130, "", "interrupted\n")


WITHOUT = """
import importlib, os, signal, sys
for name in ("SIGCHLD", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
for name in ("sched_getaffinity", "killpg", "getpgid", "mkfifo"):
    delattr(os, name)
sys.modules["fcntl"] = None
import train
from harness.processes import stop_on_signals
if __name__ == "__main__":
    stop_on_signals()
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


@pytest.mark.parametrize("module", ["train", "eval", "downstream.segment", "downstream.selection", "downstream.compare", "replication.bench_model", "replication.bench_data",
                                    *(f"replication.{name}" for name in ("ladder", "properties", "anytime", "starts", "transfer", "where", "quantize"))])
def test_programs_work_without_docstrings(module, tmp_path):
    (tmp_path / "program.py").write_text(f"import sys, {module} as program\nprogram.__doc__ = None\nprogram.main(['--help'])")
    code, said, errors = Program(tmp_path / "program.py").wait()
    assert code == 0 and said.startswith("usage: ") and errors == ""


@pytest.mark.parametrize("rows", ["{", "7\n", "\xff"])
def test_damaged_rows_of_many_runs_are_named(rows, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(rows)
    said = refused(ladder, ["--data", "shapes", "--out", tmp_path], capsys)
    assert "rows.jsonl does not have a JSON object in each line" in said and "repair or remove it" in said


def test_alphas_of_mixing_have_bounds(photos, tmp_path, capsys):
    assert "--mixup is 1e+308; it must be from 0 to 1,000" in refused(train, [*flags(photos, tmp_path / "run"), "--mixup", "1e308"], capsys)
