"""Checks of notebook 08: what LoRA learns."""

import math

import torch
import torch.nn.functional as F

from lora_lab.checks import Mistake, Verdict, grade, grade_value


def _sizes(generator, count, low, high):
    """Different whole numbers, so that nothing is square by chance."""
    return (torch.randperm(high - low, generator=generator)[:count] + low).tolist()


def _relative_error(S, r):
    return math.sqrt(S[r:].square().sum() / S.square().sum())


def _spectrum(generator):
    k, r = 9, int(torch.randint(6, (1,), generator=generator))
    return torch.rand(k, generator=generator).sort(descending=True).values + 0.05, r


def _close(a, b):
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm())


def _same_update(A1, B1, A2, B2):
    return _close(B1 @ A1, B2 @ A2)


def _adapters(generator):
    """Equal updates with equal, scaled or turned factors, and different ones with or without a common A; large or
    small."""
    r, m, n = 2, *_sizes(generator, 2, 150, 250)
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    mix, mix_more = torch.tensor([[2.1, 0.9], [0.7, 1.3]]), torch.tensor([[0.4, 1.7], [-1.1, 0.6]])
    other, left = torch.randn(m, r, generator=generator), torch.randn(m, r, generator=generator)
    left -= left.mean(0)  # its columns add up to 0: B + left gives another update with the same sum
    right = torch.randn(r, n, generator=generator)
    right -= right.mean(1, keepdim=True)  # the same for its rows
    end, last = torch.zeros(m, r), torch.zeros(r, n)
    end[-1], last[:, -1] = 1, 1  # another update in the last row, or in the last column, alone
    other *= B.norm() / other.norm()
    pairs = [(A, B, A + right, B), (A, B, A, B + end), (A, B, A + last, B), (A, B, A, 1.01 * B), (A, B, A, other),
             *((A, B, Q @ A, B @ torch.linalg.inv(Q)) for Q in (mix, mix_more)), (A, B, A.clone(), B.clone()),
             (A, B, A, -B), (A, B, 2 * A, B / 2), (A, B, A, 2 * B), (A, B, A, B + left),
             (A.abs(), B, A.abs(), B + 1)]
    A1, B1, A2, B2 = pairs[torch.randint(len(pairs), (1,), generator=generator)]
    size = (1, 1e-3)[torch.randint(2, (1,), generator=generator)]
    return A1, size * B1, A2, size * B2


def _later_phi(V1, V2, first, last):
    U, V = V1[:, first - 1:last], V2[:, first - 1:last]
    return (U.T @ V).square().sum().item() / (last - first + 1)


def _bases(generator):
    d, i, j = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((11, 16), (6, 8), (8, 10)))
    V1, V2 = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for k in (i, j))
    first, last = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 4), (5, 7)))
    return V1, V2, first, last


def _random_projection(W_norm, r, m, n):
    return r / math.sqrt(m * n) * W_norm


def _weight(generator):
    m, n = _sizes(generator, 2, 20, 90)
    return 5 * torch.rand(1, generator=generator).item() + 1, int(torch.randint(2, 9, (1,), generator=generator)), m, n


def _pull_back(g, left, right, signs, scale=None):
    padded = F.pad(signs * g, (0, len(left) * right.shape[1] - len(g)))
    G = padded.view(len(left), right.shape[1])
    return (left.T @ G @ right.T).flatten() / (math.sqrt(len(signs)) if scale is None else scale)


def _grid(generator):
    side, k, q, rows = 8, *_sizes(generator, 2, 2, 6), int(torch.randint(5, 8, (1,), generator=generator))
    H = torch.ones(1, 1)
    while len(H) < side:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    signs = torch.randint(2, (rows * side - 3,), generator=generator) * 2.0 - 1
    left = H[:rows, torch.randperm(side, generator=generator)[:k]]
    right = H[torch.randperm(side, generator=generator)[:q]]
    return torch.randn(len(signs), generator=generator), left, right, signs


def _turned(g, left, right, signs):
    G = F.pad(signs * g, (0, len(left) * right.shape[1] - len(g))).view(len(left), right.shape[1])
    return (right @ G.T @ left).flatten() / math.sqrt(len(signs))


