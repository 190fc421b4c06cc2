"""The editions of each notebook: with the solutions it runs and every check says "right"; the handout has none."""

import copy
import re
import shutil
from importlib.util import find_spec

import nbformat
import pytest

from tools import notebooks

CHROMIUM = find_spec("playwright") and (shutil.which("chromium") or shutil.which("chromium-browser"))
NOTEBOOKS = sorted(notebooks.FOLDER.glob("[0-9]*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def said(cell):
    return "".join(output.get("data", {}).get("text/plain", "") for output in cell["outputs"])


@pytest.mark.skipif(bool(CHROMIUM), reason="test_browser.py does this in JupyterLab")
@every_notebook
def test_the_solved_notebook_runs_and_every_check_says_right(path, record_property):
    nb = notebooks.read(path)
    full = notebooks.solved(nb)
    for cell in full.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebooks.execute(full, timeout=240)
    exercises = notebooks.exercises(nb)
    verdicts = {e.name: said(full.cells[e.check]) for e in exercises}
    assert not {name: text for name, text in verdicts.items() if not text.startswith("✔ right: ")}
    record_property("exercises solved in a notebook that runs from top to bottom", len(exercises))


@every_notebook
def test_solving_changes_the_stubs_and_nothing_else(path):
    nb = notebooks.read(path)
    before = copy.deepcopy(nb)
    full = notebooks.solved(nb)
    assert nb == before
    changed = [k for k, (a, b) in enumerate(zip(nb.cells, full.cells, strict=True)) if a.source != b.source]
    assert changed == [exercise.stub for exercise in notebooks.exercises(nb)]


@every_notebook
def test_the_handout_has_no_solution_and_still_holds_every_exercise(path, tmp_path):
    nb = notebooks.read(path)
    nbformat.write(notebooks.handout(nb), tmp_path / path.name)
    handout = nbformat.read(tmp_path / path.name, as_version=4)
    nbformat.validate(handout)
    assert not any(cell.get("outputs") for cell in handout.cells)
    text = "\n".join(cell.source for cell in handout.cells)
    solutions = [exercise.solution.strip() for exercise in notebooks.exercises(nb)]
    assert not re.search(r"<summary>\s*(Hint|Solution)", text)  # a folded proof may stay
    assert not [s for s in solutions if s in text]
    kept = [cell.source for cell in nb.cells if "solution" not in notebooks.tags(cell)]
    assert [cell.source for cell in handout.cells] == kept
    assert [t for c in handout.cells for t in notebooks.tags(c)].count("exercise") == len(solutions)
