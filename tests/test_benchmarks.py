"""The benchmarks run, and say of what they timed."""
import json
import re
import subprocess
import sys

import pytest
import torch

from model import Attention, Mask, attention_weights, config
from replication import bench_data, bench_model
from replication.fused import DoubledKeys, TwoPasses, causal_scores, mixture
from conftest import DEADLINE, ROOT, environment, metrics, refused


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_names_what_was_timed_and_on_what(tmp_path):
    bench_model.main(["--models", "none", "soft", "--dtypes", "float32", "--compile", "0", "--img-sizes", "32", "--batch-sizes", "2",
                      "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    for row, model in zip(rows(tmp_path / "rows.jsonl"), ("none", "soft"), strict=True):
        assert row["images_per_s"] > 0 and 0 < row["peak"] < 2 and row["saved_mb"] > 0
        assert len(row["images_per_s_each"]) == 3 and row["images_per_s"] == sorted(row["images_per_s_each"])[1]
        assert row["model"] == model and row["dtype"] == "float32" and not row["compiled"] and row["training"]
        assert row["device"].startswith("cpu with ") and row["torch"] and "timm" not in row


def attention_with(kind, alpha):
    """A way to the soft mask in float64, tokens for it and their mask."""
    torch.manual_seed(0)
    cfg = config("nano")
    future = torch.ones(9, 9).triu(1).bool()
    scale = torch.where(future, alpha, torch.ones((), dtype=torch.double))
    return kind(cfg).double(), torch.randn(2, 9, cfg.width, dtype=torch.double, requires_grad=True), Mask(attn_scale=scale)


def with_gradients(y, inputs):
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_published_mask_is_a_mixture_of_full_and_causal_attention(alpha):
    """In float64 with gradients; the fused kernels that give both parts have no backward pass on a CPU."""
    attention, x, mask = attention_with(Attention, alpha)
    q, k, v = attention.qkv_heads(x, None)
    want = with_gradients((attention_weights(q, k, None) * mask.attn_scale) @ v, [x, attention.qkv.weight])
    q, k, v = attention.qkv_heads(x, None)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    causal = causal_scores(scores, None, None, torch.arange(9)[:, None], torch.arange(9))
    parts = [part for s in (scores, causal) for part in (s.softmax(-1) @ v, s.logsumexp(-1))]
    got = with_gradients(mixture(*parts, alpha), [x, attention.qkv.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_published_mask_from_doubled_keys(alpha):
    other, x, mask = attention_with(DoubledKeys, alpha)
    inputs = [x, *other.parameters()]
    want = with_gradients(Attention.forward(other, x, None, mask), inputs)
    for a, b in zip(with_gradients(other(x, None, mask), inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_published_mask_from_two_passes(alpha):
    """Forward alone."""
    other, x, mask = attention_with(TwoPasses, alpha)
    with torch.no_grad():
        torch.testing.assert_close(other(x, None, mask), Attention.forward(other, x, None, mask), rtol=1e-6, atol=1e-6)


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
