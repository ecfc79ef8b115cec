"""What the README and the pages say is what the code and the results are."""
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import model
import train
from conftest import DEADLINE, ROOT, SMALL
from downstream import caption, segment
from model import STEPS, VisionTransformer, config
from replication import report

PAGES = {str(page.relative_to(ROOT)): page.read_text() for pattern in ("README.md", "docs/*.md", "replication/**/*.md")
         for page in sorted(ROOT.glob(pattern))}
COMMANDS = re.sub(r"\\\n\s*", "", "\n".join(PAGES.values()))              # a command a line
for name, value in [*re.findall(r'^([A-Z]+)="(.*)"$', COMMANDS, re.M), ("seed", "0"), ("step", "vit"), ("say", "one")]:
    COMMANDS = COMMANDS.replace(f"${name}", value)


def test_tables_are_made_from_the_results():
    pytest.importorskip("scipy", reason="the study's tables need pandas and scipy")
    pytest.importorskip("pandas", reason="the study's tables need pandas and scipy")
    for page, text in PAGES.items():
        assert report.written(text) == text, f"{page}: run python -m replication.report"
    marks = re.findall(r"^<!-- (?!end)([\w-]+) -->$", "\n".join(PAGES.values()), re.M)
    assert len(marks) == len(set(marks))
    assert {name for name in set(report.PARTS) - set(marks) if not name.startswith(("speed-", "memory-"))} == set()


def test_the_table_of_steps_names_the_code_and_has_the_parameters_of_each():
    lines = re.findall(r"^\| `(\w+)`, \[`(\w+)`\]\(model\.py\) \|.*\| ([\d,]+) \|$", PAGES["README.md"], re.M)
    assert [step for step, *_ in lines] == list(STEPS)
    for step, name, parameters in lines:
        with torch.device("meta"):
            count = sum(p.numel() for p in VisionTransformer(config("tiny", step)).parameters())
        assert (hasattr(model, name) or hasattr(VisionTransformer, name)) and parameters == f"{count:,}", step


def rows(name):
    return [json.loads(line) for line in (ROOT / "replication" / "results" / f"{name}.jsonl").read_text().splitlines()]


def test_the_output_that_the_quick_start_shows_is_what_its_commands_printed():
    last = rows("shapes-tiny")[-1]
    assert (f"epoch 3  train loss {last['train_loss']:.4f}  test loss {last['test_loss']:.4f}  top-1 {last['test_acc1']:.2f} %  "
            f"top-5 {last['test_acc5']:.2f} %  {last['time_images_per_s']:.0f} images/s  {last['time_s']:.0f} s"
            ) in PAGES["README.md"] and f"{last['n_parameters']:,} parameters" in PAGES["README.md"]
    for row in rows("demo"):
        assert f"--step {row['step']} --size nano --depth 2 --epochs 1   # top-1 {row['test_acc1']:.2f} %" in PAGES["README.md"]


def test_each_table_and_figure_of_the_paper_has_its_line():
    lines = re.findall(r"^\| (\d+) \|", PAGES["replication/paper.md"], re.M)
    assert lines == [str(number) for last in (18, 11) for number in range(1, last + 1)]


