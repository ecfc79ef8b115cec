"""downstream/compare.py: what a table and a figure of several runs say."""
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from PIL import Image

from conftest import ROOT, metrics, refused
from downstream import compare
from model import config
from train import RECIPES

# What the published logs have in a row; ours have more.
PUBLISHED = ('{"train_lr": 0.0004, "train_min_lr": 0.0004, "train_loss": 6.73, "train_weight_decay": 0.05, '
             '"train_soft_mask_rate": 1.0, "test_loss": 5.97, "test_acc1": 4.04, "test_acc5": 12.2, "epoch": 0, '
             '"n_parameters": 5701096}\n')


def row(epoch, acc1, **more):
    return dict(epoch=epoch, test_acc1=acc1, test_loss=2.5, train_loss=2.25, n_parameters=1234567, time_s=61.5,
                time_images_per_s=100.0) | more


def make(folder, *rows, size="nano", step="vit", recipe="small-data", model=(), **changes):
    """A run's folder, without training: `model` overrides fields of the model, `changes` those of run and recipe."""
    folder.mkdir(parents=True)
    run = dict(size=size, step=step, recipe=recipe, data="shapes", init_from="", seed=0, dtype="float32")
    saved = dict(run=run | {name: changes[name] for name in run if name in changes},
                 recipe=asdict(RECIPES[recipe]) | {name: changes[name] for name in changes if name not in run},
                 config=asdict(config(size, step, **dict(model))), classes=["a", "b"], train_images=9, ranks=1)
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows or [row(0, 10.0)]))
    return folder


def table(capsys, *argv):
    """The cells of each run's line; columns are at least two spaces apart."""
    compare.main([str(arg) for arg in argv])
    return [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]


def test_a_line_has_the_highest_accuracy_with_its_epoch_and_what_the_last_epoch_says(tmp_path, capsys):
    slow = row(2, 30.0, test_loss=2.125, train_loss=2.0, time_s=3 * 3600 + 125.9, time_images_per_s=7.0)
    run = make(tmp_path / "run", row(0, 20.0, time_images_per_s=1500.0), row(1, 31.25, time_images_per_s=1200.4), slow)
    (line,) = table(capsys, run)
    assert line == [str(run), "-", "3", "31.25", "1", "2.1250", "2.0000", "1,200", "182.1", "1,234,567"]


@pytest.mark.parametrize("runs, cells", [
    ([dict(), dict()], ["-", "-"]),
    ([dict(step="causal"), dict(step="ps_cls")], ["step causal", "step ps_cls"]),
    ([dict(step="vit"), dict(step="rope", model=dict(mask="soft"))], ["step vit", "step rope, mask soft"]),
    ([dict(step="rope"), dict(step="rope", model=dict(rmsnorm=False))], ["-", "rmsnorm False"]),
    ([dict(step="vit", model=dict(depth=2)), dict(step="causal", model=dict(depth=2))], ["step vit", "step causal"]),
    ([dict(step="vit", model=dict(depth=2)), dict(step="causal")], ["step vit, depth 2", "step causal"]),
    ([dict(size="nano"), dict(size="tiny", model=dict(depth=3))], ["size nano", "size tiny, depth 3"]),
    ([dict(lr=1e-3), dict(lr=2e-3), dict()], ["lr 0.001", "lr 0.002", "-"]),
    ([dict(seed=0), dict(seed=1)], ["seed 0", "seed 1"]),
    ([dict(recipe="basic", epochs=9), dict(recipe="small-data")], ["recipe basic, epochs 9", "recipe small-data"]),
    ([dict(), dict(init_from="best.pt")], ["init_from none", "init_from best.pt"]),
    ([dict(), dict(data="cifar100", model=dict(num_classes=100))], ["data shapes", "data cifar100"]),
])
def test_settings_are_shown_where_runs_differ_and_flags_where_they_changed_the_step_or_recipe(runs, cells, tmp_path, capsys):
    folders = [make(tmp_path / f"run-{i}", **settings) for i, settings in enumerate(runs)]
    assert [line[1] for line in table(capsys, *folders)] == cells


