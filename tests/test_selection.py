"""Starting from a larger model's weights: one property a test."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train
from conftest import SMALL, load, refused
from downstream import selection
from downstream.selection import LLAMA, channels, places, read_llama, select_weights
from harness.checkpoint import CHECKPOINT, build, open_checkpoint, resize_positions
from model import VisionTransformer, config, rope_table, rotate
from replication import starts as comparison
from test_model import hashed, hashed_weights

LARGE = dict(size="tiny", width=192, heads=3, depth=3, img_size=16, patch_size=8, num_classes=5)
SMALLER = dict(size="nano", width=128, heads=2, depth=2, img_size=16, patch_size=8, num_classes=5)


def rule(larger, smaller):
    """Section by section as the published repository's script has it, in numpy."""
    if larger % smaller == 0:
        return [i * (larger // smaller) for i in range(smaller)]
    return np.round(np.linspace(0, larger - 1, smaller, dtype=np.float32)).astype(int).tolist()


def save(model, path, classes="01234"):
    torch.save(dict(model=model.state_dict(), config=asdict(model.cfg), classes=list(classes),
                    alpha=0.0 if model.cfg.soft else None,
                    run=dict(size="tiny", step="soft_mask", data="shapes", dtype="float32", seed=0)), path)
    return path


@pytest.fixture
def larger(tmp_path):
    model = VisionTransformer(config(**LARGE))
    model.load_state_dict(hashed_weights(model))
    save(model, tmp_path / "larger.pt")
    return model


@pytest.mark.parametrize("larger, smaller", [(192, 128), (576, 384), (4096, 192), (12288, 576), (11008, 512), (768, 384), (5, 5)])
def test_places_are_those_of_the_published_rule(larger, smaller):
    assert places(larger, smaller).tolist() == rule(larger, smaller)
    assert len(set(rule(larger, smaller))) == smaller


def test_the_published_script_picks_rows_of_q_k_and_v_unlike():
    picked = places(3 * 4096, 3 * 192).view(3, 192) - torch.tensor([[0], [4096], [8192]])
    assert [(part[0].item(), part[-1].item()) for part in picked] == [(0, 4081), (7, 4088), (14, 4095)]


def test_uniform_takes_the_first_blocks_and_evenly_spaced_elements_of_every_dimension(larger, tmp_path):
    model = VisionTransformer(config(**SMALLER))
    select_weights(model, open_checkpoint(tmp_path / "larger.pt"), "uniform")
    source = larger.state_dict()
    for name, value in model.state_dict().items():
        indices = np.ix_(*(rule(*sizes) for sizes in zip(source[name].shape, value.shape)))
        assert np.array_equal(value.numpy(), source[name].numpy()[indices]), name


@torch.no_grad()
def test_aligned_heads_compute_what_they_computed_in_the_larger_model(larger, tmp_path):
    model = VisionTransformer(config(**SMALLER))
    select_weights(model, open_checkpoint(tmp_path / "larger.pt"), "aligned")
    x, kept = hashed((1, 5, 128), 1), places(192, 128)
    wide = torch.zeros(1, 5, 192)
    wide[..., kept] = x                                                      # nothing in the channels that are left out
    one, other = model.blocks[1].attn, larger.blocks[1].attn
    for small, large in zip(one.qkv_heads(x, model.rope), other.qkv_heads(wide, larger.rope)):
        torch.testing.assert_close(small, large[:, [0, 2]])                  # evenly spaced of three heads
    heads = hashed((1, 5, 2, 64), 2)
    all_heads = torch.zeros(1, 5, 3, 64)
    all_heads[:, :, [0, 2]] = heads
    torch.testing.assert_close(one.proj(heads.flatten(2)), other.proj(all_heads.flatten(2))[..., kept])
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, larger.blocks[1].mlp.fc1.weight[:, kept])


def test_pairs_half_a_head_apart_become_adjacent_and_keep_their_frequency():
    q, k = hashed((9, 128), 1), hashed((9, 128), 2)                          # one head of LLaMA 2, Hugging Face's order
    rows = channels(128, 1, 64, 1, rotated=True, halves=True)
    left = torch.ones(128, dtype=torch.bool)
    left[rows] = False
    q[:, left] = k[:, left] = 0
    angle = torch.arange(9)[:, None] * 10000 ** (-torch.arange(0, 128, 2) / 128)
    cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()

    def halves(x):
        return x * cos + torch.cat([-x[:, 64:], x[:, :64]], 1) * sin
    table = rope_table(9, 64)
    torch.testing.assert_close(rotate(q[:, rows], table) @ rotate(k[:, rows], table).T, halves(q) @ halves(k).T)


def llama(folder, layers=3, **fields):
    """A folder as the library saves it, with numbers of ours: width 256 and 4 heads of 64."""
    sizes = dict(num_hidden_layers=layers, num_attention_heads=4, hidden_size=256, intermediate_size=1024) | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    state, D, H = {}, sizes["hidden_size"], sizes["intermediate_size"]
    shapes = dict(layernorm=(D,), gate=(H, D), up_proj=(H, D), down=(D, H), attn=(D, D))
    for i in range(layers):
        for place, part in enumerate(LLAMA):
            shape = next(shape for word, shape in shapes.items() if word in part.replace("post_attention", ""))
            state[f"model.layers.{i}.{part}"] = hashed(shape, 100 * i + place)
    state |= {"model.embed_tokens.weight": torch.zeros(7, D), "model.norm.weight": torch.ones(D)}
    return state


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_llama_is_read_from_its_shards(kind, tmp_path):
    state = llama(tmp_path / "llama")
    names = sorted(state)
    for number, part in enumerate((names[:10], names[10:])):
        path = tmp_path / "llama" / f"model-0000{number}-of-00002.{kind}"
        if kind == "bin":
            torch.save({name: state[name] for name in part}, path)
        else:
            pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
                {name: state[name] for name in part}, path)
    found, heads = read_llama(tmp_path / "llama", 2)
    assert heads == 4 and {name.split(".")[1] for name in found} == {"0", "1"}       # the third layer is not read
    qkv = torch.cat([state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(found["blocks.1.attn.qkv.weight"], qkv)
    model = VisionTransformer(config(**SMALLER))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = select_weights(model, tmp_path / "llama", "uniform")
    after = model.state_dict()
    assert torch.equal(after["blocks.1.attn.qkv.weight"], qkv[rule(768, 384)][:, rule(256, 128)])
    same = [name for name in after if torch.equal(after[name], before[name])]
    assert same == fresh == [name for name in after if not name.startswith("blocks.") or name.endswith("bias")]
    assert fresh[:3] == ["cls_token", "pos_embed", "patch_embed.proj.weight"]


def test_names_and_shapes_are_those_that_the_library_saves(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    for rule in ("uniform", "aligned"):
        model = VisionTransformer(config(**SMALLER))
        select_weights(model, tmp_path / "llama", rule)
        assert model.blocks[1].attn.qkv.weight.abs().mean() > 1e-3


@torch.no_grad()
def test_aligned_queries_and_keys_of_llama_attend_as_in_the_library(tmp_path):
    """On inputs in the channels that are kept, where keys and queries use the pairs that are kept alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    larger = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="eager")).eval()
    rows = channels(256, 2, 128, 2, rotated=True, halves=True)
    left = torch.ones(256, dtype=torch.bool)
    left[rows] = False
    layer = larger.model.layers[0].self_attn
    for projection in (layer.q_proj, layer.k_proj):
        projection.weight.normal_(std=0.3)
        projection.weight[left] = 0
    larger.save_pretrained(tmp_path / "llama")
    model = VisionTransformer(config(**SMALLER | dict(depth=1)))
    select_weights(model, tmp_path / "llama", "aligned")
    x = hashed((1, 5, 128), 1)
    wide = torch.zeros(1, 5, 256)
    wide[..., places(256, 128)] = x
    _, theirs = layer(wide, position_embeddings=larger.model.rotary_emb(wide, torch.arange(5)[None]), attention_mask=None)
    q, k, _ = model.blocks[0].attn.qkv_heads(x, model.rope)
    torch.testing.assert_close((q @ k.transpose(-2, -1) / 128 ** 0.5).softmax(-1), theirs, atol=1e-5, rtol=0)


def make_small(tmp_path, *flags, source="larger.pt"):
    """The program: a checkpoint of a model like SMALLER."""
    selection.main([str(flag) for flag in (tmp_path / source, "--size", "nano", "--depth", 2, *flags, "--out", tmp_path / "small.pt")])
    return load(tmp_path / "small.pt")


def test_the_program_writes_a_checkpoint_of_the_smaller_model_that_evaluation_takes(larger, tmp_path, capsys):
    checkpoint = make_small(tmp_path, "--rule", "aligned", "--seed", 3)
    assert checkpoint.keys() == {*CHECKPOINT, "made_by"}
    assert checkpoint["config"] == asdict(config(**SMALLER)) and checkpoint["classes"] == list("01234")
    assert checkpoint["alpha"] == 0 and checkpoint["run"] == dict(size="nano", step="soft_mask", data="shapes", dtype="float32", seed=3)
    model = VisionTransformer(config(**SMALLER))
    assert select_weights(model, open_checkpoint(tmp_path / "larger.pt"), "aligned") == []
    built = build(open_checkpoint(tmp_path / "small.pt")).state_dict()
    assert all(torch.equal(built[name], value) for name, value in model.state_dict().items())
    assert "python train.py --size nano --step soft_mask --depth 2 --img-size 16" in capsys.readouterr().out


def test_the_smaller_model_has_the_larger_ones_parts_unless_its_step_is_given(tmp_path):
    model = VisionTransformer(config(**LARGE | dict(step="rope", mask="none")))
    save(model, tmp_path / "larger.pt")
    assert make_small(tmp_path)["config"] == asdict(config(**SMALLER | dict(step="rope", mask="none"))) | dict(abs_pos=False)
    assert make_small(tmp_path, "--step", "rope")["config"]["mask"] == "causal"


def test_what_is_not_selected_is_drawn_from_the_seed(tmp_path):
    torch.save(llama(tmp_path / "llama"), tmp_path / "llama" / "model.bin")
    flags = "--img-size", 16, "--num-classes", 3, "--seed"
    one, same, other = (make_small(tmp_path, *flags, seed, source="llama") for seed in (1, 1, 2))
    for name in ("head.weight", "pos_embed", "patch_embed.proj.weight"):
        assert torch.equal(one["model"][name], same["model"][name]) and not torch.equal(one["model"][name], other["model"][name])
    assert torch.equal(one["model"]["blocks.1.mlp.fc1.weight"], other["model"]["blocks.1.mlp.fc1.weight"])
    assert one["classes"] is None and one["run"]["data"] == "" and one["config"]["patch_size"] == 16
    assert make_small(tmp_path, source="llama")["config"] == asdict(config("nano", depth=2))         # 224 pixels, 1,000 classes


def test_positions_are_resized_before_they_are_selected(larger, tmp_path):
    pos = make_small(tmp_path, "--img-size", 32)["model"]["pos_embed"]
    assert pos.shape == (1, 17, 128)
    torch.testing.assert_close(pos, resize_positions(larger.pos_embed, larger.patches, 4)[..., places(192, 128)])


def trained(photos, tmp_path):
    """The weights of a run that starts from small.pt and learns nothing."""
    flags = ["--data", photos, *SMALL, "--lr", 0, "--min-lr", 0, "--epochs", 1, "--init-from", tmp_path / "small.pt"]
    train.main([str(flag) for flag in [*flags, "--out", tmp_path / "run", "--resume"]])
    return load(tmp_path / "run" / "last.pt")["model"]


def test_a_run_starts_from_selected_weights_and_says_so(photos, larger, tmp_path, capsys):
    small = make_small(tmp_path, "--rule", "aligned")["model"]
    saved = trained(photos, tmp_path)
    assert "small.pt; new head: 5 classes before, 3 now" in capsys.readouterr().out
    assert all(torch.equal(saved[name], value) for name, value in small.items() if not name.startswith("head"))


@pytest.mark.parametrize("classes, kept", [(["cat", "dog", "owl"], True), (["cat", "dog", "cow"], False)])
def test_a_run_keeps_the_selected_head_if_its_classes_are_the_same(classes, kept, photos, tmp_path):
    larger = VisionTransformer(config(**LARGE | dict(num_classes=3)))
    save(larger, tmp_path / "larger.pt", classes)
    small = make_small(tmp_path)["model"]["head.weight"]
    assert torch.equal(small, larger.head.weight[:, rule(192, 128)])
    assert torch.equal(trained(photos, tmp_path)["head.weight"], small) == kept


def test_a_head_of_another_number_of_classes_is_fresh(larger, tmp_path, capsys):
    checkpoint = make_small(tmp_path, "--num-classes", 7)
    assert checkpoint["model"]["head.weight"].shape == (7, 128) and checkpoint["classes"] is None
    assert "fresh: head.weight, head.bias" in capsys.readouterr().out


def test_what_cannot_be_selected_is_refused(photos, larger, tmp_path, capsys):
    llama(tmp_path / "llama")
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "config.json").write_text(
        '{"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 8}')
    llama(tmp_path / "gemma", model_type="gemma")
    state = llama(tmp_path / "part")
    torch.save({name: value for name, value in state.items() if "layers.1.input" not in name}, tmp_path / "part" / "a.bin")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('["hidden_size"]')
    llama(tmp_path / "broken")
    (tmp_path / "broken" / "model.bin").write_bytes(b"no weights")
    for source, more, said in [
        ("larger.pt", ["--depth", 4], "lacks blocks.3.norm1.weight to select from"),
        ("larger.pt", ["--step", "vit"], "has swiglu True, this one False"),
        ("larger.pt", ["--step", "rmsnorm"], "has cls_last True, this one False"),
        ("larger.pt", ["--size", "small"], "the larger model has 192 and this one 384"),
        ("larger.pt", ["--width", 128, "--heads", 4, "--rule", "aligned"], "the larger model has 3 heads of 64 channels, this one 4 of 32"),
        ("larger.pt", ["--patch-size", 4], "has patch_size 8, this one 4"),
        ("larger.pt", ["--heads", 3], "width 128 is no multiple of heads 3"),
        ("larger.pt", ["--depth", 0.5], "argument --depth: invalid int value"),
        ("larger.pt", ["--width", 0], "--width is 0; it must be at least 1"),
        ("llama", [], "holds neither *.safetensors nor *.bin"),
        ("llama", ["--depth", 4], "has 3 layers, this model 4"),
        ("llama", ["--step", "swiglu"], "has SwiGLU and RMSNorm: use --step rmsnorm or a later one"),
        ("gqa", [], "shares keys and values between heads"),
        ("gemma", [], "is another model than LLaMA"),
        ("part", [], "lacks model.layers.1.input_layernorm.weight: download all of its files"),
        ("odd", [], "is not that of LLaMA 2"),
        ("broken", [], "cannot be read as weights"),
        ("nowhere", [], "no checkpoint at"),
    ]:
        flags = [tmp_path / source, "--size", "nano", "--depth", 2, *more, "--out", tmp_path / "small.pt"]
        assert said in refused(selection, flags, capsys), (source, more)
    assert not (tmp_path / "small.pt").exists()
    assert "required: --size, --out" in refused(selection, [tmp_path / "larger.pt"], capsys)
    assert "unrecognized arguments: --select uniform" in refused(train, ["--select", "uniform"], capsys)


def test_a_permuted_start_has_the_same_values_in_each_tensor_at_other_places(larger, tmp_path):
    before, after = (open_checkpoint(tmp_path / "larger.pt") for _ in range(2))
    comparison.permute(after, 0)
    for name, value in before["model"].items():
        assert torch.equal(value.flatten().sort()[0], after["model"][name].flatten().sort()[0])
        assert value.unique().numel() == 1 or not torch.equal(value, after["model"][name])


@pytest.mark.slow
def test_the_comparison_starts_smaller_models_from_the_larger_one_by_both_rules_and_from_random_weights(
        photos, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison, "FLAGS", " ".join([*SMALL, "--lr 0 --min-lr 0"]))
    monkeypatch.setattr(comparison, "LARGER", "--size tiny --depth 3")
    monkeypatch.setattr(comparison, "SMALLER", "--size nano --depth 2")
    flags = ["--data", str(photos), "--seeds", "1", "--epochs", "2", "--larger-epochs", "1", "--out", str(tmp_path)]
    for _ in range(2):                                                       # the second time nothing is left to do
        with pytest.raises(SystemExit) as end:
            comparison.main(flags)
        assert end.value.code == 0
    assert "0 runs to do" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["start"] == "larger" and sorted(row["start"] for row in rows[1:]) == ["aligned", "permuted", "random", "uniform"]
    assert all(len(row["acc1_by_epoch"]) == 2 and row["acc1_by_epoch"][-1] == row["test_acc1"] for row in rows[1:])
    larger = load(tmp_path / "larger" / "last.pt")["model"]["blocks.0.attn.qkv.weight"]
    assert torch.equal(load(tmp_path / "uniform-0" / "last.pt")["model"]["blocks.0.attn.qkv.weight"],
                       larger[rule(576, 384)][:, rule(192, 128)])
    selected, permuted = (load(tmp_path / name / "last.pt")["model"]["blocks.0.attn.qkv.weight"] for name in ("uniform-0", "permuted-0"))
    assert torch.equal(selected.flatten().sort()[0], permuted.flatten().sort()[0]) and not torch.equal(selected, permuted)
    for flag in ("--seeds", "--epochs", "--larger-epochs", "--jobs"):
        assert "must be at least 1" in refused(comparison, [flag, 0], capsys)


@pytest.mark.slow
def test_with_other_classes_the_smaller_models_learn_what_the_larger_one_has_not_seen(animals, monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "FLAGS", " ".join(SMALL))
    monkeypatch.setattr(comparison, "LARGER", "--size tiny --depth 3")
    monkeypatch.setattr(comparison, "SMALLER", "--size nano --depth 2")
    flags = ["--data", str(animals), "--seeds", "1", "--epochs", "1", "--larger-epochs", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        comparison.main([*flags, "--other-classes"])
    assert end.value.code == 0
    classes = [load(tmp_path / name / "last.pt")["classes"] for name in ("larger-other", "random-other-0", "uniform-other-0")]
    assert classes[1] == classes[2] and not set(classes[0]) & set(classes[1])
    init = json.loads((tmp_path / "uniform-other-0" / "config.json").read_text())["run"]["init_from"]
    assert init == str(tmp_path / "uniform-other-0.pt")