MISTAKES = {
    "relative_error": [
        Mistake("you add the singular values themselves: the Frobenius norm adds their squares",
                lambda S, r: (S[r:].sum() / S.sum()).item()),
        Mistake("that is the lost share of the energy, the squared error: take its square root",
                lambda S, r: (S[r:].square().sum() / S.square().sum()).item()),
        Mistake("that is what the cut keeps; the error is what it loses, S[r:]",
                lambda S, r: math.sqrt(S[:r].square().sum() / S.square().sum())),
        Mistake("that is sigma_(r+1) / sigma_1, the error in the spectral norm; here the Frobenius norm is asked",
                lambda S, r: (S[r] / S[0]).item()),
    ],
    "same_update": [
        Mistake("you still compare the factors: (B Q^-1)(Q A) is the same update for every invertible Q",
                lambda A1, B1, A2, B2: _close(A1, A2) and _close(B1, B2)),
        Mistake("the products differ by rounding, in the seventh digit: compare them with a tolerance",
                lambda A1, B1, A2, B2: torch.equal(B1 @ A1, B2 @ A2)),
        Mistake("allclose as it is looks at each entry, and beside one near 0 rounding is large: compare the length of "
                "the difference with the length of the update",
                lambda A1, B1, A2, B2: torch.allclose(B1 @ A1, B2 @ A2)),
        Mistake("a fixed tolerance calls all small updates the same: let it grow with the size of the update",
                lambda A1, B1, A2, B2: torch.allclose(B1 @ A1, B2 @ A2, rtol=1e-4, atol=1e-4)),
        Mistake("two updates of the same size need not be the same: compare every entry of B A with its sign, not "
                "its size or its norm",
                lambda A1, B1, A2, B2: bool(torch.isclose((B1 @ A1).norm(), (B2 @ A2).norm(), rtol=1e-3))),
        Mistake("a cosine has no length: two updates in the same direction need not be equally large",
                lambda A1, B1, A2, B2: bool(torch.isclose(torch.cosine_similarity(
                    (B1 @ A1).flatten(), (B2 @ A2).flatten(), dim=0), torch.tensor(1.0), rtol=1e-4))),
        Mistake("the sign of the difference: take abs() before you compare with a tolerance",
                lambda A1, B1, A2, B2: bool((B1 @ A1 - B2 @ A2).max() < 1e-4)),
        Mistake("A B does not fit: (r, in) @ (out, r). For a square layer with r = in it would have run and been wrong",
                lambda A1, B1, A2, B2: _close(A1 @ B1, A2 @ B2)),
        Mistake("the same A reads the same directions, but B decides what is written: compare B A",
                lambda A1, B1, A2, B2: _close(A1, A2)),
    ],
    "later_phi": [
        Mistake("one direction is missing: number 5 is column 4, so the slice starts at first - 1",
                lambda V1, V2, first, last:
                (V1[:, first:last].T @ V2[:, first:last]).square().sum().item() / (last - first)),
        Mistake("one direction is missing at the start, while you divide by all of them: slice from first - 1",
                lambda V1, V2, first, last:
                (V1[:, first:last].T @ V2[:, first:last]).square().sum().item() / (last - first + 1)),
        Mistake("the stronger directions are still in it: cut them off on both sides",
                lambda V1, V2, first, last: (V1[:, :last].T @ V2[:, :last]).square().sum().item() / last),
        Mistake("the overlap is right, the division is not: by the number of directions compared, not by last",
                lambda V1, V2, first, last:
                (V1[:, first - 1:last].T @ V2[:, first - 1:last]).square().sum().item() / last),
        Mistake("the overlap is right, the division is not: the rest of the adapters' directions does not count",
                lambda V1, V2, first, last:
                _later_phi(V1, V2, first, last) * (last - first + 1) / min(V1.shape[1], V2.shape[1])),
        Mistake("you add up the overlaps unsquared: the squared Frobenius norm is wanted",
                lambda V1, V2, first, last:
                (V1[:, first - 1:last].T @ V2[:, first - 1:last]).norm().item() / (last - first + 1)),
        Mistake("the division is missing: this counts the directions in common and can exceed 1",
                lambda V1, V2, first, last:
                (V1[:, first - 1:last].T @ V2[:, first - 1:last]).square().sum().item()),
        Mistake("you cut rows; the directions are the columns, V[:, first - 1:last]",
                lambda V1, V2, first, last:
                (V1[first - 1:last].T @ V2[first - 1:last]).square().sum().item() / (last - first + 1)),
    ],
    "random_projection": [
        Mistake("r / n is right for a square matrix only (the paper's are): both sides of the layer count",
                lambda W_norm, r, m, n: r / n * W_norm),
        Mistake("r / m is right for a square matrix only (the paper's are): both sides of the layer count",
                lambda W_norm, r, m, n: r / m * W_norm),
        Mistake("that is the squared share: norms, not squared norms, are compared",
                lambda W_norm, r, m, n: r * r / (m * n) * W_norm),
        Mistake("that is for r pairs (u_k, v_k) of directions; the r x r block U^T W V has r squared entries",
                lambda W_norm, r, m, n: math.sqrt(r / (m * n)) * W_norm),
    ],
    "pull_back": [
        Mistake("the random signs are missing: each weight was turned on the way out, so turn it again",
                lambda g, left, right, signs: _pull_back(g, left, right, torch.ones_like(signs))),
        Mistake("the division by sqrt(D) is missing: P has it, so its transpose has it too",
                lambda g, left, right, signs: _pull_back(g, left, right, signs, scale=1)),
        Mistake("you divide by D, but P has 1 / sqrt(D), and so has its transpose",
                lambda g, left, right, signs: _pull_back(g, left, right, signs, scale=len(signs))),
        Mistake("P is not inverted but transposed: divide by sqrt(D), as P does, do not multiply",
                lambda g, left, right, signs: _pull_back(g, left, right, signs, scale=len(signs) ** -0.5)),
        Mistake("the numbers are right, their order is not: lay out (k, q) row by row, as Z is",
                _turned),
        Mistake("g has D entries, the rectangle a few more: fill up with zeros before you lay it out",
                lambda g, left, right, signs:
                (left.T @ (signs * g).view(len(left), -1) @ right.T).flatten() / math.sqrt(len(signs))),
        Mistake("g has D entries, the rectangle a few more: fill up with zeros, then lay it out",
                lambda g, left, right, signs:
                (left.T @ (signs * g).view(len(left), right.shape[1]) @ right.T).flatten() / math.sqrt(len(signs))),
        Mistake("this gives the rectangle (k, q); z is flat: lay it out row by row",
                lambda g, left, right, signs: _pull_back(g, left, right, signs).view(left.shape[1], -1)),
    ],
    "frozen_a_rank": [
        Mistake("that is the rank of the LoRA beside it: with A frozen each unit of rank costs fewer numbers", 4),
        Mistake("almost: the head has ten outputs, so its rank stops at 10 and its B at 10 x 10 = 100 numbers", 11),
        Mistake("only B counts, and B is shorter than A here (778 outputs, 1,552 inputs): more than twice fits", 8),
        Mistake("count again: 13 needs 13 x 768 + 100 = 10,084 numbers, more than 9,320", 13),
    ],
}


