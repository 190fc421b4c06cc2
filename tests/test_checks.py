"""The exercise checks are sharp: stubs, constants and every classic mistake are told apart from the solution."""

import ast
import importlib
import inspect
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager

from lora_lab import checks
from lora_lab.checks import Mistake, grade, grade_value, matrices, nb03
from tools import notebooks

NOTEBOOKS = sorted(notebooks.FOLDER.glob("[0-9]*.ipynb"))


def check_module(path):
    return importlib.import_module(f"lora_lab.checks.nb{path.name[:2]}")


def functions(cells):
    """Those that the cells define, as long as nothing of the notebook has to run for it."""
    sources = [TransformerManager().transform_cell(cell.source) for cell in cells
               if cell.cell_type == "code" and "exercise" not in notebooks.tags(cell)]
    defined = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return "".join("\n" + ast.unparse(node) for node in defined if not node.decorator_list + node.args.defaults)


def listed():
    """Each exercise with what its tests need, the notebook's imports and the functions above it included."""
    for path in NOTEBOOKS:
        nb = notebooks.read(path)
        for exercise in notebooks.exercises(nb):
            yield SimpleNamespace(id=f"{path.name[:2]}-{exercise.name}", name=exercise.name, module=check_module(path),
                                  above=nb.cells[1].source + functions(nb.cells[2:exercise.stub]),
                                  stub=nb.cells[exercise.stub].source, solution=exercise.solution,
                                  call=nb.cells[exercise.check].source)


EXERCISES = list(listed())
MISTAKES = [(e, mistake) for e in EXERCISES for mistake in e.module.MISTAKES.get(e.name, [])]
every_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)


@cache
def namespace(above):
    names = {}
    exec(above, names)
    return names


def answers(exercise, source):
    """The arguments that the check's cell hands over after the import cell and `source` have run."""
    names = dict(namespace(exercise.above))
    exec(source, names)
    call = ast.parse(exercise.call.strip(), mode="eval").body
    return [eval(compile(ast.Expression(argument), exercise.id, "eval"), names) for argument in call.args]


def verdict(exercise, *given):
    return getattr(exercise.module, exercise.name)(*given)


@every_exercise
def test_a_stub_is_not_attempted(exercise, record_property):
    assert verdict(exercise, *answers(exercise, exercise.stub)).outcome == "not attempted"
    record_property("stubs that are \"not attempted\"", 1)


@every_exercise
def test_a_solution_is_right(exercise, record_property):
    said = verdict(exercise, *answers(exercise, exercise.solution))
    assert said.outcome == "right" and len(said.message) > 20, said
    record_property("solutions that are \"right\"", 1)


@pytest.mark.parametrize("exercise, mistake", MISTAKES, ids=[
    f"{e.id}-{e.module.MISTAKES[e.name].index(mistake)}" for e, mistake in MISTAKES])
def test_a_classic_mistake_gets_its_own_message(exercise, mistake, record_property):
    said = verdict(exercise, mistake.answer)
    assert (said.outcome, said.message) == ("not yet", mistake.message)
    record_property("classic mistakes, each told by its own message", 1)


@every_exercise
def test_at_least_two_mistakes_with_messages_that_differ(exercise):
    messages = [mistake.message for mistake in exercise.module.MISTAKES.get(exercise.name, [])]
    assert len(messages) >= 2 and len(set(messages)) == len(messages)
    assert all(len(message.split()) >= 4 for message in messages)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_module_holds_the_notebooks_checks_and_no_others(path):
    module = check_module(path)
    used = {exercise.name for exercise in notebooks.exercises(notebooks.read(path))}
    assert used == set(module.MISTAKES)
    public = {name for name, value in vars(module).items()
              if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")}
    assert used == public


# --- answers that know nothing ----------------------------------------------------------------------------------

def nothing_like(result):
    """Zeros of the same kind and shape as a result."""
    if isinstance(result, torch.Tensor | np.ndarray):
        return result * 0
    if isinstance(result, (list, tuple)):
        return type(result)(map(nothing_like, result))
    return type(result)() if isinstance(result, (bool, int, float, str)) else result


def ignorant(solution):
    """Functions that do not look at their arguments: constants, zeros of the right shape, the first right result."""
    yield from [(repr(value), lambda *a, value=value, **k: value) for value in (0, 1, True, "", [], torch.zeros(2, 3))]
    yield "zeros of the right shape", lambda *a, **k: nothing_like(solution(*a, **k))
    kept = []

    def first_result(*a, **k):
        kept[:] = kept or [solution(*a, **k)]
        return kept[0]

    yield "the first result for ever", first_result


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if "def " in e.stub], ids=lambda e: e.id)
def test_a_function_that_ignores_its_arguments_is_not_right(exercise):
    for value in (0, 1, "", torch.zeros(3, 2)):
        assert verdict(exercise, value).outcome == "not yet", value
    solution, = answers(exercise, exercise.solution)
    if isinstance(solution, type):
        return
    for name, answer in ignorant(solution):
        assert verdict(exercise, answer).outcome == "not yet", name


