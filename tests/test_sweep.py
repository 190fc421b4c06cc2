"""lora_lab.sweep: the same numbers for any number of workers, kept as they come, and errors that name the setting."""

import json
import linecache
import multiprocessing
import os
import runpy
import sys
import textwrap
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from lora_lab import data
from lora_lab import sweep as sweep_module
from lora_lab.data import NEW, few_digits, mnist
from lora_lab.lora import inject
from lora_lab.models import MLP
from lora_lab.sweep import sweep
from lora_lab.training import fit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path))
    return tmp_path


def kept(folder):
    return sorted(folder.glob("sweep-*/*.json"))


def defined(source: str, **outside):
    """The function `run` of a notebook cell with this text, in a notebook that also holds `outside`."""
    source = textwrap.dedent(source)
    name = f"<cell {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {"__name__": "__main__", **outside}
    exec(compile(source, name, "exec"), space)
    return space["run"], space


def training(seed, r=2):
    """A short real training; nothing seeds MLP's and LoRA's random start but sweep itself."""
    model = MLP()
    inject(model, ["fc2"], r=r, alpha=4)
    loss = fit(model, few_digits("train", 200, seed), seed=seed, lr=1e-2, steps=4, label=None).loss
    return {"loss": loss, "threads": torch.get_num_threads(), "process": os.getpid()}


def double(x):
    return {"twice": 2 * x}


def fails_at_3(x):
    if x == 3:
        raise ZeroDivisionError("no reason")
    return x


def tensor(x):
    return {"loss": torch.tensor(x)}


def parts_read(x):
    return data._pixels.cache_info().currsize


def parent(x):
    return os.getppid()


def killed(x):
    os._exit(1)


def counted(path, x):
    with open(path, "a") as file:
        file.write(f"{x}\n")
    return x


def test_the_same_numbers_for_any_number_of_workers(own_cache):
    settings, results = [{"seed": s} for s in range(3)], []
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for workers in (1, 2, 3):
        results.append(sweep(training, settings, label="x", workers=workers))
        for file in kept(own_cache):
            file.unlink()
    assert [[run["loss"] for run in result] for result in results] == [[run["loss"] for run in results[0]]] * 3
    assert {run["threads"] for result in results for run in result} == {1}
    assert len({run["process"] for run in results[1]} | {os.getpid()}) >= 2
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_results_come_in_the_order_of_the_settings():
    settings = [{"x": x} for x in (5, 1, 4, 1)]
    for _ in range(2):
        assert [result["twice"] for result in sweep(double, settings, label="x", workers=2)] == [10, 2, 8, 2]


def test_a_second_call_runs_nothing_and_says_so(tmp_path, capfd):
    log = tmp_path / "log"
    settings = [{"path": str(log), "x": x} for x in range(4)]
    first = sweep(counted, settings, label="counting", workers=1)
    capfd.readouterr()
    assert sweep(counted, settings, label="counting", workers=1) == first == [0, 1, 2, 3]
    assert len(log.read_text().split()) == 4
    assert "counting" in capfd.readouterr().err  # the line is there also when nothing ran


def test_it_goes_on_after_an_interruption(tmp_path, own_cache):
    log = tmp_path / "log"
    settings = [{"path": str(log), "x": x} for x in range(4)]
    sweep(counted, settings[:3], label="x", workers=1)
    kept(own_cache)[0].write_text('{"setting": {"x": 0}, "resu')  # cut off
    assert sweep(counted, settings, label="x", workers=1) == [0, 1, 2, 3]
    assert len(log.read_text().split()) == 5


def test_what_was_finished_before_an_error_stays(own_cache):
    with pytest.raises(ZeroDivisionError, match="no reason") as failed:
        sweep(fails_at_3, [{"x": x} for x in (1, 2, 3)], label="x", workers=1)
    assert "fails_at_3(**{'x': 3})" in failed.value.__notes__[0]
    assert [json.loads(file.read_text())["result"] for file in kept(own_cache)] in ([1, 2], [2, 1])
    with pytest.raises(ZeroDivisionError) as failed:
        sweep(fails_at_3, [{"x": x} for x in (1, 2, 3)], label="x", workers=2)
    assert "{'x': 3}" in failed.value.__notes__[0]


def test_nothing_more_is_begun_after_an_error(tmp_path):
    log = tmp_path / "log"

    def run(x):
        with open(log_path, "a") as file:
            file.write("x")
        raise ZeroDivisionError

    log_path = str(log)
    with pytest.raises(ZeroDivisionError):
        sweep(run, [{"x": x} for x in range(20)], label="x", workers=2)
    assert 1 <= len(log.read_text()) < 10


