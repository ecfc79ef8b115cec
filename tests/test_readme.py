"""What the README and the pages in docs/ say is what the code and the results are."""
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import train
from conftest import ROOT, SMALL
from downstream import segment
from experiments import report

PAGES = {page: (ROOT / page).read_text() for page in report.PAGES}
COMMANDS = re.sub(r"\\\n\s*", "", "\n".join(PAGES.values()))              # a command a line
for name, value in [*re.findall(r'^([A-Z]+)="(.*)"$', COMMANDS, re.M), ("seed", "0"), ("step", "vit")]:
    COMMANDS = COMMANDS.replace(f"${name}", value)


def test_tables_and_links_to_lines_are_made_from_the_code_and_the_results():
    for page, text in PAGES.items():
        assert report.written(text) == text, f"{page}: run python -m experiments.report"
    marks = re.findall(r"^<!-- (?!end)(\w+) -->$", "\n".join(PAGES.values()), re.M)
    assert sorted(marks) == sorted(report.PARTS)                             # each once


def test_what_the_readme_says_that_commands_print_is_what_they_printed():
    last = report.rows("shapes-tiny")[-1]
    assert (f"epoch 3  train loss {last['train_loss']:.4f}  test loss {last['test_loss']:.4f}  top-1 {last['test_acc1']:.2f} %  "
            f"top-5 {last['test_acc5']:.2f} %  {last['time_images_per_s']:.0f} images/s  {last['time_s']:.0f} s"
            ) in PAGES["README.md"] and f"{last['n_parameters']:,} parameters" in PAGES["README.md"]
    for row in report.rows("demo"):
        assert f"--step {row['step']} --size nano --depth 2 --epochs 1   # top-1 {row['test_acc1']:.2f} %" in PAGES["README.md"]
    first, *_, before_last, _, _ = next(row["leak"] for row in report.rows("leak") if row["step"] == "soft_mask")
    text, downstream = (" ".join(PAGES[page].split()) for page in ("README.md", "docs/downstream.md"))
    assert f"by {first:.2f} % to {before_last:.1f} %" in text
    for rung, against in (("rmsnorm", "ps_cls"), ("soft_mask", "ps_cls")):
        gains = [one["test_miou"] - other["test_miou"] for one, other in zip(
            *(sorted(report.segmented("segment", step, True), key=lambda row: row["seed"]) for step in (rung, against)))]
        assert f" {report.plus_minus(gains)} points" in downstream
    transfer = {(start, step, percent): torch.tensor(report.transferred(start, step, percent))
                for start in report.STARTS for step in report.TRANSFERRED for percent in report.PERCENT}
    for percent in (1, 100):
        gains = [report.plus_minus((transfer["fine-tuning", step, percent] - transfer["scratch", step, percent]).tolist())
                 for step in report.TRANSFERRED]
        assert re.search(rf"{gains[0]}( points in ViT)? and {gains[1]}( in iLLaMA)? with {250 * percent:,}", downstream)
    ahead = [(transfer[start, "soft_mask", percent] - transfer[start, "rmsnorm", percent]).mean().item()
             for start, step, percent in transfer if step == "rmsnorm"]
    assert f"from every start, by {min(ahead):.1f} to {max(ahead):.1f} points" in downstream
    for step in report.TRANSFERRED:
        behind = [(transfer["fine-tuning", step, percent] - transfer["probe", step, percent]).mean() for percent in report.PERCENT]
        assert behind[0] < 0 and min(behind[1:]) > 6
    starts = {start: torch.tensor(report.selected(start)) for start in ("random", "uniform", "aligned")}
    gains = [report.plus_minus((starts[start] - starts["random"])[:, epoch].tolist()) for start in ("uniform", "aligned")
             for epoch in (0, -1)]
    assert "by {} points after the first epoch and by {} after the third, `aligned` by {} and {}:".format(*gains) in downstream
    assert f"The larger model has {report.rows('select')[0]['test_acc1']:.1f} %" in downstream
    costs = {what: torch.tensor([[row[what]["rows_miou"] for row in report.segmented("where", rung, True)]
                                 for rung in ("rmsnorm", "ps_cls")]).mean(1) for what in ("image", "window")}
    image, window = (bidirectional - causal for bidirectional, causal in costs.values())         # by row
    assert (f"{image[:2].mean():.0f} points in the upper quarter of the image, none in the lower half; {window[:8].mean():.1f} in the "
            "upper half of a window, none below") in downstream
    assert abs(image[4:].mean()) < 0.5 and window[8:].mean() < 0
    cost = report.plus_minus(report.longer_costs())
    assert f"the mask costs {cost} points" in text and f"and {cost[:3]} points after 20" in text and f"[{cost[:3]} points after 20 epochs]" in downstream
    assert min(report.longer_costs()) > 0
    rates = {row["model"]: row["images_per_s"] for row in report.rows("bench_model/mask")
             if row["img_size"] == 1024 and row["training"]}
    assert f"at 4,097 tokens `causal` trains [{rates['causal'] / rates['bidirectional']:.1f} times as fast]" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([\w./-]+)", PAGES[page])
    assert "README" not in page or len(links) > 20
    assert all(((ROOT / page).parent / link).exists() for link in links if not link.startswith("http"))


