"""For authors and teachers: run the notebooks, make the index of claims, make the editions for a class.

    python -m tools.notebooks run [NAME ...]       run in fresh kernels, clean, store, measure; then the index
    python -m tools.notebooks index                notebooks/CLAIMS.md from the stored outputs
    python -m tools.notebooks editions [NAME ...]  a handout (no hints, solutions, outputs) and an instructor's copy
                                                   (solved and run: minutes), in editions/

An exercise is three or more cells in a row: a code cell tagged "exercise" (the stub), a code cell tagged "check", and
markdown cells tagged "solution" with <details>; the Python block of the one whose summary says "Solution" replaces the
stub.
"""

import argparse
import base64
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor

from lora_lab.claims import VERDICTS

FOLDER = Path(__file__).parents[1] / "notebooks"
SOLUTION = re.compile(r"<summary>Solution.*?</summary>\s*```python\n(.*?)```", re.S)
SECONDS = re.compile(r"\b(\d+) s to compute")


class Exercise(NamedTuple):
    """Where an exercise stands in its notebook (cell numbers), its check's name, and the code that solves it."""

    stub: int
    check: int
    name: str
    solution: str


def paths(names=()) -> list[Path]:
    """The notebooks of the course in order, or those whose file name starts with one of `names`."""
    found = [p for p in sorted(FOLDER.glob("[0-9]*.ipynb")) if not names or p.name.startswith(tuple(names))]
    if not found:
        raise SystemExit(f"no notebook in {FOLDER} starts with {', '.join(names)}")
    return found


def read(path: Path):
    return nbformat.read(path, as_version=4)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def exercises(nb) -> list[Exercise]:
    """The exercises of a notebook. Raises ValueError if one has no check or no solution."""
    found = []
    for k, cell in enumerate(nb.cells):
        if "exercise" not in tags(cell):
            continue
        if "check" not in tags(nb.cells[k + 1]):
            raise ValueError(f"cell {k} is an exercise, but the cell below it is not its check")
        help_text = ""
        for below in nb.cells[k + 2:]:
            if "solution" not in tags(below):
                break
            help_text += below.source
        solution = SOLUTION.search(help_text)
        if not solution:
            raise ValueError(f"the exercise in cell {k} has no <details> with a Solution and a Python block")
        name = re.search(r"check\.(\w+)\(", nb.cells[k + 1].source)[1]
        found.append(Exercise(k, k + 1, name, solution[1]))
    return found


def solved(nb):
    """The notebook with every solution in place of its stub."""
    nb = nbformat.from_dict(nb)
    for exercise in exercises(nb):
        nb.cells[exercise.stub].source = exercise.solution.rstrip()
    return nb


def handout(nb):
    """The notebook without hints and solutions, and without outputs, which would answer what it asks to predict."""
    nb = nbformat.from_dict(nb)
    nb, _ = TagRemovePreprocessor(remove_cell_tags={"solution"}, enabled=True).preprocess(nb, {})
    return ClearOutputPreprocessor(enabled=True).preprocess(nb, {})[0]


def execute(nb, timeout: int = 600) -> float:
    """Run all cells in a fresh kernel, in place; return the seconds it took. Raises CellExecutionError."""
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}},
                            store_widget_state=False)
    with client.setup_kernel():
        started = time.perf_counter()
        for k, cell in enumerate(nb.cells):
            client.execute_cell(cell, k, execution_count=None)
        return time.perf_counter() - started


def clean(nb) -> None:
    """Leave nothing in a notebook that changes from run to run or from author to author."""
    nb.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                   "language_info": {"name": "python"}}
    nb.nbformat_minor = 5
    count = 0
    for cell in nb.cells:
        cell.metadata = {"tags": sorted(tags(cell))} if tags(cell) else {}
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count


def records(output) -> list[dict]:
    """The claims that one output shows: none, one, or a list of open ones."""
    found = output.get("metadata", {}).get("lora_lab_claim", [])
    return [found] if isinstance(found, dict) else found


