"""What a notebook shows: claims that can fail, figures with alternative text, one quiet progress line."""

import base64
import copy
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from nbval.plugin import get_sanitize_patterns
from PIL import Image

from lora_lab import claims, plots
from lora_lab.claims import claim
from tools import notebooks

SANITIZE = dict(get_sanitize_patterns((Path(__file__).parent / "nbval_sanitize.cfg").read_text(encoding="utf-8")))
SAID = dict(source="Hu et al. 2021, section 1", measured="≈ 97.3 % <of> 10,000")


def sanitised(text):
    for pattern, replacement in SANITIZE.items():
        text = re.sub(pattern, replacement, text)
    return text


# --- claims -----------------------------------------------------------------------------------------------------

@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(claims, "display", lambda what, raw, metadata: found.append((what, metadata)))
    return found


@pytest.mark.parametrize("verdict", claims.VERDICTS)
def test_a_claim_that_does_not_hold_raises_and_shows_nothing(shown, verdict):
    correction = "" if verdict == "confirmed" else "it is half of that"
    with pytest.raises(AssertionError, match=f"no longer {verdict}: rank is 3") as caught:
        claim("rank is 3", **SAID, holds=False, verdict=verdict, correction=correction)
    assert SAID["measured"] in str(caught.value)
    assert not shown


@pytest.mark.parametrize("holds", [torch.tensor(False), np.False_, 0, torch.tensor([0.0])])
def test_evidence_that_is_false_in_other_types_raises(shown, holds):
    with pytest.raises(AssertionError, match="no longer confirmed"):
        claim("rank is 3", **SAID, holds=holds)


@pytest.mark.parametrize("verdict, correction, message", [
    ("true", "", "'true' is not one of"), ("Confirmed", "", "is not one of"), ("corrected", "", "needs a correction"),
    ("not seen", "", "needs a correction"), ("confirmed", "no", "confirmed has none")])
def test_a_verdict_that_makes_no_sense_is_refused(shown, verdict, correction, message):
    with pytest.raises(ValueError, match=message):
        claim("rank is 3", **SAID, holds=True, verdict=verdict, correction=correction)
    assert not shown


def test_the_record_of_a_claim_and_what_the_reader_sees(shown):
    claim("a < b | c", **SAID, holds=True, verdict="corrected", correction="a <= b")
    (what, metadata), = shown
    record = dict(statement="a < b | c", **SAID, verdict="corrected", correction="a <= b")
    assert metadata == {"lora_lab_claim": record}
    said = ("a < b | c", "Hu et al. 2021", "✎ corrected: a <= b", "they say")
    assert all(text in what["text/plain"] for text in said)
    page = what["text/html"]
    assert "a &lt; b | c" in page and "&lt;of&gt;" in page and "a &lt;= b" in page and "<of>" not in page


def test_only_the_number_behind_the_sign_is_cut_before_comparing():
    one, other = "≈ 97.3 % of 10,000", "≈ 96.8 % of 10,000"
    assert one != other and sanitised(one) == sanitised(other)
    assert sanitised("≈ 97.3 % of 10,000") != sanitised("≈ 97.3 % of 20,000")
    assert sanitised("97.3 %") != sanitised("96.8 %")
    assert sanitised("by ≈ −0.2 to 0.6 points") == sanitised("by ≈ 0.1 to 0.7 points") == "by ≈ points"
    assert sanitised("≈ 5 of 7, 2 to 3") != sanitised("≈ 5 of 7, 2 to 4")


# --- figures ----------------------------------------------------------------------------------------------------

@pytest.fixture
def pictures(monkeypatch):
    found = []
    monkeypatch.setattr(plots, "display", lambda what, raw: found.append(what))
    return found


def png(picture):
    return base64.b64decode(picture["image/png"])


