"""What is true of the architecture: one property a test. `python -m pytest test_model.py`"""
import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from harness.checkpoint import load_weights, resize_positions
from model import STEPS, Config, Mask, SwiGLU, VisionTransformer, config, norm, rope_table, rotate

GOLDEN = json.loads(Path(__file__).with_name("tests").joinpath("golden.json").read_text())     # made by tests/golden.py

# Every step, and the two masks beside them.
CASES = {step: dict(step=step) for step in STEPS}
CASES |= {"modified": dict(step="rmsnorm", mask="modified"), "soft_log": dict(step="soft_mask", mask="soft_log")}
every_step = pytest.mark.parametrize("step", CASES)


def hashed(shape, seed):
    """Float32 numbers in [-1, 1) that are the same everywhere: a 32-bit integer hash of each element's place."""
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(seed * 40503 + 1)
    for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return torch.from_numpy((x / 2 ** 31 - 1).astype(np.float32)).reshape(shape)


def hashed_weights(model, seed=0):
    """A state dict large enough in its numbers that every part of the model matters."""
    state = {}
    for place, (name, value) in enumerate(sorted(model.state_dict().items())):
        u = hashed(value.shape, seed * 1000 + place)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * u
        elif u.ndim == 1:
            state[name] = 0.05 * u
        elif name in ("pos_embed", "cls_token"):
            state[name] = 0.5 * u
        else:
            state[name] = u * (3 if "qkv" in name else 1) / math.prod(u.shape[1:]) ** 0.5
    return state


def hashed_images(batch, size=32, seed=0):
    return 1.5 * hashed((batch, 3, size, size), 777 + seed)


def build(step="soft_mask", alpha=None, **fields):
    """A small model of a step: 2 blocks, 16 patches, 10 classes."""
    fields = dict(size="nano", depth=2, img_size=32, patch_size=8, num_classes=10) | CASES[step] | fields
    model = VisionTransformer(config(**fields)).eval()
    model.load_state_dict(hashed_weights(model))
    if alpha is not None:
        model.set_soft_mask(alpha)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The published models


@pytest.mark.parametrize("case", GOLDEN["cases"],
                         ids=lambda c: f"{c['size']}-{c.get('mask', c['step'])}-{c['img_size']}-{c.get('alpha', '')}")
