"""What is true of training: one property a test."""
import json
import math
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from conftest import ROOT, SMALL, equal, in_ranks, load, metrics, refused, torchrun
from data import Images, erase, mix
from harness import flags as harness_flags
from harness import processes
from harness.run import RunFolder
from model import STEPS, VisionTransformer, config
from train import RECIPES, lr_at, make_optimizer, soft_mask_at

RECIPE = replace(RECIPES["small-data"], epochs=10, warmup_epochs=2, lr=1e-3, min_lr=1e-5, soft_mask_epochs=3)


def run_without_checkpoint(photos, out, *flags):
    train.main(["--data", str(photos), "--out", str(out), *SMALL, *map(str, flags)])


def run(photos, out, *flags):
    """Train in this process; returns what last.pt holds."""
    run_without_checkpoint(photos, out, *flags)
    return torch.load(out / "last.pt", weights_only=True)


def largest_difference(one, other):
    return max((one["model"][name] - other["model"][name]).abs().max().item() for name in one["model"])


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and optimiser


def test_the_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine():
    lrs = [lr_at(i, RECIPE, 100) for i in range(1000)]
    assert lrs[0] == 0 and lrs[199] == lrs[200] == max(lrs) == 1e-3
    assert lrs[100] == pytest.approx(1e-3 * 100 / 199)
    assert lrs[600] == pytest.approx((1e-3 + 1e-5) / 2) and lrs[-1] == pytest.approx(1e-5, rel=1e-3)
    assert lr_at(0, replace(RECIPE, warmup_epochs=0), 100) == 1e-3


def test_the_soft_mask_falls_from_1_to_0_or_stays_at_1_and_is_0_afterwards():
    linear = [soft_mask_at(i, RECIPE, 100) for i in range(1000)]
    assert linear[0] == 1 and linear[299] == 0 and set(linear[300:]) == {0}
    assert linear[100] == pytest.approx(1 - 100 / 299)
    constant = [soft_mask_at(i, replace(RECIPE, soft_mask_schedule="constant"), 100) for i in range(1000)]
    assert constant == [1.0] * 300 + [0.0] * 700
    assert soft_mask_at(0, replace(RECIPE, soft_mask_epochs=0), 100) == 0


# Means over an epoch as the published logs have them: recipe: {epoch: learning rate}, {epoch: soft mask}.
LOGGED = {
    "tiny": ({0: 0.0003989737010904423, 1: 0.0011994868505452213, 4: 0.003601026298909562, 5: 0.003999962387459458,
              24: 0.003957038701434948, 49: 0.003779651625448557, 50: 0.0037698337174944005,
              150: 0.0020431179124244117, 299: 1.0379759434612073e-06}, {0: 1, 49: 1, 50: 0, 299: 0}),
    "small": ({0: 0.0003989737010904423, 5: 0.003999962387459458, 150: 0.0020431179124244117},
              {0: 0.9900314122700176, 1: 0.9700301301365466, 4: 0.9100262837361381, 5: 0.8900250016026673,
               24: 0.5100006410667346, 25: 0.4899993589332656, 49: 0.009968587729982704, 50: 0}),
    "base": ({0: 3.987435091993077e-05, 1: 0.00011987947945381105, 4: 0.0003598948650554526, 24: 0.001959997435733062,
              25: 0.0020400025642669404, 49: 0.003960125649080073, 50: 0.003999947628414735, 150: 0.00260645340790698,
              299: 1.0528775856391834e-06},
             {0: 0.9800615463520972, 1: 0.940056417489422, 4: 0.8200410309013976, 5: 0.7800359020387229,
              24: 0.019938453647903486, 25: 0}),
    "base-in21k": ({0: 9.997036817541856e-05, 1: 0.00029998518408770293, 4: 0.0009000296318245609,
                    5: 0.000999886348500017, 25: 0.0008633352670056172, 49: 0.00046361617142508477,
                    89: 1.1137778438795923e-06}, {0: 1, 29: 1, 30: 0}),
    "large-in21k": ({0: 9.997036817541856e-05, 24: 0.0008757711743865591, 50: 0.0004452355288696278}, {29: 1, 30: 0}),
    "base-384": ({0: 7.992788848282348e-05, 1: 7.949599477065516e-05, 29: 1.0721980020418422e-06}, {0: 0}),
    "base-in21k-224": ({0: 7.992788848282348e-05, 24: 7.388097317251548e-06}, {0: 0}),
    "base-in21k-384": ({0: 0.00010990050436237771, 5: 0.00010118728473191276, 29: 1.0996149648425372e-06}, {0: 0}),
    "large-in21k-224": ({0: 5.99461445631214e-05, 5: 5.522981467140261e-05, 29: 1.053920026841383e-06}, {0: 0}),
    "large-in21k-384": ({0: 3.496896466349359e-05, 25: 2.8599706921353547e-06, 29: 1.0310725578407872e-06}, {0: 0}),
}


@pytest.mark.parametrize("name", LOGGED)
def test_the_schedules_are_those_of_the_published_logs(name):
    recipe, (lrs, alphas) = RECIPES[name], LOGGED[name]
    iterations = (11_060_223 if name.endswith("in21k") else 1_281_167) // recipe.batch_size

    def mean(schedule, epoch):
        return math.fsum(schedule(epoch * iterations + i, recipe, iterations) for i in range(iterations)) / iterations
    for epoch, lr in lrs.items():
        assert mean(lr_at, epoch) == pytest.approx(lr, rel=1e-9, abs=0)
    for epoch, alpha in alphas.items():
        assert mean(soft_mask_at, epoch) == pytest.approx(alpha, abs=1e-9)


