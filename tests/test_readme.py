"""What the README says is what the code and the results are."""
import re
import runpy
import shlex
from pathlib import Path

import pytest

import train

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