def test_logits_and_parameters_are_those_of_the_published_code(case):
    fields = {k: case[k] for k in ("size", "step", "mask", "img_size", "patch_size", "num_classes") if k in case}
    model = VisionTransformer(config(**fields)).eval()
    model.load_state_dict(hashed_weights(model, case["seed"]))
    if "alpha" in case:
        model.set_soft_mask(case["alpha"])
    with torch.no_grad():
        logits = model(hashed_images(case["batch"], case["img_size"], case["seed"]))
    torch.testing.assert_close(logits[:, :8], torch.tensor(case["logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.sum(1), torch.tensor(case["logit_sum"]), atol=1e-3, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == case["n_parameters"]


@pytest.mark.parametrize("size, step, img_size, parameters", [
    ("tiny", "vit", 224, 5_717_416), ("small", "vit", 224, 22_050_664), ("base", "vit", 224, 86_567_656),
    ("nano", "soft_mask", 224, 3_407_848), ("tiny", "soft_mask", 224, 5_701_096),
    ("small", "soft_mask", 224, 22_018_024), ("base", "soft_mask", 224, 86_502_376),
    ("large", "soft_mask", 224, 310_445_032),
    ("base", "soft_mask", 384, 86_794_216), ("large", "soft_mask", 384, 310_834_152), ("tiny", "rope", 224, 5_663_272)])
def test_parameter_counts_are_the_published_ones(size, step, img_size, parameters):
    with torch.device("meta"):
        model = VisionTransformer(config(size, step, img_size=img_size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_first_step_is_the_default_and_the_last_is_illama():
    assert config("tiny", step="vit") == Config()
    assert config("tiny") == Config(swiglu=True, rmsnorm=True, mask="soft", cls_last=True, rope=True, abs_pos=True)


def test_the_step_vit_is_torchvisions_vision_transformer():
    ours = build("vit")
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=512, num_classes=10).eval()
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
             "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2",
             "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3", "head": "heads.head"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name.replace("norm.", "encoder.ln.")] = value
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(hashed_images(2)), theirs(hashed_images(2)), atol=1e-5, rtol=0)


def test_weights_start_as_the_published_ones_do():
    torch.manual_seed(0)
    for name, p in VisionTransformer(config("tiny", depth=2)).named_parameters():
        if name.startswith("patch_embed"):                                   # torch's default for a convolution
            assert abs(p.abs().max() - 1 / math.sqrt(3 * 16 * 16)) < 0.002
        elif "norm" in name:
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:                                                                # linear, class token and positions
            assert abs(p.std() - 0.02) < 0.003 and abs(p.mean()) < 0.003


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def test_rmsnorm_divides_by_the_root_mean_square():
    rmsnorm, x = norm(Config(width=6, rmsnorm=True)), hashed((2, 3, 6), 1)
    rmsnorm.weight.data = hashed((6,), 2)
    expected = torch.empty_like(x)
    for b, t, c in np.ndindex(*x.shape):
        expected[b, t, c] = x[b, t, c] / math.sqrt(sum(v ** 2 for v in x[b, t].tolist()) / 6 + 1e-6) * rmsnorm.weight[c]
    torch.testing.assert_close(rmsnorm(x), expected)


def test_swiglu_gates_one_projection_by_the_silu_of_another():
    mlp, x = SwiGLU(96), hashed((5, 96), 1)
    assert mlp.fc1.out_features == 256 and all(m.bias is None for m in (mlp.fc1, mlp.fc2, mlp.fc3))
    gate, up = mlp.fc1.weight @ x.T, mlp.fc3.weight @ x.T                     # hidden, 5
    expected = (mlp.fc2.weight @ (gate / (1 + torch.exp(-gate)) * up)).T
    torch.testing.assert_close(mlp(x), expected)


def test_rope_multiplies_pairs_of_channels_as_complex_numbers():
    x = hashed((1, 2, 5, 8), 1)                                              # B, h, N, d
    expected = torch.empty_like(x)
    for h, t, k in np.ndindex(2, 5, 4):
        turned = complex(*x[0, h, t, 2 * k: 2 * k + 2]) * np.exp(1j * t * 10000 ** (-2 * k / 8))
        expected[0, h, t, 2 * k: 2 * k + 2] = torch.tensor([turned.real, turned.imag])
    torch.testing.assert_close(rotate(x, rope_table(5, 8)), expected)


def test_rope_scores_depend_on_the_distance_alone():
    table = rope_table(40, 64)
    q, k = (rotate(hashed((64,), seed).expand(1, 1, 40, 64), table) for seed in (1, 2))   # the same vector everywhere
    scores = (q @ k.transpose(-2, -1))[0, 0]                                 # N, N
    for distance in range(-39, 40):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-4, rtol=0)
    assert scores[0].std() > 0.1                                             # and on the distance they do depend


# ---------------------------------------------------------------------------------------------------------------------
# The masks: what attends to what


def test_collapse_under_causal_the_first_token_gives_every_image_the_same_logits():
    logits = build("causal")(hashed_images(4))
    assert torch.equal(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize("step, alpha", [("ps_cls", None), ("rope", None), ("abs_pos", None),
                                         ("soft_mask", 0.0), ("soft_log", 0.0)])
def test_the_last_token_sees_every_patch(step, alpha):
    assert (seen_patches(build(step, alpha)) > 1e-6).all()


def test_under_the_modified_mask_the_first_token_sees_every_patch():
    assert (seen_patches(build("modified")) > 1e-6).all()


def seen_patches(model):
    """How strongly each patch of an image moves the logits: (P,)."""
    images = hashed_images(1).requires_grad_()
    model(images)[0, 0].backward()
    return F.max_pool2d(images.grad.abs().amax(1), 8).flatten()


def earlier_tokens_change(model, patch=9):
    """Whether a change to one patch moves the tokens before it, and whether it moves those from it on."""
    images = hashed_images(2)
    row, column = patch // 4 * 8, patch % 4 * 8
    images[1] = images[0]
    images[1, :, row: row + 8, column: column + 8] += 1
    one, other = model.forward_features(images)
    moved = (one - other).abs().amax(-1) > 1e-5                              # N
    return moved[:patch].any().item(), moved[patch:].all().item()


@pytest.mark.parametrize("step, alpha", [("ps_cls", None), ("rope", None), ("abs_pos", None), ("soft_log", 0.0)])
def test_a_causal_mask_hides_the_future(step, alpha):
    assert earlier_tokens_change(build(step, alpha)) == (False, True)


@pytest.mark.parametrize("step, alpha", [("soft_mask", 0.0), ("soft_mask", 0.5), ("soft_log", 0.5)])
def test_the_published_soft_mask_leaks_the_future_even_at_alpha_0(step, alpha):
    assert earlier_tokens_change(build(step, alpha)) == (True, True)         # through the softmax's denominator


def test_with_the_class_token_first_the_soft_mask_at_alpha_0_is_not_blind():
    logits = build("soft_mask", alpha=0.0, cls_last=False)(hashed_images(2))
    assert (logits[0] - logits[1]).abs().max() > 0.01
    logits = build("soft_log", alpha=0.0, cls_last=False)(hashed_images(2))
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("step", ["soft_mask", "soft_log"])
def test_at_alpha_1_there_is_no_mask(step):
    images = hashed_images(2)
    torch.testing.assert_close(build(step, alpha=1.0)(images), build(step, mask="none")(images), atol=1e-5, rtol=0)


def test_another_mask_is_a_method():
    class Prefix(VisionTransformer):                                         # the first four attend to each other
        def mask(self, queries=slice(None)):
            future = torch.ones(17, 17).triu(1).bool()
            future[:4, :4] = False
            return Mask(attn_bias=torch.where(future, -math.inf, 0.0)[queries])
    model = Prefix(build().cfg).eval()
    attn = model.attention_maps(hashed_images(1))[0, 0, 0]
    assert (attn[:4, :4] > 0).all() and (attn[:4, 4:] == 0).all()
    assert torch.equal(attn[4:] > 0, torch.ones(13, 17).tril(4) > 0)         # the others as under `causal`


def test_soft_log_at_alpha_0_is_the_causal_mask():
    images = hashed_images(2)
    assert torch.equal(build("soft_log", alpha=0.0)(images), build("soft_log", mask="causal")(images))


def test_soft_is_the_softmax_times_alpha_above_the_diagonal_and_soft_log_scales_before_normalising():
    def first_map(step, alpha):
        return build(step, alpha).attention_maps(hashed_images(2))[0]        # B, h, N, N
    ones, alpha = torch.ones(17, 17), 0.3
    scaled = first_map("soft_mask", 1.0) * (ones.tril() + alpha * ones.triu(1))
    torch.testing.assert_close(first_map("soft_mask", alpha), scaled)
    torch.testing.assert_close(first_map("soft_log", alpha), scaled / scaled.sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass


@every_step
def test_the_short_last_block_gives_the_full_blocks_logits(step):
    model, images = build(step, alpha=0.3 if "soft" in step else None), hashed_images(2)
    full = model.head(model.forward_features(images)[:, model.cls])[:, 0]
    torch.testing.assert_close(model(images), full, atol=1e-5, rtol=0)


def test_in_the_last_block_one_query_and_one_token_of_the_mlp_are_computed():
    model, shapes = build(), {}
    for name in ("attn.proj", "mlp.fc1", "norm2"):
        model.blocks[-1].get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: inputs[0].shape[:2]}))
    model(hashed_images(3))
    assert set(shapes.values()) == {(3, 1)} and len(shapes) == 3