def test_there_is_a_recipe_for_each_published_run():
    assert list(RECIPES) == ["small-data", "basic", "tiny", "small", "base", "base-384", "base-in21k", "large-in21k",
                             "base-in21k-224", "base-in21k-384", "large-in21k-224", "large-in21k-384",
                             "transfer", "transfer-cifar100", "transfer-flowers"]
    assert train.TUNING == tuple(name for name in RECIPES if name.startswith("transfer") or name[-4:] in ("-224", "-384"))
    for name, recipe in list(RECIPES.items())[1:]:
        assert recipe.augment and recipe.erasing == 0.25 and recipe.label_smoothing == 0.1 and recipe.clip_grad == 0
        assert recipe.min_lr == 1e-6 and recipe.patch_size == 16
        assert harness_flags.split_batch(recipe, 4 if name in ("transfer", "transfer-cifar100") else 8, strict=True)


# Tables 12 to 14 and 16 of the paper. Of the last one only what it gives: no weight decay, mixup or CutMix.
PAPER = ("img_size", "epochs", "batch_size", "warmup_epochs", "lr", "drop_path", "soft_mask_schedule", "soft_mask_epochs",
         "weight_decay", "mixup", "cutmix")
TABLES = {
    "basic": (224, 300, 4096, 50, 4e-3, 0, "constant", 0, .05, .8, 1),                       # Table 12, size T
    "tiny": (224, 300, 4096, 5, 4e-3, 0, "constant", 50, .05, .1, .1),                       # Table 13
    "small": (224, 300, 4096, 5, 4e-3, .1, "linear", 50, .05, .5, .5),
    "base": (224, 300, 4096, 50, 4e-3, .4, "linear", 25, .05, .95, 1),
    "base-in21k": (224, 90, 4096, 5, 1e-3, .1, "constant", 30, .01, .8, 1),
    "large-in21k": (224, 90, 4096, 5, 1e-3, .1, "constant", 30, .01, .8, 1),
    "base-384": (384, 30, 512, 0, 8e-5, .8, "constant", 0, 1e-8, 0, 0),                      # Table 14
    "base-in21k-224": (224, 30, 512, 0, 8e-5, .2, "constant", 0, 1e-8, 0, 0),
    "large-in21k-224": (224, 30, 512, 0, 6e-5, .3, "constant", 0, 1e-8, 0, 0),
    "base-in21k-384": (384, 30, 512, 0, 1.1e-4, .2, "constant", 0, 1e-8, 0, 0),
    "large-in21k-384": (384, 30, 512, 0, 3.5e-5, .3, "constant", 0, 1e-8, 0, 0),
    "transfer": (224, 300, 1024, 50, 2e-3, 0, "linear", 25),                                 # Table 16
    "transfer-cifar100": (224, 300, 1024, 50, 2e-3, 0, "linear", 50),
}


@pytest.mark.parametrize("name", TABLES)
def test_recipes_are_those_of_the_papers_tables(name):
    assert [getattr(RECIPES[name], field) for field in PAPER[:len(TABLES[name])]] == list(TABLES[name])


@pytest.mark.parametrize("major, dtype", [(7, "float16"), (8, "bfloat16"), (9, "bfloat16")])
def test_gpus_that_emulate_bfloat16_compute_in_float16(major, dtype, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert processes.fast_dtype("cuda") == dtype
    assert processes.fast_dtype("cpu") == "float32"


def test_float32_is_never_tf32():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in flags]
    try:
        for backend in flags:
            backend.allow_tf32 = True
        processes.setup("cpu", "float32")
        assert not any(backend.allow_tf32 for backend in flags)
    finally:
        for backend, allowed in zip(flags, before):
            backend.allow_tf32 = allowed


@pytest.mark.parametrize("flags, name, drop_path, dtype", [
    ([], "tiny", 0, "float32"), (["--size", "base"], "base", 0.4, "float32"), (["--step", "vit"], "basic", 0, "float32"),
    (["--step", "vit", "--size", "small"], "basic", 0.1, "float32"), (["--step", "vit", "--size", "base"], "basic", 0.4, "float32"),
    (["--step", "abs_pos", "--size", "base", "--drop-path", "0.2"], "basic", 0.2, "float32"),
    (["--recipe", "small-data"], "small-data", 0, "auto"), (["--dtype", "bfloat16"], "tiny", 0, "bfloat16"),
    (["--size", "large", "--recipe", "large-in21k-384", "--init-from", "a.pt"], "large-in21k-384", 0.3, "float32")])
def test_a_folder_of_1000_classes_has_the_sizes_own_recipe(flags, name, drop_path, dtype, thousand):
    run, recipe, cfg = train.resolve(train.parse(["--data", str(thousand), *flags]), None)
    assert (run.recipe, recipe.drop_path, cfg.drop_path, run.dtype) == (name, drop_path, drop_path, dtype)
    assert cfg.img_size == recipe.img_size


def test_hidden_folders_are_no_classes(thousand, tmp_path):
    (tmp_path / "train").mkdir()
    for folder in (thousand / "train").iterdir():
        (tmp_path / "train" / folder.name).mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    run, *_ = train.resolve(train.parse(["--data", str(tmp_path)]), None)
    assert run.recipe == "tiny"


