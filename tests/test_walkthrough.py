"""The notebook runs from top to bottom, and its exercises can be solved."""
import json
import re

import pytest
import torch

from conftest import DEADLINE, ROOT

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
SOLUTIONS = """
def sliding_window(N, width):
    t = torch.arange(N)
    far = (t > t[:, None]) | (t < t[:, None] - width)
    return Mask(attn_bias=torch.where(far, -torch.inf, 0.0))


def add_registers(tokens, registers):
    return torch.cat([tokens[:, :-1], registers.expand(len(tokens), -1, -1), tokens[:, -1:]], dim=1)


def rope_table_2d(grid, d):
    table = rope_table(grid, d // 2)                         # 2, grid, d/2
    rows, columns = table.repeat_interleave(grid, dim=1), table.repeat(1, grid, 1)
    return torch.cat([rows, columns], dim=-1)
"""
WRONG = SOLUTIONS.replace("- width)", "- width - 1)").replace("tokens[:, -1:]], dim=1", "tokens[:, -1:]][::-1], dim=1").replace(
    "columns], dim=-1", "rows], dim=-1")


def checked(solutions, capsys):
    names = {}
    exec("import torch\nfrom model import Mask, rope_table, rotate\n" + solutions + "\n" + CELLS[-1], names)
    return re.findall(r": (.*)$", capsys.readouterr().out, re.M)


def test_the_checks_of_the_exercises_tell_right_from_wrong(capsys):
    torch.manual_seed(0)
    assert checked(CELLS[-2], capsys) == 3 * ["not written yet"]
    assert checked(SOLUTIONS, capsys) == 3 * ["solved"]
    assert checked(WRONG, capsys) == 3 * ["not right yet"]


def test_it_is_committed_with_its_outputs_and_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 1_000_000 and len(cells) == 12
    assert all(cell["outputs"] and cell["execution_count"] for cell in cells[:-2])


@pytest.mark.slow
def test_it_runs_from_top_to_bottom():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=DEADLINE, kernel_name="python3", resources=dict(metadata=dict(path=NOTEBOOK.parent))).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "differ by at most 0\n" in printed and "accuracy after training 10" in printed
    cured = float(re.search(r"^accuracy ([\d.]+) %$", printed, re.M)[1])
    assert cured > 30