def test_there_is_a_figure_for_dark_mode_for_each_for_light_mode_and_no_other():
    shown = re.findall(r"assets/([\w-]+\.png)", "\n".join(PAGES.values()))
    light = {name for name in shown if not name.endswith("-dark.png")}
    assert set(shown) == light | {name.replace(".png", "-dark.png") for name in light}
    assert set(shown) == {path.name for path in (ROOT / "assets").iterdir()}


def test_the_readme_is_short_and_its_code_fits_the_page():
    assert len(PAGES["README.md"].splitlines()) <= 240
    for text in PAGES.values():
        for block in re.findall(r"^```\w+\n(.*?)^```", text, re.S | re.M):
            if "train.py --data cifar10 --size" not in block:                # commands that are made from a table
                assert max(map(len, block.splitlines())) <= 110


@pytest.mark.parametrize("command", re.findall(r"^[^`\n]*(?:python|torchrun)[^\n]* (?:train.py|experiments.anytime train)(.*?)(?:#.*)?$",
                                               COMMANDS, re.M))
def test_training_commands_have_flags_that_exist(command):
    train.parse_flags(shlex.split(command))


@pytest.mark.parametrize("command", re.findall(r"-m downstream\.segment(?! eval)(.*?)(?:#.*)?$", COMMANDS, re.M))
def test_segmentation_commands_have_flags_that_exist(command):
    segment.parse_flags(shlex.split(command))


def test_other_commands_have_flags_that_exist():
    commands = re.findall(r"^(?:python|torchrun)[^`\n]* (?:-m )?(eval\.py|(?:experiments|benchmarks)\.\w+"
                          r"|downstream\.where|downstream\.select|downstream\.transfer|downstream\.segment(?= eval))(.*?)(?:#.*)?$", COMMANDS, re.M)
    assert {file for file, _ in commands} == {"eval.py", *(f"experiments.{name}" for name in (
        "ladder", "properties", "compare", "figures", "report", "samples", "anytime")), *(f"benchmarks.{name}" for name in (
            "bench_model", "bench_data", "bench_files", "soak")), *(f"downstream.{name}" for name in ("where", "select", "transfer", "segment"))}
    for file, flags in commands:
        source = (ROOT / (file if file.endswith(".py") else file.replace(".", "/") + ".py")).read_text()
        shares = {"experiments.properties": "eval.py", "downstream.select": "experiments/ladder.py",
                  "downstream.transfer": "experiments/ladder.py"}                    # the flags of another program
        source += (ROOT / shares[file]).read_text() if file in shares else ""
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", flags) if "soak" not in file else ():        # which train.py takes
            assert f'"{flag}"' in source, f"{file} {flag}"


@pytest.mark.slow
def test_commands_after_the_ladder_work_on_what_it_leaves_behind(photos, tmp_path):
    """With two rungs and one seed, played by runs of seconds."""
    for rung, step in (("vit-0", "vit"), ("soft_mask-0", "soft_mask")):
        train.main(["--data", str(photos), "--step", step, "--out", str(tmp_path / "out" / "ladder-3" / rung), *SMALL])
    shutil.copytree(tmp_path / "out" / "ladder-3", tmp_path / "out" / "cue")
    commands = re.findall(r"^python -m experiments\.properties out/.*$", COMMANDS, re.M)
    script = "\n".join(commands).replace("{0,1,2}", "0").replace("{vit,causal,ps_cls,soft_mask}", "{vit,soft_mask}")
    script = script.replace("python -m", f"{sys.executable} -m").replace("shape_bias", f"shape_bias --cue {tmp_path / 'images'}")
    for name in ("cat1-dog1", "dog1-owl1"):
        (tmp_path / "images" / name[:3]).mkdir(parents=True)
        shutil.copy(photos / "val" / "cat" / "00.png", tmp_path / "images" / name[:3] / f"{name}.png")
    ended = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT), PATH="/usr/bin:/bin"),
                           capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ladder-3", "cue", "collapse.jsonl", "properties.jsonl", "shape-bias.jsonl", "attention.png"}


def test_nothing_that_a_reader_runs_writes_to_the_rows_of_these_pages():
    assert not re.search(r"(--out|--out-rows|--draw|--plot|>>) (results|assets)/", COMMANDS)
