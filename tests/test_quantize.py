"""Training in eight bits: one property a test."""
import json

import pytest
import torch

from conftest import SMALL, equal, load, metrics, refused
from experiments import quantize
from experiments.quantize import QuantizedTransformer, Quantizer
from model import VisionTransformer, config
from test_model import CASES, every_step, hashed, hashed_images


def quantized(step="soft_mask"):
    torch.manual_seed(0)
    cfg = config(**dict(size="nano", depth=2, img_size=32, patch_size=8, num_classes=10) | CASES[step])
    return QuantizedTransformer(cfg)


@pytest.mark.parametrize("size, published", [("tiny", 56_352), ("small", 111_168), ("base", 220_800)])
def test_what_is_learned_besides_is_as_many_parameters_as_in_the_published_code(size, published):
    with torch.device("meta"):
        plain, more = (sum(p.numel() for p in make(config(size)).parameters()) for make in (VisionTransformer, QuantizedTransformer))
    assert more - plain == published


@pytest.mark.parametrize("signed, low, high", [(True, -128, 127), (False, 0, 255)])
def test_a_quantizer_rounds_to_integers_of_eight_bits(signed, low, high):
    quantizer, x = Quantizer(1, (-1,), signed=signed), hashed((64,), 0) * 3
    quantizer.started = True
    quantizer.step.data.fill_(0.01)
    quantizer.zero.data.fill_(5.4)                                           # as the integer 5
    integers = [min(max(round(value / 0.01 + 5), low), high) for value in x.tolist()]
    torch.testing.assert_close(quantizer(x), 0.01 * (torch.tensor(integers) - 5.0), atol=1e-5, rtol=0)
    assert min(integers) == low and max(integers) == high


def test_the_gradients_are_those_of_learned_steps():
    quantizer = Quantizer(1, (-1,), symmetric=True)
    quantizer.started = True
    quantizer.step.data.fill_(0.5)
    x = torch.tensor([0.6, -0.1, 100.0, -100.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]                                   # straight through, but where it is clipped
    by_hand = (1 - 1.2) + (0 + 0.2) + 127 - 128                              # round(x/s) - x/s, and the ends
    assert quantizer.step.grad.item() == pytest.approx(by_hand / (4 * 127) ** 0.5, rel=1e-4)


@every_step
@torch.no_grad()
def test_without_rounding_and_norms_a_model_is_that_of_its_step(step, monkeypatch):
    model, images = quantized(step).eval(), hashed_images(2)
    assert all(len(part.quantize_weight(part.weight)[0].unique()) <= 256 for part in model.modules()
               if isinstance(part, quantize.QuantizedLinear))
    plain = VisionTransformer(model.cfg).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    alphas = (0.0, 0.5) if plain.cfg.soft else (None,)
    for block in model.blocks:
        block.attn.norm_q = block.attn.norm_k = torch.nn.Identity()
    for alpha in alphas:
        for each in (model, plain) if alpha is not None else ():
            each.set_soft_mask(alpha)
        rough = model(images)
        with monkeypatch.context() as patch:
            patch.setattr(Quantizer, "forward", lambda self, x: x)
            torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=0)
        assert 0 < (rough - plain(images)).abs().mean() < 0.1 * plain(images).std()


def test_every_parameter_learns_and_no_step_size_decays():
    model = quantized().train()
    model(hashed_images(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.ndim == 1 for name, p in model.named_parameters() if name.endswith((".step", ".zero")))


def test_a_run_resumes_exactly_and_learns_its_steps(photos, tmp_path):
    flags = ["train", "--data", str(photos), "--step", "soft_mask", *SMALL]
    quantize.main([*flags, "--out", str(tmp_path / "whole")])
    quantize.main([*flags, "--out", str(tmp_path / "part"), "--save-every", "1"])
    (tmp_path / "part" / "last.pt").unlink()                                 # so the one before is taken
    quantize.main(["train", "--resume", str(tmp_path / "part"), "--workers", "0", "--device", "cpu"])
    whole, part = (load(tmp_path / name / "last.pt")["model"] for name in ("whole", "part"))
    assert equal(whole, part) and metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    steps = whole["blocks.0.attn.qkv.quantize_input.step"]
    assert steps.unique().numel() > 1                                        # they began alike


def test_both_models_are_trained_and_get_their_rows(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quantize, "FLAGS", " ".join(SMALL))
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            quantize.main(["--data", str(photos), "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
        assert end.value.code == 0
    assert "0 runs to do" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted((row["step"], row["seed"]) for row in rows) == [("soft_mask", 0), ("vit", 0)]
    assert "must be at least 1" in refused(quantize, ["--seeds", 0], capsys)
