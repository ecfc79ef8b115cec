"""The study: what was run is not run again, and what the report says follows from the rows."""
import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace

import pytest

pandas = pytest.importorskip("pandas", reason="the study's tables need pandas")
pytest.importorskip("scipy", reason="the study's intervals need scipy")

import train
from conftest import DEADLINE, ROOT, SMALL, refused, wait_until
from replication import ladder as program
from harness.flags import InputError
from replication import figures, report
from replication import rows as results
from replication.ladder import PUBLISHED, VARIANTS, claim


def ladder(tmp_path, data, seeds, *more, epochs=2, wait=True):
    """The ladder with runs of seconds."""
    program = f"""
import sys
from replication import ladder
sys.argv = ["ladder.py", "--data", {str(data)!r}, "--steps", "vit", "soft_log", "--seeds", "{seeds}", "--jobs", "2",
            "--epochs", "{epochs}", "--out", {str(tmp_path / "runs")!r}]
ladder.FLAGS = {" ".join(SMALL)!r}
sys.argv += {list(more)!r}
ladder.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return process.communicate(timeout=DEADLINE)[0] if wait else process


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "runs" / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_ladder_runs_what_is_missing_and_appends_its_rows(photos, tmp_path):
    assert ladder(tmp_path, photos, 1).startswith("2 runs to do")
    first = rows(tmp_path)
    assert {(row["step"], row["seed"]) for row in first} == {("vit", 0), ("soft_log", 0)}
    for row in first:                                                # a row is the last one of a plain run of train.py
        epochs = [json.loads(line) for line in (tmp_path / "runs" / f"{row['step']}-0" / "metrics.jsonl").read_text().splitlines()]
        added = dict(step=None, flags=None, commit=None, acc1_by_epoch=[epoch["test_acc1"] for epoch in epochs])
        assert row | dict(step=None, flags=None, commit=None) == epochs[-1] | added and row["epoch"] == 1
    alone = tmp_path / "alone"
    train.main(["--data", str(photos), "--step", "soft_mask", "--mask", "soft_log", "--out", str(alone), *SMALL])
    assert [row["test_loss"] for row in first if row["step"] == "soft_log"] == pytest.approx(
        [json.loads((alone / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]], rel=1e-5)
    assert ladder(tmp_path, photos, 2).startswith("2 runs to do")
    assert rows(tmp_path)[:2] == first and [row["seed"] for row in rows(tmp_path)] == [0, 0, 1, 1]
    assert ladder(tmp_path, photos, 1, epochs=1) == ladder(tmp_path, "shapes", 1) == ""      # refused: they want another --out
    assert len(rows(tmp_path)) == 4


@pytest.mark.slow
def test_the_ladder_takes_flags_for_all_its_runs_and_names_them_in_the_rows(photos, tmp_path):
    assert ladder(tmp_path, photos, 1, "--with", "--lr 1e-5 --label-smoothing 0", epochs=1).startswith("2 runs to do")
    assert [row["with"] for row in rows(tmp_path)] == ["--lr 1e-5 --label-smoothing 0"] * 2
    recipe = json.loads((tmp_path / "runs" / "vit-0" / "config.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["label_smoothing"]) == (1e-5, 0)
    assert ladder(tmp_path, photos, 1, epochs=1) == ""               # refused: without them it is another --out


def test_flags_for_all_runs_are_checked_before_the_first(photos, capsys):
    assert "unrecognized arguments: --lrr 1" in refused(program, ["--data", photos, "--with", "--lrr 1"], capsys)
    assert "--lr is -1.0" in refused(program, ["--data", photos, "--with", "--lr -1"], capsys)
    said = "--with sets --epochs, --seed, which the ladder does itself"
    assert said in refused(program, ["--data", photos, "--with=--epochs 10 --seed 7"], capsys)


@pytest.mark.slow
def test_a_ladder_that_is_stopped_goes_on_where_it_was(tmp_path):
    process = ladder(tmp_path, "shapes", 1, wait=False)
    wait_until(lambda: len(list((tmp_path / "runs").glob("*/config.json"))) == 2)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode == 1 and said.count("not finished, see") == 2 and not (tmp_path / "runs" / "rows.jsonl").exists()
    logs = list((tmp_path / "runs").glob("*/log.txt"))
    assert all("preempted at iteration" in log.read_text() for log in logs)
    process = ladder(tmp_path, "shapes", 1, wait=False)
    wait_until(lambda: all("resume  " in log.read_text() for log in logs))
    process.terminate()
    process.communicate(timeout=DEADLINE)
    assert all(re.search(r"resume  .* at iteration \d+ of", log.read_text()) for log in logs)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_differences_are_paired_by_seed():
    """Of five seeds two are in both: what moves both alike is no noise."""
    values, others = pandas.Series({0: 51.0, 1: 60.5, 7: 1.0}), pandas.Series({0: 50.0, 1: 59.0, 3: 7.0, 4: 8.0})
    mean, low, high, chance, pairs = results.paired(values, others)
    assert (mean, pairs) == (pytest.approx(1.25), 2)
    assert (low, high) == pytest.approx((1.25 - 12.7062 * 0.25, 1.25 + 12.7062 * 0.25), rel=1e-4)    # Student's t, tabulated
    assert chance == pytest.approx(0.1257, abs=1e-4)
    assert results.interval(values, others) == "+1.2 [-1.9, +4.4]"


def test_many_comparisons_are_corrected_for_from_the_least_likely_up():
    def holm(*chances):
        return results.holm(dict(enumerate(chances)))
    assert holm(0.016, 0.024, 0.049) == {0, 1, 2}
    assert holm(0.017, 0.0171, 0.04) == set()                                # the first fails, so all do
    assert holm(0.001, 0.026, 0.049) == {0} and holm(0.049) == {0}


@pytest.mark.parametrize("step, overrides, variant", [
    ("vit", {}, "vit"), ("rmsnorm", dict(width=96, rope=True, abs_pos=False), "rope_alone"), ("modified", {}, "modified"),
    ("soft_mask", dict(depth=4, mask="soft_log"), "soft_log"), ("rmsnorm", dict(heads=3), "rmsnorm"),
    ("rmsnorm", dict(mask="soft"), "rmsnorm {'mask': 'soft'}")])
def test_a_row_is_filed_under_its_variant_by_what_it_changes(step, overrides, variant):
    assert results.step_of(dict(step=step, overrides=overrides)) == variant


def test_a_difference_beyond_chance_has_a_star_and_of_repeated_rows_the_last_counts(monkeypatch):
    def row(step, seed, accuracy, epoch=2):
        return dict(step=step, seed=seed, test_acc1=accuracy, train_loss=1.5, epoch=epoch)
    wobble = [0.1, -0.1, 0, -0.1, 0.1, 0.1, -0.1, 0, 0.1, -0.1, 0.1, -0.1, 0]
    means = dict.fromkeys(VARIANTS, 55) | dict(vit=50, causal=10, modified=55.1)
    table = [row(step, seed, mean + seed + wobble[i] * (1 - seed))
             for i, (step, mean) in enumerate(means.items()) for seed in (0, 1, 2)]
    shorter = [row(step, seed, 30, epoch=1) for step in means for seed in (0, 1, 2)]
    table = [row("vit", 0, 99), *table, *shorter, row("vit", 0, 80, epoch=9), row("swiglu", 3, 58)]      # a seed more

    def rows(name, **fields):
        return pandas.DataFrame([one for one in table if one.items() >= fields.items()])
    monkeypatch.setattr(results, "rows", rows)
    lines = {line.split(" | ")[0]: line for line in report.results_table().splitlines()}
    assert "|  | 3 | 51.0 ± 0.9 |  | 1.500 | 73.8 | 3.451 | 81.5 | 2.828 |" in lines["| `vit`"]
    assert "| `vit` | 4 | " in lines["| `swiglu`"] and "| +5.0 [+4.5, +5.5] * |" in lines["| `swiglu`"]
    assert "| +0.0 [-0.2, +0.2] |" in lines["| `rmsnorm`"]
    assert "| -45.0 [-45.2, -44.8] * | 1.500 | 0.1 |  | 0.1 |  |" in lines["| `causal`"]


def test_the_ladder_holds_what_the_paper_reports_of_both_sizes():
    """Table 17, and Table 1 for the modified mask."""
    published = {step: (row.published, row.published_base) for step, row in VARIANTS.items() if row.published}
    assert published == dict(
        vit=(73.8, 81.5), swiglu=(74.3, 82.0), rmsnorm=(74.5, 81.7), causal=(0.1, 0.1), ps_cls=(71.9, 80.6), rope=(72.6, 81.2),
        abs_pos=(73.2, 81.2), soft_mask=(75.0, 81.6), modified=(72.5, 80.4))
    losses = {step: (row.published_loss, row.published_base_loss) for step, row in VARIANTS.items() if row.published_loss}
    assert losses == dict(
        vit=(3.451, 2.828), swiglu=(3.407, 2.724), rmsnorm=(3.406, 2.721), ps_cls=(3.599, 2.869), rope=(3.618, 2.861),
        abs_pos=(3.531, 2.839), soft_mask=(2.955, 2.828), modified=(3.550, 2.857))


def test_every_published_row_says_where_it_stands_in_the_paper():
    places = [(row["source"], row["row"]) for row in PUBLISHED]
    assert len(set(places)) == len(places)
    assert all(re.fullmatch(r"(Table|Figure) \d+", source) for source, _ in places)


def test_figures_are_all_drawn_unless_some_are_named(monkeypatch, capsys):
    monkeypatch.setattr(figures, "plt", None)                                # so that nothing is drawn
    for flags in ([], ["--data", "shapes"], ["masks"]):
        assert "the figures need matplotlib" in refused(figures, flags, capsys)
    assert "there is no figure mask: give some of masks, social" in refused(figures, ["mask"], capsys)


def test_a_folder_of_runs_belongs_to_one_set_of_flags(tmp_path):
    claim(tmp_path / "runs", Namespace(data="cifar10", epochs=3, seeds=3))
    claim(tmp_path / "runs", Namespace(data="cifar10", epochs=3, seeds=5))
    with pytest.raises(InputError, match="holds runs with --data 'cifar10', not 'shapes': give another folder with --out"):
        claim(tmp_path / "runs", Namespace(data="shapes", epochs=3, seeds=3))
