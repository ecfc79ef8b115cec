"""A model that writes: one property a test."""
import json

import numpy as np
import pytest
import torch

import downstream.caption as caption
import train
from conftest import SMALL, equal, load, metrics, refused
from data import normalize
from downstream.anytime import Reader
from downstream.caption import END, LONGEST, PAD, WORDS, Captioned, Captioner, ReadingWriter, text_of
from model import config

TINY = ["--depth", "2", "--epochs", "2", "--images", "24", "--batch-size", "8", "--warmup-epochs", "0", "--patch-size", "8",
        "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    return Captioner(config("nano", "abs_pos", depth=2, img_size=32, patch_size=8)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caption") / "run"
    caption.main(["--out", str(folder), *TINY])
    return folder


def images_of(count, say="one"):
    source = Captioned(say, "val", 32, count)
    pixels, words = zip(*(source[0, index] for index in range(count)))
    return torch.stack(pixels), torch.stack(words)


def test_an_image_shows_what_its_sentence_says():
    """Large shapes cover more; the place is where the light pixels are."""
    covered, centres = {}, {}
    for index in range(300):
        image, words = Captioned("one", "train", 64, 300)[1, index]
        light = np.asarray(image.float().mean(0)) > 0.3 * 255
        _, size, name, row, column, stop = text_of(words.tolist()).split()
        assert stop == "." and name in WORDS
        covered.setdefault((size, name), []).append(light.mean())
        y, x = np.argwhere(light).mean(0) / 31.5 - 1
        centres.setdefault(row, []).append(y)
        centres.setdefault(column, []).append(x)
    for name in caption.KINDS["shape"]:
        assert max(covered["small", name]) < min(covered["large", name]), name
    for before, after in (("top", "middle"), ("middle", "bottom"), ("left", "centre"), ("centre", "right")):
        assert np.mean(centres[before]) + 0.2 < np.mean(centres[after])


def test_images_are_drawn_anew_in_each_epoch_and_the_same_for_a_seed():
    source = Captioned("two", "train", 32, 10)
    (first, words), (second, _) = source[0, 3], source[1, 3]
    assert not torch.equal(first, second) and torch.equal(first, Captioned("two", "train", 32, 10)[0, 3][0])
    assert text_of(words.tolist()).split()[2] in ("above", "beside")


@torch.no_grad()
def test_a_word_depends_on_the_image_and_the_words_before_it_alone(captioner):
    pixels, words = images_of(2)
    images, other = normalize(pixels), words.clone()
    other[:, 3:] = (other[:, 3:] + 1) % len(WORDS)
    before, after = captioner(images, words), captioner(images, other)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])
    assert not torch.equal(before, captioner(images.flip(0), words))


@torch.no_grad()
def test_an_exact_sentence_is_one_whose_every_word_is_the_likeliest_after_the_right_ones(captioner):
    """So a batch with its words at hand counts what write() would write."""
    pixels, _ = images_of(4)
    sentences = captioner.write(normalize(pixels))
    words = torch.tensor([sentence + [PAD] * (LONGEST - len(sentence)) for sentence in sentences])
    result = caption.evaluate(captioner, [(pixels, words)], torch.device("cpu"), torch.float32)
    assert (result["test_exact"], result["images"]) == (100, 4)
    words[0, 0] = (words[0, 0] + 1) % len(WORDS)
    assert caption.evaluate(captioner, [(pixels, words)], torch.device("cpu"), torch.float32)["test_exact"] == 75


def test_padding_has_no_loss():
    logits, words = torch.randn(2, LONGEST, len(WORDS)), torch.full((2, LONGEST), PAD)
    words[:, 0] = END
    by_hand = -logits[:, 0].log_softmax(-1)[:, END].mean()
    torch.testing.assert_close(caption.loss_of(logits, words), by_hand)


@torch.no_grad()
def test_read_row_by_row_it_writes_the_same_and_reading_goes_on_after_a_sentence(captioner):
    pixels, _ = images_of(3)
    for image, sentence in zip(normalize(pixels), captioner.write(normalize(pixels))):
        reader = ReadingWriter(captioner)
        for strip in image[None].split(8, dim=2):
            reader.read(strip)
            reader.write()
        assert reader.write() == sentence and isinstance(reader, Reader)


def test_a_run_that_is_stopped_resumes_exactly(written, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr(caption, "evaluate", lambda *args: (_ for _ in ()).throw(GeneratorExit))
        caption.main(["--out", str(tmp_path / "part"), *TINY])
    caption.main(["--resume", str(tmp_path / "part"), "--workers", "0", "--device", "cpu"])
    assert equal(load(tmp_path / "part" / "last.pt")["model"], load(written / "last.pt")["model"])
    assert metrics(tmp_path / "part") == metrics(written)


def test_what_it_writes_is_shown_beside_the_right_sentences(written, tmp_path, capsys):
    caption.main(["show", str(written), "--draw", str(tmp_path / "a.png"), "--rows"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 * 5 and all("row 4 of 4" in line for line in lines[4::5])
    assert all(line.endswith(".)") for line in lines[::5])
    caption.main(["show", str(written), "--image", str(tmp_path / "a.png")])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_does_not_fit_a_model_that_writes_is_refused(written, finished, tmp_path, capsys):
    for step in (["--step", "ps_cls"], ["--step", "soft_mask"], ["--mask", "none"]):
        assert "RoPE and an exactly causal mask" in refused(caption, [*step, "--out", tmp_path / "a"], capsys)
    caption.main(["--mask", "soft_log", "--out", str(tmp_path / "soft"), *TINY, "--epochs", "1"])
    capsys.readouterr()
    assert "is no run of downstream.caption" in refused(caption, ["show", finished], capsys)
    assert "which trains Captioner, not VisionTransformer" in refused(train, ["--resume", written, *SMALL[-2:]], capsys)


def test_the_librarys_generate_writes_the_same_words(written, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    from downstream import llama
    llama.main([str(written), "--out", str(tmp_path / "llama"), "--check", "--images", "20"])
    said = capsys.readouterr().out
    assert "has a LlamaForCausalLM of" in said and "20 images, the same sentence: 20" in said
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["attention_bias"]
