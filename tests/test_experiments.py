"""The experiments: what was run is not run again, and what the report says follows from the rows."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import train
from conftest import ROOT, SMALL
from experiments import report


def ladder(tmp_path, data, seeds, epochs=2, wait=True):
    """The ladder with runs of seconds."""
    program = f"""
import sys
from experiments import ladder
sys.argv = ["ladder.py", "--data", {str(data)!r}, "--rungs", "vit", "soft_log", "--seeds", "{seeds}", "--jobs", "2",
            "--epochs", "{epochs}", "--out", {str(tmp_path / "runs")!r}]
ladder.FLAGS = {" ".join(SMALL)!r}
ladder.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return process.communicate(timeout=100)[0] if wait else process


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
    for _ in range(600):
        if len(list((tmp_path / "runs").glob("*/config.json"))) == 2:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 1 and said.count("not finished, see") == 2 and not (tmp_path / "runs" / "rows.jsonl").exists()
    logs = list((tmp_path / "runs").glob("*/log.txt"))
    assert all("preempted at iteration" in log.read_text() for log in logs)
    process = ladder(tmp_path, "shapes", 1, wait=False)
    for _ in range(600):
        if all("resume  " in log.read_text() for log in logs):
            break
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=100)
    assert all(re.search(r"resume  .* at iteration \d+ of", log.read_text()) for log in logs)


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize("degrees, share, expected", [          # from tables of Student's t
    (10, 0.95, 2.2281), (22, 0.95, 2.0739), (60, 0.95, 2.0003), (18, 0.99, 2.8784), (20, 1 - 0.05 / 11, 3.1966)])
def test_quantiles_are_those_of_students_t(degrees, share, expected):
    assert report.quantile_of_t(degrees, share) == pytest.approx(expected, abs=5e-3)


def test_noise_is_what_neither_rung_nor_seed_explains():
    seeds, noise = [0, 3, -1], [[0.1, -0.2, 0.1], [-0.1, 0.2, -0.1]]         # rows and columns sum to 0
    found = {rung: [50 + 9 * i + s + e for s, e in zip(seeds, noise[i])] for i, rung in enumerate(("vit", "swiglu"))}
    squares, degrees = 0.12, 2
    error, freedom = report.standard_error(found | {"causal": [10, 10, 10]})
    assert error == pytest.approx((squares / degrees * 2 / 3) ** 0.5) and freedom == degrees


def test_many_comparisons_are_corrected_for_from_the_largest_down():
    def significant(*changes):
        return report.significant(dict(enumerate(changes)), 1.0, 10)
    bounds = [report.quantile_of_t(10, 1 - 0.05 / left) for left in (3, 2, 1)]
    assert significant(-bounds[0] - 0.01, bounds[1] + 0.01, bounds[2] + 0.01) == {0, 1, 2}
    assert significant(bounds[0] - 0.01, bounds[1] + 0.01, 0) == set()       # the largest fails, so all do
    assert significant(9, bounds[1] - 0.01, bounds[2] + 0.01) == {0} and significant(bounds[2] + 0.01) == {0}


@pytest.mark.parametrize("step, overrides, rung", [
    ("vit", {}, "vit"), ("rmsnorm", dict(width=96, rope=True, abs_pos=False), "rope_alone"), ("modified", {}, "modified"),
    ("soft_mask", dict(depth=4, mask="soft_log"), "soft_log"), ("rmsnorm", dict(heads=3), "rmsnorm"),
    ("rmsnorm", dict(mask="soft"), "rmsnorm {'mask': 'soft'}")])
def test_a_row_is_filed_under_its_rung_by_what_it_changes(step, overrides, rung):
    assert report.rung_of(dict(step=step, overrides=overrides)) == rung


def test_a_difference_beyond_the_noise_is_called_so_and_of_repeated_rows_the_last_counts(monkeypatch):
    def row(rung, seed, accuracy, epoch=2):
        return dict(step=rung, seed=seed, test_acc1=accuracy, epoch=epoch)
    wobble = [0.1, -0.1, 0, -0.1, 0.1, 0.1, -0.1, 0, 0.1, -0.1, 0.1, -0.1, 0]
    means = dict.fromkeys(report.RUNGS, 55) | dict(vit=50, causal=10, modified=55.1)
    table = [row(rung, seed, mean + seed + wobble[i] * (1 - 2 * seed))
             for i, (rung, mean) in enumerate(means.items()) for seed in (0, 1)]
    shorter = [row(rung, seed, 30, epoch=1) for rung in means for seed in (0, 1, 2)]
    table = [row("vit", 0, 99), *table, *shorter, row("vit", 0, 80, epoch=9)]    # overwritten; a longer run of one rung
    monkeypatch.setattr(report, "rows", lambda name: table)
    lines = {line.split(" | ")[0]: line for line in report.results_table().splitlines()}
    assert "| the vision transformer | 50.5 ± 0.6 |  | 73.9 |" in lines["| `vit`"]
    assert "| **+5.0** | 74.3 |" in lines["| `swiglu`"] and "| +0.0 | 74.5 |" in lines["| `rmsnorm`"]
    assert "| `rmsnorm` | +0.1 |" in lines["| `rmsnorm --mask modified`"] and "| **-45.0** |" in lines["| `causal`"]
    assert "| +0.0 ³ | 71.9 |" in lines["| `ps_cls`"]                          # not compared with the row above it
    assert "corrected for the 12 comparisons of both tables by Holm's" in report.results_table()