TEXTS = dict(title="A message", alt='A rising line, <steep> & "straight".')
DRAWN = {
    "curves": lambda **t: plots.curves({"a": ([1, 2], [3, 4]), "b": ([1, 2], [1, 2], [0, 1], [2, 3])}, xlabel="x",
                                       ylabel="y", marks={"level": 2}, xscale="log", ylim=(0.1, 5), **t),
    "bars": lambda **t: plots.bars({"a": {"u": 1, "v": 3}, "b": {"u": 2, "v": 4}}, ylabel="y", **t),
    "images": lambda **t: plots.images(torch.rand(3, 784), ["a", "b", "c"], columns=2, **t),
    "images with a channel": lambda **t: plots.images(torch.rand(3, 1, 28, 28), **t),
    "images of 784 pixels": lambda **t: plots.images(torch.rand(3, 14, 56), **t),
    "signed images": lambda **t: plots.images([np.zeros((4, 6))], signed=True, **t),
    "heatmap": lambda **t: plots.heatmap([[1, 2, 3], [4, 5, 6]], numbers="{:.0f}", xticks="abc", yticks="de", **t),
    "plane": lambda **t: plots.plane({"W": [[2, 1], [0, 1]], "I": np.eye(2)}, vectors={"W": [(1, 0)]}, **t),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_figure_has_alternative_text_in_its_html_and_a_png_beside_it(pictures, draw):
    before = dict(plt.rcParams)
    assert draw(**TEXTS) is None
    picture, = pictures
    assert 'alt="A rising line, &lt;steep&gt; &amp; &quot;straight&quot;."' in picture["text/html"]
    assert TEXTS["alt"] in picture["text/plain"]
    assert png(picture).startswith(b"\x89PNG") and len(png(picture)) < 150_000
    assert not plt.get_fignums() and dict(plt.rcParams) == before


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alternative_text_is_refused(pictures, draw, alt):
    with pytest.raises(ValueError, match="alternative text"):
        draw(title="A message", alt=alt)
    assert not pictures


def test_alternative_text_cannot_be_left_out():
    for draw in DRAWN.values():
        with pytest.raises((TypeError, ValueError), match="alt"):
            draw(title="A message")


def test_an_own_figure_through_figure_and_show(pictures):
    fig, axes = plots.figure(1, 2, size=(5, 2))
    axes[0].plot([1, 2])
    plots.show(fig, alt="two panels", title="A message")
    assert fig.get_suptitle() == "A message" and not plt.get_fignums()
    assert 'width="500"' in pictures[0]["text/html"]


def test_lines_and_colours_on_axes_of_a_larger_figure(pictures):
    fig, (left, right) = plots.figure(1, 2)
    plots.curves({"a": ([1, 2, 1000], [3, 4, 5])}, ax=left, title="L", xscale="log", xticks=[1, 1000], xlabel="x")
    plots.heatmap([[1, 2], [3, 4]], ax=right, title="R", xticks="ab", ylabel="y")
    assert not pictures and (left.get_title(), left.get_xlabel()) == ("L", "x")
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "1,000"]
    assert not len(left.xaxis.get_minorticklocs())
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["a", "b"] and right.get_ylabel() == "y"
    plots.show(fig, alt="two panels")
    assert len(pictures) == 1


def test_series_differ_without_their_colours():
    styles = list(zip(plots.MARKERS, map(str, plots.LINES), strict=True))
    assert len(set(styles)) == len(styles) == len(set(plots.COLOURS)) == len(plots.COLOURS)


def test_the_same_picture_is_the_same_bytes(pictures):
    for _ in range(2):
        DRAWN["curves"](**TEXTS)
    assert pictures[0] == pictures[1]


def test_a_table_escapes_its_bars(monkeypatch):
    found = []
    monkeypatch.setattr(plots, "display", lambda what, raw: found.append(what))
    plots.table(["name", "|x|"], [["a", 1], ["b", 2.5]])
    assert found[0]["text/markdown"] == "| name | \\|x\\| |\n| ---: | ---: |\n| a | 1 |\n| b | 2.5 |"
    assert found[0]["text/plain"] == found[0]["text/markdown"]


# --- in a kernel ------------------------------------------------------------------------------------------------

