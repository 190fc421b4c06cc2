"""Checks of notebook 01: rank, elimination, products, factorisation, numerical rank."""

from fractions import Fraction

import torch

from lora_lab.checks import NO_ARRAY, NOT_ATTEMPTED, Mistake, Verdict, blank, grade, grade_value, not_yet, right
from lora_lab.linalg import numerical_rank

HAND = ((2, 1, 3), (4, 2, 7), (6, 3, 10))  # the matrix of echelon_by_hand
SIZES = ((3, 6), (7, 4), (10, 15), (12, 20), (20, 5), (5, 21), (12, 4), (256, 512))  # m n / (m + n) is whole for four


def _rank(rows) -> int:
    """Of small matrices of whole numbers or fractions, ragged ones refused."""
    exact = [[float(Fraction(entry)) for entry in row] for row in rows]  # Fraction refuses nan and words
    return numerical_rank(torch.tensor(exact, dtype=torch.float64))


def _each_multiple(rows, row):
    return any(_rank([other, row]) == _rank([other]) for other in rows)


def _above(W, share):
    """The notebook's above: how many singular values exceed this share of the longest."""
    S = torch.linalg.svdvals(W)
    return int((S > share * S[0]).sum())


def _scaled(W):
    return W / W.norm(dim=0)


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
        Mistake("you compare with too few rows at a time. A row can be a mixture of several without being a multiple "
                "of any.",
                _each_multiple),
        Mistake("the other way round: a reachable row brings nothing new, so the rank stays as it was.",
                lambda rows, row: _rank([*rows, row]) > _rank(rows)),
        Mistake("you take it that the given rows are independent. If they are not, their rank is below their number: "
                "compare with exact_rank(rows).", lambda rows, row: _rank([*rows, row]) == len(rows)),
        Mistake("you ask whether all rows together are dependent. They are as well when the given rows alone are: "
                "compare with exact_rank(rows).", lambda rows, row: _rank([*rows, row]) < len(rows) + 1),
    ],
    "invisible_directions": [
        Mistake("10 is the rank: the directions that the layer can see. The question is how many of the 784 are "
                "left.", 10),
        Mistake("0 is the count on the other side: 10 outputs minus rank 10. Rank and nullity add up to the number of "
                "inputs, which is the number of columns.", 0),
        Mistake("784 would mean that the layer sees nothing at all. Take off the directions that it does see.", 784),
        Mistake("rank and nullity add up to 784; you have added where you should subtract.", 794),
    ],
    "blind_in": [
        Mistake("your matrix has the rank k. Asked is the nullity: k directions shall vanish, and rank + nullity = n.",
                lambda m, n, k: torch.randn(m, k) @ torch.randn(k, n)),
        Mistake("your matrix has the rank m - k. What vanishes are directions of the input, and there are n of those, "
                "one for each column.", lambda m, n, k: torch.randn(m, m - k) @ torch.randn(m - k, n)),
        Mistake("the rank is min(m, n) whatever k is: a random row is never a mixture of the others by accident. Send "
                "the input through fewer numbers first: a product of two factors.", lambda m, n, k: torch.randn(m, n)),
        Mistake("the shape is (n, m), it should be (m, n): the factor with m rows stands on the left.",
                lambda m, n, k: torch.randn(n, n - k) @ torch.randn(n - k, m)),
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
    "rank_in_any_units": [
        Mistake("the count still depends on the units: the columns with the largest numbers decide what is long. "
                "(Dividing all of W by one number changes nothing.) Give every column the same length first.",
                lambda W, share: _above(W, share)),
        Mistake("you give the rows the same length, but the units belong to the columns: one number for each column.",
                lambda W, share: _above(W / W.norm(dim=1, keepdim=True), share)),
        Mistake("the columns have the length 1 now, but the longest singular value is not 1: compare with share times "
                "the longest.", lambda W, share: int((torch.linalg.svdvals(W / W.norm(dim=0)) > share).sum())),
        Mistake("you multiply by the lengths, so a long column gets longer still: divide.",
                lambda W, share: _above(W * W.norm(dim=0), share)),
        Mistake("you also subtract the mean of each column. That can take away a direction, the one that all rows "
                "share. A unit only multiplies.", lambda W, share: _above(_scaled(W - W.mean(0)), share)),
        Mistake("you count every singular value: with noise none is zero, so that is always min(m, n). Where is share, "
                "times the longest?", lambda W, share: int((torch.linalg.svdvals(W) > 0).sum())),
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
                       hint="How many rows do you need to mix all the others?")


def echelon_by_hand(answer) -> Verdict:
    copied, no_stairs, lost, foreign = (m.message for m in MISTAKES["echelon_by_hand"])
    if blank(answer):
        return NOT_ATTEMPTED
    try:
        rows = [list(row) for row in (answer.tolist() if hasattr(answer, "tolist") else answer)]
        if [len(row) for row in rows] != [3, 3, 3]:
            return not_yet(f"three rows of three numbers were expected, yours have {[len(row) for row in rows]} "
                           "(write zero rows too)")
        rank, together = _rank(rows), _rank([*rows, *HAND])
    except NO_ARRAY as error:
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
    if kind == 1:  # a seventh of a given row: amounts need not be whole numbers
        row, rows[0] = rows[0], 7 * rows[0]
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


def blind_in(answer) -> Verdict:
    of_rank_k, rows_minus_k, full, transposed = (m.message for m in MISTAKES["blind_in"])
    cases = [(6, 9, 4), (8, 5, 2), (7, 11, 5), (13, 7, 2)]
    ranks = []
    for m, n, k in cases:
        try:
            W = answer(m, n, k)
        except Exception as error:  # the reader's own
            return not_yet(f"your function raised {type(error).__name__}: {error}  (called with {m}, {n}, {k})")
        if W is ...:
            return NOT_ATTEMPTED
        if W is None:
            return not_yet("your function returns nothing: is `return` missing?")
        try:
            W = torch.as_tensor(W)
            W = W.detach() if W.is_floating_point() else W.double()
        except (TypeError, ValueError, RuntimeError):
            return not_yet(f"a matrix was expected, you return {W!r}")
        if tuple(W.shape) == (n, m):
            return not_yet(transposed)
        if tuple(W.shape) != (m, n):
            return not_yet(f"shape {(m, n)} was expected, yours is {tuple(W.shape)}  (called with {m}, {n}, {k})")
        ranks.append(numerical_rank(W))
    if ranks == [n - k for _, n, k in cases]:
        return right("rank n - k, so k directions vanish. As a product B A with n - k numbers in the middle this is "
                     "LoRA's update: with a small r it is blind in nearly all directions.")
    known = {of_rank_k: [k for _, _, k in cases], rows_minus_k: [min(m - k, n) for m, n, k in cases],
             full: [min(m, n) for m, n, _ in cases]}
    if found := next((message for message, typical in known.items() if ranks == typical), None):
        return not_yet(found)
    m, n, k = cases[i := next(i for i, (_, n, k) in enumerate(cases) if ranks[i] != n - k)]
    return not_yet(f"the shape {(m, n)} is right, but the rank is {ranks[i]}, so the nullity is {n - ranks[i]} instead "
                   f"of {k}  (called with {m}, {n}, {k})")


def merged_rank(answer) -> Verdict:
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


def _in_units(generator):
    """A (m, n) matrix of low rank with a little noise, each column in a unit of its own; and the share.

    Once the columns have a common length, the count is the same by whatever norm. In a third of the cases they point
    nearly the same way, so that the longest singular value is not near 1; in a third a row is tiny."""
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    m, n = (torch.randperm(5, generator=generator)[:2] + 5).tolist()
    share, r, kind = (1e-2, 1e-3)[whole(0, 2)], whole(2, 4), whole(0, 3)
    U = torch.linalg.qr(torch.cat([torch.ones(m, 1).double(), normal(m, r - 1)], 1)).Q  # (m, r), the first one constant
    V = normal(r, n)
    if kind == 1:  # nearly the same way, the second direction just below the bar or just above it
        tilt = (0.6, 6.0)[whole(0, 2)] * share
        U, V = U[:, :2], torch.stack([torch.ones(n), tilt * (-1.0) ** torch.arange(n)]).double()  # (2, n)
    W = U @ V + 1e-7 * normal(m, n)
    if kind == 2:  # a row that is far too short to count
        W[-1] *= 1e-5 * normal(n)
    W[:, whole(0, n)] *= 10.0 ** (5 * whole(-1, 2))  # one column in a very small unit, a very large one, or as before
    return W * 10.0 ** torch.randint(-1, 2, (n,), generator=generator), share


def rank_in_any_units(answer) -> Verdict:
    return grade(answer, lambda W, share: _above(_scaled(W), share), _in_units, MISTAKES["rank_in_any_units"],
                 "a rank is about directions, not about units. Singular values do depend on units, so settle those "
                 "before you compare lengths.", rounds=20)


def rank_of_step(answer) -> Verdict:
    return grade_value(answer, 10, MISTAKES["rank_of_step"],
                       "min(10, 256, 16): the step is a product (10, 16) @ (16, 256), and every rank in it is a bound.",
                       hint="Write the step as a product of two matrices and look at all three sizes.")
