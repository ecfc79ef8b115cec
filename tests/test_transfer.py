"""Transfer to other classes: one property a test."""
import json
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import train
from conftest import SMALL, load, refused
from data import OPENERS, open_data
from replication import transfer
from replication.transfer import Part, open_part


@pytest.fixture(autouse=True)
def openers():
    """No test leaves a part among the data sets."""
    known = dict(OPENERS)
    yield
    OPENERS.clear()
    OPENERS.update(known)


def test_the_halves_share_no_class_and_number_their_own_from_0(animals):
    first, rest = (open_part(f"{animals}:{part}", "train", 16) for part in ("first", "rest-100-0"))
    assert (first.classes, rest.classes) == (["ant", "bee"], ["cat", "dog"])
    assert [Counter(part[i][1] for i in range(len(part))) for part in (first, rest)] == [{0: 40, 1: 40}] * 2


def test_a_percentage_is_of_each_class_and_repeated_to_the_same_length(animals):
    part = open_part(f"{animals}:rest-25-0", "train", 16)
    seen = Counter((part[i][0].getpixel((0, 0)), part[i][1]) for i in range(len(part)))
    assert len(part) == 80 and part.images == 20 and set(seen.values()) == {4}
    assert Counter(label for _, label in seen) == {0: 10, 1: 10}
    assert len(open_part(f"{animals}:rest-25-0", "val", 16)) == 16           # all of them, each once


def test_the_images_of_a_part_depend_on_the_seed_and_smaller_parts_are_within_larger_ones(animals):
    source = open_data(str(animals), "train", 16)
    small, large, other = (set(Part(source, ["cat", "dog"], percent, seed).places) for percent, seed in ((5, 0), (25, 0), (5, 1)))
    assert small < large and small != other and len(small) == len(other) == 4


@pytest.mark.slow
def test_every_start_is_run_on_every_part_and_a_probe_leaves_the_blocks_as_they_were(animals, monkeypatch, tmp_path):
    flags = " ".join(SMALL) + " --batch-size 16"
    monkeypatch.setattr(transfer, "FLAGS", flags)
    monkeypatch.setattr(transfer, "PERCENT", (5, 100))
    for _ in range(2):                                                       # the second time nothing is left to do
        with pytest.raises(SystemExit) as end:
            transfer.main([*"--seeds 1 --epochs 1 --pretrain-epochs 1 --data".split(), str(animals), "--out", str(tmp_path)])
        assert end.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert Counter((row["step"], row["start"]) for row in rows) == {("soft_mask", "fine-tuning-0"): 1} | {
        (step, start): 1 if start == "pretraining" else 2
        for step in transfer.COMPARED for start in ("pretraining", "scratch", "fine-tuning", "probe")}
    before = load(tmp_path / "first-soft_mask-0" / "last.pt")["model"]
    for start, same in (("probe", True), ("fine-tuning", False)):
        after = load(tmp_path / f"{start}-5-soft_mask-0" / "last.pt")
        assert (after["model"]["blocks.0.attn.qkv.weight"] == before["blocks.0.attn.qkv.weight"]).all() == same
        assert after["classes"] == ["cat", "dog"] and after["alpha"] == 0


def resolved(command):
    flags = list(map(str, command))
    return train.resolve(train.parse(flags[3:] if flags[0] == "-m" else flags[1:]), None)


def test_size_t_is_fine_tuned_by_the_papers_protocol_but_for_resolution_epochs_and_batch():
    args = Namespace(data="cifar10", pretrain_data="shapes", epochs=12, pretrain_epochs=5, seeds=1, out=Path("out"))
    first, rest = transfer.tiny_runs(args)
    starts = {}
    for name, (command, row) in rest.items():
        run, recipe, cfg = resolved(command)
        soft = {"fine-tuning": 50, "fine-tuning-0": 0}[row["start"]]                     # of 300
        published = replace(train.RECIPES["transfer-cifar100"], soft_mask_epochs=soft)
        for field in ("warmup_epochs", "soft_mask_epochs") if cfg.soft else ("warmup_epochs",):
            assert getattr(recipe, field) / recipe.epochs == getattr(published, field) / published.epochs
        others = dict(warmup_epochs=0, soft_mask_epochs=0, epochs=1, img_size=32, patch_size=8, batch_size=64, lr=0.0)
        assert replace(recipe, **others) == replace(published, **others)
        assert recipe.lr ** 2 / recipe.batch_size == pytest.approx(published.lr ** 2 / published.batch_size)
        assert (run.size, run.data) == ("tiny", "cifar10:rest-100-0")
        starts[row["step"], row["start"]] = Path(run.init_from).parent.name
    assert starts == {("rmsnorm", "fine-tuning"): "first-rmsnorm-0", ("soft_mask", "fine-tuning"): "first-soft_mask-0",
                      ("soft_mask", "fine-tuning-0"): "first-soft_mask-0"}
    for command, row in first.values():                       # the weights fit, and what was pretrained is the same
        run, recipe, cfg = resolved(command)
        assert (run.data, recipe.img_size, recipe.patch_size) == ("shapes", 32, 8)
        assert cfg == resolved(rest[f"fine-tuning-{row['step']}-0"][0])[2]


def found_epoch(run):
    """Of best.pt."""
    return load(run / "best.pt")["epoch"] - 1


def test_size_t_is_pretrained_and_fine_tuned(photos, animals, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(transfer, "TINY", " ".join(SMALL))
    monkeypatch.setattr(transfer, "TUNING", "--recipe transfer --img-size 16 --batch-size 16")
    with pytest.raises(SystemExit) as end:
        transfer.main(["--data", str(animals), "--pretrain-data", str(photos), "--pretrain-epochs", "1", "--epochs", "6",
                       "--seeds", "1", "--out", str(tmp_path)])
    assert end.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert Counter((row["step"], row["start"], row["data"]) for row in rows) == {
        ("rmsnorm", "pretraining", str(photos)): 1, ("soft_mask", "pretraining", str(photos)): 1,
        ("rmsnorm", "fine-tuning", str(animals)): 1, ("soft_mask", "fine-tuning", str(animals)): 1,
        ("soft_mask", "fine-tuning-0", str(animals)): 1}

    # A run on a part is evaluated on that part
    part, run = f"{animals}:rest-100-0", tmp_path / "fine-tuning-rmsnorm-0"
    transfer.main(["eval", str(run), "--data", part, "--workers", "0", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["images"] == 16
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[found_epoch(run)])
    assert found["test_acc1"] == row["test_acc1"]


def test_bad_input_is_refused(photos, animals, capsys):
    assert "fewer than four classes" in refused(transfer, ["--data", photos], capsys)
    for flag in ("--seeds", "--epochs", "--pretrain-epochs", "--jobs"):
        assert "must be at least 1" in refused(transfer, [flag, 0], capsys)
    assert "give a multiple of 6" in refused(transfer, ["--pretrain-data", "shapes", "--data", animals], capsys)
    assert "have no parts: use cifar10" in refused(transfer, ["--data", "shapes"], capsys)
    assert "have no parts: use cifar10" in refused(transfer, ["train", *SMALL, "--data", "shapes:first"], capsys)
    flags = ["train", *SMALL, "--data", f"{photos}:half"]
    assert f"{photos}:half is neither one of shapes" in refused(transfer, flags, capsys)
