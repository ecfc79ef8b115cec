"""Training in eight bits: one property a test."""
import json

import pytest
import torch

import train
from conftest import SMALL, equal, load, metrics, refused
from model import Attention, VisionTransformer, config
from replication import quantize
from replication.quantize import NormalizedTransformer, QuantizedTransformer, Quantizer
from test_model import CASES, every_step, hashed, hashed_images, hashed_weights


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
    quantizer.step_size.data.fill_(0.01)
    quantizer.zero.data.fill_(5.4)                                           # as the integer 5
    integers = [min(max(round(value / 0.01 + 5), low), high) for value in x.tolist()]
    torch.testing.assert_close(quantizer(x), 0.01 * (torch.tensor(integers) - 5.0), atol=1e-5, rtol=0)
    assert min(integers) == low and max(integers) == high


def test_the_gradients_are_those_of_learned_steps():
    quantizer = Quantizer(1, (-1,), symmetric=True)
    quantizer.started = True
    quantizer.step_size.data.fill_(0.5)
    x = torch.tensor([0.6, -0.1, 100.0, -100.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]                                   # straight through, but where it is clipped
    by_hand = (1 - 1.2) + (0 + 0.2) + 127 - 128                              # round(x/s) - x/s, and the ends
    assert quantizer.step_size.grad.item() == pytest.approx(by_hand / (4 * 127) ** 0.5, rel=1e-4)


def test_a_zero_point_moves_only_what_is_clipped():
    quantizer = Quantizer(1, (-1,))
    quantizer.started = True
    quantizer.step_size.data.fill_(0.5)
    quantizer(torch.tensor([0.6, -0.1, 100.0, -90.0, 80.0])).sum().backward()
    assert quantizer.zero.grad.item() == pytest.approx(3 * -0.5 / (5 * 127) ** 0.5, rel=1e-4)


@torch.no_grad()
def test_queries_and_keys_are_normalized_after_rope_and_before_they_are_quantized(monkeypatch):
    model = quantized("rope")
    attn, x = model.blocks[0].attn, hashed((2, 17, 128), 0)
    attn.norm_q.weight.data, attn.norm_k.weight.data = 1 + 0.5 * hashed((64,), 1), 1 + 0.5 * hashed((64,), 2)
    rough = attn.qkv_heads(x, model.rope)
    for part, quantizer in zip(rough, (attn.quantize_q, attn.quantize_k, attn.quantize_v)):
        integers = part / quantizer.step_size.view(-1, 1, 1)
        torch.testing.assert_close(integers, integers.round(), atol=1e-2, rtol=0)
    monkeypatch.setattr(Quantizer, "forward", lambda self, x: x)
    q, k, v = Attention.qkv_heads(attn, x, model.rope)
    expected = [y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight for y, norm in ((q, attn.norm_q), (k, attn.norm_k))]
    for ours, theirs in zip(attn.qkv_heads(x, model.rope), [*expected, v]):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@every_step
@torch.no_grad()
def test_the_control_is_the_quantized_model_without_rounding(step, monkeypatch):
    model, images = quantized(step).eval(), hashed_images(2)
    control = NormalizedTransformer(model.cfg).eval()
    control.load_state_dict({name: value for name, value in model.state_dict().items() if "quantize" not in name})
    monkeypatch.setattr(Quantizer, "forward", lambda self, x: x)
    torch.testing.assert_close(model(images), control(images), atol=1e-5, rtol=0)


@every_step
@torch.no_grad()
def test_without_rounding_and_norms_a_model_is_that_of_its_step(step, monkeypatch):
    model, images = quantized(step).eval(), hashed_images(2)
    assert all(block.attn.quantize_attn.low == 0 for block in model.blocks)
    assert all(len(part.quantize_weight(part.weight)[0].unique()) <= 256 for part in model.modules()
               if isinstance(part, quantize.QuantizedLinear))
    plain = VisionTransformer(model.cfg).eval()
    # As large as they are drawn, but the same with all versions of torch
    plain.load_state_dict({name: value if value.ndim == 1 else 0.4 * value for name, value in hashed_weights(plain).items()})
    model.load_state_dict(plain.state_dict(), strict=False)
    alphas = (0.0, 0.5) if plain.cfg.soft else (None,)
    for block in model.blocks:
        block.attn.norm_q = block.attn.norm_k = torch.nn.Identity()
    for part in model.modules():
        if isinstance(part, Quantizer):
            part.started = False
    model(images)                                                            # sets the step sizes for these weights
    for alpha in alphas:
        for each in (model, plain) if alpha is not None else ():
            each.set_soft_mask(alpha)
        rough = model(images)
        with monkeypatch.context() as patch:
            patch.setattr(Quantizer, "forward", lambda self, x: x)
            torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=0)
        assert 0 < (rough - plain(images)).abs().mean() < 0.1 * plain(images).std()


def test_all_blocks_quantize_all_tokens_as_the_gradients_of_step_sizes_depend_on_their_number(monkeypatch):
    model, counts, plain = quantized(), {}, Quantizer.forward

    def counting(self, x):
        counts[self] = x.numel()
        return plain(self, x)
    monkeypatch.setattr(Quantizer, "forward", counting)
    model(hashed_images(2))
    first, last = ([counts[part] for part in block.modules() if isinstance(part, Quantizer)] for block in model.blocks)
    assert first == last and len(first) == 14


def test_step_sizes_of_a_soft_mask_start_at_alpha_1(monkeypatch):
    alphas = []
    monkeypatch.setattr(QuantizedTransformer, "forward", lambda self, images: alphas.append(self.alpha.item()))
    assert quantized().alpha == 0 and alphas == [1]


def test_every_parameter_learns_and_no_step_size_decays():
    model = quantized().train()
    model(hashed_images(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.ndim == 1 for name, p in model.named_parameters() if name.endswith((".step_size", ".zero")))


def test_a_run_resumes_exactly_and_learns_its_steps(photos, monkeypatch, tmp_path, capsys):
    flags = ["train", "--data", str(photos), "--step", "soft_mask", *SMALL]
    quantize.main([*flags, "--out", str(tmp_path / "whole")])
    assert capsys.readouterr().out.splitlines()[-1].endswith("best.pt")     # and nothing about eval.py, which does not take it
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(train, "evaluate", lambda *args: (_ for _ in ()).throw(GeneratorExit))         # after an epoch
        quantize.main([*flags, "--out", str(tmp_path / "part")])
    quantize.main(["train", "--resume", str(tmp_path / "part"), "--workers", "0", "--device", "cpu"])
    whole, part = (load(tmp_path / name / "last.pt")["model"] for name in ("whole", "part"))
    assert equal(whole, part) and metrics(tmp_path / "whole") == metrics(tmp_path / "part")
    steps = whole["blocks.0.attn.qkv.quantize_input.step_size"]
    assert steps.unique().numel() > 1                                        # they began alike


def test_both_models_are_trained_and_get_their_rows(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quantize, "FLAGS", " ".join(SMALL))
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            quantize.main(["--data", str(photos), "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
        assert end.value.code == 0
    assert "0 runs to do" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted((row["step"], row["bits"], row["seed"]) for row in rows) == [
        (step, bits, 0) for step in ("soft_mask", "vit") for bits in (8, 32)]
    counts = {(row["step"], row["bits"]): row["n_parameters"] for row in rows}
    assert all(counts[step, 8] > counts[step, 32] for step in ("soft_mask", "vit"))
    assert "must be at least 1" in refused(quantize, ["--seeds", 0], capsys)
