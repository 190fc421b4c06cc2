"""Checks of notebook 05: LoRA from scratch."""

import torch

from lora_lab.checks import Mistake, Verdict, WrongForm, blank, grade, grade_value, matrices


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def _sizes(generator, low=5, high=14):
    """n, out, in, r: all different, r the smallest."""
    n_out, n_in, n = (torch.randperm(high - low, generator=generator)[:3] + low).tolist()
    return n, n_out, n_in, torch.randint(1, low, (), generator=generator).item()


def _side_by_side(A1, B1, A2, B2):
    return torch.cat([A1, A2]), torch.cat([B1, B2], dim=1)


def _top(W, r, s, power=1, last=False):
    """The frozen part, A and B of a start from W's r strongest (or last) directions, S to `power` in the product."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = slice(-r, None) if last else slice(r)
    A, B = Vh[kept], U[:, kept] * S[kept] ** power / s
    return W - s * B @ A, A, B


def _less(W, factor, A, B):
    return W - factor * B @ A, A, B


def _without_gradient(x, W, A, B, s):
    with torch.no_grad():
        h = x @ W.T
    return h + s * (x @ A.T) @ B.T


def _in_place(W, A, B, s):
    W += s * B @ A
    return W


def _and_back(W, A, B, s):
    merged = _in_place(W, A, B, s).clone()
    W -= s * B @ A
    return merged


def _widest(shapes):
    return max(min(shape) for shape in shapes)


def _affordable(shapes, budget):
    """The largest r whose adapters, each capped at its layer's full rank, have at most `budget` numbers in all."""
    return max((r for r in range(_widest(shapes) + 1) if sum(min(r, m, n) * (m + n) for m, n in shapes) <= budget),
               default=-1)


