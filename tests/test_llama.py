"""The model is the transformers library's LLaMA, where it says so."""
import pytest
import torch

import train
from conftest import SMALL, refused
from downstream import llama
from model import VisionTransformer
from test_model import build, hashed_images

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
EXACT = [("rope", None), ("abs_pos", None), ("soft_log", 0.0)]


@pytest.mark.parametrize("step, alpha", EXACT)
def test_the_librarys_unmodified_llama_gives_the_same_logits(step, alpha):
    """With biases and positions that are not zero: hashed_weights()."""
    model, images = build(step, alpha, depth=3), hashed_images(3)
    theirs = llama.to_llama(model)
    assert type(theirs) is transformers.LlamaModel
    with torch.no_grad():
        torch.testing.assert_close(llama.logits_of(theirs, model, images), model(images), atol=5e-6, rtol=0)
        torch.testing.assert_close(llama.logits_by_rows(theirs, model, images), model(images), atol=5e-6, rtol=0)


def test_with_the_class_token_first_it_is_a_llama_too_which_is_blind():
    model, images = build("abs_pos", cls_last=False), hashed_images(3)
    with torch.no_grad():
        logits = llama.logits_of(llama.to_llama(model), model, images)
        torch.testing.assert_close(logits, model(images), atol=5e-6, rtol=0)
    assert (logits - logits[:1]).abs().max() < 1e-6


def test_under_the_published_soft_mask_it_is_not_a_llama_even_at_alpha_0(monkeypatch):
    model, images = build("soft_mask", 0.0), hashed_images(3)
    with pytest.raises(ValueError, match="under `soft` later keys stay in the softmax's denominator, even at alpha 0"):
        llama.to_llama(model)
    monkeypatch.setattr(VisionTransformer, "exactly_causal", True)           # taken for one all the same
    theirs = llama.to_llama(model)
    with torch.no_grad():
        assert (llama.logits_of(theirs, model, images) - model(images)).abs().max() > 0.05


@pytest.mark.parametrize("step, said", [("vit", "a LLaMA has SwiGLU, RMSNorm and RoPE"), ("ps_cls", "a LLaMA has SwiGLU, RMSNorm and RoPE")])
def test_a_step_that_is_no_llama_is_refused(step, said):
    with pytest.raises(ValueError, match=said):
        llama.to_llama(build(step))


def test_the_folder_opens_in_the_library_and_is_compared(photos, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["--data", str(photos), "--step", "abs_pos", "--out", str(run), *SMALL])
    capsys.readouterr()
    llama.main([str(run), "--out", str(tmp_path / "llama"), "--check"])
    said = capsys.readouterr().out
    assert "has a LlamaModel of " in said and "11 images, largest difference of a logit: " in said
    assert all(float(number) < 1e-5 for number in said.split("logit: ")[1].split(", read by rows: "))
    assert transformers.LlamaModel.from_pretrained(tmp_path / "llama").config.attention_bias
    rest = torch.load(tmp_path / "llama" / "vision.pt", weights_only=True)
    assert sorted(rest["model"]) == ["cls_token", "head.bias", "head.weight", "patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed"]
    train.main(["--data", str(photos), "--out", str(tmp_path / "soft"), *SMALL])
    capsys.readouterr()
    assert "is a folder that is not empty" in refused(llama, [run, "--out", tmp_path / "llama"], capsys)
    said = refused(llama, [tmp_path / "soft", "--out", tmp_path / "b"], capsys)
    assert "use a run with mask causal, or soft_log at alpha 0; under `soft`" in said and not (tmp_path / "b").exists()
