"""The experiments: what was run is not run again, and what the report says follows from the rows."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import train
from conftest import DEADLINE, ROOT, SMALL, wait_until
from experiments import report, results
from experiments.ladder import PUBLISHED, VARIANTS


def ladder(tmp_path, data, seeds, epochs=2, wait=True):
    """The ladder with runs of seconds."""
    program = f"""
import sys
from experiments import ladder
sys.argv = ["ladder.py", "--data", {str(data)!r}, "--steps", "vit", "soft_log", "--seeds", "{seeds}", "--jobs", "2",
            "--epochs", "{epochs}", "--out", {str(tmp_path / "runs")!r}]
ladder.FLAGS = {" ".join(SMALL)!r}
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
        (last,) = (tmp_path / "runs" / f"{row['step']}-0" / "metrics.jsonl").read_text().splitlines()[1:]
        assert row | dict(step=None, flags=None) == json.loads(last) | dict(step=None, flags=None) and row["epoch"] == 1
    alone = tmp_path / "alone"
    train.main(["--data", str(photos), "--step", "soft_mask", "--mask", "soft_log", "--out", str(alone), *SMALL])
    assert [row["test_loss"] for row in first if row["step"] == "soft_log"] == pytest.approx(
        [json.loads((alone / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]], rel=1e-5)
    assert ladder(tmp_path, photos, 2).startswith("2 runs to do")
    assert rows(tmp_path)[:2] == first and [row["seed"] for row in rows(tmp_path)] == [0, 0, 1, 1]
    assert "vit-0: not finished, see" in ladder(tmp_path, photos, 1, epochs=1)   # longer or shorter is another --out
    assert ladder(tmp_path, "shapes", 1).startswith("2 runs to do")         # and so are other data
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 1, 1, 1]


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


@pytest.mark.parametrize("degrees, share, expected", [          # from tables of Student's t
    (10, 0.95, 2.2281), (22, 0.95, 2.0739), (60, 0.95, 2.0003), (18, 0.99, 2.8784), (20, 1 - 0.05 / 11, 3.1966)])
def test_quantiles_are_those_of_students_t(degrees, share, expected):
    assert results.quantile_of_t(degrees, share) == pytest.approx(expected, abs=5e-3)


def test_noise_is_what_neither_step_nor_seed_explains():
    seeds, noise = [0, 3, -1], [[0.1, -0.2, 0.1], [-0.1, 0.2, -0.1]]         # rows and columns sum to 0
    found = {step: [50 + 9 * i + s + e for s, e in zip(seeds, noise[i])] for i, step in enumerate(("vit", "swiglu"))}
    squares, degrees = 0.12, 2
    error, freedom = results.standard_error(found | {"causal": [10, 10, 10]})
    assert error == pytest.approx((squares / degrees * 2 / 3) ** 0.5) and freedom == degrees


def test_many_comparisons_are_corrected_for_from_the_largest_down():
    def significant(*changes):
        return results.significant(dict(enumerate(changes)), 1.0, 10)
    bounds = [results.quantile_of_t(10, 1 - 0.05 / left) for left in (3, 2, 1)]
    assert significant(-bounds[0] - 0.01, bounds[1] + 0.01, bounds[2] + 0.01) == {0, 1, 2}
    assert significant(bounds[0] - 0.01, bounds[1] + 0.01, 0) == set()       # the largest fails, so all do
    assert significant(9, bounds[1] - 0.01, bounds[2] + 0.01) == {0} and significant(bounds[2] + 0.01) == {0}


@pytest.mark.parametrize("step, overrides, variant", [
    ("vit", {}, "vit"), ("rmsnorm", dict(width=96, rope=True, abs_pos=False), "rope_alone"), ("modified", {}, "modified"),
    ("soft_mask", dict(depth=4, mask="soft_log"), "soft_log"), ("rmsnorm", dict(heads=3), "rmsnorm"),
    ("rmsnorm", dict(mask="soft"), "rmsnorm {'mask': 'soft'}")])
def test_a_row_is_filed_under_its_variant_by_what_it_changes(step, overrides, variant):
    assert results.step_of(dict(step=step, overrides=overrides)) == variant


def test_a_difference_beyond_the_noise_is_called_so_and_of_repeated_rows_the_last_counts(monkeypatch):
    def row(step, seed, accuracy, epoch=2):
        return dict(step=step, seed=seed, test_acc1=accuracy, train_loss=1.5, epoch=epoch)
    wobble = [0.1, -0.1, 0, -0.1, 0.1, 0.1, -0.1, 0, 0.1, -0.1, 0.1, -0.1, 0]
    means = dict.fromkeys(VARIANTS, 55) | dict(vit=50, causal=10, modified=55.1)
    table = [row(step, seed, mean + seed + wobble[i] * (1 - 2 * seed))
             for i, (step, mean) in enumerate(means.items()) for seed in (0, 1)]
    shorter = [row(step, seed, 30, epoch=1) for step in means for seed in (0, 1, 2)]
    table = [row("vit", 0, 99), *table, *shorter, row("vit", 0, 80, epoch=9)]    # overwritten; a longer run of one step
    monkeypatch.setattr(results, "rows", lambda name: table)
    lines = {line.split(" | ")[0]: line for line in report.results_table().splitlines()}
    assert "|  | 50.5 ± 0.6 |  | 1.500 | 73.8 | 3.451 | 81.5 | 2.828 |" in lines["| `vit`"]
    assert "| **+5.0** |" in lines["| `swiglu`"] and "| +0.0 |" in lines["| `rmsnorm`"]
    assert "| +0.1 |" in lines["| `rmsnorm --mask modified`"]
    assert "| **-45.0** | 1.500 | 0.1 |  | 0.1 |  |" in lines["| `causal`"]


def test_what_is_significant_without_vit_alone_is_set_apart(monkeypatch):
    means = dict.fromkeys(VARIANTS, 55) | dict(ps_cls=57, causal=10, soft_first=10)
    wobble = [0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0, 0.05, -0.05, 0.1, -0.1, 0, 0.05]
    accuracies = {step: [mean + seed * wobble[i] for seed in (-1, 0, 1)] for i, (step, mean) in enumerate(means.items())}
    accuracies["vit"] = [58, 55, 52]                                     # against all others
    monkeypatch.setattr(results, "rows", lambda name: [
        dict(step=step, seed=seed, test_acc1=value, train_loss=1, epoch=2)
        for step, values in accuracies.items() for seed, value in enumerate(values)])
    changes, with_vit, without_vit = results.comparisons()
    assert changes["ps_cls"] == pytest.approx(2) and "ps_cls" not in with_vit and "ps_cls" in without_vit
    assert "swiglu" in changes and "swiglu" not in without_vit
    assert "| *+2.0* |" in report.results_table()


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
