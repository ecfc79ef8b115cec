"""Compare runs: which settings they differ in, and what came of it.

    python -m experiments.compare out/vit out/causal                     # a table, one row per run
    python -m experiments.compare out/* --plot curves.png                # their curves as well (needs matplotlib)
    python -m experiments.compare out/tiny illama-tiny-in1k-75.0.txt     # beside a published log

RUN is a run's folder, or a file with a line of JSON per epoch: a metrics.jsonl or a published log. Settings come from
config.json; without one they are unknown. What follows from a size, step or recipe in the same cell is not repeated.
Epochs count from 0. The highest top-1 is taken over all epochs, while best.pt only counts those after the soft mask has
reached its final value. Losses, time and parameters are the last epoch's, images/s is the median over epochs. Time
begins with the last start of train.py, so a run that was resumed shows less than it took. What is missing is a "-".
"""
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median

from harness.flags import InputError, Parser, report_errors, require
from model import SIZES, STEPS, config
from train import RECIPES

HEAD = [("", "", "epochs", "highest", "at", "test", "train", "", "", ""),
        ("run", "settings that differ", "done", "top-1, %", "epoch", "loss", "loss", "images/s", "time", "parameters")]
CHANGED = {name for changes in STEPS.values() for name in changes}           # fields of Config
FIELDS = {step: {name: getattr(config(step=step), name) for name in CHANGED} for step in STEPS}
IMPLIED = dict(size=SIZES, step=FIELDS, recipe={name: asdict(recipe) for name, recipe in RECIPES.items()})


def read(path):
    """A run's folder or file -> the numbers of each row, and the settings by name ({} without a config.json)."""
    file, rows = path / "metrics.jsonl" if path.is_dir() else path, []
    lines = file.read_bytes().splitlines() if file.is_file() else []
    require(lines, f"{file} is missing or empty: give the folder of a run that has finished an epoch, or a log")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_int=float)              # all numbers alike, and none too large to be shown
            row = {name: value for name, value in row.items() if isinstance(value, float)}
        except (ValueError, AttributeError, RecursionError):
            row = {}
        previous = rows[-1]["epoch"] if rows else -1             # a file with the last rows of many runs is no run
        require(row.get("epoch", -1) > previous and row.get("test_acc1", -1) >= 0, f"{file}, line {number}: not a JSON "
                "object with a number test_acc1 and a later epoch than the line before: give a run's folder, or the "
                "log of one run")
        rows.append(row)
    saved = file.with_name("config.json")
    if file.name != "metrics.jsonl" or not saved.exists():
        return rows, {}
    try:
        parts = json.loads(saved.read_bytes())
        settings = {**parts["run"], **parts["recipe"], **parts["config"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{saved} is not a run's config.json: replace or remove it") from error
    return rows, {name: value for name, value in settings.items() if name != "num_classes"}      # the data tell it


def differences(runs):
    """The settings of all runs -> in words, for each run, those that are not the same in all."""
    values = {name: [settings[name] for settings in runs if name in settings] for settings in runs for name in settings}
    names, cells = [name for name in values if values[name].count(values[name][0]) < len(values[name])], []
    for settings in runs:
        implied = {}
        for source in IMPLIED.keys() & names:
            implied |= IMPLIED[source].get(str(settings.get(source)), {})
        cells.append(", ".join(f"{name} {'none' if settings[name] == '' else settings[name]}" for name in names
                               if name in settings and (name, settings[name]) not in implied.items()) or "-")
    return cells


def numbers(rows):
    """A run's cells of the table, from `epochs done` on."""
    best, last = max(rows, key=lambda row: row["test_acc1"]), rows[-1]
    test_loss, train_loss, time, size = (last.get(name, math.nan) for name in
                                         ("test_loss", "train_loss", "time_s", "n_parameters"))
    speed = median([row["time_images_per_s"] for row in rows if "time_images_per_s" in row] or [math.nan])
    cells = [f"{last['epoch'] + 1:.0f}", f"{best['test_acc1']:.2f}", f"{best['epoch']:.0f}", f"{test_loss:.4f}",
             f"{train_loss:.4f}", f"{speed:,.0f}",
             f"{time // 3600:.0f}:{time // 60 % 60:02.0f}:{time // 1 % 60:02.0f}", f"{size:,.0f}"]
    return ["-" if "nan" in cell else cell for cell in cells]


def draw(Figure, names, runs, path):
    fig = Figure(figsize=(10, 4), layout="constrained")
    for ax, field, label in zip(fig.subplots(1, 2), ("test_acc1", "train_loss"), ("top-1, %", "train loss")):
        for i, rows in enumerate(runs):                          # there are ten colours: the next ten runs are dotted
            ax.plot([row["epoch"] for row in rows], [row.get(field, math.nan) for row in rows],
                    color=f"C{i}", linestyle="-:"[i // 10 % 2], marker="o", markersize=3)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(alpha=0.3)
    labels = [name.replace("$", r"\$") for name in names]      # no formulas
    fig.legend(ax.lines, labels, loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=130)


def short_names(runs):
    """As much of the end of each run's path as tells them all apart."""
    paths = [Path(run).absolute() for run in runs]
    paths = [path.parent.parts if path.name == "metrics.jsonl" else path.parts for path in paths]
    length = 1
    while len({path[-length:] for path in paths}) < len(set(paths)):
        length += 1
    return [str(Path(*path[-length:])) for path in paths]


@report_errors()
def main(argv=None):
    parser = Parser(description="Compare runs: which settings they differ in, and what came of it.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, a metrics.jsonl or a log")
    parser.add_argument("--plot", metavar="FILE", help="draw their curves as .png, .pdf or .svg (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot is not None:
        require(Path(args.plot).suffix.lower() in (".png", ".pdf", ".svg"),
                f"--plot {args.plot}: give a file that ends in .png, .pdf or .svg")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    runs, settings = zip(*(read(Path(run)) for run in args.runs))
    names = short_names(args.runs)
    if args.plot is not None:                                    # where this fails, nothing has been printed
        draw(Figure, names, runs, args.plot)
    table = HEAD + [[name, words, *numbers(rows)] for name, words, rows in zip(names, differences(settings), runs)]
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for row in table:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
