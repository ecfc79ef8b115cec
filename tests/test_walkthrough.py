"""The notebook runs from top to bottom, and its exercises can be solved."""
import json
import re

import pytest
import torch

from conftest import DEADLINE, ROOT

NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
RIGHT = {
    "sliding window": ["""
def sliding_window(N, width):
    t = torch.arange(N)
    far = (t > t[:, None]) | (t < t[:, None] - width)
    return Mask(attn_bias=torch.where(far, -torch.inf, 0.0))
""", """
def sliding_window(N, width):
    window = torch.ones(N, N).tril().triu(-width)
    return Mask(attn_bias=window.log())
"""],
    "registers": ["""
def add_registers(tokens, registers):
    registers = registers.expand(len(tokens), -1, -1)
    return torch.cat([tokens[:, :-1], registers, tokens[:, -1:]], dim=1)
""", """
def add_registers(tokens, registers):
    patches, cls = tokens.split([tokens.shape[1] - 1, 1], dim=1)
    return torch.cat([patches, registers.repeat(len(tokens), 1, 1), cls], dim=1)
"""],
    "2-D RoPE": ["""
def rope_table_2d(grid, d):
    table = rope_table(grid, d // 2)                         # 2, grid, d/2
    rows, columns = table.repeat_interleave(grid, dim=1), table.repeat(1, grid, 1)
    return torch.cat([rows, columns], dim=-1)
""", """
def rope_table_2d(grid, d):                                  # of all frequencies, rows and columns in turns
    table = rope_table(grid, d)
    rows, columns = table.repeat_interleave(grid, dim=1), table.repeat(1, grid, 1)
    return torch.where(torch.arange(d) // 2 % 2 == 0, columns, rows)
"""],
    "second word": ["""
def second_word(model, images):
    words = torch.zeros(len(images), 2, dtype=torch.long)
    words[:, 0] = model(images, words)[:, 0].argmax(-1)
    return model(images, words)[:, 1].argmax(-1)
""", """
def second_word(model, images):
    first = model(images, torch.zeros(len(images), 1, dtype=torch.long)).argmax(-1)
    return model(images, torch.cat([first, first], dim=1)).argmax(-1)[:, 1]
"""]}
WRONG = {  # the first right one, with a mistake: what was, what is
    "sliding window": [("- width", "- width - 1"),                           # one token too many
                       ("(t > t[:, None]) | ", ""),                          # later tokens, too
                       ("-torch.inf, 0.0", "0.0, -torch.inf")],              # the other way round
    "registers": [("[tokens[:, :-1], registers, tokens[:, -1:]]", "[tokens, registers]"),            # after the class token
                  ("[tokens[:, :-1], registers, tokens[:, -1:]]", "[registers, tokens]"),            # before the patches
                  ("registers = registers", "registers = registers.detach()")],                      # never trained
    "2-D RoPE": [("[rows, columns]", "[rows, rows]"),                        # depends on rows alone
                 ("table = rope_table(grid, d // 2)", "return rope_table(grid * grid, d)"),          # 1-D, along the raster
                 ("[rows, columns], dim=-1", "[rows + columns] * 2, dim=-1")],                       # no rotation
    "second word": [("[:, 1].argmax", "[:, 0].argmax"),                      # the first one again
                    ("    words[:, 0] = model(images, words)[:, 0].argmax(-1)\n", "")]}            # after no word


def verdict(name, solution, capsys):
    """What the notebook's last cell says of a solution of one exercise, the others unsolved."""
    torch.manual_seed(0)
    names = {}
    exec("import torch\nfrom model import Mask, config, rope_table, rotate\n" + CELLS[-2] + solution + "\n" + CELLS[-1], names)
    verdicts = dict(re.findall(r"^(.+): (.*)$", capsys.readouterr().out, re.M))
    assert set(verdicts) == set(RIGHT) and set(verdicts.values()) <= {verdicts[name], "not written yet"}
    return verdicts[name]


@pytest.mark.parametrize("name", RIGHT)
def test_the_checks_of_the_exercises_tell_right_from_wrong(name, capsys):
    assert verdict(name, "", capsys) == "not written yet"
    for solution in RIGHT[name]:
        assert verdict(name, solution, capsys) == "solved"
    for before, after in WRONG[name]:
        assert before in RIGHT[name][0]
        assert verdict(name, RIGHT[name][0].replace(before, after), capsys) == "not right yet"


def test_it_is_committed_with_its_outputs_and_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK.stat().st_size < 1_000_000 and len(cells) == 13
    assert all(cell["outputs"] and cell["execution_count"] for cell in cells[:-2])
    assert max(len(line) for cell in CELLS for line in cell.splitlines()) <= 88         # the width of its boxes


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