CELLS = {
    "imports": "import time, torch\nimport matplotlib.pyplot as plt\nfrom lora_lab import plots\n"
               "from lora_lab.claims import claim\nfrom lora_lab.data import Digits\n"
               "from lora_lab.progress import progress\nfrom lora_lab.training import fit",
    "claim": "claim('two is even', source='this course', measured='2 % 2 = 0', holds=True)",
    "plot": "plots.curves({'a': ([1, 2], [3, 4])}, title='t', xlabel='x', ylabel='y', alt='a line that rises')",
    "progress": "for _ in progress(range(4), desc='work'): time.sleep(0.15)",
    "generator": "for _ in progress(iter(range(4)), desc='work'): time.sleep(0.15)",
    "note": "with progress(total=1, desc='base model') as bar:\n    bar.note = 'base model: from the cache'",
    "failing": "try:\n    for _ in progress(range(3), desc='work'): 1 / 0\nexcept ZeroDivisionError: pass",
    "silent": "for _ in progress(range(4), desc='work', disable=True): pass",
    "fit": "few = Digits(torch.randn(20, 3), torch.arange(20) % 2)\n"
           "_ = fit(torch.nn.Linear(3, 2), few, seed=0, lr=0.1, steps=5, batch_size=8)",
    "silent fit": "_ = fit(torch.nn.Linear(3, 2), few, seed=0, lr=0.1, steps=5, batch_size=8, label=None)",
    "left over": "plt.get_fignums()",
}


class Recording(NotebookClient):
    """A client that also keeps each output as it first arrives: what nbval sees, which knows no updates."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "display_data":
            self.first.setdefault(cell_index, []).append(copy.deepcopy(msg["content"]["data"]))
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def kernel():
    """The outputs of each cell as stored, and as they first arrived."""
    nb = new_notebook(cells=[new_code_cell(source) for source in CELLS.values()])
    client = Recording(nb, timeout=60, kernel_name="python3", allow_errors=True)
    client.first = {}
    client.execute()
    nbformat.validate(nb)
    assert "widgets" not in nb.metadata
    return {name: (cell.outputs, client.first.get(k, [])) for k, (name, cell) in
            enumerate(zip(CELLS, nb.cells, strict=True))}


@pytest.mark.parametrize("name", CELLS)
def test_no_error_and_nothing_on_stderr(kernel, name):
    assert not [o for o in kernel[name][0] if o.output_type in ("error", "stream")]


@pytest.mark.parametrize("name", ["progress", "generator", "note", "failing", "fit"])
def test_progress_is_one_display_that_compares_equal_when_stored(kernel, name):
    (stored,), (first,) = kernel[name]
    assert stored.output_type == "display_data" and set(stored.data) == set(first) == {"text/plain", "text/html"}
    for kind in first:
        assert stored.data[kind] != first[kind]  # it was updated
        assert sanitised(stored.data[kind]) == sanitised(first[kind])


def test_progress_ends_on_what_was_done(kernel):
    assert re.fullmatch(r"\S work: 4 steps, \d\.\d s", kernel["progress"][0][0].data["text/plain"])
    assert kernel["note"][0][0].data["text/plain"] [1:] == " base model: from the cache"


@pytest.mark.parametrize("name", ["silent", "silent fit"])
def test_a_line_that_is_not_wanted_is_not_shown(kernel, name):
    assert kernel[name] == ([], [])


def test_a_claims_record_is_stored_with_the_output(kernel):
    (stored,), _ = kernel["claim"]
    assert stored.metadata["lora_lab_claim"]["statement"] == "two is even"
    assert set(stored.data) == {"text/plain", "text/html"}


def test_a_stored_figure(kernel):
    (stored,), _ = kernel["plot"]
    assert set(stored.data) == {"text/plain", "text/html", "image/png"}
    assert '<img alt="a line that rises"' in stored.data["text/html"]
    assert stored.data["text/plain"] == "Figure: a line that rises"
    assert "base64," not in sanitised(stored.data["text/html"])
    assert kernel["left over"][0][0].data["text/plain"] == "[]"


# --- the index --------------------------------------------------------------------------------------------------

def test_the_index_of_claims_lists_them_by_heading(kernel, tmp_path, monkeypatch):
    nb = new_notebook(cells=[nbformat.v4.new_markdown_cell("# 01 · Rank"),
                             nbformat.v4.new_markdown_cell("## Rows and columns\n```python\n# no heading\n```"),
                             new_code_cell(outputs=kernel["claim"][0])])
    nbformat.write(nb, tmp_path / "01_rank.ipynb")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    index = notebooks.claims_index()
    assert "1 claims: 1 confirmed." in index and "## 01 · Rank" in index
    assert "| [two is even](01_rank.ipynb#Rows-and-columns) | this course | 2 % 2 = 0 | confirmed |" in index


def test_a_picture_can_be_opened(pictures):
    DRAWN["heatmap"](**TEXTS)
    assert Image.open(io.BytesIO(png(pictures[0]))).size[0] > 500