def test_a_result_that_json_cannot_keep(own_cache):
    with pytest.raises(TypeError, match="Tensor is not JSON serializable") as failed:
        sweep(tensor, [{"x": 1.5}], label="x", workers=2)
    assert "tensor(**{'x': 1.5})" in failed.value.__notes__[0] and "only what JSON" in failed.value.__notes__[0]
    assert not kept(own_cache)


@pytest.mark.parametrize("damage", ["", "{", "null", "5", "[]", "{}"])
def test_a_damaged_result_is_computed_again(own_cache, damage):
    assert sweep(double, [{"x": 4}], label="x", workers=1) == [{"twice": 8}]
    kept(own_cache)[0].write_text(damage)
    assert sweep(double, [{"x": 4}], label="x", workers=1) == [{"twice": 8}]
    assert "twice" in kept(own_cache)[0].read_text()


def test_fresh_and_kept_results_are_the_same():
    def run(x):
        return {"pair": (x, 1), "nothing": None}

    assert sweep(run, [{"x": 1}], label="x", workers=1) == sweep(run, [{"x": 1}], label="x", workers=1)
    assert sweep(run, [{"x": 1}], label="x", workers=1) == [{"pair": [1, 1], "nothing": None}]


def test_a_changed_function_helper_or_constant_starts_anew():
    text = "def helper(x):\n    return x + 1\n\ndef run(x):\n    return [helper(y) * FACTOR for y in [x]]\n"
    seen = [sweep(defined(source, FACTOR=factor)[0], [{"x": 1}], label="x", workers=1)
            for source, factor in ((text, 10), (text.replace("x + 1", "x + 2"), 10), (text, 3), (text, 10))]
    assert seen == [[[20]], [[30]], [[6]], [[20]]]


def test_a_constant_is_seen_although_a_name_inside_is_the_same():
    text = "def run(x):\n    return sum(lr for lr in [x]) * g()\n\ndef g():\n    return lr\n"
    assert [sweep(defined(text, lr=lr)[0], [{"x": 3}], label="x", workers=1) for lr in (1, 2)] == [[3], [6]]


def test_a_changed_property_or_base_class_starts_anew():
    text = ("class Base:\n    def two(self):\n        return 2\n\nclass Own(Base):\n    @property\n    def one(self):\n"
            "        return 1\n\ndef run(x):\n    return Own().one + Own().two()\n")
    seen = [sweep(defined(source)[0], [{"x": 1}], label="x", workers=1)
            for source in (text, text.replace("return 1", "return 5"), text.replace("return 2", "return 7"))]
    assert seen == [[3], [7], [8]]


def test_a_changed_class_attribute_starts_anew():
    text = "class Own:\n    size = 2\n\ndef run(x):\n    return Own().size\n"
    seen = [sweep(defined(source)[0], [{"x": 1}], label="x", workers=1)
            for source in (text, text.replace("2", "7"), text)]
    assert seen == [[2], [7], [2]]


@pytest.mark.parametrize("before, after", [("relu", "elu"), ("relu", "tanh")])
def test_another_function_of_a_library_under_the_same_name_starts_anew(before, after):
    text = ("import torch\nimport torch.nn.functional as F\n\nact = F.{0}\n\n"
            "class Own:\n    act = staticmethod(F.{0})\n\n"
            "def run(x):\n    return [act(torch.tensor(x)).item(), Own.act(torch.tensor(x)).item()]\n")
    first, second = (sweep(defined(text.format(name))[0], [{"x": -1.0}], label="x", workers=1)[0]
                     for name in (before, after))
    assert first == [0, 0] and max(second) < -0.5


def test_a_function_whose_line_cannot_be_read_alone_is_refused_in_words():
    run = dict(one=1,
               two=lambda x: x)["two"]
    with pytest.raises(TypeError, match="define it in a cell or a file, with def"):
        sweep(run, [{"x": 1}], label="x", workers=1)


def test_a_class_that_holds_data_is_refused():
    run, _ = defined("import torch\n\nclass Own:\n    data = torch.zeros(2)\n\ndef run(x):\n    return Own().data\n")
    with pytest.raises(TypeError, match="Own uses data, a Tensor from outside"):
        sweep(run, [{"x": 1}], label="x", workers=1)


