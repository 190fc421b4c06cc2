"""Checks of notebook 02 (SVD)."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_lab import linalg
from lora_lab.checks import Mistake, WrongForm, blank, grade, grade_value, matrices, not_yet


def _thin(W: Tensor):
    return torch.linalg.svd(W, full_matrices=False)


def _sizes(generator, low: int = 3, high: int = 8) -> tuple[int, int]:
    """Two different sizes."""
    m, n = torch.randperm(high - low + 1, generator=generator)[:2].add(low).tolist()
    return m, n


def _randn(generator, *shape) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# 1 · predict the singular values of [[0, -3, 0], [2, 0, 0]]

def singular_values(answer):
    return grade_value(answer, [3, 2], MISTAKES["singular_values"],
                       "each row here uses its own input axis, so the lengths of the rows are the stretches; signs and "
                       "swapped axes live in U and V, never in S.",
                       hint="Which unit vector gives the longest output, and how long is it?", tol=1e-3)


# 2 · deflate the arrow instead of the table

def _draw_arrow(generator):
    n, _ = _sizes(generator)
    v1 = _randn(generator, n)
    return 3 * _randn(generator, n), v1 / v1.norm()


def without(answer):
    return grade(answer, lambda x, v1: x - (x @ v1) * v1, _draw_arrow, MISTAKES["without"],
                 "W sends what is left to (W - s u1 v1^T) x: correcting the arrow is the same as deflating the table, "
                 "and the table stays as it was.")


# 3 · the tutorial's code, ported to torch.linalg.svd without care

def _ported(W, r):
    U, S, Vt = torch.linalg.svd(W)
    return U[:, :r] @ torch.diag(S[:r]) @ Vt.t()[:r, :]


def _draw_low_rank(generator):
    m, n = _sizes(generator)
    return _randn(generator, m, n), int(torch.randint(1, min(m, n), (1,), generator=generator))


def low_rank(answer):
    return grade(answer, linalg.truncate, _draw_low_rank, MISTAKES["low_rank"],
                 "torch.svd returned V, torch.linalg.svd returns its transpose Vh; the old code runs with the new "
                 "function on every shape, and is wrong on all that have more than one column.")


# 4 · the pseudo-inverse from the SVD

def _pseudo_inverse(W, tol=1e-9, invert=torch.reciprocal, relative=True):
    U, S, Vh = _thin(W)
    r = int((S > (tol * S[0] if relative else tol)).sum())
    return Vh[:r].T * invert(S[:r]) @ U[:, :r].T


def _draw_invertible_in_part(generator):
    """Rank 2 exactly and the default `tol`; or a third singular value under the bar (large or small W) or over it."""
    m, n = _sizes(generator)
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 0:
        return (_randn(generator, m, 2) @ _randn(generator, 2, n),)
    U, V = (torch.linalg.qr(_randn(generator, size, 3)).Q for size in (m, n))
    S = torch.tensor([1, 0.95, 0.012] if kind == 3 else [1, 0.4, 0.005], dtype=torch.float64)
    S = S * (20 if kind == 1 else 0.02)
    return U * S @ V.T, 0.01


def pseudo_inverse(answer):
    return grade(answer, _pseudo_inverse, _draw_invertible_in_part, MISTAKES["pseudo_inverse"],
                 "you undid what W did and left alone what it had destroyed: a stretch by zero cannot be undone.",
                 rounds=10)


# 5 · predict the two errors of the best rank-1 approximation, S = (6, 3, 2)

def errors(answer):
    return grade_value(answer, (13 ** 0.5, 3), MISTAKES["errors"],
                       "the whole tail counts in the Frobenius norm, only its head in the spectral norm.",
                       hint="What is left after rank 1 has the singular values 3 and 2.", tol=3e-3)


# 6 · the smallest error for a given number of numbers

def _best_error(S, m, n, budget, cost=lambda m, n: m + n, more=0, size=Tensor.norm):
    r = budget // cost(m, n) + more
    return size(S[r:]) / size(S)


def _draw_budget(generator):
    """A spectrum, and a budget for 1 to k - 2 ranks: exactly, or with up to m + n - 1 numbers to spare; or for more
    than all of them."""
    m, n = _sizes(generator, 5, 14)
    S = torch.rand(min(m, n), generator=generator, dtype=torch.float64).add(0.05).sort(descending=True).values
    r, spare = (int(torch.randint(high, (1,), generator=generator)) for high in (min(m, n) - 2, m + n))
    if int(torch.randint(8, (1,), generator=generator)) == 0:
        return S, m, n, (min(m, n) + 1) * (m + n)
    return S, m, n, (r + 1) * (m + n) + spare * (r % 2)


def best_error(answer):
    return grade(answer, _best_error, _draw_budget, MISTAKES["best_error"],
                 "the shape gives the rank that you can pay for, S the error that it leaves: both are known before "
                 "anything is trained or cut.", rounds=20)


# 7 · which pairs have the same product?

def _letters(answer):
    """"abd" from "b, a and d", "(a) (b) (d)", ["a", "b", "d"] or ("A", "B", "D"); other words stay as they are."""
    if isinstance(answer, (list, tuple, set)) and answer and all(isinstance(part, str) for part in answer):
        answer = " ".join(answer)
    if not isinstance(answer, str):
        return answer
    letters = {c for c in answer.lower().replace("and", " ") if c.isalpha()}
    return "".join(sorted(letters)) if letters <= set("abcde") else answer


def same_product(answer):
    return grade_value(_letters(answer), "abd", MISTAKES["same_product"],
                       "between B and A you may always write G G^-1, the identity: a product has countless splits.",
                       hint="Write out each product and look whether what stands between B and A is the identity. "
                            'Give the letters, as "ace" or ["a", "c", "e"].')


# 8 · balance a given pair

def _balanced(A, B):
    return linalg.split(B @ A, len(A))


def _weighted(weigh):
    """A wrong split of the same matrix: `weigh(S)` gives what A's rows and B's columns are multiplied with."""
    def split(A, B):
        U, S, Vh = _thin(B @ A)
        r = len(A)
        for_A, for_B = weigh(S[:r])
        return for_A[:, None] * Vh[:r], U[:, :r] * for_B
    return split


def _draw_pair(generator):
    m, n = _sizes(generator, 5, 9)
    r = int(torch.randint(2, 5, (1,), generator=generator))
    return _randn(generator, r, n), _randn(generator, m, r)


def _invariants(function):
    """What a split is judged by: the signs of its rows and columns are free."""
    def judged(A, B):
        result = function(A, B)
        if blank(result):
            return result
        A2, B2 = matrices(result, "two torch matrices, A2 (r, n) and B2 (m, r)")
        if len(A2) != B2.shape[1]:
            raise WrongForm(f"B2 @ A2 must be possible, and A2 comes first: {tuple(A2.shape)}, {tuple(B2.shape)}")
        return B2 @ A2, A2 @ A2.T, B2.T @ B2
    return judged


class _Watch(TorchFunctionMode):
    """Notes the shape of every matrix that torch makes, and whether one is handed over to numpy."""

    def __init__(self):
        super().__init__()
        self.shapes, self.left_torch = set(), False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.left_torch |= function in (Tensor.numpy, Tensor.__array__)
        self.shapes |= {tuple(M.shape) for M in made if isinstance(M, Tensor)}
        return result


def _on_the_way(function) -> tuple[bool, bool]:
    """Whether a matrix is handed over to numpy, and whether one with more than r rows and columns is made."""
    A, B = _draw_pair(torch.Generator().manual_seed(0))
    with _Watch() as watch:
        function(A, B)
    return watch.left_torch, any(len(shape) > 1 and min(shape) > len(A) for shape in watch.shapes)


def balance(answer):
    large, *others = MISTAKES["balance"]
    mistakes = [Mistake(m.message, _invariants(m.answer)) for m in others]
    verdict = grade(_invariants(answer), _invariants(_balanced), _draw_pair, mistakes,
                    "no split has a smaller sum of squares in B and A (this one turned by a Q has the same).")
    if verdict.outcome == "not yet" and verdict.message not in [m.message for m in mistakes]:
        verdict.message = "I compare B2 @ A2, A2 @ A2.T and B2.T @ B2 with what they should be: " + verdict.message
    if verdict.outcome == "right":
        left_torch, large_made = _on_the_way(answer)
        if large_made:
            return not_yet(large.message)
        if left_torch:
            return not_yet("the right pair, but I see only what torch makes, and you go through numpy: stay in torch.")
    return verdict


MISTAKES = {
    "singular_values": [
        Mistake("a singular value is a length and never negative: the sign of -3 goes into U or V. And the largest "
                "comes first.", [2, -3]),
        Mistake("a singular value is a length and never negative: the sign of -3 goes into U or V.", [-3, 2]),
        Mistake("the right two numbers; the convention puts the largest first.", [2, 3]),
        Mistake("a 2 x 3 matrix has min(2, 3) = 2 singular values: the third input axis goes to zero, but there is no "
                "third output direction for it.", [3, 2, 0]),
        Mistake("these are their squares: take the square roots.", [9, 4]),
        Mistake("those are the lengths of the three outputs, axis by axis. Only two can be singular values, and the "
                "largest comes first.", [2, 3, 0]),
        Mistake("0 is what becomes of the third axis, but the second one is stretched as well: by how much?", [2, 0]),
    ],
    "without": [
        Mistake("you take away all of v1, however much of it is in x: the part along v1 is (x @ v1) times v1.",
                lambda x, v1: x - v1),
        Mistake("x @ v1 is one number, and you take it from every entry. It is a length; give it the direction v1.",
                lambda x, v1: x - x @ v1),
        Mistake("this is the part along v1 itself, not what is left of x without it.", lambda x, v1: (x @ v1) * v1),
        Mistake("x * v1 multiplies entry by entry; the length of the part along v1 is the sum of these products, "
                "x @ v1.",
                lambda x, v1: x - x * v1),
        Mistake("x @ v1 says how much of v1 is in x: take away that much of v1, not of x.",
                lambda x, v1: x - (x @ v1) * x),
        Mistake("you take away all of x's length along v1; only x @ v1 of it points that way.",
                lambda x, v1: x - x.norm() * v1),
        Mistake("you add the part along v1 once more instead of taking it away.", lambda x, v1: x + (x @ v1) * v1),
        Mistake("perpendicular to v1, but you also brought it to length 1: the question is only what is left of x.",
                lambda x, v1: torch.nn.functional.normalize(x - (x @ v1) * v1, dim=0)),
    ],
    "low_rank": [
        Mistake("this is still the bug: you take columns of Vh, turned round. The third result of torch.linalg.svd is "
                "already transposed; the right singular vectors are its rows.", _ported),
        Mistake("this is still the bug, now with the thin form: .t() turns the rows of Vh into columns. Leave it out "
                "and take Vh[:r]. (With the old torch.svd: V has the directions as columns, V[:, :r].T.)",
                lambda W, r: _thin(W)[0][:, :r] @ torch.diag(_thin(W)[1][:r]) @ _thin(W)[2].t()[:r]),
        Mistake("the singular values are missing: U_r @ Vh_r stretches every kept direction by 1.",
                lambda W, r: _thin(W)[0][:, :r] @ _thin(W)[2][:r]),
        Mistake("Vh[:, :r] takes columns of Vh, that is one coordinate of every direction; the directions are its "
                "rows, Vh[:r].", lambda W, r: _thin(W)[0][:, :r] * _thin(W)[1][:r] @ _thin(W)[2][:, :r]),
        Mistake("you keep all singular values: this is W itself, whatever r is.", lambda W, r: W),
    ],
    "pseudo_inverse": [
        Mistake("you divide by singular values that are zero up to rounding, and the result explodes: keep only those "
                "above tol * S[0].", lambda W, tol=0.0: _pseudo_inverse(W, -1.0)),
        Mistake("right for the default, but for another `tol` your bar is not tol * S[0]: what is at most that counts "
                "as zero.",
                lambda W, tol=1e-9: _pseudo_inverse(W)),
        Mistake("`tol` is relative: compare with tol * S[0], or a small matrix loses its directions and a large one "
                "keeps its rounding errors.", lambda W, tol=1e-9: _pseudo_inverse(W, tol, relative=False)),
        Mistake("this is W's transpose: the singular values must be inverted (1 / S).",
                lambda W, tol=1e-9: _pseudo_inverse(W, tol, lambda S: S)),
        Mistake("this maps inputs to outputs again, shape (m, n): the way back is V 1/S U^T, the factors transposed "
                "and in reverse order.", lambda W, tol=1e-9: _pseudo_inverse(W, tol).T),
    ],
    "errors": [
        Mistake("5 = 3 + 2: Frobenius is a length, so add squares and take the root.", (5, 3)),
        Mistake("13 = 9 + 4 and 9 are the squares: take the roots.", (13, 9)),
        Mistake("the spectral norm is the largest singular value of what is left, not the smallest.", (13 ** 0.5, 2)),
        Mistake("these are the norms of what you keep; the error is what you drop.", (6, 6)),
        Mistake("that is the other way round: Frobenius first.", (3, 13 ** 0.5)),
    ],
    "best_error": [
        Mistake("one rank costs a column of B, m numbers, and a row of A, n numbers: together m + n, not m n.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, cost=lambda m, n: m * n)),
        Mistake("you pay for B only. A, with n numbers for each rank, has to fit into the budget too.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, cost=lambda m, n: m)),
        Mistake("you pay for A only. B, with m numbers for each rank, has to fit into the budget too.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, cost=lambda m, n: n)),
        Mistake("one rank too many: S[r:] begins after the first r, since an index starts at 0.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, more=1)),
        Mistake("one rank too few: S[r:] already leaves out the first r, since an index starts at 0.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, more=-1)),
        Mistake("you round the rank up, but a part of a column and a row is not in the budget.",
                lambda S, m, n, budget: _best_error(S, m, n, budget + m + n - 1)),
        Mistake("this is the share of the energy that is lost, a square: an error of 10 % is only 1 % of the energy. "
                "Take the root.", lambda S, m, n, budget: _best_error(S, m, n, budget) ** 2),
        Mistake("norms do not subtract: what is lost is |S[r:]|, not |S| - |S[:r]|.",
                lambda S, m, n, budget: 1 - S[:budget // (m + n)].norm() / S.norm()),
        Mistake("you add singular values; the Frobenius norm adds their squares and takes the root.",
                lambda S, m, n, budget: _best_error(S, m, n, budget, size=Tensor.sum)),
        Mistake("this is the error in the spectral norm, the first value of the tail. In the Frobenius norm all of the "
                "tail counts.", lambda S, m, n, budget: _best_error(S, m, n, budget, size=Tensor.max)),
        Mistake("this is the error itself. Relative means: divided by the length of all of S.",
                lambda S, m, n, budget: _best_error(S, m, n, budget) * S.norm()),
        Mistake("this measures what you keep; the error is what you drop.",
                lambda S, m, n, budget: S[:budget // (m + n)].norm() / S.norm()),
    ],
    "same_product": [
        Mistake("(a) too: 2 and 1/2 cancel. It is (b) with G = 2 I.", "bd"),
        Mistake("(d) too: an orthogonal Q is invertible, with Q^-1 = Q^T.", "ab"),
        Mistake("(b) too: G G^-1 = I, for any invertible G.", "ad"),
        Mistake("(c) gives B G G A, and G G is the identity only for special G.", "abcd"),
        Mistake("(e) does not even fit: G is (r, r), B is (out, r), and G has to stand between B and A.", "abde"),
        Mistake("right, but (a) and (d) are special cases of it: G = 2 I and G = Q.", "b"),
    ],
    "balance": [
        Mistake("right and balanced, but on the way you make a matrix with more than r rows and more than r columns. "
                "Take Q and R of B and of A.T, and the SVD of the small matrix in the middle.", _balanced),
        Mistake("the product is right, but B2 carries all of S and A2 none: give sqrt(S) to each.",
                _weighted(lambda S: (torch.ones_like(S), S))),
        Mistake("the product is right, but A2 carries all of S and B2 none: give sqrt(S) to each.",
                _weighted(lambda S: (S, torch.ones_like(S)))),
        Mistake("you gave S to both, so the product has S ** 2: give sqrt(S) to each.", _weighted(lambda S: (S, S))),
        Mistake("you return A and B as they came: same product, not balanced.", lambda A, B: (A, B)),
        Mistake("you return B2 first; here, as in split, A2 comes first.", lambda A, B: _balanced(A, B)[::-1]),
    ],
}
