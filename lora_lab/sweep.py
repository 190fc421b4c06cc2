"""Many short training runs on all cores, each result kept as soon as it is there."""

import ast
import inspect
import json
import textwrap
from functools import cache
from pathlib import Path

import joblib
import torch
from IPython.utils.capture import capture_output

from lora_lab.cache import folder, key, written_whole
from lora_lab.data import MEAN, NEW, OLD, STD, Digits, _pixels_and_labels
from lora_lab.progress import progress


class SweepError(RuntimeError):
    """A run failed, or its result cannot be kept; the message names its setting."""


def sweep(run, settings, *, label: str, workers: int | None = None) -> list:
    """[run(**setting) for setting in settings], by `workers` processes (default: all cores, at most 8).

    Every run has one thread and starts from the same random state, so the results do not depend on `workers`. Each is
    kept on disk, as JSON, when it is finished: after an interruption, or in a later session, the same call goes on from
    there. A change of `run`, of what it uses from its notebook, of lora_lab or of torch starts anew.
    `run` gets and returns only what JSON can hold, and makes its data and models itself (see `few_digits`).
    Raises SweepError, which names the setting, if a run fails; what is finished stays.
    """
    settings = list(settings)
    kept = folder() / f"sweep-{key(_code(run), torch.__version__, _package())}"
    kept.mkdir(exist_ok=True)
    files = [kept / f"{key(run.__name__, sorted(setting.items()))}.json" for setting in settings]
    found = dict(enumerate(map(_read, files)))
    missing = [k for k, text in found.items() if text is None]
    with progress(total=len(settings), desc=label, unit="run") as bar:
        bar.update(len(settings) - len(missing))
        if not missing:
            bar.note = f"{label}: {len(settings)} runs, from the cache"
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            pool = joblib.Parallel(workers or min(joblib.cpu_count(), 8), return_as="generator", batch_size=1)
            done = pool(joblib.delayed(_finished)(run, settings[k], files[k]) for k in missing)
            for k, text in zip(missing, done, strict=True):
                found[k] = text
                bar.update()
    return [json.loads(found[k])["result"] for k in range(len(settings))]


def few_digits(split: str, n: int, seed: int, digits=OLD + NEW) -> Digits:
    """`n` random examples of MNIST's "train" or "t10k" part with a label in `digits`, as mnist() gives them.

    Fewer from the same seed are the first of them. Unlike mnist(), this does not make floats (220 MB) of all the
    others, which several processes at once could not afford. Raises ValueError if there are not so many."""
    pixels, labels = _pixels_and_labels(split)
    among = torch.isin(labels, torch.tensor(tuple(digits))).nonzero()[:, 0]  # (m,)
    if not 0 <= n <= len(among):
        raise ValueError(f"cannot draw {n} different examples from {len(among)}")
    pick = among[torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:n]]  # (n,)
    return Digits(pixels[pick].reshape(-1, 784).float().div_(255).sub_(MEAN).div_(STD), labels[pick])


def _finished(run, setting: dict, file: Path) -> str:
    """Do one run and keep its result; the JSON text."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), capture_output():  # no progress lines from inside
            torch.manual_seed(0)
            result = run(**setting)
    except Exception as error:
        raise SweepError(f"{run.__name__}({_words(setting)}) raised {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
    try:
        text = json.dumps({"setting": setting, "result": result})
    except TypeError as error:
        raise SweepError(f"{run.__name__}({_words(setting)}) returned something that JSON cannot keep: {error}. Return "
                         "numbers, strings, and lists and dicts of them (for a tensor: .item() or .tolist())") from None
    with written_whole(file) as part:
        part.write_text(text, encoding="utf-8")
    return text


def _words(setting: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in setting.items())


def _read(file: Path) -> str | None:
    """The text of a kept result; None if there is none, or if it is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        return text if "result" in json.loads(text) else None
    except (OSError, ValueError, TypeError):
        return None


def _code(thing, users=()) -> str:
    """The source of a function or class, and of what it uses from its own notebook or module."""
    if inspect.isclass(thing):  # method by method, since Python finds no source for a class of a notebook
        own = [method for method in vars(thing).values() if inspect.isfunction(method)]
        return "".join(_code(method, (thing, *users)) for method in own if method.__code__.co_filename != "<string>")
    try:
        text = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        raise TypeError(f"the source of {thing!r} cannot be read: define it in a cell or a file") from None
    outside = thing.__globals__ | inspect.getclosurevars(thing).nonlocals
    nodes = list(ast.walk(ast.parse(text)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)} & outside.keys()
    names -= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names -= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for name in sorted(names):
        value = inspect.unwrap(outside[name])
        if inspect.isfunction(value) or inspect.isclass(value):
            if value.__module__ == thing.__module__ and value not in (thing, *users):
                text += _code(value, (thing, *users))
        elif not inspect.ismodule(value) and not inspect.isroutine(value):
            try:
                text += f"{name} = {json.dumps(value)}"
            except TypeError:
                raise TypeError(f"{thing.__name__} uses {name}, a {type(value).__name__} from outside. Whether that "
                                "changed since a result was kept cannot be seen: make it inside.") from None
    return text


@cache
def _package() -> str:
    """Changes whenever a module of lora_lab does."""
    return key([file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))])