@every_exercise
def test_an_answer_of_the_wrong_kind_gets_a_verdict_and_no_trace(exercise):
    for value in ("seven", object(), lambda: 1, [], {}, 10**400, torch.zeros(3, device="meta")):
        assert verdict(exercise, value).outcome == "not yet", value


# --- answers that readers gave, or might give -------------------------------------------------------------------

def joined_in_place(A1, B1, alpha1, A2, B2, alpha2):
    B1 *= alpha1 / len(A1)
    B2 *= alpha2 / len(A2)
    return torch.cat([A1, A2]), torch.cat([B1, B2], dim=1)


def chosen_with_pop(valid, gain):
    r, reached = 1, valid.pop(1)
    while 2 * r in valid and valid[2 * r] - reached >= gain:
        r *= 2
        reached = valid.pop(r)
    return r


def by_both_tables(valid, test):
    r = max(valid, key=lambda r: valid[r] + test[r])
    return r, test[r]


def at_least_one(shapes, budget):
    r = 1
    while r < max(map(min, shapes)) and sum(min(r + 1, m, n) * (m + n) for m, n in shapes) <= budget:
        r += 1
    return r


def equal_points_once(points):
    def beaten(p):
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    return [points.index(p) for p in points if not beaten(p)]


def replayed_in_an_order_of_its_own(y, n, generator):
    old = (y < 8).nonzero()[:, 0]
    picks = torch.cat([(y >= 8).nonzero()[:, 0], old[torch.randperm(len(old), generator=generator)[:n]]])
    return picks[torch.randperm(len(picks))]