def claims(path: Path) -> list[dict]:
    """The claims that a notebook's stored outputs show, each with the heading that it stands under."""
    found, heading = [], ""
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", cell.source, flags=re.S), re.M)
            heading = headings[-1] if headings else heading
            continue
        for output in cell.get("outputs", []):
            found += [{**record, "heading": heading} for record in records(output)]
    return found


def claims_index() -> str:
    """The text of notebooks/CLAIMS.md."""
    everything = {path: claims(path) for path in paths()}
    verdicts = [record["verdict"] for records in everything.values() for record in records]
    totals = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
    lines = ["# Every claim of the course", "",
             "Made by `python -m tools.notebooks index` from what the notebooks show; each line is asserted there, "
             "in the reader's sight, unless it is open. ≈ marks numbers that come out of training and differ a little "
             "between machines. The pages among the sources are [named in 00](00_start_here.ipynb#How-a-lesson-works). "
             "Back to [the course map](00_start_here.ipynb).", "", f"{len(verdicts)} claims: {totals}.", ""]
    for path, records in everything.items():
        if records:
            title = re.search(r"^# (.+)$", read(path).cells[0].source, re.M)[1]
            lines += [f"## {title}", "", "| claim | source | measured | verdict |", "|---|---|---|---|"]
            for r in records:
                anchor = re.sub(r"\s", "-", r["heading"])
                verdict = r["verdict"] + (f": {r['correction']}" if r["correction"] else "")
                row = (f"[{r['statement']}]({path.name}#{anchor})", r["source"], r["measured"], verdict)
                lines.append("| " + " | ".join(text.replace("|", r"\|").replace("\n", " ") for text in row) + " |")
            lines.append("")
    return "\n".join(lines)


def write_index() -> None:
    """notebooks/CLAIMS.md, and the README's picture, which is the signature result of notebook 06."""
    (FOLDER / "CLAIMS.md").write_text(claims_index(), encoding="utf-8")
    for cell in read(FOLDER / "06_adapt_to_8_and_9.ipynb").cells:
        if cell.id == "replay-plot" and cell.outputs:
            picture = base64.b64decode(cell.outputs[-1].data["image/png"])
            (FOLDER / "figures").mkdir(exist_ok=True)
            (FOLDER / "figures" / "forgetting.png").write_bytes(picture)


def run(names=()) -> None:
    """Run notebooks from an empty cache, store their outputs, and put the measured seconds into their headers."""
    for path in paths(names):
        nb = read(path)
        with tempfile.TemporaryDirectory() as empty:
            os.environ["LORA_LAB_CACHE"] = empty
            seconds = execute(nb)
        clean(nb)
        written = SECONDS.search(nb.cells[0].source)
        if written and abs(seconds - int(written[1])) > max(3, 0.3 * int(written[1])):  # else a rerun would change it
            nb.cells[0].source = SECONDS.sub(f"{max(1, round(seconds))} s to compute", nb.cells[0].source)
        nbformat.write(nb, path)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
    write_index()


def editions(names=()) -> None:
    """Write editions/handout (hints, solutions, outputs gone), then editions/instructor (solutions filled in, run)."""
    def write(edition, name, path):
        edition.cells[0].source = re.sub("^# .+$", rf"\g<0> ({name})", edition.cells[0].source, count=1, flags=re.M)
        target = FOLDER.parent / "editions" / name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(edition, target)
        shutil.copy(FOLDER / "CLAIMS.md", target.parent)

    for path in paths(names):
        write(handout(read(path)), "handout", path)
    print("editions/handout is written. The instructor's copy is run, which takes minutes.", flush=True)
    for path in paths(names):
        full = solved(read(path))
        execute(full)
        clean(full)
        write(full, "instructor", path)
        print(f"{path.name}: {len(exercises(read(path)))} exercises", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "index", "editions"])
    parser.add_argument("names", nargs="*", help="how the notebooks' names start; without any: all")
    args = parser.parse_args()
    if args.command == "run":
        run(args.names)
    elif args.command == "index":
        write_index()
    else:
        editions(args.names)


if __name__ == "__main__":
    sys.exit(main())
