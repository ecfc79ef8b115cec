"""What the README says is what the code and the results are."""
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from conftest import SMALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_and_links_to_lines_are_made_from_the_code_and_the_results():
    report = runpy.run_path(str(ROOT / "results" / "report.py"))
    assert report["written"](README) == README, "run: python results/report.py"


def test_links_lead_to_files_that_exist():
    links = re.findall(r"(?:\]\(|src=\")([\w./-]+)", README)
    assert len(links) > 10 and all((ROOT / link).exists() for link in links if not link.startswith("http"))


@pytest.mark.parametrize("command", re.findall(r"^[^`]*(?:python|torchrun).* train.py(.*?)(?:#.*)?$", README, re.M))
def test_training_commands_have_flags_that_exist(command):
    train.parse_flags(shlex.split(command))


def test_other_commands_have_flags_that_exist():
    commands = re.findall(r"^[^`\n]*(?:python|torchrun)[^`\n]* ((?:\w+/)?\w+\.py)(.*?)(?:#.*)?$", README, re.M)
    commands = [(file, flags) for file, flags in commands if file not in ("train.py", "benchmarks/soak.py")]   # which train
    assert {file for file, _ in commands} > {"eval.py", "data.py", "results/ladder.py", "benchmarks/bench_model.py"}
    for file, flags in commands:
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", flags):
            assert f'"{flag}"' in (ROOT / file).read_text(), f"{file} {flag}"


def blocks(*words):
    """The shell commands of README's blocks that hold all the words, in their order."""
    return [block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if all(word in block for word in words)]


@pytest.mark.slow
def test_commands_after_the_ladder_work_on_what_it_leaves_behind(photos, tmp_path):
    """The loops over runs, cut to their first turn; the ladder itself is played by runs of seconds."""
    for rung, step in (("vit-0", "vit"), ("soft_mask-0", "soft_mask")):
        train.main(["--data", str(photos), "--step", step, "--out", str(tmp_path / "out" / "ladder-3" / rung), *SMALL])
    shutil.copytree(tmp_path / "out" / "ladder-3", tmp_path / "out" / "cue")
    commands = [block for block in blocks("out/ladder-3/", "eval.py") + blocks("out/cue/", "eval.py")]
    script = "\n".join(command for block in commands for command in block.splitlines() if "ladder.py" not in command)
    script = re.sub(r"for (\w+) in (\S+) [^;]*;", r"for \1 in \2;", script)
    script = re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", script)
    script = script.replace("--shape-bias shapes-cue", f"--shape-bias {photos.parent / 'cue'}")
    for name in ("cat1-dog1", "dog1-owl1"):
        folder = photos.parent / "cue" / name[:3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "val" / "cat" / "00.png", folder / f"{name}.png")
    ended = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} > {"collapse.jsonl", "properties.jsonl", "shape-bias.jsonl"}
    assert (tmp_path / "conflict.png").is_file()


def test_nothing_that_a_reader_runs_writes_to_the_rows_of_this_page():
    assert not re.search(r"(--out|--table|>>) (results|assets)/", README)