MISTAKES = {
    "largest_rank": [
        Mistake("where r is above min(m, n), that layer gets only min(m, n): so it costs no more, and more is left "
                "for the others",
                lambda shapes, budget: min(budget // sum(m + n for m, n in shapes), _widest(shapes))),
        Mistake("beyond the largest min(m, n) no layer can use a higher rank: end there",
                lambda shapes, budget: budget // sum(m + n for m, n in shapes)),
        Mistake("you stop where the smallest layer has its full rank; the others can still use more",
                lambda shapes, budget: min(_affordable(shapes, budget), min(map(min, shapes)))),
        Mistake("a cost of exactly the budget is still allowed",
                lambda shapes, budget: _affordable(shapes, budget - 1)),
        Mistake("you are one too high: the last r that is paid for, not the first that is not",
                lambda shapes, budget: _affordable(shapes, budget) + 1),
        Mistake("an adapter has r (m + n) numbers, not r m n", lambda shapes, budget: max(
            r for r in range(_widest(shapes) + 1) if sum(min(r, m, n) * m * n for m, n in shapes) <= budget)),
        Mistake("the budget is for all adapters together, not for each", lambda shapes, budget: max(
            r for r in range(_widest(shapes) + 1) if all(min(r, m, n) * (m + n) <= budget for m, n in shapes))),
    ],
    "joined": [
        Mistake("A's and B's are added, and (B1 + B2)(A1 + A2) contains B1 A2 and B2 A1 as well. (With different ranks "
                "it does not even run.) Put the matrices side by side", lambda A1, B1, a1, A2, B2, a2:
                (A1 + A2, a1 / len(A1) * B1 + a2 / len(A2) * B2)),
        Mistake("the updates are not divided by their rank: each scale is alpha / r",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(A1, a1 * B1, A2, a2 * B2)),
        Mistake("alpha and r are missing: no scale is applied later, so B must contain it",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(A1, B1, A2, B2)),
        Mistake("both are divided by r1 + r2, the rank of the pair; each update brings its own r",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(A1, a1 / len([*A1, *A2]) * B1,
                                                             A2, a2 / len([*A1, *A2]) * B2)),
        Mistake("both get the scale of the first; the second has an alpha and an r of its own",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(A1, a1 / len(A1) * B1, A2, a1 / len(A1) * B2)),
        Mistake("the scale is in A and in B, so it counts squared; one of the two is enough",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(a1 / len(A1) * A1, a1 / len(A1) * B1,
                                                             a2 / len(A2) * A2, a2 / len(A2) * B2)),
        Mistake("the blocks are crossed: row k of A meets column k of B, so both need the same order",
                lambda A1, B1, a1, A2, B2, a2: (torch.cat([A1, A2]),
                                                torch.cat([a2 / len(A2) * B2, a1 / len(A1) * B1], 1))),
        Mistake("the order of the results: A (r1 + r2, in) first, then B (out, r1 + r2)",
                lambda A1, B1, a1, A2, B2, a2: _side_by_side(A1, a1 / len(A1) * B1, A2, a2 / len(A2) * B2)[::-1]),
    ],
    "middle_gradients": [
        Mistake("the scale s is missing from both", lambda G, A, M, B, s: (G @ (M @ A).T, B.T @ G @ A.T)),
        Mistake("M is missing from dB: what stands to the right of B is M A, not A alone",
                lambda G, A, M, B, s: (s * G @ A.T, s * B.T @ G @ A.T)),
        Mistake("dB has M where its transpose belongs. It is square, so both fit: (M A)^T is A^T M^T",
                lambda G, A, M, B, s: (s * G @ A.T @ M, s * B.T @ G @ A.T)),
        Mistake("dM is transposed. It is square, so no shape complains: entry (i, j) goes with column i of B and row j "
                "of A", lambda G, A, M, B, s: (s * G @ (M @ A).T, s * A @ G.T @ B)),
        Mistake("M is in its own gradient; the gradient of one factor contains the two others",
                lambda G, A, M, B, s: (s * G @ (M @ A).T, s * B.T @ G @ (M @ A).T)),
        Mistake("these are the two gradients in the other order: dB comes first",
                lambda G, A, M, B, s: (s * B.T @ G @ A.T, s * G @ (M @ A).T)),
    ],
    "moves_first": [
        Mistake("that is the answer for B = 0. Now A is zero: dB = s G A^T contains A, dA = s B^T G does not", "B"),
        Mistake("dB = s G A^T is zero when A is, so only one of them moves", "both"),
        Mistake("that is what happens when both are zero; here B is random, and dA = s B^T G contains it", "none"),
    ],
    "pissa_start": [
        Mistake("that is the tutorial's start: the model computes with W + W_r. Take s B A off the frozen part",
                lambda W, r, s: (W, *_top(W, r, s)[1:])),
        Mistake("the layer multiplies B A by s, you did not count on it: together they give W only at s = 1",
                lambda W, r, s: _top(W, r, 1)),
        Mistake("together they give W, but s B A is s times the strongest part: divide one of the factors by s",
                lambda W, r, s: _less(W, s, *_top(W, r, 1)[1:])),
        Mistake("A and B are right, but B A is taken off without the s that the layer puts before it",
                lambda W, r, s: _less(W, 1, *_top(W, r, s)[1:])),
        Mistake("the singular values are missing from A and B: their directions are right, their lengths are not",
                lambda W, r, s: _less(W, s, *_top(W, r, s, power=0)[1:])),
        Mistake("the singular values stand whole in A and in B, so they count squared: give them to one of the two, or "
                "their root to each", lambda W, r, s: _less(W, s, *_top(W, r, s, power=2)[1:])),
        Mistake("these are the weakest directions: torch.linalg.svd gives the largest singular value first",
                lambda W, r, s: _less(W, s, *_top(W, r, s, last=True)[1:])),
        Mistake("B = 0 keeps the model too, but here s B A shall be the strongest rank-r part of W",
                lambda W, r, s: (W, torch.randn(r, W.shape[1]), torch.zeros(W.shape[0], r))),
    ],
    "adapted": [
        Mistake("the gradient at x is wrong: the part through the frozen W is missing (no_grad or detach cuts it)",
                _without_gradient),
        Mistake("the gradient at x is wrong: the part through A and B is missing",
                lambda x, W, A, B, s: x @ W.T + s * (x.detach() @ A.T) @ B.T),
        Mistake("the scale s is missing", lambda x, W, A, B, s: x @ W.T + (x @ A.T) @ B.T),
    ],
    "scale": [
        Mistake("that does not divide by r at all", lambda alpha, r, rslora=False: alpha),
        Mistake("rslora is ignored: with it the divisor is the square root of r",
                lambda alpha, r, rslora=False: alpha / r),
        Mistake("the two are exchanged: with rslora=True the divisor is the square root of r, without it r",
                lambda alpha, r, rslora=False: alpha / (r if rslora else r ** 0.5)),
        Mistake("that is rsLoRA's scale always; without rslora the divisor is r itself",
                lambda alpha, r, rslora=False: alpha / r ** 0.5),
    ],
    "merged_weight": [
        Mistake("right the first time, but W itself was changed: a second call would add the change twice", _in_place),
        Mistake("the right weight both times, but W is no longer what it was, to the last bit: changed in place, and "
                "not (or not exactly) changed back", _and_back),
        Mistake("the scale s is missing", lambda W, A, B, s: W + B @ A),
        Mistake("that takes the change off; merging adds it", lambda W, A, B, s: W - s * B @ A),
    ],
    "times_counted": [
        Mistake("A and B were saved besides the merged weight, so the change is there once more", 1),
        Mistake("it is in the saved weight already, and A and B add it again", 0),
        Mistake("once in the weight and once from A and B: nothing adds it a third time", 3),
    ],
}


def largest_rank(answer) -> Verdict:
    cases = iter([([(512, 784), (256, 512), (10, 256)], 18_640), ([(512, 784), (256, 512), (10, 256)], 40_000),
                  ([(6, 3), (20, 7)], 10_000), ([(30, 40)], 69), ([(12, 5), (8, 9)], 187)])
    return grade(answer, _affordable, lambda g: next(cases), MISTAKES["largest_rank"],
                 "for our three layers 18,640 numbers allow r = 8: the adapter of notebook 00.")


def joined(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, r = _sizes(g)
        r2 = r % 4 + 1  # another rank
        alpha1, alpha2 = (3.0 + torch.rand(2, generator=g)).tolist()
        return (_normal(g, r, n_in), _normal(g, n_out, r), alpha1,
                _normal(g, r2, n_in), _normal(g, n_out, r2), alpha2)

    wanted = "two matrices, A (r1 + r2, in) and B (out, r1 + r2)"

    def product(function):
        def values(A1, B1, alpha1, A2, B2, alpha2):
            k = min(len(A1), len(A2))  # cut to equal ranks first: there, sums run and show their shape
            first = function(A1[:k].clone(), B1[:, :k].clone(), alpha1, A2[:k].clone(), B2[:, :k].clone(), alpha2)
            if blank(first):
                return first
            if matrices(first, wanted)[0].shape == A1[:k].shape:
                raise WrongForm("for two adapters of equal rank your A has as many rows as one of them")
            A, B = matrices(function(A1, B1, alpha1, A2, B2, alpha2), wanted)
            (n_in, n_out), r = (A1.shape[1], len(B1)), len(A1) + len(A2)
            if A.shape != (r, n_in) or B.shape != (n_out, r):
                raise WrongForm(f"expected A ({r}, {n_in}) and B ({n_out}, {r}), yours are {tuple(A.shape)} and "
                                 f"{tuple(B.shape)}")
            return B @ A
        return values

    mistakes = [Mistake(message, product(function)) for message, function in MISTAKES["joined"]]
    return grade(product(answer), lambda A1, B1, a1, A2, B2, a2: a1 / len(A1) * B1 @ A1 + a2 / len(A2) * B2 @ A2, draw,
                 mistakes, "two adapters are one of rank r1 + r2: ranks add up, matrices A and B do not.")


def middle_gradients(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, _ = _sizes(g)
        r = torch.randint(2, 5, (), generator=g).item()  # at r = 1 M would be a number
        return _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, r, r), _normal(g, n_out, r), 1.5

    return grade(answer, lambda G, A, M, B, s: (s * G @ (M @ A).T, s * B.T @ G @ A.T), draw,
                 MISTAKES["middle_gradients"],
                 "each gradient contains the other factors. Without M, dA contains B and dB contains A: the next "
                 "section lives on that.")


def moves_first(answer) -> Verdict:
    return grade_value(answer, "A", MISTAKES["moves_first"],
                       "each gradient contains the other matrix, so the zero one is the one that moves.",
                       hint='Answer with "A", "B", "both" or "none".')


def pissa_start(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, r = _sizes(g)
        return _normal(g, n_out, n_in), r, 1.5

    def parts(function):
        def values(W, r, s):
            (n_out, n_in), result = W.shape, function(W, r, s)
            if blank(result):
                return result
            frozen, A, B = matrices(result, "three matrices, the frozen part, A and B", 3)
            wanted = [(n_out, n_in), (r, n_in), (n_out, r)]
            if [tuple(part.shape) for part in result] != wanted:
                raise WrongForm(f"the shapes {wanted} were expected, yours are {[tuple(p.shape) for p in result]}")
            return frozen, s * B @ A  # any split between A and B will do
        return values

    mistakes = [Mistake(message, parts(function)) for message, function in MISTAKES["pissa_start"]]
    return grade(parts(answer), parts(lambda W, r, s: _top(W, r, s)), draw, mistakes,
                 "the model starts as it was, and training acts on the strongest part of W.")


def adapted(answer) -> Verdict:
    def with_gradient(function):
        def both(x, W, A, B, s):
            for tensor in (x, A, B):
                tensor.requires_grad_(True)
            h = function(x, W, A, B, s)
            if blank(h):
                return h
            if not isinstance(h, torch.Tensor):
                raise WrongForm(f"return a torch tensor, not {type(h).__name__}: the gradients are wanted, too")
            if not h.requires_grad:
                raise WrongForm("nothing of your result has a gradient for autograd: everything stood under no_grad")
            weights = torch.linspace(-1, 2, h.numel()).reshape(h.shape)
            dx, *trained = torch.autograd.grad((h * weights).sum(), (x, A, B), allow_unused=True)
            if any(gradient is None for gradient in trained):
                raise WrongForm("A and B get no gradient, and they are what is trained: only W is frozen")
            if dx is None:
                raise WrongForm("no gradient reaches x")
            return h, dx, *trained
        return both

    def draw(g):
        n, n_out, n_in, r = _sizes(g)
        return _normal(g, n, n_in), _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, n_out, r), 1.5

    mistakes = [Mistake(message, with_gradient(function)) for message, function in MISTAKES["adapted"]]
    truth = with_gradient(lambda x, W, A, B, s: x @ W.T + s * (x @ A.T) @ B.T)
    return grade(with_gradient(answer), truth, draw, mistakes,
                 "output and gradients are right: earlier adapters learn from true gradients.")


def scale(answer) -> Verdict:
    def draw(g):
        alpha, r = torch.randint(5, 40, (2,), generator=g).tolist()
        return float(alpha), r

    def both(function):
        def values(alpha, r):
            plain, stable = function(alpha, r), function(alpha, r, rslora=True)
            return next((value for value in (plain, stable) if blank(value)), (plain, stable))
        return values

    mistakes = [Mistake(message, both(function)) for message, function in MISTAKES["scale"]]
    return grade(both(answer), both(lambda alpha, r, rslora=False: alpha / (r ** 0.5 if rslora else r)), draw, mistakes,
                 "with it, alpha can stay as it is when r changes.")


def merged_weight(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, r = _sizes(g)
        return _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, n_out, r), 1.5

    def twice(function):
        def values(W, A, B, s):
            before, first = W.clone(), function(W, A, B, s)
            if blank(first):
                return first
            first = torch.as_tensor(first).clone()
            return first, function(W, A, B, s), bool(torch.equal(W, before))
        return values

    mistakes = [Mistake(message, twice(function)) for message, function in MISTAKES["merged_weight"]]
    return grade(twice(answer), twice(lambda W, A, B, s: W + s * B @ A), draw, mistakes,
                 "two calls give the same weight, and the base can still be had back.")


def times_counted(answer) -> Verdict:
    return grade_value(answer, 2, MISTAKES["times_counted"],
                       "the file must hold either W with A and B, or W + s B A alone.",
                       hint="Count the places in the saved file that contain the change.")
