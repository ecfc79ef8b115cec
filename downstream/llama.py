"""It is a LLaMA: a trained model as the LlamaModel of the transformers library, unmodified.

    python -m downstream.llama RUN --out FOLDER            # needs transformers; LlamaModel.from_pretrained opens FOLDER
    python -m downstream.llama RUN --out FOLDER --check    # and compare the logits of validation images
    python -m downstream.llama WORDS --out FOLDER --check  # a run of downstream.caption: as a LlamaForCausalLM

Under an exact causal mask (`causal`, or `soft_log` at alpha 0) with SwiGLU, RMSNorm and RoPE the blocks are LLaMA's.
The library's model takes what embed() gives, patches and class token, as the embeddings of a text. FOLDER/vision.pt has
the rest: patches, positions, class token and head. A model that writes is a LlamaForCausalLM, whose own generate() writes
the same words after the same embeddings.
"""
from functools import partial
from pathlib import Path

import torch

from data import Images, eval_batches, eval_transform, loader, normalize
from downstream.caption import END, LONGEST, PAD, WORDS, Captioned, Captioner, open_captioner, until_end
from downstream.selection import LLAMA
from eval import open_model, open_val
from harness.checkpoint import CHECKPOINT, read_checkpoint
from harness.files import replacing
from harness.flags import Parser, check_bounds, needs, nonempty, require
from harness.processes import report_errors
from harness.run import packed


def half_split(rows, heads):
    """Rows of q or k (D, ...) with each head's pairs of channels half a head apart, as the library rotates them; here
    the two of a pair are neighbours."""
    rows = rows.unflatten(0, (heads, -1, 2))                         # h, d/2, 2, ...
    return rows.transpose(1, 2).flatten(0, 2)


