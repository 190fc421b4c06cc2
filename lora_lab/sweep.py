"""Many short training runs on all cores, each result kept as soon as it is there."""

import inspect
import json
import multiprocessing
import symtable
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import joblib
import torch
from IPython import get_ipython
from IPython.utils.capture import capture_output

from lora_lab.cache import folder, keep, key
from lora_lab.progress import progress

PACKAGE = key([file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))])  # as it was when imported
# On Linux one process loads torch and the data, and every worker is forked from that one and shares its memory.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    PROCESSES.set_forkserver_preload(["lora_lab.sweep_preload"])
    if get_ipython():  # in a notebook it loads while the first cells are read: the first sweep need not wait
        from multiprocessing import forkserver

        forkserver.ensure_running()


def sweep(run, settings, *, label: str, workers: int | None = None) -> list:
    """[run(**setting) for setting in settings], by `workers` processes (default: all cores, at most 8).

    Every run has one thread and starts from the same random state, so the results do not depend on `workers`. Each is
    kept on disk, as JSON, when it is finished: after an interruption, or in a later session, the same call goes on from
    there. A change of `run`, of what it uses from its notebook, of lora_lab or of torch starts anew.
    `run` gets and returns only what JSON can hold, and makes its data and models itself (see `few_digits`).
    A script, unlike a notebook, calls this under `if __name__ == "__main__":`, as for all of Python's processes.
    What a run raises is raised here, with a note that names the setting; what is finished stays.
    """
    settings = list(settings)
    kept = folder() / f"sweep-{key(_code(run), torch.__version__, PACKAGE)}"
    kept.mkdir(exist_ok=True)
    files = [kept / f"{key(run.__name__, sorted(setting.items()))}.json" for setting in settings]
    results = [_read(file) for file in files]
    missing = [k for k, result in enumerate(results) if result is None]
    with progress(total=len(settings), initial=len(settings) - len(missing), desc=label, unit="run") as bar:
        if not missing:
            bar.note = f"{label}: {len(settings)} runs, from the cache"
        pool = ProcessPoolExecutor(workers or min(joblib.cpu_count(), 8), PROCESSES)
        sent = joblib.wrap_non_picklable_objects(run)  # with its code, since other processes do not know a notebook's
        try:
            done = pool.map(_finished, repeat(sent), [settings[k] for k in missing], [files[k] for k in missing])
            for k, text in zip(missing, done, strict=True):
                results[k] = json.loads(text)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interruption nothing more is begun
    return [result["result"] for result in results]


def _finished(run, setting: dict, file: Path) -> str:
    """Do one run, in a worker, and keep its result; the JSON text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with capture_output():  # no progress lines from inside
            text = json.dumps({"setting": setting, "result": run(**setting)})
    except Exception as error:
        error.add_note(f"in a run of the sweep: {run.__name__}(**{setting}). A run returns only what JSON can hold.")
        raise
    keep(file, text.encode())
    return text


def _read(file: Path) -> dict | None:
    """A kept result; None if there is none, or if it is damaged."""
    with suppress(OSError, ValueError, TypeError):
        kept = json.loads(file.read_bytes())
        return kept if "result" in kept else None


def _code(thing, users=()) -> str:
    """The source of a function or class, and of what it uses from its own notebook or module."""
    if inspect.isclass(thing):  # part by part, since Python finds no source for a class of a notebook
        text, used = "", {base.__name__: base for base in thing.__bases__} | vars(thing)
    else:
        text, used = _source(thing)
    for name, value in used.items():
        value = inspect.unwrap(getattr(value, "fget", value))
        if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
            text += f"{name} = {getattr(value, '__module__', '')}.{value.__name__}"
            generated = inspect.isfunction(value) and value.__code__.co_filename == "<string>"  # by a dataclass, say
            if getattr(value, "__module__", "") == thing.__module__ and value not in (thing, *users) and not generated:
                text += _code(value, (thing, *users))
        elif not name.startswith("__") and not hasattr(value, "__get__"):
            try:
                text += f"{name} = {json.dumps(value)}"
            except TypeError:
                raise TypeError(f"{thing.__name__} uses {name}, a {type(value).__name__} from outside. Whether that "
                                "changed since a result was kept cannot be seen: make it inside the function."
                                ) from None
    return text


def _source(function) -> tuple[str, dict]:
    """A function's text, and what it takes from outside, by name."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        scopes = [symtable.symtable(text, "", "exec")]
    except (OSError, TypeError, SyntaxError):
        raise TypeError(f"the source of {function!r} cannot be read: define it in a cell or a file, with def") from None
    for scope in scopes:  # it grows: each function and comprehension inside is a scope of its own
        scopes += scope.get_children()
    used = {s.get_name() for scope in scopes for s in scope.get_symbols() if s.is_global() and not s.is_local()}
    outside = function.__globals__ | inspect.getclosurevars(function).nonlocals
    return text, {name: outside[name] for name in sorted(used & outside.keys())}
