"""Exercise checks: one module a notebook, one function an exercise, three outcomes.

A check is called as `check.rank_of_product(answer)` in the cell under the exercise. `answer` is a function or a value;
`...` (or a function that returns it) means "not attempted". `grade` compares functions, `grade_value` values.
A wrong answer that behaves like a known mistake gets that mistake's own message.
"""

import copy
import html
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Mistake(NamedTuple):
    """A classic wrong answer (a function, or a value) and what to tell the reader who gives it."""

    message: str
    answer: object


class WrongForm(Exception):
    """Raised by a check, about a result that it cannot compare; the message is for the reader."""


class Verdict:
    """What a check says. `outcome` is "right", "not yet" or "not attempted"."""

    SIGNS = {"right": "✔", "not yet": "✘", "not attempted": "○"}

    def __init__(self, outcome: str, message: str):
        self.outcome, self.message = outcome, message

    def __repr__(self):
        return f"{self.SIGNS[self.outcome]} {self.outcome}: {self.message}"

    def _repr_html_(self):
        return (f"<p><strong>{self.SIGNS[self.outcome]} {self.outcome}</strong>: "
                f"{html.escape(self.message)}</p>")


NOT_ATTEMPTED = Verdict("not attempted", "replace the ... above with your answer, run that cell, then this one")


def right(why: str) -> Verdict:
    return Verdict("right", why)


def not_yet(message: str) -> Verdict:
    return Verdict("not yet", message)


def blank(answer) -> bool:
    """Whether this is the placeholder of the exercise."""
    return answer is ... or answer is None


def matrices(result, expected: str, count: int = 2):
    """The result, if it is `count` matrices; else WrongForm, with `expected` for what they should be."""
    if (not isinstance(result, (tuple, list)) or len(result) != count
            or not all(isinstance(M, torch.Tensor) and M.ndim == 2 for M in result)):
        raise WrongForm(f"expected, as torch tensors: {expected}; you return {_describe([result])}")
    return result


def same(a, b, tol: float = 1e-4) -> bool:
    """Whether two results agree: numbers and arrays within `tol` of their size, sequences item by item, else ==."""
    a, b = _unwrapped(a), _unwrapped(b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same(x, y, tol) for x, y in zip(a, b, strict=True))
    if isinstance(a, (bool, str)) or isinstance(b, (bool, str)):
        return type(a) is type(b) and a == b
    try:
        a, b = _array(a), _array(b)
    except NO_ARRAY:
        return False
    size = max(1.0, float(np.nanmax(np.abs(b), initial=0)))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tol, atol=tol * size, equal_nan=True))


def grade(answer: Callable, truth: Callable, draw: Callable[[torch.Generator], Sequence], mistakes: Sequence[Mistake],
          why: str, *, tol: float = 1e-4, rounds: int = 5) -> Verdict:
    """Compare `answer` with `truth` on `rounds` argument lists from `draw(generator)`; draw non-square shapes.

    `why` is the one sentence on why it matters, for a right answer."""
    generator = torch.Generator().manual_seed(20210617)
    cases = [draw(generator) for _ in range(rounds)]
    verdict = None
    for arguments in cases:
        try:
            got = answer(*_copies(arguments))
        except Exception as error:  # whatever the reader's code raises is the reader's to see
            raised = "" if isinstance(error, WrongForm) else f"your function raised {type(error).__name__}: "
            return not_yet(_recognise(answer, cases, mistakes, tol)
                           or f"{raised}{error}  (called with {_describe(arguments)})")
        if got is ...:
            return NOT_ATTEMPTED
        if got is None:
            return not_yet("your function returns nothing: is `return` missing, or does a loop end without one?  "
                           f"(called with {_describe(arguments)})")
        verdict = verdict or _difference(got, truth(*_copies(arguments)), arguments, tol)
    if verdict is None:
        return right(why)
    return not_yet(_recognise(answer, cases, mistakes, tol) or verdict)


def grade_value(answer, truth, mistakes: Sequence[Mistake], why: str, *, hint: str, tol: float = 1e-9) -> Verdict:
    """Compare a predicted value. `hint` answers a wrong one that is no known mistake."""
    if blank(answer):
        return NOT_ATTEMPTED
    def is_(expected) -> bool:
        if isinstance(answer, str) and isinstance(expected, str):
            return answer.strip(" ().").lower() == expected.lower()
        return same(answer, expected, tol)

    if is_(truth):
        return right(why)
    if isinstance(answer, str) and isinstance(truth, int | float):
        return not_yet(f"{answer!r} is a text: write the number without quotes")
    for mistake in mistakes:
        if is_(mistake.answer):
            return not_yet(mistake.message)
    given = _describe([answer]) if isinstance(answer, torch.Tensor | np.ndarray) else repr(answer)
    return not_yet(f"{given} is not it. {hint}")


def _recognise(answer, cases, mistakes, tol) -> str | None:
    """The message of the mistake that gives what `answer` gives, the same error included, in every case."""
    def outcome(function, arguments):
        try:
            return function(*_copies(arguments))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    for mistake in mistakes:
        pairs = [(outcome(answer, c), outcome(mistake.answer, c)) for c in cases]
        if all(same(a, b, tol) for a, b in pairs):
            return mistake.message
    return None


def _difference(got, expected, arguments, tol) -> str | None:
    """What is wrong with a result, in the reader's terms; None if nothing is."""
    given = f"called with {_describe(arguments)}"
    if same(got, expected, tol):
        return None
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return f"{len(expected)} results were expected, you return {_describe([got])}  ({given})"
        return next(d for g, e in zip(got, expected, strict=True) if (d := _difference(g, e, arguments, tol)))
    try:
        shape, wanted = _array(got).shape, _array(expected).shape
    except NO_ARRAY:
        return f"you return {_describe([got])}, expected was {_describe([expected])}  ({given})"
    if shape != wanted:
        return f"shape {wanted} was expected, yours is {shape}  ({given})"
    if not wanted:
        return f"expected was {_short(expected)}, you return {_short(got)}  ({given})"
    gap = np.abs(_array(got).astype(float) - _array(expected).astype(float)).max()
    return f"the shape {shape} is right, the values are not: the largest difference is {gap:.3g}  ({given})"


NO_ARRAY = (TypeError, ValueError, OverflowError, RuntimeError)  # a huge int; a tensor on the meta device


def _array(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype == object:
        array = array.astype(float)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{value!r} is no array of numbers")
    return array


def _unwrapped(value):
    """A number of numpy, or a single bool of torch, as Python's."""
    one_bool = isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.numel() == 1
    return value.item() if one_bool or isinstance(value, np.generic) else value


def _short(value) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe(values) -> str:
    parts = []
    for value in values:
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
            parts.append(f"{'tensor' if isinstance(value, torch.Tensor) else 'array'} {tuple(value.shape)}")
        elif inspect.isroutine(value) or isinstance(value, torch.nn.Module):
            parts.append(type(value).__name__)
        elif isinstance(value, (list, tuple)):
            parts.append(f"[{_describe(value)}]")
        else:
            parts.append(_short(value))
    return ", ".join(parts)


def _copies(arguments):
    """Fresh arguments for each call: an answer that works in place must not change the next one's."""
    return [copy.deepcopy(a) if isinstance(a, torch.Tensor | np.ndarray | list | dict) else a for a in arguments]