def test_a_published_log_and_a_file_of_rows_stand_beside_runs_without_what_they_lack(tmp_path, capsys):
    run, other = make(tmp_path / "run"), make(tmp_path / "other", seed=1)
    log, alone = tmp_path / "published-75.0.txt", run / "rows.jsonl"      # no config.json is theirs
    log.write_text(PUBLISHED + PUBLISHED.replace('"epoch": 0', '"epoch": 1').replace("4.04", "9.5")
                   + PUBLISHED.replace('"epoch": 0', '"epoch": 2').replace("5.97", "5.5"))
    alone.write_text(json.dumps(dict(epoch=0, test_acc1=50)))
    by_folder, by_file, theirs, bare = table(capsys, run, other / "metrics.jsonl", log, alone)
    assert by_folder[:2] == [str(run), "seed 0"] and by_file[:2] == [str(other / "metrics.jsonl"), "seed 1"]
    assert theirs == [str(log), "-", "3", "9.50", "1", "5.5000", "6.7300", "-", "-", "5,701,096"]
    assert bare == [str(alone), "-", "1", "50.00", "0", "-", "-", "-", "-", "-"]


def test_columns_are_aligned(tmp_path, capsys):
    short = make(tmp_path / "a", seed=1)
    long = make(tmp_path / "a-longer-name", row(0, 9.5, time_s=1e5), seed=100, lr=2e-3)
    compare.main([str(short), str(long)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0].index("settings") == said[1].index("seed 1") == said[2].index("seed 100")
    assert said[0].index("top-1") == said[1].index("10.00") == said[2].index("9.50")


def test_a_trained_run_shows_what_its_metrics_say(finished):
    command = [sys.executable, "-m", "downstream.compare", str(finished)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = metrics(finished)
    best = max(rows, key=lambda row: row["test_acc1"])
    assert re.split(" {2,}", said[0]) == ["run", "settings that differ", "epochs", "top-1, %", "at epoch", "test loss",
                                          "train loss", "images/s", "minutes", "parameters"]
    name, words, epochs, acc1, epoch, test_loss, train_loss, speed, time, parameters = said[1].split()
    assert (name, words, epochs, acc1, epoch) == (str(finished), "-", "2", f"{best['test_acc1']:.2f}", str(best["epoch"]))
    assert (test_loss, train_loss) == (f"{rows[1]['test_loss']:.4f}", f"{rows[1]['train_loss']:.4f}")
    assert int(speed.replace(",", "")) > 0 and float(time) < 10
    assert parameters == f"{rows[1]['n_parameters']:,}"


@pytest.mark.parametrize("file, content, words", [
    ("none", None, "none is missing: give the folder of a run"),
    ("empty.jsonl", b"", "empty.jsonl does not have a JSON object with numbers epoch and test_acc1"),
    ("half.jsonl", json.dumps(row(0, 9.5)).encode() + b'\n{"epoch": 1, "te', "half.jsonl does not have a JSON object"),
    ("binary.pt", bytes(range(256)), "binary.pt does not have a JSON object"),
    ("list.jsonl", b"[1, 2]", "list.jsonl does not have a JSON object"),
    ("deep.jsonl", b"[" * 100_000, "deep.jsonl does not have a JSON object"),
    ("no-epoch.jsonl", b'{"test_acc1": 5}', "no-epoch.jsonl does not have a JSON object"),
    ("no-accuracy.jsonl", b'{"epoch": 0}', "no-accuracy.jsonl does not have a JSON object"),
    ("text.jsonl", b'{"epoch": 0, "test_acc1": "5"}', "text.jsonl does not have a JSON object"),
    ("nan.jsonl", b'{"epoch": 0, "test_acc1": NaN}', "nan.jsonl does not have a JSON object"),
    ("runs.jsonl", b'{"epoch": 9, "test_acc1": 5}\n{"epoch": 9, "test_acc1": 6}', "a later epoch than before: .* the log of one run"),
    ("run/config.json", b"{", "config.json is not a run's config.json: replace or remove it"),
    ("run/config.json", b'{"run": {}, "recipe": {}}', "config.json is not a run's config.json: replace or remove it"),
    ("run/config.json", json.dumps(dict(run=dict(size="nano", step="other", recipe="basic"), recipe={}, config={})).encode(),
     "config.json is not a run's config.json: replace or remove it"),
    ("run/config.json", b'{"run": 1, "recipe": 2, "config": 4}', "config.json is not a run's config.json: replace or"),
    ("run/metrics.jsonl", b"", "metrics.jsonl does not have a JSON object"),
])
def test_bad_runs_are_left_out_with_a_warning_that_names_the_file(file, content, words, tmp_path, capsys):
    good, run = make(tmp_path / "good"), make(tmp_path / "run")
    if content is not None:
        (tmp_path / file).write_bytes(content)
    bad = run if file.startswith("run/") else tmp_path / file
    compare.main([str(good), str(bad)])
    shown = capsys.readouterr()
    assert shown.err.startswith("warning: ") and str(tmp_path / file) in shown.err and re.search(words, shown.err)
    assert str(good) in shown.out and f"{bad} " not in shown.out
    assert str(tmp_path / file) in refused(compare, [bad], capsys)             # an error where nothing is left


def test_settings_that_another_version_wrote_are_shown_as_far_as_this_one_knows_them(tmp_path, capsys):
    for i in range(2):
        folder = make(tmp_path / f"run-{i}", seed=i)
        saved = json.loads((folder / "config.json").read_text())
        saved["run"]["select"], saved["recipe"]["old"], saved["config"]["older"] = "", 3 + i, 7
        (folder / "config.json").write_text(json.dumps(saved))
    lines = table(capsys, tmp_path / "run-0", tmp_path / "run-1")
    assert [line[1] for line in lines] == ["seed 0, old 3", "seed 1, old 4"]


def test_numbers_that_cannot_be_shown_end_without_a_traceback(tmp_path, capsys):
    (tmp_path / "log").write_text('{"epoch": 0, "test_acc1": 5, "time_s": Infinity, "test_loss": NaN, '
                                  f'"train_loss": null, "n_parameters": 1{"0" * 5000}}}')
    ((*_, test_loss, train_loss, _, time, parameters),) = table(capsys, tmp_path / "log")
    assert (test_loss, train_loss, time, parameters) == ("-", "-", "inf", "inf")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_plot_has_a_curve_of_each_run_in_both_panels(suffix, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    runs = [make(tmp_path / name, row(0, acc1, train_loss=loss), row(1, acc1 + 5, train_loss=loss - 1))
            for name, acc1, loss in (("_one", 10.0, 3.0), (r"two$\foo$", 40.0, 2.5))]
    log = tmp_path / "log.txt"
    log.write_text('{"epoch": 0, "test_acc1": 70}\n{"epoch": 1, "test_acc1": 75}')
    assert len(table(capsys, *runs, log, "--plot", tmp_path / f"curves.{suffix}")) == 3
    if suffix != "png":
        assert (tmp_path / f"curves.{suffix}").stat().st_size > 5000
        return
    image = Image.open(tmp_path / "curves.png").convert("RGB")
    width, height = image.size
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)       # C0 to C2
    counts = [{colour: count for count, colour in image.crop(box).getcolors(width * height)} for box in (
        (0, 0, width // 2, 0.7 * height), (width // 2, 0, width, 0.7 * height), (0, 0.8 * height, width, height))]
    for part, colours in zip(counts, ([blue, orange, green], [blue, orange], [blue, orange, green])):
        assert all(part.get(colour, 0) > 50 for colour in colours)
    assert green not in counts[1]                                             # it has no train loss


@pytest.mark.parametrize("plot, words", [
    ("curves.txt", "curves.txt: give a file that ends in .png, .pdf or .svg"),
    ("curves", "curves: give a file that ends in .png, .pdf or .svg"),
    ("mine.png", "mine.png is there, and not of downstream.compare: give another name, or remove it"),
    ("folder.png", "folder.png cannot be written (Is a directory)")])
def test_a_plot_that_cannot_be_written_is_refused_before_the_table(plot, words, tmp_path, capsys):
    if plot.endswith(".png"):
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "mine.png").write_text("mine")
    assert words in refused(compare, [make(tmp_path / "run"), "--plot", tmp_path / plot], capsys)


def test_without_matplotlib_a_plot_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refused(compare, [tmp_path / "none", "--plot", tmp_path / "curves.png"], capsys)
    assert said == "error: --plot needs matplotlib: pip install matplotlib\n"