def test_a_micro_batch_that_is_mixed_is_even():
    plain = replace(RECIPE, batch_size=258)
    assert harness_flags.split_batch(replace(plain, mixup=0.2), 1, strict=False) == (86, 3)
    assert harness_flags.split_batch(plain, 1, strict=False) == (129, 2)


def test_a_size_without_a_recipe_for_1000_classes_says_so(thousand, capsys):
    said = refused(train, ["--data", thousand, "--size", "large"], capsys)
    assert "--size large has no recipe of its own for 1,000 classes; choose one with --recipe: small-data, basic" in said


def test_norms_biases_positions_and_class_token_do_not_decay():
    model = VisionTransformer(config("tiny"))
    decay, rest = make_optimizer(model, RECIPE).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (RECIPE.weight_decay, 0)
    names = {p: name for name, p in model.named_parameters()}
    for name in (names[p] for p in rest["params"]):
        assert re.search(r"norm|bias|pos_embed|cls_token", name)
    assert (len(decay["params"]), len(rest["params"])) == (62, 53)           # as many as in the published runs


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_says_what_it_does_and_where_it_is(photos, tmp_path, capsys):
    run(photos, tmp_path / "run", "--micro-batch", 4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("model   nano, step soft_mask --depth 2: 551,811 parameters, 16 x 16 pixels in patches of 8, 5 tokens, "
                        "mask soft")
    assert lines[1] == f"data    {photos}: 24 images to train, 11 to test, 3 classes"
    assert lines[2] == ("batch   8 = 1 rank x 2 micro-batches x 4 images; recipe small-data --img-size 16 --epochs 2 "
                        "--batch-size 8 --micro-batch 4: 2 epochs of 3 iterations")
    assert re.match(r"device  cpu with \d+ threads?, float32$", lines[3])
    assert lines[4] == f"run     {tmp_path / 'run'}"
    best = re.match(r"done    top-1 ([\d.]+) % in (.*best.pt); evaluate it: python eval.py \2 --data ", lines[-1])
    assert Path(best[2]).is_file()


def test_overrides_of_a_step_stand_in_the_first_line_the_folders_name_and_every_row(photos, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    for flags in ([], ["--no-rmsnorm"], ["--mask", "soft_log"]):
        train.main(["--data", str(photos), *SMALL, "--epochs", "1", "--step", "ps_cls", *flags])
        said = capsys.readouterr().out
        folder = Path(re.search(r"^run     (\S+)$", said, re.M)[1])
        seen.append((re.match(r"model   nano, step (.*?):", said)[1], folder.name, metrics(folder)[0]["overrides"]))
        assert metrics(folder)[0]["step"] == "ps_cls" and "recipe small-data --img-size 16 --epochs 1 --batch-size 8:" in said
    name = photos.name
    assert seen == [
        ("ps_cls --depth 2", f"nano-ps_cls-depth-2-{name}-1", dict(depth=2)),
        ("ps_cls --depth 2 --no-rmsnorm", f"nano-ps_cls-depth-2-no-rmsnorm-{name}-1", dict(depth=2, rmsnorm=False)),
        ("ps_cls --depth 2 --mask soft_log", f"nano-ps_cls-depth-2-mask-soft_log-{name}-1", dict(depth=2, mask="soft_log"))]


def test_help_lists_the_choices_and_no_references_of_another_file(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, values in (("--size", model.SIZES), ("--step", STEPS), ("--recipe", RECIPES), ("--mask", model.MASKS),
                         ("--dtype", ["auto", "float32", "bfloat16", "float16"])):
        assert f"{name} {{{','.join(values)}}}" in said
    assert not re.search(r"\[\d\]", said)


def test_the_folder_holds_settings_metrics_and_checkpoints_of_plain_types(photos, finished):
    names = ".lock best.pt config.json last.pt metrics.jsonl"
    assert " ".join(sorted(path.name for path in finished.iterdir())) == names
    settings = json.loads((finished / "config.json").read_text())
    assert settings["run"]["data"] == str(photos) and settings["recipe"]["epochs"] == 2
    assert settings["config"]["mask"] == "soft" and settings["classes"] == ["cat", "dog", "owl"]
    last, best = (torch.load(finished / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert {key: last[key] for key in settings} == settings and settings["recipe"]["flip"] and last["alpha"] == 0 and last["iteration"] == 6
    assert "optimizer" in last and "optimizer" not in best and best["model"].keys() == last["model"].keys()


def test_metrics_bear_the_published_names_and_the_epochs_means(finished):
    rows = metrics(finished)
    names = "step overrides seed epoch train_loss train_lr train_soft_mask_rate test_loss test_acc1 test_acc5 n_parameters"
    assert [" ".join(row) for row in rows] == [names, names]
    assert [row["epoch"] for row in rows] == [0, 1] and [row["train_soft_mask_rate"] for row in rows] == [0.5, 0]
    assert rows[0]["train_lr"] == pytest.approx(7e-4 / 2)
    assert all(row["test_acc1"] * 11 / 100 == pytest.approx(round(row["test_acc1"] * 11 / 100)) for row in rows)


def test_training_learns(photos, tmp_path):
    run(photos, tmp_path / "run", "--epochs", 8, "--lr", 1e-3)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"] and rows[-1]["test_acc1"] > 60


def test_waiting_for_data_is_in_sight_and_hinted_at(photos, monkeypatch, tmp_path, capsys):
    now = [0.0]                                                              # a clock that only loading moves
    load = Images.__getitem__

    def slow(images, key):
        now[0] += 1
        return load(images, key)
    monkeypatch.setattr(Images, "__getitem__", slow)
    monkeypatch.setattr("harness.run.time.perf_counter", lambda: now.__setitem__(0, now[0] + 0.5) or now[0])
    run(photos, tmp_path / "run", "--epochs", 1)
    assert re.search(r"images/s, data wait [5-9]\d%; more --workers may help", capsys.readouterr().out)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0.5 < row["time_waiting"] < 1


@pytest.mark.parametrize("step", STEPS)
def test_every_step_trains_and_only_soft_masks_have_a_schedule(step, photos, tmp_path):
    checkpoint = run(photos, tmp_path / "run", "--step", step, "--epochs", 1)
    assert (checkpoint["alpha"] is None) == (step != "soft_mask")
    assert (metrics(tmp_path / "run")[0]["train_soft_mask_rate"] is None) == (step != "soft_mask")


def test_flags_change_the_step(photos, tmp_path):
    cfg = run(photos, tmp_path / "run", "--step", "ps_cls", "--no-rmsnorm", "--mask", "soft_log")["config"]
    expected = dict(swiglu=True, rmsnorm=False, mask="soft_log", cls_last=True, rope=False)
    assert {name: cfg[name] for name in expected} == expected


def test_the_same_command_gives_the_same_run_with_any_number_of_workers(photos, finished, tmp_path):
    again = run(photos, tmp_path / "run", "--workers", 2)
    assert equal(again, torch.load(finished / "last.pt", weights_only=True))
    assert metrics(tmp_path / "run") == metrics(finished)


def test_recomputing_blocks_changes_nothing_but_the_memory(photos, tmp_path, monkeypatch):
    kept, forward = [], VisionTransformer.forward

    def counting_forward(model, images):
        def keep(tensor):                                                    # for the backward pass
            kept[-1] += tensor.nbytes
            return tensor
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(model, images)
    monkeypatch.setattr(VisionTransformer, "forward", counting_forward)
    plain = run(photos, tmp_path / "plain", "--drop-path", 0.5)
    much, before = kept[0], len(kept)
    assert equal(run(photos, tmp_path / "less", "--drop-path", 0.5, "--recompute"), plain)
    assert kept[before] < much / 3


class Transfers(TorchDispatchMode):
    """Counts what crosses between the host and a device whose kernels do not run: torch's meta device stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.uploads, self.waits = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs, packet = [arg for arg in args if isinstance(arg, torch.Tensor)], function.overloadpacket
        down = packet is torch.ops.aten._to_copy and (kwargs or {}).get("device") == torch.device("cpu")
        if inputs and inputs[0].is_meta and (down or packet is torch.ops.aten._local_scalar_dense):
            self.waits += 1
            return torch.zeros(inputs[0].shape) if down else 0.0
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_meta and any(not tensor.is_meta for tensor in inputs):
            self.uploads.append(tuple(output.shape))
        return output


def test_an_iteration_copies_its_images_and_labels_to_the_device_and_waits_for_it_once(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())               # knows no meta device
    monkeypatch.setattr(train, "setup", lambda *_: (0, 1, torch.device("meta"), torch.float32))
    monkeypatch.setattr(train, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1))
    monkeypatch.setattr(RunFolder, "save", lambda *_: None)
    counts = []
    for epochs in (1, 2):
        with Transfers() as transfers:                                       # alpha changes at each of 6 iterations
            run_without_checkpoint(photos, tmp_path / f"{epochs}", "--epochs", epochs, "--soft-mask-epochs", epochs,
                                   "--mixup", 0.8, "--cutmix", 1, "--micro-batch", 4)
        counts.append((Counter(transfers.uploads), transfers.waits))
    (first, few), (both, more) = counts                                      # the first epoch has the set-up, too
    assert both - first == {(4, 3, 16, 16): 6 + 2, (4,): 6 + 2, (3, 3, 16, 16): 1, (3,): 1}    # 8 = 2 x 4; 11 = 4 + 4 + 3
    assert more - few == 3 + 1                                               # of three iterations and one evaluation


def test_another_seed_gives_another_run(photos, finished, tmp_path):
    other = run(photos, tmp_path / "run", "--seed", 1)
    assert largest_difference(other, torch.load(finished / "last.pt", weights_only=True)) > 0.01


def test_the_published_augmentation_reaches_the_model(photos, monkeypatch, tmp_path):
    flags = ["--augment", "--erasing", 0.5, "--mixup", 0.8, "--cutmix", 1, "--img-size", 48]
    monkeypatch.setattr(train, "erase", lambda images, rng, p: erased.append((p, rng.random())) or erase(images, rng, p))
    monkeypatch.setattr(train, "mix", lambda *args: mixed.append(args[2:3] + args[4:]) or mix(*args))
    erased, mixed = [], []
    run(photos, tmp_path / "run", *flags)
    assert [p for p, _ in erased] == 6 * [0.5] and mixed == 6 * [(3, 0.8, 1)]
    assert len({draw for _, draw in erased}) == 6                            # each iteration has draws of its own


def test_images_are_mirrored_unless_that_is_switched_off(photos, monkeypatch, tmp_path):
    mirrored = []
    monkeypatch.setattr("data.ImageOps.mirror", lambda image: mirrored.append(image) or image)
    for flag, count in (("--no-flip", 0), ("--flip", 24)):
        run(photos, tmp_path / flag, flag, "--epochs", 2)
        assert count / 2 <= len(mirrored) <= 2 * count                       # of 48 images


@pytest.fixture
def steps(monkeypatch):
    """What reaches the optimiser and the model in each iteration: [dict(lr, alpha, grads)]."""
    seen, step, embed = [], torch.optim.AdamW.step, VisionTransformer.embed

    def spy_step(optimizer, *args):
        groups = optimizer.param_groups
        assert groups[0]["lr"] == groups[1]["lr"]
        seen.append(dict(lr=groups[0]["lr"], alpha=alphas[-1],
                         grads=[p.grad.clone() for group in groups for p in group["params"]]))
        return step(optimizer, *args)

    def spy_embed(model, images):
        alphas.append(model.alpha.item())
        return embed(model, images)
    alphas = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    monkeypatch.setattr(VisionTransformer, "embed", spy_embed)
    return seen


def test_each_iteration_has_the_schedules_learning_rate_and_alpha(photos, tmp_path, steps):
    run(photos, tmp_path / "run", "--epochs", 4, "--warmup-epochs", 1, "--soft-mask-epochs", 2)
    recipe = replace(RECIPES["small-data"], epochs=4, warmup_epochs=1, soft_mask_epochs=2)
    assert [step["lr"] for step in steps] == [lr_at(i, recipe, 3) for i in range(12)]
    assert [step["alpha"] for step in steps] == pytest.approx([soft_mask_at(i, recipe, 3) for i in range(12)])


def test_micro_batches_accumulate_to_the_same_gradients(photos, tmp_path, steps):
    run(photos, tmp_path / "whole", "--clip-grad", 0, "--epochs", 1)
    run(photos, tmp_path / "parts", "--clip-grad", 0, "--epochs", 1, "--micro-batch", 2)
    for whole, parts in zip(steps[0]["grads"], steps[3]["grads"], strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)


def test_labels_are_smoothed_in_training(photos, tmp_path, steps):
    for smoothing in (0, 0.5):
        run(photos, tmp_path / f"{smoothing}", "--epochs", 1, "--clip-grad", 0, "--label-smoothing", smoothing)
    plain, smooth = (step["grads"][-1] for step in (steps[0], steps[3]))     # of the head's bias: p - target, averaged
    assert plain.shape == (3,) and smooth.norm() < 0.8 * plain.norm()


def test_bfloat16_computes_differently_but_stores_float32(photos, finished, tmp_path):
    other = run(photos, tmp_path / "run", "--dtype", "bfloat16")
    assert all(value.dtype == torch.float32 for value in other["model"].values())
    assert 0 < largest_difference(other, torch.load(finished / "last.pt", weights_only=True)) < 0.01


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(photos, tmp_path, steps):
    run(photos, tmp_path / "clipped", "--clip-grad", 0.1)
    run(photos, tmp_path / "free", "--clip-grad", 0)
    norms = [torch.nn.utils.get_total_norm(step["grads"]).item() for step in steps]
    assert norms[:6] == pytest.approx(6 * [0.1], rel=1e-4) and min(norms[6:]) > 0.2


def test_the_default_folder_is_the_next_free_number(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("1", "2", "4"):
        (tmp_path / "out" / f"nano-soft_mask-depth-2-{photos.name}-{name}").mkdir(parents=True)
    train.main(["--data", str(photos), *SMALL, "--epochs", "1"])
    assert (tmp_path / "out" / f"nano-soft_mask-depth-2-{photos.name}-3" / "best.pt").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Starting from weights


def test_fine_tuning_keeps_the_weights_resizes_positions_and_makes_a_new_head(photos, finished, tmp_path, capsys):
    folders = tmp_path / "two" / "train", tmp_path / "two" / "val"
    for folder, split in zip(folders, ("train", "val")):
        folder.mkdir(parents=True)
        for name in ("cat", "dog"):
            (folder / name).symlink_to(photos / split / name)
    flags = ["--init-from", finished / "best.pt", "--lr", 0, "--min-lr", 0, "--img-size", 32]
    tuned = run(tmp_path / "two", tmp_path / "run", *flags)["model"]
    init = torch.load(finished / "best.pt", weights_only=True)["model"]
    assert (f"init    weights of {finished / 'best.pt'}; learned positions resized from 4 to 16 patches; "
            "new head: 3 classes before, 2 now\n") in capsys.readouterr().out
    assert tuned["head.weight"].shape == (2, 128) and torch.equal(tuned["pos_embed"][:, -1], init["pos_embed"][:, -1])
    assert all(torch.equal(tuned[name], init[name]) for name in init if not name.startswith(("head", "pos")))


def test_fine_tuning_with_the_same_classes_keeps_the_head(photos, finished, tmp_path, capsys):
    tuned = run(photos, tmp_path / "run", "--init-from", finished / "best.pt", "--lr", 0, "--min-lr", 0)["model"]
    assert f"init    weights of {finished / 'best.pt'}\n" in capsys.readouterr().out
    assert equal(tuned, torch.load(finished / "best.pt", weights_only=True)["model"])


def test_fine_tuning_on_as_many_other_classes_makes_a_new_head(photos, finished, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for old, new in zip(("cat", "dog", "owl"), ("cat", "dog", "fox")):
            (tmp_path / "data" / split / new).symlink_to(photos / split / old)
    tuned = run(tmp_path / "data", tmp_path / "run", "--init-from", finished / "best.pt", "--lr", 0, "--min-lr", 0)["model"]
    assert "new head: 3 classes before, 3 others now\n" in capsys.readouterr().out
    init = torch.load(finished / "best.pt", weights_only=True)["model"]
    assert [name for name in init if not torch.equal(tuned[name], init[name])] == ["head.weight", "head.bias"]


def test_a_fine_tuning_run_resumes_from_its_own_checkpoint(photos, finished, monkeypatch, tmp_path):
    flags = ["--init-from", finished / "best.pt"]
    alone = run(photos, tmp_path / "alone", *flags)
    stopped(photos, tmp_path / "run", monkeypatch, *flags)
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert equal(torch.load(tmp_path / "run" / "last.pt", weights_only=True), alone)


def test_transfer_at_224_works_by_flags_alone(photos, tmp_path, capsys):
    torch.save(VisionTransformer(config("tiny")).state_dict(), tmp_path / "imagenet.pth")
    flags = "--recipe basic --batch-size 8 --lr 2e-3 --epochs 1 --warmup-epochs 1 --soft-mask-schedule linear --soft-mask-epochs 1"
    train.main(["--data", str(photos), "--out", str(tmp_path / "run"), "--init-from", str(tmp_path / "imagenet.pth"),
                *flags.split(), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "5,508,675 parameters, 224 x 224 pixels" in said and "new head: 1000 classes before, 3 now" in said
    recipe = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["recipe"]
    assert (recipe["mixup"], recipe["cutmix"], recipe["augment"], recipe["erasing"]) == (0.8, 1, True, 0.25)


def test_a_linear_probe_trains_head_and_last_norm_alone_and_resumes(photos, finished, monkeypatch, tmp_path):
    before = load(finished / "last.pt")["model"]
    flags = ["--init-from", finished, "--freeze", "--lr", 0.01]
    alone = run(photos, tmp_path / "alone", *flags)
    changed = {name.split(".")[0] for name, value in alone["model"].items() if not torch.equal(value, before[name])}
    assert changed == {"norm", "head"} and len(alone["optimizer"]) == 3      # its weight, and head's weight and bias
    stopped(photos, tmp_path / "run", monkeypatch, *flags)
    train.main(["--resume", str(tmp_path / "run"), "--workers", "0", "--device", "cpu"])
    assert equal(load(tmp_path / "run" / "last.pt"), alone)


@pytest.mark.parametrize("name, epochs", [("transfer", 25), ("transfer-cifar100", 50)])
def test_the_transfer_recipes_start_the_soft_mask_again_for_any_size(name, epochs):
    for size in ("tiny", "base"):
        flags = ["--data", "cifar100", "--size", size, "--recipe", name, "--init-from", "a.pt"]
        made, recipe, cfg = train.resolve(train.parse(flags), None)
        assert (cfg.img_size, cfg.mask, made.dtype) == (224, "soft", "auto")
        assert [soft_mask_at(i, recipe, 97) for i in (0, epochs * 97 - 1, epochs * 97)] == [1, 0, 0]


def test_the_recipe_for_flowers_is_that_of_cifar_for_longer():
    recipe = replace(RECIPES["transfer"], epochs=600, warmup_epochs=100, batch_size=512, micro_batch=64)
    assert recipe == RECIPES["transfer-flowers"]


def test_weights_of_another_architecture_are_refused(photos, finished, tmp_path, capsys):
    flags = ["--data", photos, "--out", tmp_path / "run", *SMALL, "--init-from", finished / "best.pt"]
    assert "are of another model: give --size nano --step soft_mask --depth 2" in refused(train, [*flags, "--no-swiglu"], capsys)
    assert "no checkpoint at nowhere.pt" in refused(train, [*flags, "--init-from", "nowhere.pt"], capsys)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Resume


class Stop(Exception):
    pass


def stopped(photos, out, monkeypatch, *flags):
    """A run that ends right after its first epoch was evaluated and saved."""
    def save_and_stop(folder, improved=False):
        save(folder, improved)
        if folder.state.epoch == 1:
            raise Stop
    save = RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(RunFolder, "save", save_and_stop)
        run(photos, out, *flags)


def test_resume_without_a_path_takes_out_or_the_newest_run(photos, finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(photos), *SMALL, "--resume"]
    train.main([*flags, "--out", "mine"])
    assert "run     mine, nothing to resume" in capsys.readouterr().out
    train.main([*flags, "--out", "mine"])
    assert "resume  mine/last.pt at iteration 6 of 6" in capsys.readouterr().out
    train.main(flags)
    assert "run     out/nano-soft_mask-depth-2-photos0-1, nothing to resume" in capsys.readouterr().out
    train.main(flags)
    assert "resume  out/nano-soft_mask-depth-2-photos0-1/last.pt at iteration 6 of 6" in capsys.readouterr().out


def test_the_best_checkpoint_is_chosen_only_under_the_final_mask(photos, monkeypatch, tmp_path):
    stopped(photos, tmp_path / "falling", monkeypatch, "--soft-mask-epochs", 2)
    assert not (tmp_path / "falling" / "best.pt").exists() and (tmp_path / "falling" / "last.pt").exists()
    stopped(photos, tmp_path / "fallen", monkeypatch, "--soft-mask-epochs", 1)
    assert (tmp_path / "fallen" / "best.pt").exists()


def test_the_best_checkpoint_is_the_best_epochs_also_across_a_resume(photos, monkeypatch, tmp_path):
    scores = iter([60.0, 40.0, 55.0, 50.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: dict(test_acc1=next(scores), test_acc5=100.0, test_loss=1.0))
    stopped(photos, tmp_path / "run", monkeypatch, "--epochs", 4)
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["iteration"], best["best_acc1"]) == (3, 60) and (last["iteration"], last["best_acc1"]) == (12, 60)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(photos, finished, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes((finished / "config.json").read_bytes())
    again = run(photos, tmp_path / "run", "--resume")
    assert equal(again, torch.load(finished / "last.pt", weights_only=True))


def test_metrics_of_earlier_epochs_are_never_lost(photos, monkeypatch, tmp_path):
    stopped(photos, tmp_path / "run", monkeypatch)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train, "evaluate", lambda *_: (_ for _ in ()).throw(Stop))
        train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before and before


def test_the_data_may_have_moved_and_the_type_may_be_another(photos, finished, monkeypatch, tmp_path, capsys):
    stopped(photos, tmp_path / "run", monkeypatch)
    (tmp_path / "elsewhere").symlink_to(photos)
    train.main(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "elsewhere"), "--dtype", "bfloat16", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "at iteration 3 of 6" in said and "dtype   float32 before, bfloat16 now: rounding will differ" in said


def test_resuming_on_other_data_is_refused(finished, tmp_path, capsys):
    said = refused(train, ["--resume", finished, "--data", "shapes", "--device", "cpu"], capsys)
    assert "but here is --data shapes, not --data " in said
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = load(finished / "last.pt")
    checkpoint["run"]["data"] = "shapes"
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    for data in ("shapes-cue", tmp_path):
        said = refused(train, ["--resume", tmp_path / "run", "--data", data, "--device", "cpu"], capsys)
        assert f"but here is --data {data}, not --data shapes: drop the flag" in said


def test_a_run_of_an_earlier_version_resumes(photos, finished, monkeypatch, tmp_path):
    stopped(photos, tmp_path / "run", monkeypatch)
    checkpoint = load(tmp_path / "run" / "last.pt")
    del checkpoint["recipe"]["flip"], checkpoint["test_images"]
    torch.save(checkpoint | dict(unreadable=0, images="a hash"), tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "prev.pt").write_bytes(b"not read")
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert equal(load(tmp_path / "run" / "last.pt"), load(finished / "last.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# More than one process


SPY = """  # train.py, but each rank saves its first gradients and how often they were synchronised
import os, sys
import torch, train
from harness import processes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

class Counting(processes.DistributedDataParallel):
    syncs = 0
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        def count(state, bucket):
            Counting.syncs += bucket.is_last()
            return allreduce_hook(None, bucket)
        self.register_comm_hook(None, count)

class Saving(torch.optim.AdamW):
    def step(self, *args):
        if not self.state:
            torch.save([p.grad for group in self.param_groups for p in group["params"]], sys.argv[1])
        return super().step(*args)

processes.DistributedDataParallel, torch.optim.AdamW = Counting, Saving
train.main(sys.argv[2:])
open(sys.argv[1] + os.environ["RANK"], "w").write(str(Counting.syncs))
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_two_ranks_train_as_one_and_synchronise_once_an_iteration(machines, photos, tmp_path, steps):
    flags = ["--data", photos, *SMALL, "--clip-grad", 0]
    run(photos, tmp_path / "alone", "--clip-grad", 0)
    (tmp_path / "spy.py").write_text(SPY)
    flags += ["--out", tmp_path / "two", "--micro-batch", 2]
    launch = in_ranks if machines == 1 else torchrun
    code, said, errors = launch(2, tmp_path / "spy.py", tmp_path / "grads.pt", *flags, machines=machines)
    assert code == 0, errors
    assert "batch   8 = 2 ranks x 2 micro-batches x 2 images" in said
    assert said.count("epoch 1  train loss") == 1                            # rank 0 alone speaks
    assert [(tmp_path / f"grads.pt{rank}").read_text() for rank in (0, 1)] == ["6", "6"]     # 6 iterations
    for alone, shared in zip(steps[0]["grads"], torch.load(tmp_path / "grads.pt", weights_only=True), strict=True):
        torch.testing.assert_close(alone, shared, atol=1e-6, rtol=0)         # before AdamW, which would hide a factor
    for alone, shared in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "two"), strict=True):
        assert all(shared.pop(name) == alone.pop(name) for name in ("step", "overrides"))
        assert shared == pytest.approx(alone, rel=1e-4)


def test_several_ranks_share_the_next_free_folder_and_end_well(photos, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said, errors = in_ranks(2, ROOT / "train.py", "--data", photos, *SMALL)
    assert code == 0, errors
    assert said.splitlines()[-1].startswith("done    top-1 ") and "Traceback" not in errors
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "best.pt").is_file() and f"in {folder.relative_to(tmp_path) / 'best.pt'}; evaluate it" in said


@pytest.mark.parametrize("flags, said", [
    (["--size", "nano", "--width", "129"], "error: width 129 is no multiple of heads 2: change one\n"),
    (["--batch-size", "7"], "error: --batch-size 7 is not a multiple of 2 ranks x --micro-batch 3; 6 is\n")])
def test_bad_input_ends_all_ranks_with_one_sentence(flags, said, photos, tmp_path):
    code, _, errors = in_ranks(2, ROOT / "train.py", "--data", photos, "--out", tmp_path / "run", *SMALL, *flags)
    assert code != 0 and errors.count("error:") == errors.count(said) >= 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, before anything is written


@pytest.mark.parametrize("flags, said", [
    (["--size", "huge"], "argument --size: invalid choice: 'huge' (choose from nano, tiny, small, base, large); --help"),
    (["--data", "cifar11"], "--data cifar11 is neither one of shapes, shapes-cue, shapes-cue-centred, cifar10, cifar100, flowers102 nor a folder"),
    (["--epochs", "many"], "argument --epochs: invalid int value: 'many'; --help lists the flags"),
    (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
    (["--lr", "-1"], "--lr is -1.0; it must be at least 0"),
    (["--lr", "nan"], "--lr is nan; it must be at least 0"), (["--lr", "inf"], "--lr is inf; it must be at least 0"),
    (["--mixup", "1e308"], "--mixup is 1e+308; it must be at least 0"), (["--depth", "0"], "--depth is 0; it must be at least 1"),
    (["--size", "nano", "--width", "6"], "RoPE: width 6 / heads 2 must be even"),
    (["--warmup-epochs", "3"], "--epochs 2 would end before --warmup-epochs 3: lower that, too"),
    (["--soft-mask-epochs", "3"], "--epochs 2 would end before --soft-mask-epochs 3: lower that, too"),
    (["--resume", ""], "argument --resume: it is empty: give a value, or drop the flag; --help lists the flags"),
    (["--freeze"], "--freeze needs weights to start from: give --init-from"),
    (["--drop-path", "1"], "--drop-path is 1.0; it must be from 0 to 0.99"),
    (["--colour", "red"], "unrecognized arguments: --colour red; --help lists the flags"),
    (["--dtype", "float16"], "--dtype float16 needs a CUDA GPU, this is cpu; use bfloat16 or float32"),
    (["--img-size", "20"], "img_size 20 is not a multiple of patch_size 8"),
    (["--step", "ps_cls", "--soft-mask-epochs", "1"], "--soft-mask-epochs needs a soft mask, but the mask of this"),
    (["--batch-size", "7", "--micro-batch", "4"], "--batch-size 7 is not a multiple of 1 rank x --micro-batch 4; 8 is"),
    (["--batch-size", "6", "--micro-batch", "3", "--mixup", "0.1"], "--micro-batch 3 is odd, but mixup and cutmix pair"),
    (["--batch-size", "32"], "has 24 training images, less than one --batch-size 32: make it smaller"),
    (["--resume", "nowhere"], "--resume nowhere: no checkpoint there; check the path"),
])
def test_bad_flags_are_refused(flags, said, photos, tmp_path, capsys):
    error = refused(train, ["--data", photos, "--out", tmp_path / "run", *SMALL, *flags], capsys)
    assert said.replace("'", "") in error.replace("'", "")                   # Python 3.12 quotes choices no longer
    assert not (tmp_path / "run").exists()


def test_a_folder_without_val_is_refused(photos, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(photos / "train")
    said = refused(train, ["--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL], capsys)
    assert f"{tmp_path / 'data' / 'val'} has no class folders" in said and not (tmp_path / "run").exists()


def test_an_explicit_folder_with_another_run_is_refused(photos, finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    said = refused(train, ["--data", photos, "--out", finished, *SMALL], capsys)
    assert f"--out {finished} holds another run: give another folder, or add --resume to continue it" in said
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("flags, said", [
    (["--recipe", "base-384", "--size", "base"], "--recipe base-384 is for fine-tuning: give the weights to start from"),
    (["--recipe", "base-384"], "--recipe base-384 is for --size base, not tiny: change one of them"),
    (["--recipe", "small"], "--recipe small is for --size small, not tiny: change one of them"),
    (["--init-from", "illama-tiny-in1k-75.0"], "--init-from on 1,000 classes needs a --recipe: one for fine-tuning (base-384"),
])
def test_traps_of_recipes_on_1000_classes_are_refused(flags, said, thousand, tmp_path, capsys):
    assert said in refused(train, ["--data", thousand, "--out", tmp_path / "run", *flags], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, said", [
    (["--epochs", "9"], "but here is --epochs 9, not --epochs 2: drop the flag, or start a new run, --init-from its last.pt"),
    (["--size", "tiny"], "but here is --size tiny, not --size nano: drop the flag, or start a new run"),
    (["--step", "ps_cls"], "but here is --step ps_cls, not --step soft_mask"),
    (["--lr", "0.1", "--no-rope"], "but here is --lr 0.1, not --lr 0.0007 and --no-rope, not --rope"),
])
def test_resuming_another_run_is_refused(flags, said, finished, capsys):
    assert said in refused(train, ["--resume", finished, *flags], capsys)


def test_resuming_from_what_is_no_run_is_refused(finished, tmp_path, capsys):
    assert "nowhere: no checkpoint there" in refused(train, ["--resume", tmp_path / "nowhere"], capsys)
    assert "--resume takes a run's folder or its last.pt, not " in refused(train, ["--resume", finished / "best.pt"], capsys)
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    assert "last.pt cannot be read as a checkpoint" in refused(train, ["--resume", tmp_path], capsys)


@pytest.mark.parametrize("changes, said", [
    (dict(classes=["cat", "dog", "fox"]), "has other classes than the run to resume (fox, owl): give"),
    (dict(train_images=25), "has other train images than the run to resume (24 instead of 25)"),
    (dict(test_images=12), "has other test images than the run to resume (11 instead of 12)"),
    (dict(model={}), "no weights were found under model, state_dict"), (dict(optimizer={}), "what the optimizer has saved is of another"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(changes, said, finished, tmp_path, capsys):
    torch.save(torch.load(finished / "last.pt", weights_only=True) | changes, tmp_path / "last.pt")
    assert said in refused(train, ["--resume", tmp_path, "--device", "cpu"], capsys)
