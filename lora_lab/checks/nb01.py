"""Checks of notebook 01: rank, elimination, products, factorisation, numerical rank."""

from fractions import Fraction

import torch

from lora_lab.checks import NOT_ATTEMPTED, Mistake, Verdict, blank, grade, grade_value, not_yet, right
from lora_lab.linalg import numerical_rank

HAND = ((2, 1, 3), (4, 2, 7), (6, 3, 10))  # the matrix of echelon_by_hand
SIZES = ((3, 6), (7, 4), (10, 15), (12, 20), (20, 5), (5, 21), (12, 4), (256, 512))  # m n / (m + n) is whole for four


def _rank(rows) -> int:
    """Of small matrices of whole numbers or fractions, ragged ones refused."""
    exact = [[float(Fraction(entry)) for entry in row] for row in rows]  # Fraction refuses nan and words
    return numerical_rank(torch.tensor(exact, dtype=torch.float64))


def _each_multiple(rows, row):
    return any(_rank([other, row]) == _rank([other]) for other in rows)


MISTAKES = {
    "addition_table": [
        Mistake("12 is the number of rows. True, no row is a multiple of another; but mixtures count as well. "
                "Look at row 2 - row 1 and row 3 - row 2: what do you see?", 12),
        Mistake("20 is the number of columns, and a table with 12 rows cannot even have 20 independent columns: the "
                "rank is at most the shorter side. How many rows do the others need?", 20),
        Mistake("1 would mean that every row is a multiple of the first. Is (3, 4, 5, ...) a multiple of (2, 3, 4, "
                "...)?", 1),
    ],
    "echelon_by_hand": [
        Mistake("that is the matrix as it was given: rows 2 and 3 still start in the first column. Subtract 2 times "
                "row 1 from row 2, and 3 times row 1 from row 3.", [list(row) for row in HAND]),
        Mistake("no staircase yet: each row has to start further right than the row above it, with zero rows at the "
                "bottom. Where two rows start in the same column, one can be cleared by the other.",
                [[2, 1, 3], [0, 0, 1], [0, 0, 1]]),
        Mistake("a row has got lost: your rows hold less than the rows of the matrix (their rank is smaller). The "
                "second column has no pivot, but the third has one: go on there.", [[2, 1, 3], [0, 0, 0], [0, 0, 0]]),
        Mistake("a staircase, but it holds a row that no mixture of the given rows can produce: a slip in the "
                "arithmetic. Take each entry of row 2 minus 2 times the entry above it, the second column too.",
                [[2, 1, 3], [0, 1, 1], [0, 0, 0]]),
    ],
    "reachable": [
        Mistake("you ask whether the row is one of the given rows. A mixture, such as row 1 + row 2, is reachable too.",
                lambda rows, row: row in rows),
        Mistake("you compare with one row at a time. A row can be a mixture of several without being a multiple of "
                "any.",
                _each_multiple),
        Mistake("the other way round: a reachable row brings nothing new, so the rank stays as it was.",
                lambda rows, row: _rank([*rows, row]) > _rank(rows)),
        Mistake("you take it that the given rows are independent. If they are not, their rank is below their number: "
                "compare with exact_rank(rows).", lambda rows, row: _rank([*rows, row]) == len(rows)),
    ],
    "invisible_directions": [
        Mistake("10 is the rank: the directions that the layer can see. The question is how many of the 784 are "
                "left.", 10),
        Mistake("0 is the count on the other side: 10 outputs minus rank 10. Rank and nullity add up to the number of "
                "inputs, which is the number of columns.", 0),
        Mistake("784 would mean that the layer sees nothing at all. Take off the directions that it does see.", 784),
        Mistake("rank and nullity add up to 784; you have added where you should subtract.", 794),
    ],
    "matrix_of_rank": [
        Mistake("the rank is min(m, n) whatever r is: random numbers in every place never repeat each other. Send the "
                "input through r numbers first: a product of two factors.", lambda m, n, r: torch.randn(m, n)),
        Mistake("the shape is (n, m), it should be (m, n): the tall factor (m, r) stands on the left.",
                lambda m, n, r: torch.randn(n, r) @ torch.randn(r, m)),
        Mistake("the rank is 1 whatever r is: one column times one row. Use r columns and r rows.",
                lambda m, n, r: torch.randn(m, 1) @ torch.randn(1, n)),
    ],
    "merged_rank": [
        Mistake("a) 4 is the rank of the update B A alone. W keeps its own 256 directions, and adding 4 new ones "
                "cannot destroy more than 4.", "a"),
        Mistake("b) the sum rule does say at most 256 + 4, but no matrix of shape (256, 512) has a rank above 256.",
                "b"),
        Mistake("d) it will nearly always be 256, but it need not: think of an update that cancels a part of W, such "
                "as B A = minus the first four rows of W, and zeros below.", "d"),
    ],
    "largest_cheap_rank": [
        Mistake("where m n is a multiple of m + n, your r stores exactly as many numbers as W does; asked was fewer. "
                "Try (3, 6).", lambda m, n: m * n // (m + n)),
        Mistake("that is the break-even point itself, a fraction in general. A rank is a whole number, below it.",
                lambda m, n: m * n / (m + n)),
        Mistake("min(m, n) is the largest rank that there is, not the largest that is cheap.", lambda m, n: min(m, n)),
        Mistake("you count 2 n numbers for each rank: true for a square matrix. Here a column has m numbers and a row "
                "n.",
                lambda m, n: (m * n - 1) // (2 * n)),
    ],
    "relative_rank": [
        Mistake("tol is still absolute: measure the same thing in millimetres and the answer changes. Compare with tol "
                "times the largest singular value.", lambda W, tol: int((torch.linalg.svdvals(W) > tol).sum())),
        Mistake("you count every singular value: with noise none is zero, so that is always min(m, n). Where is tol, "
                "times the largest?", lambda W, tol: int((torch.linalg.svdvals(W) > 0).sum())),
        Mistake("you count the small singular values. The rank is the number of the large ones.",
                lambda W, tol: int((torch.linalg.svdvals(W) <= tol * torch.linalg.svdvals(W)[0]).sum())),
        Mistake("you compare with a norm of W, in which all singular values are added up. The bar is tol times the "
                "largest alone.", lambda W, tol: int((torch.linalg.svdvals(W) > tol * W.norm()).sum())),
    ],
    "rank_of_step": [
        Mistake("16 is what the batch would allow. But this matrix has only 10 rows.", 16),
        Mistake("9 is what cross-entropy leaves, well seen! Asked is what shape and batch alone allow.", 9),
        Mistake("256 is the longer side of the matrix. No rank is above the shorter side, nor above the batch.", 256),
        Mistake("1 is the bound for a single example. Sixteen examples add up to sixteen such pieces at most.", 1),
        Mistake("rows times examples: ranks are not multiplied. Each of the three numbers is a bound by itself.", 160),
    ],
}


def addition_table(answer) -> Verdict:
    return grade_value(answer, 2, MISTAKES["addition_table"],
                       "each row is the first row plus a number: all twelve are mixtures of (1, 2, 3, ...) and (1, 1, "
                       "1, ...). Not one row is a copy, and yet two suffice.",
                       hint="how many rows do you need to mix all the others?")


def echelon_by_hand(answer) -> Verdict:
    copied, no_stairs, lost, foreign = (m.message for m in MISTAKES["echelon_by_hand"])
    if blank(answer):
        return NOT_ATTEMPTED
    try:
        rows = [list(row) for row in (answer.tolist() if isinstance(answer, torch.Tensor) else answer)]
        if [len(row) for row in rows] != [3, 3, 3]:
            return not_yet(f"three rows of three numbers were expected, yours have {[len(row) for row in rows]} "
                           "(write zero rows too)")
        rank, together = _rank(rows), _rank([*rows, *HAND])
    except (TypeError, ValueError) as error:
        return not_yet(f"write the matrix as a list of three lists of numbers, as in the stub ({error})")
    if rows == [list(row) for row in HAND]:
        return not_yet(copied)
    starts = [next((j for j, a in enumerate(row) if a), 3 + i) for i, row in enumerate(rows)]  # zero rows: 3, 4, 5
    if any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        return not_yet(no_stairs)
    if together > _rank(HAND):
        return not_yet(foreign)
    if rank < _rank(HAND):
        return not_yet(lost)
    return right("two rows are left, so the rank is 2: row 3 was row 1 + row 2 all along, which elimination has found "
                 "without being told.")


def _rows_and_row(generator):
    """3 or 4 rows of 5 numbers, in half of the cases dependent, and a row that is given, a mixture or (mostly) new."""
    def whole(*size):
        return torch.randint(-4, 5, size, generator=generator)

    m, kind = 3 + int(whole(1)) % 2, int(torch.randint(0, 4, (1,), generator=generator))
    rows = whole(m, 5)
    if int(whole(1)) % 2:
        rows[-1] = rows[0] - 2 * rows[1]
    row = {0: rows[1], 1: 3 * rows[0], 2: rows[0] + 2 * rows[1] - rows[2], 3: whole(5)}[kind]
    return rows.tolist(), row.tolist()


def reachable(answer) -> Verdict:
    return grade(answer, lambda rows, row: _rank([*rows, row]) == _rank(rows), _rows_and_row,
                 MISTAKES["reachable"],
                 "a row that is a mixture brings nothing new, so the rank stays. One call now judges any elimination.",
                 rounds=24)


def invisible_directions(answer) -> Verdict:
    return grade_value(answer, 774, MISTAKES["invisible_directions"],
                       "784 - 10 = 774. You can change a picture in 774 independent ways and this layer will not "
                       "notice.",
                       hint="rank + nullity = the number of columns, here 784.")


def matrix_of_rank(answer) -> Verdict:
    full, transposed, always_one = (m.message for m in MISTAKES["matrix_of_rank"])
    cases = [(6, 9, 2), (8, 5, 3), (4, 11, 3), (13, 7, 5)]
    ranks = []
    for m, n, r in cases:
        try:
            W = answer(m, n, r)
        except Exception as error:  # the reader's own
            return not_yet(f"your function raised {type(error).__name__}: {error}  (called with {m}, {n}, {r})")
        if blank(W):
            return NOT_ATTEMPTED
        try:
            W = torch.as_tensor(W)
            W = W.detach() if W.is_floating_point() else W.double()
        except (TypeError, ValueError, RuntimeError):
            return not_yet(f"a matrix was expected, you return {W!r}")
        if tuple(W.shape) == (n, m):
            return not_yet(transposed)
        if tuple(W.shape) != (m, n):
            return not_yet(f"shape {(m, n)} was expected, yours is {tuple(W.shape)}  (called with {m}, {n}, {r})")
        ranks.append(numerical_rank(W))
    if ranks == [r for _, _, r in cases]:
        return right("the middle number r is a bottleneck: nothing that passes it has more than r directions. With the "
                     "names B and A for your two factors this is LoRA's update.")
    if ranks == [min(m, n) for m, n, _ in cases]:
        return not_yet(full)
    if set(ranks) == {1}:
        return not_yet(always_one)
    m, n, r = cases[k := next(k for k, (_, _, r) in enumerate(cases) if ranks[k] != r)]
    return not_yet(f"the shape {(m, n)} is right, but the rank is {ranks[k]} instead of {r}  "
                   f"(called with {m}, {n}, {r})")


def merged_rank(answer) -> Verdict:
    if isinstance(answer, str):
        answer = answer.strip(" ().").lower()
    return grade_value(answer, "c", MISTAKES["merged_rank"],
                       "W = (W + B A) - B A, so 256 is at most the rank of the sum plus 4: adding a rank-4 matrix "
                       "moves a rank by at most 4, up or down.", hint='Answer with one letter, such as "a".')


def largest_cheap_rank(answer) -> Verdict:
    return grade(answer, lambda m, n: (m * n - 1) // (m + n),
                 lambda generator: SIZES[int(torch.randint(len(SIZES), (1,), generator=generator))],
                 MISTAKES["largest_cheap_rank"],
                 "for a 256 x 512 layer it is 170, so LoRA's r = 4 or 8 is far below: that is where the saving comes "
                 "from.",
                 rounds=16)


def _noisy(generator):
    """A (6, 9) matrix in small, middle or large units with two singular values close to the bar; and tol."""
    def turn(k, n):
        return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q

    unit, pick, large = (int(torch.randint(k, (1,), generator=generator)) for k in (3, 2, 3))
    tol = (1e-2, 1e-3)[pick]
    S = torch.tensor([1, 0.95, 0.9][:1 + large] + [1.3 * tol, 0.7 * tol] + [1e-3 * tol] * (3 - large)).double()
    return (1e-5, 1.0, 1e6)[unit] * turn(6, 6) * S @ turn(6, 9).T, tol


def relative_rank(answer) -> Verdict:
    return grade(answer, lambda W, tol: int((torch.linalg.svdvals(W) > tol * torch.linalg.svdvals(W)[0]).sum()), _noisy,
                 MISTAKES["relative_rank"],
                 "rank is about directions, not about units: only the ratio to the largest singular value can decide.",
                 rounds=10)


def rank_of_step(answer) -> Verdict:
    return grade_value(answer, 10, MISTAKES["rank_of_step"],
                       "min(10, 256, 16): the step is a product (10, 16) @ (16, 256), and every rank in it is a bound.",
                       hint="write the step as a product of two matrices and look at all three sizes.")
