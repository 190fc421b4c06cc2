"""The notebook contract, where a program can judge it: one test a point, for each notebook."""

import ast
import re
import statistics
from itertools import pairwise
from urllib.parse import unquote

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tools import fresh_seeds, notebooks

NOTEBOOKS = sorted(notebooks.FOLDER.glob("[0-9]*.ipynb"))
COURSE = ["00_start_here", "01_matrix_rank", "02_svd", "03_low_rank_approximation", "04_mnist_base_model",
          "05_lora_from_scratch", "06_adapt_to_8_and_9", "07_rank_and_alpha", "08_what_lora_learns"]
LATER = re.compile(r"(09|10|11|12)_\w+\.ipynb")  # announced, not yet there
COMPLETE = {path.stem for path in NOTEBOOKS} >= set(COURSE)
EXERCISES = {"00_start_here": 3}  # at least; 5 in the others
SECTIONS = {"00_start_here": set()}  # the map of the course has nothing to sum up; the others:
EVERY_SECTION = {"Recap", "Limits", "References"}
TAGS = {"exercise", "check", "solution", "nbval-ignore-output", "nbval-skip", "raises-exception"}
MACHINE_PATH = re.compile(r"(?<![\w.])(/(?:home|root|tmp|work|Users|opt|usr|private|var)/[\w./-]+|[A-Z]:\\+Users)")
FORBIDDEN = re.compile(r"\bpip\b|\bsys\.path|\burllib|\brequests\.|\bhttpx?\b|\bsocket\b|https?://|torch\.hub|"
                       r"download\s*=\s*True|from_pretrained|\b(?:curl|wget|git clone)\b")


def pytest_generate_tests(metafunc):
    if "nb" in metafunc.fixturenames:
        metafunc.parametrize("nb", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS], indirect=True)


@pytest.fixture
def nb(request):
    found = notebooks.read(request.param)
    found.path = request.param
    return found


def code(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def markdown(nb):
    """The text of each markdown cell, without its code blocks."""
    return [re.sub(r"```.*?```", "", cell.source, flags=re.S) for cell in nb.cells if cell.cell_type == "markdown"]


def headings(nb):
    return [(len(marks), title.strip()) for text in markdown(nb)
            for marks, title in re.findall(r"^(#{1,6}) +(.+)$", text, re.M)]


def anchors(nb):
    """What JupyterLab makes of the headings: their rendered text, with hyphens for blanks."""
    return {re.sub(r"\s", "-", re.sub(r"[`*]", "", title)) for _, title in headings(nb)}


def links(nb):
    for text in markdown(nb):
        yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
        yield from re.findall(r"""<a\b[^>]*\bhref=["']([^"']+)""", text)


def shown(cell):
    """All text that the stored outputs of a code cell show."""
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"base64,[\w+/=]+", "", value)


def test_there_are_notebooks():
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} <= set(COURSE)


# --- shape ------------------------------------------------------------------------------------------------------

def test_it_is_a_valid_notebook(nb):
    nb.pop("path")
    nbformat.validate(nb)


def test_the_header_has_one_title_with_the_number(nb):
    titles = [title for level, title in headings(nb) if level == 1]
    assert len(titles) == 1 and re.fullmatch(rf"{nb.path.name[:2]} · \S.+", titles[0])
    assert nb.cells[0].source.startswith(f"# {titles[0]}\n")


def test_the_header_says_what_one_gets_and_what_it_takes(nb):
    header = nb.cells[0].source
    assert re.search(r"^# .+\n\n\*[^*].{20,}[^*]\*\n", header), "the claim, in italics"
    bullets = re.search(r"^\*\*You will be able to\*\*:?\n+((?:[-*] .+\n(?:  .+\n)*)+)", header, re.M)
    assert bullets, "**You will be able to** and a list"
    assert 3 <= len(re.findall(r"^[-*] ", bullets[1], re.M)) <= 6
    assert re.search(r"^\*\*Before this\*\*: \S", header, re.M)
    assert re.search(r"\*\*Time\*\*: about \d+ minutes to read, \d+ s to compute", header)


def test_the_maps_give_the_minutes_of_the_header(nb):
    minutes = re.search(r"about (\d+) minutes to read", nb.cells[0].source)[1]
    maps = [notebooks.FOLDER.parent / "README.md"] + [NOTEBOOKS[0]] * (nb.path != NOTEBOOKS[0])
    for path in maps:
        row = next(line for line in path.read_text(encoding="utf-8").splitlines() if f"{nb.path.name}) |" in line)
        assert re.search(r"(\d+) \|\D*$", row)[1] == minutes, f"{path.name}: {row}"


def test_the_header_links_to_its_neighbours(nb):
    number = COURSE.index(nb.path.stem)
    targets = re.findall(r"\]\(([^)#\s]+\.ipynb)(?:#The-map)?\)", nb.cells[0].source.splitlines()[-1])
    for neighbour in COURSE[max(0, number - 1):number] + COURSE[number + 1:number + 2]:
        assert f"{neighbour}.ipynb" in targets
    assert number == 0 or "00_start_here.ipynb" in targets
    assert all(t.removesuffix(".ipynb") in COURSE or LATER.fullmatch(t) for t in targets)


