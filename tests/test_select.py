"""Starting from a larger model's weights: one property a test."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train
from conftest import SMALL, load, refused
from downstream import select
from downstream.select import LLAMA, channels, places, read_llama, select_weights
from model import VisionTransformer, config, rope_table, rotate
from test_model import hashed, hashed_weights

LARGE = dict(size="tiny", width=192, heads=3, depth=3, img_size=16, patch_size=8, num_classes=5)
SMALLER = dict(size="nano", width=128, heads=2, depth=2, img_size=16, patch_size=8, num_classes=5)


def rule(larger, smaller):
    """Section by section as the published repository's script has it, in numpy."""
    if larger % smaller == 0:
        return [i * (larger // smaller) for i in range(smaller)]
    return np.round(np.linspace(0, larger - 1, smaller, dtype=np.float32)).astype(int).tolist()


def save(model, path, size="tiny"):
    torch.save(dict(model=model.state_dict(), config=asdict(model.cfg), classes=[str(i) for i in range(model.cfg.num_classes)],
                    alpha=0.0 if model.cfg.soft else None,
                    run=dict(size=size, step="soft_mask", data="shapes", dtype="float32", seed=0)), path)
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
    select_weights(model, tmp_path / "larger.pt", "uniform")
    source = larger.state_dict()
    for name, value in model.state_dict().items():
        indices = np.ix_(*(rule(*sizes) for sizes in zip(source[name].shape, value.shape)))
        assert np.array_equal(value.numpy(), source[name].numpy()[indices]), name


@torch.no_grad()
def test_aligned_heads_compute_what_they_computed_in_the_larger_model(larger, tmp_path):
    model = VisionTransformer(config(**SMALLER))
    select_weights(model, tmp_path / "larger.pt", "aligned")
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
    notes = select_weights(model, tmp_path / "llama", "uniform")
    after = model.state_dict()
    assert torch.equal(after["blocks.1.attn.qkv.weight"], qkv[rule(768, 384)][:, rule(256, 128)])
    same = [name for name in after if torch.equal(after[name], before[name])]
    assert same == [name for name in after if not name.startswith("blocks.") or name.endswith("bias")]
    assert notes[1].startswith("fresh: cls_token, pos_embed, patch_embed.proj.weight")


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


def test_a_run_starts_from_selected_weights_and_says_so(photos, larger, tmp_path, capsys):
    flags = ["--data", str(photos), *SMALL, "--width", "128", "--heads", "2", "--lr", "0", "--min-lr", "0", "--epochs", "1"]
    train.main([*flags, "--init-from", str(tmp_path / "larger.pt"), "--select", "aligned", "--out", str(tmp_path / "run")])
    assert "aligned selection of larger weights; fresh: head.weight, head.bias" in capsys.readouterr().out
    model = VisionTransformer(config(**SMALLER | dict(num_classes=3)))
    select_weights(model, tmp_path / "larger.pt", "aligned")
    saved = load(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items() if not name.startswith("head"))


def test_a_head_of_as_many_other_classes_is_not_selected_from(larger, tmp_path):
    for classes, kept in (("01234", True), ("01235", False)):
        model = VisionTransformer(config(**SMALLER))
        before = model.head.weight.clone()
        select_weights(model, tmp_path / "larger.pt", "uniform", list(classes))
        assert torch.equal(model.head.weight, before) != kept


def test_what_cannot_be_selected_is_refused(photos, larger, tmp_path, capsys):
    flags = ["--data", photos, *SMALL, "--out", tmp_path / "run", "--init-from", tmp_path / "larger.pt", "--select", "uniform"]
    llama(tmp_path / "llama")
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "config.json").write_text(
        '{"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 8}')
    llama(tmp_path / "gemma", model_type="gemma")
    state = llama(tmp_path / "part")
    torch.save({name: value for name, value in state.items() if "layers.1.input" not in name}, tmp_path / "part" / "a.bin")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('["hidden_size"]')
    for more, said in [
        (["--depth", 4], "lacks blocks.3.norm1.weight to select from"),
        (["--step", "vit"], "has swiglu True, this model False"),
        (["--step", "rmsnorm"], "has cls_last True, this model False"),
        (["--size", "small"], "the larger model has 192 and this one 384"),
        (["--width", 128, "--heads", 4, "--select", "aligned"], "the larger model has 3 heads of 64 channels, this one 4 of 32"),
        (["--patch-size", 4], "has patch_size 8, this model 4"),
        (["--init-from", tmp_path / "llama"], "holds neither *.safetensors nor *.bin"),
        (["--init-from", tmp_path / "llama", "--depth", 4], "has 3 layers, this model 4"),
        (["--init-from", tmp_path / "gqa"], "shares keys and values between heads"),
        (["--init-from", tmp_path / "gemma"], "is another model than LLaMA"),
        (["--init-from", tmp_path / "part"], "lacks model.layers.1.input_layernorm.weight: download all of its files"),
        (["--init-from", tmp_path / "odd"], "is not that of LLaMA 2"),
        (["--init-from", tmp_path / "nowhere"], "no checkpoint at"),
    ]:
        assert said in refused(train, [*flags, *more], capsys), more
    (tmp_path / "llama" / "model.bin").write_bytes(b"no weights")
    assert "cannot be read as weights" in refused(train, [*flags, "--init-from", tmp_path / "llama"], capsys)
    assert "--select needs weights" in refused(train, ["--select", "uniform"], capsys)


@pytest.mark.slow
def test_the_comparison_starts_smaller_models_from_the_larger_one_by_both_rules_and_from_random_weights(photos, tmp_path, capsys):
    flags = ["--data", str(photos), "--seeds", "1", "--epochs", "2", "--larger-epochs", "1", "--out", str(tmp_path),
             "--flags", " ".join([*SMALL, "--lr 0 --min-lr 0"]), "--larger", "--size tiny --depth 3", "--smaller", "--size nano"]
    for _ in range(2):                                                       # the second time nothing is left to do
        with pytest.raises(SystemExit) as end:
            select.main(flags)
        assert end.value.code == 0
    assert "0 runs to do" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["start"] == "larger" and sorted(row["start"] for row in rows[1:]) == ["aligned", "random", "uniform"]
    assert all(len(row["acc1_by_epoch"]) == 2 and row["acc1_by_epoch"][-1] == row["test_acc1"] for row in rows[1:])
    larger = load(tmp_path / "larger" / "last.pt")["model"]["blocks.0.attn.qkv.weight"]
    assert torch.equal(load(tmp_path / "uniform-0" / "last.pt")["model"]["blocks.0.attn.qkv.weight"],
                       larger[rule(576, 384)][:, rule(192, 128)])
    assert "must be at least 1" in refused(select, ["--seeds", 0], capsys)
