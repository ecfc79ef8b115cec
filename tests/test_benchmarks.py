"""The benchmarks run, and say of what they timed."""
import json
import re
import subprocess
import sys

import pytest

from replication import bench_data, bench_model
from conftest import DEADLINE, ROOT, environment, metrics, refused


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_names_what_was_timed_and_on_what(tmp_path):
    bench_model.main(["--models", "none", "soft", "--dtypes", "float32", "--compile", "0", "--img-sizes", "32", "--batch-sizes", "2",
                      "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    for row, model in zip(rows(tmp_path / "rows.jsonl"), ("none", "soft"), strict=True):
        assert row["images_per_s"] > 0 and 0 < row["peak"] < 2 and row["saved_mb"] > 0
        assert row["model"] == model and row["dtype"] == "float32" and not row["compiled"] and row["training"]
        assert row["device"].startswith("cpu with ") and row["torch"] and "timm" not in row


def test_photos_are_drawn_and_read(tmp_path):
    bench_data.main([str(tmp_path / "photos"), "--make", "1000", "--models", "ours", "--images", "64", "--repeats", "1",
                     "--out", str(tmp_path / "rows.jsonl")])
    (row,) = rows(tmp_path / "rows.jsonl")
    assert row["images"] == 64 and row["images_per_s"] > 0
    assert len(list((tmp_path / "photos" / "train").glob("*/*.jpg"))) == 1000


@pytest.mark.parametrize("program, argv, said", [
    (bench_model, ["--models", "torchvision"], "torchvision has no ViT of size tiny"),
    (bench_model, ["--repeats", "0"], "--repeats is 0; it must be at least 1"),
    (bench_model, ["--img-sizes", "0"], "--img-sizes is 0; it must be at least 1"),
    (bench_model, ["--dtypes", "float8"], "invalid choice: 'float8'"),
    (bench_data, ["nowhere"], "--data nowhere is neither one of")])
def test_bad_flags_are_refused(program, argv, said, capsys):
    assert said in refused(program, argv, capsys)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_in_miniature_on_a_cpu(tmp_path):
    command = ["bash", ROOT / "replication" / "gpu.sh", tmp_path, "--small"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE, env=environment(PYTHON=sys.executable, LIMIT="600"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"\d\d passed, \d skipped", ended.stdout) and "failed" not in ended.stdout
    assert all(metrics(tmp_path / name)[-1]["epoch"] == 0 for name in ("first", "photos-tiny"))
    for name, count in (("speed-training", 3), ("speed-inference", 4), ("pilot/rows", 1)):
        assert len(rows(tmp_path / f"{name}.jsonl")) == count, name
    (table,) = tmp_path.glob("ladder-*/rows.jsonl")                          # for as many epochs as fit
    assert len(rows(table)) == 1