def test_heading_levels_never_skip(nb):
    assert not [(a, b) for a, b in pairwise(headings(nb)) if b[0] > a[0] + 1]


def test_it_ends_with_recap_limits_and_references(nb):
    wanted = SECTIONS.get(nb.path.stem, EVERY_SECTION)
    assert wanted <= {title for level, title in headings(nb) if level == 2}


def test_the_second_cell_imports_and_prints_nothing(nb):
    cell = nb.cells[1]
    assert cell.cell_type == "code" and re.search(r"^(import|from) ", cell.source, re.M) and not cell.outputs


def test_code_cells_are_short(nb):
    lines = sorted(sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code(nb))
    assert statistics.median(lines) <= 5
    assert lines[min(len(lines) - 1, int(0.9 * len(lines)))] <= 15 and lines[-1] <= 25


def test_code_fits_its_cell_in_jupyterlab_without_scrolling(nb):
    assert not [(cell.id, line) for cell in code(nb) for line in cell.source.splitlines() if len(line) > 98]


# --- stored outputs ---------------------------------------------------------------------------------------------

def test_every_code_cell_was_run_in_order(nb):
    """A cell without a number compares nothing under nbval, whatever it shows."""
    assert [cell.execution_count for cell in code(nb)] == list(range(1, len(code(nb)) + 1)), (
        "run: python -m tools.notebooks run " + nb.path.name[:2])


def test_no_error_and_nothing_on_stderr(nb):
    for cell in code(nb):
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert "stderr" not in kinds
        assert "error" not in kinds or "raises-exception" in notebooks.tags(cell)


def test_no_path_of_a_machine(nb):
    for cell in nb.cells:
        for text in [cell.source, *(shown(cell) if cell.cell_type == "code" else [])]:
            assert not MACHINE_PATH.search(text), cell.id


def test_no_address_of_an_object_in_an_output(nb):
    assert not [cell.id for cell in code(nb) for text in shown(cell) if re.search(r"\b0x[0-9a-f]{6,}", text)]


def test_it_needs_no_pip_no_path_and_no_network(nb):
    assert not [(cell.id, found[0]) for cell in code(nb) if (found := FORBIDDEN.search(cell.source))]


def test_no_cell_ends_in_a_semicolon(nb):
    assert not [cell.id for cell in code(nb) if cell.source.rstrip().endswith(";")]


def test_at_most_one_cell_in_five_is_not_compared(nb):
    loose = [cell.id for cell in code(nb) if {"nbval-ignore-output", "nbval-skip"} & set(notebooks.tags(cell))
             or re.search(r"^\s*#+\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.M)]
    assert len(loose) <= len(code(nb)) / 5, loose


def test_it_is_at_most_1_mb(nb):
    assert nb.path.stat().st_size <= 1_000_000


def test_metadata_are_clean(nb):
    assert nb.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                           "language_info": {"name": "python"}}
    for cell in nb.cells:
        assert set(cell.metadata) <= {"tags"} and set(notebooks.tags(cell)) <= TAGS, cell.id


def test_cell_ids_are_unique_and_readable(nb):
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids)
    random = re.compile(r"[0-9a-f]{8}[0-9a-f-]*")  # as nbformat and JupyterLab give them
    assert not [i for i in ids if not re.fullmatch(r"[A-Za-z0-9][\w-]*", i) or random.fullmatch(i)]


# --- pictures and links -----------------------------------------------------------------------------------------

def test_every_picture_has_alternative_text(nb):
    for cell in code(nb):
        for output in cell.outputs:
            data = output.get("data", {})
            pictures = re.findall(r"<img\b[^>]*>", data.get("text/html", ""))
            assert pictures or not [kind for kind in data if kind.startswith("image/")], cell.id
            assert all(re.search(r"""\balt=(["'])\s*[^"'\s]""", picture) for picture in pictures), cell.id
    for text in markdown(nb):
        assert not re.search(r"!\[\s*\]\(", text)
        assert all(re.search(r"""\balt=["']\s*\w""", tag) for tag in re.findall(r"<img\b[^>]*>", text))


def test_no_picture_from_the_web(nb):
    texts = markdown(nb) + [text for cell in code(nb) for text in shown(cell)]
    assert not [t for t in texts if re.search(r"""!\[[^\]]*\]\(https?:|\bsrc=["']?(https?:)?//""", t)]


def test_links_lead_somewhere(nb):
    for link in links(nb):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = nb.path.parent / unquote(target) if target else nb.path
        if not path.exists():
            missing = path.name.removesuffix(".ipynb") in COURSE and not COMPLETE
            assert missing or LATER.fullmatch(path.name), f"{link}: no such file"
        elif anchor and path.suffix == ".ipynb":
            assert unquote(anchor) in anchors(notebooks.read(path)), f"{link}: no such heading"


def test_folded_parts_are_written_so_that_markdown_in_them_is_rendered(nb):
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            assert cell.source.count("<details") == cell.source.count("</details>"), cell.id
            assert not re.search(r"</summary>(?!\s*?\n\s*\n)", cell.source), f"{cell.id}: blank line after </summary>"


