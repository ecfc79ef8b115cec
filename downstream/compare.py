"""Compare runs: which settings they differ in, and what came of it.

    python -m downstream.compare out/vit out/causal                     # a table, one row per run
    python -m downstream.compare out/* --plot curves.png                # their curves as well (needs matplotlib)
    python -m downstream.compare out/tiny illama-tiny-in1k-75.0.txt     # beside a published log

RUN is a run's folder, or a file with a line of JSON per epoch: a metrics.jsonl or a published log. Settings come from
config.json: what data, model and recipe, and which flags changed these. Epochs count from 0. The highest top-1 is taken
over all epochs, while best.pt only counts those after the soft mask has reached its final value. Losses, time and
parameters are the last epoch's, images/s is the median over epochs. Time begins with the last start of train.py, so a
run that was resumed shows less than it took. What is missing is a "-".
"""
import json
import math
import sys
from pathlib import Path
from statistics import median

from harness.files import replacing
from harness.flags import InputError, Parser, needs, overrides, pick, require
from harness.processes import print_line, report_errors
from model import Config
from train import RECIPES

HEAD = ["run", "settings that differ", "epochs", "top-1, %", "at epoch", "test loss", "train loss", "images/s",
        "minutes", "parameters"]


def read(path):
    """A run's folder or file -> the numbers of each row, and the settings by name ({} without a config.json)."""
    file, rows = path / "metrics.jsonl" if path.is_dir() else path, []
    require(file.is_file(), f"{file} is missing: give the folder of a run that has finished an epoch, or a log")
    try:
        for line in file.read_bytes().splitlines():
            row = json.loads(line, parse_int=float)              # all numbers alike, and none too large to be shown
            rows.append({name: value for name, value in row.items() if isinstance(value, float)})
    except (ValueError, AttributeError, RecursionError):
        rows = []
    epochs = [row.get("epoch", -1) for row in rows]              # a file with the last rows of many runs repeats them
    valid = rows and epochs == sorted(set(epochs)) and all(row.get("test_acc1", -1) >= 0 for row in rows)
    require(valid and epochs[0] >= 0, f"{file} does not have a JSON object with numbers epoch and test_acc1 in each "
            "line, a later epoch than before: give a run's folder, or the log of one run")
    saved = file.with_name("config.json")
    if file.name != "metrics.jsonl" or not saved.exists():
        return rows, {}
    try:
        return rows, changed_settings(json.loads(saved.read_bytes()))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{saved} is not a run's config.json: replace or remove it") from error


def changed_settings(saved):
    """{name: value} of what a config.json says of the run, and of the flags that changed its model and recipe."""
    run = saved["run"]
    usual = RECIPES[run["recipe"]]
    changes = {name: value for name, value in saved["recipe"].items() if value != getattr(usual, name, None)}
    return run | changes | overrides(Config(**pick(Config, saved["config"])), run["size"], run["step"])


def differences(runs):
    """The settings of all runs -> in words, for each run, those that are not the same in all that have any."""
    runs_with_settings = [settings for settings in runs if settings]
    cells = []
    for settings in runs:
        words = []
        for name, value in settings.items():
            if any(other.get(name) != value for other in runs_with_settings):
                words.append(f"{name} {'none' if value == '' else value}")
        cells.append(", ".join(words) or "-")
    return cells


def written(value, form):
    return "-" if value is None or math.isnan(value) else format(value, form)


def numbers(rows):
    """A run's cells of the table, from `epochs` on."""
    best, last = max(rows, key=lambda row: row["test_acc1"]), rows[-1]
    speeds = [row["time_images_per_s"] for row in rows if "time_images_per_s" in row]
    return [written(last["epoch"] + 1, ".0f"), written(best["test_acc1"], ".2f"), written(best["epoch"], ".0f"),
            written(last.get("test_loss"), ".4f"), written(last.get("train_loss"), ".4f"),
            written(median(speeds) if speeds else None, ",.0f"), written(last.get("time_s", math.nan) / 60, ",.1f"),
            written(last.get("n_parameters"), ",.0f")]


def draw(Figure, names, runs, path):
    fig = Figure(figsize=(10, 3.5 + 0.25 * len(runs)), layout="constrained")     # the legend has a line for each
    for ax, field, label in zip(fig.subplots(1, 2), ("test_acc1", "train_loss"), ("top-1, %", "train loss")):
        for rows in runs:
            ax.plot([row["epoch"] for row in rows], [row.get(field, math.nan) for row in rows], marker=".")
        ax.set(xlabel="epoch", ylabel=label)
        ax.grid(alpha=0.3)
    labels = [name.replace("$", r"\$") for name in names]        # no formulas
    fig.legend(ax.lines, labels, loc="outside lower center", frameon=False)
    with replacing(path, "downstream.compare") as file:
        fig.savefig(file, dpi=130, metadata=dict(Creator="downstream.compare"))


@report_errors()
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a metrics.jsonl or a log")
    parser.add_argument("--plot", metavar="FILE", help="draw their curves as .png, .pdf or .svg (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot is not None:
        require(Path(args.plot).suffix.lower() in (".png", ".pdf", ".svg"),
                f"--plot {args.plot}: give a file that ends in .png, .pdf or .svg")
        with needs("--plot", "matplotlib"):
            from matplotlib.figure import Figure
    names, runs, settings, errors = [], [], [], []
    for run in args.runs:
        try:
            rows, changes = read(Path(run))
        except InputError as error:      # `out/*` has runs in their first epoch, too
            errors.append(error)
            continue
        names.append(run)
        runs.append(rows)
        settings.append(changes)
    if not runs:
        raise errors[0]
    for error in errors:
        print_line(f"warning: {error}; left out", sys.stderr)
    if args.plot is not None:                                    # where this fails, nothing has been printed
        draw(Figure, names, runs, args.plot)
    table = [HEAD]
    for name, words, rows in zip(names, differences(settings), runs):
        table.append([name, words, *numbers(rows)])
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    main()