def relative_error(answer) -> Verdict:
    return grade(answer, _relative_error, _spectrum, MISTAKES["relative_error"],
                 "this is the Eckart-Young bound: no matrix of rank r comes nearer, however it was found")


def same_update(answer) -> Verdict:
    return grade(answer, _same_update, _adapters, MISTAKES["same_update"], rounds=100,
                 why="A and B are only two of many ways to write an update; what the layer feels is B A")


def later_phi(answer) -> Verdict:
    return grade(answer, _later_phi, _bases, MISTAKES["later_phi"],
                 "a shared top direction can no longer pass for agreement of all the others")


def random_projection(answer) -> Verdict:
    return grade(answer, _random_projection, _weight, MISTAKES["random_projection"],
                 "the control of table 7: what any W shows between directions that mean nothing")


def pull_back(answer) -> Verdict:
    return grade(answer, _pull_back, _grid, MISTAKES["pull_back"],
                 "z needs the gradient of every weight first, so d numbers are trained but D gradients are paid for")


def frozen_a_rank(answer) -> Verdict:
    return grade_value(answer, 12, MISTAKES["frozen_a_rank"],
                       "12 x 768 + 100 = 9,316 numbers: three times the rank for the same count",
                       hint="B has r columns: 512 r + 256 r numbers for fc1 and fc2, and 10 min(r, 10) for fc3.")

