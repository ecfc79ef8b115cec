"""Reading an image row by row: one property a test."""
import json

import pytest
import torch

import train
from conftest import SMALL, metrics, refused
from downstream import anytime
from downstream.anytime import Reader, on_rows
from replication import anytime as measured
from test_model import build, hashed_images

exactly_causal = pytest.mark.parametrize("step, alpha", [("ps_cls", None), ("rope", None), ("abs_pos", None), ("soft_log", 0.0)])


@exactly_causal
@torch.no_grad()
def test_after_each_row_the_answer_is_that_of_the_model_run_on_these_rows_alone(step, alpha):
    model, images = build(step, alpha), hashed_images(2)                     # 4 rows of 4 patches
    reader = Reader(model)
    for row in range(4):
        reader.read(images[:, :, 8 * row: 8 * row + 8])
        torch.testing.assert_close(reader.answer(), on_rows(model, images, 1 + row), atol=1e-5, rtol=0)
    torch.testing.assert_close(reader.answer(), model(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_does_not_matter_how_many_rows_arrive_at_once_or_how_often_it_is_asked():
    model, images = build("abs_pos"), hashed_images(2)
    reader = Reader(model)
    reader.read(images[:, :, :8])
    reader.answer()
    reader.read(images[:, :, 8:])
    torch.testing.assert_close(reader.answer(), model(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_on_all_rows_every_step_is_the_ordinary_forward_pass():
    for step in ("vit", "rmsnorm", "causal", "modified", "soft_mask"):
        model, images = build(step, 0.5 if step == "soft_mask" else None), hashed_images(2)
        torch.testing.assert_close(on_rows(model, images, 4), model(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_that_are_not_read_do_not_matter():
    for step in ("rmsnorm", "abs_pos"):
        model, images = build(step), hashed_images(2)
        images[1, :, :16], images[1, :, 16:] = images[0, :, :16], 0
        one, other = on_rows(model, images, 2)
        torch.testing.assert_close(one, other)           # places in a batch may round differently
        assert not torch.allclose(*model(images))


@torch.no_grad()
def test_each_patch_goes_through_the_blocks_once():
    model, images, tokens = build("abs_pos"), hashed_images(1), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[1]))
    reader = Reader(model)
    for row in range(4):
        reader.read(images[:, :, 8 * row: 8 * row + 8])
        reader.answer()
    assert tokens == [4, 1] * 4


@torch.no_grad()
def test_under_the_published_soft_mask_keys_and_values_of_the_first_rows_depend_on_those_to_come():
    for step, alpha, same in (("soft_mask", 0.0, False), ("soft_log", 0.0, True)):
        images = hashed_images(2)
        images[1, :, :8] = images[0, :, :8]                                  # the same first row of patches
        first, second = build(step, alpha).forward_features(images)[:, :4]
        assert torch.allclose(first, second, atol=1e-6) == same


def test_training_on_prefixes_resumes_exactly_and_differs_from_training_on_whole_images(photos, tmp_path, monkeypatch):
    flags = ["--data", str(photos), "--step", "abs_pos", *SMALL]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    anytime.main(["train", *flags, "--out", str(tmp_path / "prefixes")])
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(train, "evaluate", lambda *args: (_ for _ in ()).throw(GeneratorExit))         # after an epoch
        anytime.main(["train", *flags, "--out", str(tmp_path / "resumed")])
    anytime.main(["train", *flags, "--out", str(tmp_path / "resumed"), "--resume"])
    assert metrics(tmp_path / "prefixes") == metrics(tmp_path / "resumed") != metrics(tmp_path / "whole")


def test_measure_and_read_on_a_run(photos, tmp_path, capsys):
    train.main(["--data", str(photos), "--step", "abs_pos", "--out", str(tmp_path / "a"), *SMALL])
    capsys.readouterr()
    measured.main([str(tmp_path / "a" / "last.pt"), "--workers", "0", "--out", str(tmp_path / "rows.jsonl")])
    printed = capsys.readouterr().out
    row = json.loads(printed)
    assert printed == (tmp_path / "rows.jsonl").read_text() and (row["run"], row["step"]) == ("a", "abs_pos")
    assert row["test_acc1"] == row["acc1_by_row"][1] == pytest.approx(metrics(tmp_path / "a")[-1]["test_acc1"])
    image = str(next((photos / "val" / "cat").iterdir()))
    anytime.main(["read", str(tmp_path / "a"), "--image", image])
    assert [line[:11] for line in capsys.readouterr().out.splitlines()] == ["row  1 of 2", "row  2 of 2"]


def test_bad_input_is_refused_in_one_sentence(photos, finished, capsys):
    image = str(next((photos / "val" / "cat").iterdir()))
    said = "reading row by row needs a class token at the end and an exactly causal mask, not 'soft'"
    assert said in refused(anytime, ["read", finished, "--image", image], capsys)
    assert "give a command, one of train, read" in refused(anytime, [], capsys)
    for step, alpha in (("soft_mask", 0.0), ("soft_log", 0.5), ("rmsnorm", None), ("causal", None)):
        with pytest.raises(ValueError, match="reading row by row needs"):
            Reader(build(step, alpha))
    reader, images = Reader(build("abs_pos")), hashed_images(1)
    with pytest.raises(ValueError, match="nothing has been read"):
        reader.answer()
    with pytest.raises(ValueError, match="after 0 rows of patches"):
        reader.read(images[:, :, :7])
    reader.read(images)
    with pytest.raises(ValueError, match="after 4 rows of patches: this model's images have 4 rows"):
        reader.read(images[:, :, :8])
    with pytest.raises(ValueError, match="there is no row 5"):
        on_rows(reader.model, images, 5)