@pytest.mark.parametrize("step", ["ps_cls", "modified", "soft_mask", "soft_log"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_copy_computes_what_the_model_does(step, alpha):
    model, images = build(step, alpha=alpha if "soft" in step else None), hashed_images(2)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    average = AveragedModel(model)                       # a copy of the weights, and with each update of the buffers
    if "soft" in step:
        model.set_soft_mask(1 - alpha)
    average.update_parameters(model)
    torch.testing.assert_close(average(images), model(images), atol=1e-6, rtol=0)


def test_what_gets_no_weight_decay_and_which_outputs_are_patches_is_said_once():
    for cls_last in (False, True):
        model = build("abs_pos", cls_last=cls_last)
        exempt = model.no_weight_decay()
        assert {name for name, p in model.named_parameters() if p.ndim in (2, 4)}.isdisjoint(exempt)
        assert {name for name, p in model.named_parameters() if p.ndim in (1, 3)} == exempt
        tokens = torch.arange(17)
        assert tokens[model.patches].tolist() == [t for t in range(17) if t != tokens[model.cls]]


@every_step
def test_attention_maps_times_values_are_the_forward_pass(step):
    model, images = build(step, alpha=0.3 if "soft" in step else None), hashed_images(2)
    maps, x = model.attention_maps(images), model.embed(images)
    assert maps.shape == (2, 2, 2, 17, 17)                                   # depth, B, heads, N, N
    for block, attn in zip(model.blocks, maps):
        v = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)[..., 256:]          # B, N, D
        y = torch.cat([attn[:, h] @ v[..., 64 * h: 64 * h + 64] for h in range(2)], dim=-1)
        x = x + block.attn.proj(y)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.norm(x), model.forward_features(images), atol=1e-5, rtol=0)