# --- exercises --------------------------------------------------------------------------------------------------

def test_there_are_enough_exercises(nb, record_property):
    found = notebooks.exercises(nb)
    assert len(found) >= EXERCISES.get(nb.path.stem, 5)
    assert len({exercise.name for exercise in found}) == len(found)
    record_property("exercises", len(found))


def test_every_exercise_has_number_title_difficulty_minutes_and_size(nb):
    for number, exercise in enumerate(notebooks.exercises(nb), start=1):
        above = nb.cells[exercise.stub - 1].source
        assert re.search(rf"^### Exercise {number} · \S", above, re.M), above
        assert re.search(r"^\*(Easy|Medium|Hard)\b[^·*]* · \d+ minutes? · [^·*]+\*$", above, re.M), above


def test_the_check_stands_alone_and_a_hint_comes_before_the_solution(nb):
    for exercise in notebooks.exercises(nb):
        assert re.fullmatch(rf"check\.{exercise.name}\(.+\)", nb.cells[exercise.check].source.strip(), re.S)
        help_text = ""
        for cell in nb.cells[exercise.check + 1:]:
            if "solution" not in notebooks.tags(cell):
                break
            help_text += cell.source
        summaries = re.findall(r"<summary>(.*?)</summary>", help_text, re.S)
        assert [s for s in summaries if s.startswith("Hint")] and summaries[-1].startswith("Solution"), exercise.name


@pytest.mark.skipif(not COMPLETE, reason="not all notebooks are there yet")
def test_the_course_has_at_least_40_exercises():
    assert sum(len(notebooks.exercises(notebooks.read(path))) for path in NOTEBOOKS) >= 40


# --- claims -----------------------------------------------------------------------------------------------------

def claim_calls(source):
    """The calls of claim in a cell, outside of functions, and the statements that are written out."""
    tree = ast.parse(TransformerManager().transform_cell(source))
    inside = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              for node in ast.walk(function)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in inside
             and isinstance(node.func, ast.Name) and node.func.id == "claim"]
    return calls, [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]


def test_every_claim_has_its_record(nb, record_property):
    total = 0
    for cell in code(nb):
        calls, statements = claim_calls(cell.source)
        records = [record for output in cell.outputs for record in notebooks.records(output)]
        assert len(records) >= len(calls) and set(statements) <= {r["statement"] for r in records}, cell.id
        total += len(records)
    assert total or nb.path.stem == "00_start_here"
    record_property("claims, each asserted where it stands", total)


def test_the_index_of_claims_is_up_to_date():
    index = notebooks.FOLDER / "CLAIMS.md"
    again = "run python -m tools.notebooks index"
    assert index.exists(), again
    assert index.read_text(encoding="utf-8") == notebooks.claims_index(), again


def test_the_index_of_claims_links_to_headings():
    known = {path.name: anchors(notebooks.read(path)) for path in NOTEBOOKS}
    rows = re.findall(r"\]\((\w+\.ipynb)#(.*?)\) \|", notebooks.claims_index())
    assert rows and not [(name, anchor) for name, anchor in rows if anchor not in known[name]]


@pytest.mark.skipif(not COMPLETE, reason="not all notebooks are there yet")
def test_the_index_of_claims_is_reachable_from_the_start():
    assert "CLAIMS.md" in set(links(notebooks.read(NOTEBOOKS[0])))


# --- fresh seeds ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, expected", [
    ("torch.manual_seed(1000 * r + seed)", "torch.manual_seed(1000 * r + seed)"),
    ("torch.manual_seed(0)", "torch.manual_seed(20)"),
    ("fit(base_model(), seed=3, steps=60)", "fit(base_model(seed=20), seed=23, steps=60)"),
    ("[run(seed) for seed in range(5)]", "[run(seed) for seed in [20 + k for k in range(5)]]"),
    ("SEEDS, STEPS = (0, 1, 2), 200", "SEEDS, STEPS = [20 + k for k in (0, 1, 2)], 200"),
    ("SEEDS = list(range(20 if FULL else 5))", "SEEDS = [20 + k for k in list(range(20 if FULL else 5))]"),
    ("[phi(fresh_A(64, seed)) for seed in (0, 1)]", "[phi(fresh_A(64, seed)) for seed in [20 + k for k in (0, 1)]]"),
    ("grid(seed=[0, 1], r=[4])", "grid(seed=[20 + k for k in [0, 1]], r=[4])"),
])
def test_fresh_seeds_moves_seeds_and_nothing_else(source, expected):
    assert fresh_seeds.moved(source, 20) == expected


def test_fresh_seeds_names_the_cells_that_fail():
    cells = {"holds": "assert 0 < 1", "flips": "f = dict(seed=0)\nassert f['seed'] < 9, f", "after": "1 / 0"}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id=k) for k, source in cells.items()])
    assert fresh_seeds.failures(nb, 20) == ["flips: AssertionError: {'seed': 20}",
                                            "after: ZeroDivisionError: division by zero"]