def anchors(page):
    """The names by which GitHub knows a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([\w./-]*)(?:#([\w-]+))?[)\"]", PAGES[page])
    assert page != "README.md" or len(links) > 20
    for path, heading in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not heading or target.suffix != ".md" or heading in anchors(target), f"{path}#{heading}"


def test_the_figures_that_the_pages_show_are_those_that_exist():
    shown = set(re.findall(r"images/([\w.-]+\.(?:png|svg))", "\n".join(PAGES.values())))
    assert shown == {path.name for path in (ROOT / "docs" / "images").iterdir()}
    drawn = re.findall(r"^def draw_(\w+)", (ROOT / "replication" / "figures.py").read_text(), re.M)
    assert shown | {"social.png"} == {"blocks.svg", "captions.png", *(f"{name}.png" for name in drawn)}


def test_code_fits_the_page():
    for text in PAGES.values():
        for block in re.findall(r"^```\w+\n(.*?)^```", text, re.S | re.M):
            if "train.py --data cifar10 --size" not in block:                # commands that are made from a table
                assert max(map(len, block.splitlines())) <= 110


@pytest.mark.parametrize("command", re.findall(r"^(?![A-Z]+=)[^`\n]*(?:python|torchrun)[^\n]* (?:train.py|replication.\w+ (?:train|control))(.*?)(?:#.*)?$",
                                               COMMANDS, re.M))
def test_training_commands_have_flags_that_exist(command):
    train.parse(shlex.split(command))


@pytest.mark.parametrize("command", re.findall(r"-m downstream\.segment(?! eval)(.*?)(?:#.*)?$", COMMANDS, re.M))
def test_segmentation_commands_have_flags_that_exist(command):
    segment.parse(shlex.split(command))


@pytest.mark.parametrize("command", re.findall(r"-m downstream\.caption(?! show)(.*?)(?:`.*|#.*)?$", COMMANDS, re.M))
def test_captioning_commands_have_flags_that_exist(command):
    caption.parse(shlex.split(command))


def test_other_commands_have_flags_that_exist():
    commands = re.findall(r"^(?:python|torchrun)[^`\n]* (?:-m )?(eval\.py|replication\.\w+\b(?! train| control)"
                          r"|downstream\.(?!segment|caption|anytime train)\w+|downstream\.(?:segment(?= eval)|caption(?= show)))"
                          r"(.*?)(?:#.*)?$", COMMANDS, re.M)
    assert {file for file, _ in commands} == {"eval.py", *(f"replication.{name}" for name in (
        "ladder", "properties", "figures", "report", "anytime", "starts", "transfer", "quantize", "bench_model", "bench_data")),
        *(f"downstream.{name}" for name in ("compare", "export", "attention", "anytime", "selection", "segment", "llama", "caption"))}
    for file, flags in commands:
        source = (ROOT / (file if file.endswith(".py") else file.replace(".", "/") + ".py")).read_text()
        shares = {"eval.py": "harness/run.py", "replication.properties": "harness/run.py",
                  "replication.anytime": "replication/properties.py",
                  "replication.starts": "replication/ladder.py",
                  "replication.quantize": "replication/ladder.py",
                  "replication.transfer": "replication/ladder.py"}                   # the flags of another program
        source += (ROOT / shares[file]).read_text() if file in shares else ""
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", flags):
            assert f'"{flag}"' in source, f"{file} {flag}"


@pytest.mark.slow
def test_commands_after_the_ladder_work_on_what_it_leaves_behind(photos, tmp_path):
    """With two steps and one seed, played by runs of seconds."""
    for step in ("vit", "soft_mask"):
        folder = tmp_path / "out" / "ladder-3" / f"{step}-0"
        train.main(["--data", str(photos), "--step", step, "--out", str(folder), *SMALL])
    for name in ("cue", "centred", "ladder-3-label-smoothing-0"):
        shutil.copytree(tmp_path / "out" / "ladder-3", tmp_path / "out" / name)
    commands = re.findall(r"^python -m replication\.properties out/.*$", COMMANDS, re.M)
    script = re.sub(r"\{\d,\d,\d\}", "0", "\n".join(commands)).replace("{vit,causal,ps_cls,soft_mask}", "{vit,soft_mask}")
    script = re.sub(r"\{\w+,\w*soft_log[\w,]*\}|\{rmsnorm[\w,]*\}", "soft_mask", script)
    script = script.replace("python -m", f"{sys.executable} -m").replace("shape_bias", f"shape_bias --cue {tmp_path / 'images'}")
    for name in ("cat1-dog1", "dog1-owl1"):
        (tmp_path / "images" / name[:3]).mkdir(parents=True)
        shutil.copy(photos / "val" / "cat" / "00.png", tmp_path / "images" / name[:3] / f"{name}.png")
    ended = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT), PATH="/usr/bin:/bin"),
                           capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ladder-3", "ladder-3-label-smoothing-0", "cue", "centred", "collapse.jsonl", "label-smoothing.jsonl", "landscape.jsonl", "leak.jsonl", "properties.jsonl",
        "rank.jsonl", "shape-bias.jsonl", "shape-bias-centred.jsonl"}


def test_nothing_that_a_reader_runs_writes_to_the_rows_of_these_pages():
    assert not re.search(r"(--out|--out-rows|--draw|--plot|>>) (replication|docs)/", COMMANDS)