@every_step
def test_every_step_trains_an_iteration_with_finite_gradients_everywhere(step):
    model = build(step, alpha=0.5 if "soft" in step else None, drop_path=0.2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = hashed_images(8), torch.arange(8)
    before = F.cross_entropy(model.eval()(images), labels)
    F.cross_entropy(model.train()(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert F.cross_entropy(model.eval()(images), labels) < before


@pytest.mark.parametrize("step, alpha, maps", [("vit", None, 0), ("abs_pos", None, 0), ("soft_log", 0.0, 0),
                                               ("soft_mask", 0.5, 4)])
def test_backward_keeps_two_attention_maps_per_block_under_soft_and_else_none(step, alpha, maps):
    net, saved = build(step, alpha, depth=3).train(), {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.shape[1:]
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(hashed_images(2)).sum()                                   # held, or addresses would be used again
    maps_of = [shape for shape in saved.values() if shape[-2:] == (17, 17)]  # B, h, N, N; the last block has one query
    assert len(maps_of) == maps
    loss.backward()


@pytest.mark.parametrize("fields", [dict(step="abs_pos"), dict(step="vit")])
def test_without_a_soft_mask_there_is_no_table_of_all_pairs(fields):
    net = VisionTransformer(config("nano", depth=1, img_size=2048, patch_size=16, **fields))       # 16,385 tokens
    assert net.mask() == Mask(is_causal=fields != dict(step="vit"))


@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.0])
def test_gradients_are_finite_over_the_whole_range_of_soft_log(alpha):
    model = build("soft_log", alpha)
    model(hashed_images(2)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_grows_with_depth_and_draws_for_each_branch():
    torch.manual_seed(0)
    model = build(depth=3, drop_path=0.5)
    assert [block.drop_path.p for block in model.blocks] == [0, 0.25, 0.5]
    block, x = model.blocks[-1].train(), torch.randn(400, 17, 128)
    seen = model.rope, model.mask()
    branch, same = block.attn(block.norm1(x), *seen), 1e-4
    y = block(x, *seen)
    attn_off, attn_on = x, x + 2 * branch                                    # kept branches are scaled by 1 / (1 - p)
    kinds = [y - z - mlp_on * 2 * block.mlp(block.norm2(z)) for z in (attn_off, attn_on) for mlp_on in (0, 1)]
    kinds = [(difference.abs().amax((1, 2)) < same).sum().item() for difference in kinds]
    assert sum(kinds) == 400 and min(kinds) > 70                             # four independent outcomes, a quarter each


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


@every_step
def test_it_compiles_in_one_graph_and_not_again_when_alpha_changes(step):
    model, graphs = build(step).train(), []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for alpha in (1.0, 0.5, 0.0):
        if "soft" in step:
            model.set_soft_mask(alpha)
        images = hashed_images(2)
        torch.testing.assert_close(compiled(images), model(images), atol=1e-6, rtol=0)
    assert len(graphs) == 1


@every_step
def test_it_is_exported_for_any_number_of_images(step):
    model = build(step, alpha=0.3 if "soft" in step else None)
    exported = torch.export.export(model, (hashed_images(2),), dynamic_shapes=({0: torch.export.Dim("images")},))
    torch.testing.assert_close(exported.module()(hashed_images(3)), model(hashed_images(3)), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")                                        # of what torch deprecates
@every_step
def test_other_tools_of_torch_take_it(step):
    model, images = build(step, alpha=0.3 if "soft" in step else None), hashed_images(2)
    expected = model(images)
    extractor = create_feature_extractor(model, ["blocks.0", "head"])        # torch.fx
    features = extractor(images)
    assert features["blocks.0"].shape == (2, 17, 128)
    torch.testing.assert_close(features["head"][:, 0], expected, atol=1e-6, rtol=0)
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(hashed_images(3)), model(hashed_images(3)), atol=1e-6, rtol=0)
    with pytest.raises(AssertionError, match=r"images must be \(B, 3, 32, 32\): resize them"):
        model(hashed_images(2, 64))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_step
def test_gradients_of_single_images_by_vmap_are_those_of_a_loop(step):
    model, images = build(step, alpha=0.3 if "soft" in step else None), hashed_images(2)
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, image[None]).square().sum()
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    model(images[1:]).square().sum().backward()
    for name, p in weights.items():
        torch.testing.assert_close(gradients[name][1], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_same_logits_and_gradients():
    model, images = build("soft_mask", alpha=0.5), hashed_images(2)
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        results.append([logits.detach()] + [p.grad.clone() for p in model.parameters()])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out


@every_step
def test_saved_and_loaded_weights_give_equal_logits(step, tmp_path):
    model, images = build(step), hashed_images(2)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    other = VisionTransformer(model.cfg).eval()
    assert load_weights(other, tmp_path / "weights.pt") == []
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("cls_last", [False, True])
def test_positions_resize_from_224_to_384_with_the_class_token_kept_bit_for_bit(cls_last):
    pos = hashed((1, 197, 8), 1)
    cls, patches = (-1, slice(0, -1)) if cls_last else (0, slice(1, None))
    new = resize_positions(pos, patches, 24)
    assert new.shape == (1, 577, 8) and torch.equal(new[:, cls], pos[:, cls])
    flat = torch.ones(1, 197, 8)
    torch.testing.assert_close(resize_positions(flat, patches, 24), torch.ones(1, 577, 8))
    ramp = torch.arange(196.).view(1, 196, 1)               # grows to the right and downwards: still does
    ramp = torch.cat([ramp, flat[:, :1, :1]] if cls_last else [flat[:, :1, :1], ramp], dim=1)
    grid = resize_positions(ramp, patches, 24)[0, patches, 0].view(24, 24)
    assert (grid.diff(dim=0) > 0).all() and (grid[:, 2:-2].diff(dim=1) > 0).all()


def test_weights_of_another_resolution_load_and_the_same_size_changes_nothing():
    model = build("soft_mask")
    assert load_weights(build("soft_mask"), model.state_dict()) == []
    larger = VisionTransformer(config("nano", depth=2, img_size=64, patch_size=8, num_classes=10))
    assert load_weights(larger, model.state_dict()) == ["learned positions resized from 16 to 64 patches"]
    assert torch.equal(larger.pos_embed[:, -1], model.pos_embed[:, -1])
    same = resize_positions(model.pos_embed, model.patches, 4)
    torch.testing.assert_close(same, model.pos_embed, atol=1e-6, rtol=0)


def test_what_follows_from_the_configuration_is_in_float32_and_can_be_made_again():
    model, images = build(), hashed_images(2)
    torch.set_default_dtype(torch.bfloat16)                                  # as large models are built
    try:
        low = VisionTransformer(model.cfg)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(low.rope, model.rope) and low.alpha.dtype == torch.float32
    with torch.device("meta"):
        empty = VisionTransformer(model.cfg)
    empty = empty.to_empty(device="cpu").eval()
    for buffer in empty.buffers():
        buffer.fill_(torch.nan)                                              # whatever was in memory
    empty.reset_parameters()
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(images), model(images))


def test_without_classes_it_gives_features():
    model, images = build(), hashed_images(2)
    encoder = VisionTransformer(replace(model.cfg, num_classes=0)).eval()
    notes = load_weights(encoder, model.state_dict(), new_head=True)
    features = encoder(images)
    assert notes == ["new head: 10 classes before, 0 now"]
    torch.testing.assert_close(features, model.forward_features(images)[:, -1], atol=1e-5, rtol=0)


def test_a_new_head_is_made_only_when_asked_for():
    model, other = build("soft_mask"), VisionTransformer(build("soft_mask", num_classes=3).cfg)
    with pytest.raises(ValueError, match="head.weight"):
        load_weights(other, model.state_dict())
    fresh = other.head.weight.clone()
    assert load_weights(other, model.state_dict(), new_head=True) == ["new head: 10 classes before, 3 now"]
    assert torch.equal(other.head.weight, fresh) and torch.equal(other.norm.weight, model.norm.weight)


def test_another_mask_than_that_of_the_weights_is_noted():
    model = build("rope")
    checkpoint = dict(model=model.state_dict(), config=asdict(model.cfg))
    assert load_weights(VisionTransformer(model.cfg), checkpoint) == []
    other = VisionTransformer(replace(model.cfg, mask="none", rope=False))
    assert load_weights(other, checkpoint) == ["mask causal before, none now", "rope True before, False now"]


def test_names_from_ddp_and_compile_are_understood():
    model, images = build(), hashed_images(2)
    other = VisionTransformer(model.cfg).eval()
    load_weights(other, {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()})
    assert torch.equal(other(images), model(images))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("call, said", [
    (lambda: config("huge"), "unknown size 'huge'; choose one of nano, tiny, small, base, large"),
    (lambda: config("tiny", step="moe"), "unknown step 'moe'; choose one of vit, swiglu"),
    (lambda: Config(img_size=225), "img_size 225 is not a multiple of patch_size 16"),
    (lambda: Config(width=100), "width 100 is no multiple of heads 3"),
    (lambda: Config(width=9, rope=True), "RoPE: width 9 / heads 3 must be even"),
    (lambda: Config(mask="hard"), "unknown mask 'hard'; choose one of none, causal, modified, soft, soft_log"),
    (lambda: build("causal").set_soft_mask(0.5), "mask 'causal' has no alpha"),
    (lambda: build().set_soft_mask(1.5), "alpha is 1.5; it must be between 0 and 1"),
    (lambda: load_weights(build(), "nowhere.pt"), "no checkpoint at nowhere.pt"),
    (lambda: load_weights(build("rope"), build("abs_pos").state_dict()), 'Unexpected key.s. in state_dict: "pos_embed"'),
    (lambda: load_weights(build("abs_pos"), build("rope").state_dict()), 'Missing key.s. in state_dict: "pos_embed"'),
    (lambda: load_weights(build(), build(depth=3).state_dict()), 'Unexpected key.s. in state_dict: .*"blocks.2.attn.proj.bias"'),
    (lambda: load_weights(build(), build().state_dict() | {"pos_embed": torch.zeros(1, 7, 128)}), "pos_embed has 7 rows"),
])
def test_bad_input_is_a_value_error_in_one_sentence(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="trap.pt cannot be read"):
        load_weights(build(), tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
