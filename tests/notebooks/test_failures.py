"""Notebooks that must fail, and soon: a dead kernel, a cell without end, a cell that was never run, a wrong output."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.nbval_strict import LONGEST, SILENT

ROOT = Path(__file__).resolve().parents[2]
SPEC = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
OPTIONS = re.search(r"--nbval notebooks ((?:.*\\\n)*.*)",
                    (ROOT / "Makefile").read_text(encoding="utf-8"))[1].replace("\\\n", " ").split()


def cell(source, count=1, value=None):
    outputs = [new_output("execute_result", {"text/plain": value}, execution_count=count)] if value else []
    return new_code_cell(source, execution_count=count, outputs=outputs)


NUMBER = "class Number:\n    def __repr__(self): return {!r}\nNumber()"
PROGRESS = "import time\nbar = display(0, display_id=True)\nfor k in {}: time.sleep({}); bar.update(k + 1)"
NOTEBOOKS = {
    "good": [cell("x = 2"), cell("x + 1", 2, "3")],
    "exit": [cell("x = 2"), cell("import os; os._exit(1)", 2), cell("x", 3, "2")],
    "kill": [cell("x = 2"), cell("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 2), cell("x", 3, "2")],
    "never_run": [cell("x = 2"), cell("x + 1", None)],
    "wrong": [cell("2 + 2", 1, "5"), cell("2 + 3", 2, "5")],
    "about": [cell(NUMBER.format("≈ 0.96 of 9"), 1, "≈ 0.97 of 9"),
              cell(NUMBER.format("≈ 0.96 of 9"), 2, "≈ 0.96 of 8"), cell(NUMBER.format("0.96"), 3, "0.97")],
    "loop": [cell("while True: pass")],
    "sleep": [cell("import time; time.sleep(1000)")],
    "slow": [cell(PROGRESS.format("range(3)", 2.5), 1)],
    "endless": [cell(PROGRESS.format("iter(int, 1)", 0.5))],
    "chatter": [cell("import time\nwhile True: print(1); time.sleep(0.5)")],
    "pictures": [cell("import time\nwhile True: display(1); time.sleep(0.5)")],
}
NOTEBOOKS["slow"][0].outputs = [new_output("display_data", {"text/plain": "0"})]


VERDICTS = {  # a part of what is said of each cell
    "good": ["passed", "passed"],
    # nbval alone waits until the time of the cell is over, and says so
    "exit": ["passed", "the kernel died in this cell", "Kernel dead"],
    "kill": ["passed", "the kernel died in this cell", "Kernel dead"],
    "never_run": ["passed", "never run"],
    "wrong": ["outputs differ", "passed"],
    "about": ["passed", "outputs differ", "outputs differ"],  # only a number behind the sign for "about" may differ
    "loop": ["Timeout of 5 seconds exceeded"],  # having shown nothing, after SILENT of them
    "sleep": ["Timeout of 5 seconds exceeded"],
    "slow": ["passed"],  # for 7.5 s, but its progress never stands still for 5
    "endless": ["Timeout of 5 seconds exceeded"],  # its progress moves: after LONGEST times 5 s
    "chatter": ["Timeout of 5 seconds exceeded"],  # what is printed is no progress: after SILENT of 5 s
    "pictures": ["Timeout of 5 seconds exceeded"],  # after 5 s
}


def test_what_must_fail_fails_and_says_why(tmp_path):
    """All in one run of nbval, with 5 s of silence for a cell: most of it is waiting."""
    for name, cells in NOTEBOOKS.items():
        nbformat.write(new_notebook(cells=cells, metadata=SPEC), tmp_path / f"{name}.ipynb")
    given = [option for option in OPTIONS if option not in ("-n", "2", "--dist", "loadfile")]
    done = subprocess.run([sys.executable, "-m", "pytest", "--nbval", str(tmp_path), *given, "--nbval-cell-timeout=5",
                           "--color=no", f"--junitxml={tmp_path}/report.xml", "-o", "junit_duration_report=call"],
                          cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    said, seconds = {name: [] for name in NOTEBOOKS}, {}
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        wrong = "\n".join(f"{child.get('message')} {child.text}" for child in case if child.tag in ("failure", "error"))
        name = case.get("classname").rsplit(".ipynb")[0].rsplit(".")[-1]
        said[name].append(wrong or "passed")
        seconds[name] = float(case.get("time"))
    assert [len(said[name]) for name in VERDICTS] == [len(parts) for parts in VERDICTS.values()]
    for name, parts in VERDICTS.items():
        for k, part in enumerate(parts):
            assert part in said[name][k], f"cell {k} of {name}: {said[name][k]}"
    assert max(seconds["loop"], seconds["chatter"]) < seconds["pictures"] < seconds["endless"]  # 2, 2, 5 and 10 s


def test_make_test_and_the_workflow_run_nbval_alike():
    assert "tests.nbval_strict" in OPTIONS, "Makefile: add -p tests.nbval_strict to the line with --nbval"
    timeout = next(option for option in OPTIONS if option.startswith("--nbval-cell-timeout="))
    # an endless cell ends after 24 s, after 60 if it shows something, and after 120 if its progress line moves
    assert int(timeout.split("=")[1]) <= 60 and (SILENT, LONGEST) == (0.4, 2)
    workflow = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert not [option for option in OPTIONS if option not in workflow]
