"""Imports go one way: what is read first knows nothing of what is read later."""
import ast
import subprocess

import pytest

from conftest import ROOT

ORDER = ("model", "harness", "data", "eval", "train", "downstream", "replication")
FILES = [path.relative_to(ROOT) for name in ORDER for path in (ROOT / f"{name}.py", *(ROOT / name).glob("*.py")) if path.exists()]


def imported(path):
    """The first names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_nothing_that_stands_after_it(path):
    own = ORDER.index(path.parts[0].removesuffix(".py"))
    later = [name for name in imported(path) if name in ORDER and ORDER.index(name) > own]
    assert not later, f"{path} imports {later}"


def test_five_folders_stand_at_the_root():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {file.partition("/")[0] for file in files if "/" in file and file[0] != "."} == {
        "docs", "downstream", "harness", "replication", "tests"}