def test_attributes_and_locals_that_share_a_name_with_the_notebook_do_not_matter():
    text = "def run(x):\n    loss = [part for part in [x]]\n    return sorted(loss.copy(), key=lambda y: -y)\n"
    run, _ = defined(text, copy=torch.zeros(1), loss=torch.zeros(1), part=torch.zeros(1), y=torch.zeros(1))
    assert sweep(run, [{"x": 1}], label="x", workers=1) == [[1]]


@pytest.mark.parametrize("data", [torch.zeros(3), MLP(), {"kept": torch.zeros(1)}])
def test_data_from_outside_is_refused_since_its_change_could_not_be_seen(data):
    run, _ = defined("def run(x):\n    return x + len(data)\n", data=data)
    with pytest.raises(TypeError, match=f"run uses data, a {type(data).__name__} from outside"):
        sweep(run, [{"x": 1}], label="x", workers=1)


def test_a_changed_class_or_decorated_helper_starts_anew():
    text = ("import torch\n\nclass Net:\n    def size(self):\n        return SIZE\n\n"
            "@torch.no_grad()\ndef net():\n    return Net().size() + 1\n\ndef run(x):\n    return net() + x\n")
    seen = [sweep(defined(source)[0], [{"x": 1}], label="x", workers=1)
            for source in (text.replace("SIZE", "5"), text.replace("SIZE", "7"))]
    assert seen == [[7], [9]]


def test_a_function_without_source_is_refused():
    space = {"__name__": "__main__"}
    exec(compile("def run(x):\n    return x", "<nowhere>", "exec"), space)
    with pytest.raises(TypeError, match="define it in a cell or a file"):
        sweep(space["run"], [{"x": 1}], label="x", workers=1)


def test_a_change_of_the_package_starts_anew(tmp_path, monkeypatch):
    log = tmp_path / "log"
    for digest in ("a", "b", "a"):
        monkeypatch.setattr(sweep_module, "PACKAGE", digest)
        sweep(counted, [{"path": str(log), "x": 1}], label="x", workers=1)
    assert len(log.read_text().split()) == 2


def test_nothing_to_do_and_settings_from_a_generator():
    assert sweep(double, [], label="x") == []
    assert sweep(double, ({"x": x} for x in (1, 2)), label="x", workers=1) == [{"twice": 2}, {"twice": 4}]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_all_workers_come_from_one_process_that_has_loaded_torch():
    first, second = (sweep(parent, [{"x": x} for x in xs], label="x", workers=2) for xs in (range(4), range(4, 8)))
    assert len({*first, *second}) == 1 and os.getpid() not in first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_a_worker_does_not_read_the_data_again():
    assert sweep(parts_read, [{"x": 1}, {"x": 2}], label="x", workers=2) == [2, 2]


def test_workers_start_without_the_data(monkeypatch):
    def missing(split):
        raise data.DataError(split)

    monkeypatch.setattr(data, "_pixels", missing)
    runpy.run_module("lora_lab.sweep_preload")


def test_the_same_numbers_where_processes_cannot_be_forked(own_cache, monkeypatch):
    forked = sweep(training, [{"seed": 0}], label="x")
    kept(own_cache)[0].unlink()
    monkeypatch.setattr(sweep_module, "PROCESSES", multiprocessing.get_context("spawn"))
    assert sweep(training, [{"seed": 0}], label="x")[0]["loss"] == forked[0]["loss"]


def test_a_worker_that_dies_is_an_error_and_no_endless_wait(own_cache):
    with pytest.raises(BrokenProcessPool):
        sweep(killed, [{"x": 1}, {"x": 2}], label="x", workers=2)
    assert sweep(double, [{"x": 1}], label="x") == [{"twice": 2}]


def test_few_digits_are_mnist_s():
    x, y = mnist()[1].sample(50, seed=3)
    few = few_digits("t10k", 50, seed=3)
    assert torch.equal(few.x, x) and torch.equal(few.y, y)
    assert few.x.shape == (50, 784) and few.x.dtype == torch.float32 and few.y.dtype == torch.int64


def test_few_digits_of_chosen_labels_extend_one_another():
    more, fewer = few_digits("train", 30, 1, NEW), few_digits("train", 10, 1, NEW)
    assert set(more.y.tolist()) == {8, 9}
    assert torch.equal(more.x[:10], fewer.x)
    assert not torch.equal(few_digits("train", 10, 2, NEW).x, fewer.x)
    assert len(few_digits("train", 0, 1).y) == 0


@pytest.mark.parametrize("n", [-1, 1984])
def test_few_digits_cannot_draw_more_than_there_are(n):
    with pytest.raises(ValueError, match=f"cannot draw {n} different examples from 1983"):
        few_digits("t10k", n, 0, NEW)