def to_llama(model):
    """The blocks and the last norm of a model as a transformers.LlamaModel; those of a Captioner, with its words and
    head, as a LlamaForCausalLM. InputError if they are no LLaMA's."""
    with needs("this program", "transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
    cfg = model.cfg
    require(cfg.swiglu and cfg.rmsnorm and cfg.rope, "a LLaMA has SwiGLU, RMSNorm and RoPE: use a run of --step rope "
            "or a later one")
    why = "; under `soft` later keys stay in the softmax's denominator, even at alpha 0" if cfg.mask == "soft" else ""
    require(model.exactly_causal, f"a LLaMA's mask hides the future exactly, {cfg.mask!r} does not: "
            f"use a run with mask causal, or soft_log at alpha 0{why}")
    writes = isinstance(model, Captioner)
    words = dict(vocab_size=1, eos_token_id=None)                    # no words
    if writes:
        words = dict(vocab_size=len(WORDS), eos_token_id=END, pad_token_id=PAD, tie_word_embeddings=False)
    llama_config = LlamaConfig(
        hidden_size=cfg.width, intermediate_size=model.blocks[0].mlp.fc1.out_features, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, attention_bias=True, rms_norm_eps=1e-6,
        max_position_embeddings=cfg.tokens + LONGEST, bos_token_id=None, **words)        # RoPE's base: 10,000 by default
    embeddings = model.words.weight if writes else torch.zeros(1, cfg.width)
    weights = {"norm.weight": model.norm.weight, "embed_tokens.weight": embeddings}
    ours = {theirs: name for theirs, name in LLAMA.items() if not theirs.startswith("self_attn.")}
    attention = {f"attn.{name}.{kind}" for name in ("qkv", "proj") for kind in ("weight", "bias")}
    for i, block in enumerate(model.blocks):
        own, layer = block.state_dict(), f"layers.{i}"
        others = sorted(own.keys() - attention - {*ours.values()})
        require(not others, f"a LLaMA has no {', '.join(others)}: use a run without")
        weights |= {f"{layer}.{theirs}": own[name] for theirs, name in ours.items()}
        for kind in ("weight", "bias"):
            q, k, v = own[f"attn.qkv.{kind}"].chunk(3)
            rows = dict(q=half_split(q, cfg.heads), k=half_split(k, cfg.heads), v=v, o=own[f"attn.proj.{kind}"])
            weights |= {f"{layer}.self_attn.{name}_proj.{kind}": value for name, value in rows.items()}
    llama = LlamaModel(llama_config)
    if writes:
        llama = LlamaForCausalLM(llama_config)
        weights = {f"model.{name}": value for name, value in weights.items()} | {"lm_head.weight": model.head.weight}
    llama.load_state_dict(weights)
    return llama.eval()


def logits_of(llama, model, images):
    """Logits (B, classes) by the library's blocks: model(images), if it is a LLaMA."""
    hidden = llama(inputs_embeds=model.embed(images)).last_hidden_state                      # B, N, D
    return model.head(hidden[:, model.cls])[:, 0]


def logits_by_rows(llama, model, images):
    """The same, read in rows of patches through the library's cache of keys and values; the class token must be last.
    """
    from transformers import DynamicCache
    tokens, grid, cache = model.embed(images), model.cfg.grid, DynamicCache()
    for part in tokens.split([grid] * grid + [1], dim=1):
        output = llama(None, None, None, cache, inputs_embeds=part)  # by place, as its name differs by version
    return model.head(output.last_hidden_state)[:, 0]


@torch.no_grad()
def largest_difference(llama, model, batches):
    """Of the logits of all images, whole and read by rows: the largest differences to the model's own."""
    largest = [0.0, 0.0]
    for images, _ in batches:
        images = normalize(images)
        own, ways = model(images), [logits_of]
        if model.cfg.cls_last:
            ways.append(logits_by_rows)
        for i, way in enumerate(ways):
            largest[i] = max(largest[i], (way(llama, model, images) - own).abs().max().item())
    return largest


def generated(llama, model, images):
    """The words that the library's generate() writes, from its own cache, as Captioner.write() gives them."""
    written = llama.generate(inputs_embeds=model.embed(images), max_new_tokens=LONGEST, do_sample=False)
    return [until_end(words) for words in written.tolist()]


@torch.no_grad()
def check_sentences(llama, model, say, count):
    """Print how many of the library's sentences about new images are ours."""
    images = Captioned(say, "val", model.cfg.img_size, count)
    same = 0
    for batch, _ in loader(images, eval_batches(count, 32), 0, torch.device("cpu")):
        ours, theirs = model.write(normalize(batch)), generated(llama, model, normalize(batch))
        same += sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    print(f"{count} images, the same sentence: {same}")


@report_errors()
def main(argv=None):
    parser = Parser(__doc__, prog="python -m downstream.llama")
    parser.add_argument("checkpoint", help="a run's folder, or its best.pt or last.pt")
    parser.add_argument("--out", type=nonempty, required=True, help="the folder to write")
    parser.add_argument("--check", action="store_true", help="compare the logits of validation images")
    parser.add_argument("--images", type=int, default=256, help="how many of them")
    parser.add_argument("--data", type=nonempty, help="a data set or a folder with val/CLASS/IMAGE; default: the run's")
    args = parser.parse_args(argv)
    check_bounds(vars(args))
    out, cpu = Path(args.out), torch.device("cpu")
    writes = read_checkpoint(args.checkpoint).get("architecture") == Captioner.__name__
    model, checkpoint = open_captioner(args.checkpoint) if writes else open_model(args.checkpoint, cpu)
    llama = to_llama(model)
    theirs = ("blocks.", "norm.", "words.", "head.") if writes else ("blocks.", "norm.")
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith(theirs)}
    with replacing(out, "downstream.llama") as folder:
        llama.save_pretrained(folder)
        (folder / "vision.pt").write_bytes(packed({name: checkpoint[name] for name in CHECKPOINT} | dict(model=rest)))
    count = sum(p.numel() for p in llama.parameters())
    print(f"{out} has a {type(llama).__name__} of {count:,} parameters, and beside it vision.pt")
    if args.check and writes:
        check_sentences(type(llama).from_pretrained(out).eval(), model, checkpoint["run"]["say"], args.images)
    elif args.check:
        from transformers import LlamaModel
        val = open_val(args.checkpoint, checkpoint, model, args.data)
        images = Images(val, partial(eval_transform, size=model.cfg.img_size))
        batches = loader(images, eval_batches(min(args.images, len(val)), 32), 0, cpu)
        whole, rows = largest_difference(LlamaModel.from_pretrained(out).eval(), model, batches)
        print(f"{min(args.images, len(val))} images, largest difference of a logit: {whole:.1e}, read by rows: "
              f"{rows:.1e}")


if __name__ == "__main__":
    main()