def error_within_the_budget(S, m, n, budget):
    kept = S.square().cumsum(0) / S.square().sum()
    return (1 - kept[budget // (m + n) - 1]).clamp(min=0).sqrt()


@pytest.mark.parametrize("name, answer, outcome, words", [
    ("04-logit_gradient", lambda z, y: (z.softmax(1) - torch.nn.functional.one_hot(y)) / len(z), "not yet", "size"),
    ("04-share_right", lambda z, y: 0.0, "not yet", "you return 0"),
    ("05-largest_rank", at_least_one, "not yet", "expected was 0, you return 1"),
    ("05-scale", lambda alpha, r, rslora=False: None, "not yet", "is `return` missing"),
    ("01-blind_in", lambda m, n, k: None, "not yet", "is `return` missing"),
    ("05-joined", joined_in_place, "right", ""),
    ("05-merged_weight", lambda W, A, B, s: (W + s * B @ A).numpy(), "right", ""),
    ("05-adapted", lambda x, W, A, B, s: x.detach().numpy(), "not yet", "return a torch tensor"),
    ("05-moves_first", "(A)", "right", ""),
    ("06-all_ten", 19.83, "not yet", "percentage"),
    ("06-front", equal_points_once, "not yet", "enumerate"),
    ("06-front", lambda points: [0], "not yet", "of the 14 points are on the front; you return [0]"),
    ("06-replay_indices", replayed_in_an_order_of_its_own, "right", ""),
    ("02-best_error", error_within_the_budget, "not yet", "IndexError"),
    ("08-relative_error", lambda S, r: (1 - S.square().cumsum(0)[r - 1] / S.square().sum()).sqrt().item(), "not yet",
     "expected was 1, you return 0"),
    ("08-same_update", lambda A1, B1, A2, B2: torch.allclose(B1 @ A1, B2 @ A2), "not yet", "allclose"),
    ("08-same_update", lambda A1, B1, A2, B2: torch.allclose(B1 @ A1, B2 @ A2, atol=1e-5, rtol=0), "right", ""),
    ("07-choose_rank", chosen_with_pop, "right", ""),
    ("07-honest_report", by_both_tables, "not yet", "by both together")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_an_answer_that_a_reader_gave(name, answer, outcome, words):
    exercise, = (e for e in EXERCISES if e.id == name)
    said = verdict(exercise, answer)
    assert said.outcome == outcome and words in said.message, said


# --- grade and grade_value --------------------------------------------------------------------------------------

def double(answer, mistakes=(), **options):
    return grade(answer, lambda x: 2 * x, lambda g: [torch.randn(3, 5, generator=g)], mistakes, "because", **options)


@pytest.mark.parametrize("answer, outcome, words", [
    (lambda x: x + x, "right", "because"),
    (lambda x: ..., "not attempted", "replace the ..."),
    (lambda x: None, "not yet", "is `return` missing"),
    (lambda x: (2 * x).T, "not yet", "shape (3, 5) was expected, yours is (5, 3)"),
    (lambda x: 3 * x, "not yet", "the shape (3, 5) is right, the values are not"),
    (lambda x: 2 * x + float("nan"), "not yet", "values are not"),
    (lambda x: 1 / 0, "not yet", "ZeroDivisionError: division by zero  (called with tensor (3, 5))"),
    (lambda x: x @ x, "not yet", "RuntimeError"),
    (lambda: 1, "not yet", "TypeError"),
    (lambda x: x.mul_(2), "right", "because"),
    (lambda x: "text", "not yet", "you return text, expected was tensor (3, 5)"),
    (lambda x: 2 * x.sum(), "not yet", "shape (3, 5) was expected, yours is ()")])
def test_grade_tells_a_wrong_shape_from_a_wrong_value(answer, outcome, words):
    said = double(answer)
    assert said.outcome == outcome and words in said.message, said


def test_grade_recognises_a_mistake_by_what_it_does():
    mistakes = [Mistake("thrice", lambda x: 3 * x), Mistake("raises", lambda x: x @ x)]
    assert double(lambda x: x + x + x, mistakes).message == "thrice"
    assert double(lambda x: torch.mm(x, x), mistakes).message == "raises"
    assert "values are not" in double(lambda x: 4 * x, mistakes).message


def test_what_a_check_finds_wrong_is_not_called_an_error_of_the_reader():
    def checked(x):
        A, B = matrices((x, x[0]), "two matrices, A and B")
        return A @ B

    said = double(checked).message
    assert said.startswith("expected, as torch tensors: two matrices, A and B; you return [tensor (3, 5), "), said


def test_grade_draws_the_same_each_time_and_several_times():
    drawn = []
    for _ in range(2):
        double(lambda x: drawn.append(x) or 2 * x, rounds=4)
    assert len(drawn) == 8 and all(torch.equal(a, b) for a, b in zip(drawn[:4], drawn[4:], strict=True))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("answer, outcome, words", [
    (7, "right", "because"), (7.0, "right", "because"), (torch.tensor(7), "right", "because"),
    (..., "not attempted", "replace"), (None, "not attempted", "replace"), (8, "not yet", "one too many"),
    (9, "not yet", "9 is not it. Count again"), ("7", "not yet", "without quotes"), (True, "not yet", "Count again"),
    ([7], "not yet", "Count again"), (float("nan"), "not yet", "Count again")])
def test_grade_value(answer, outcome, words):
    said = grade_value(answer, 7, [Mistake("one too many", 8)], "because", hint="Count again")
    assert said.outcome == outcome and words in said.message, said


def test_a_conclusion_needs_its_measurement():
    assert "name the measurement too" in nb03.conclusion("B").message


@pytest.mark.parametrize("a, b, equal", [
    ((1, 2), [1, 2], True), ((1, 2), (1, 2, 3), False), (True, True, True), (True, 1, False), ("a", "a", True),
    (torch.ones(2), np.ones(2), True), (torch.ones(2, 1), torch.ones(2), False), (1e-9, 0, True), (1e6, 1e6 + 1, True),
    (1, 1.01, False), (torch.tensor([]), torch.tensor([]), True), ({}, 1, False),
    (3, ("B", 2), False)])
def test_same(a, b, equal):
    assert checks.same(a, b) is equal


def test_a_verdict_is_shown_in_words_and_escaped():
    said = checks.not_yet("shape <3>")
    assert repr(said) == "✘ not yet: shape <3>" and "&lt;3&gt;" in said._repr_html_()
    assert len({checks.Verdict(outcome, "")._repr_html_() for outcome in checks.Verdict.SIGNS}) == 3
