"""Checks of notebook 08: what LoRA learns."""

import math

import torch

from lora_lab.checks import Mistake, Verdict, grade, grade_value


def _sizes(generator, count, low, high):
    """Different whole numbers, so that nothing is square by chance."""
    return (torch.randperm(high - low, generator=generator)[:count] + low).tolist()


def _relative_error(S, r):
    return math.sqrt(S[r:].square().sum() / S.square().sum())


def _spectrum(generator):
    k, r = 9, int(torch.randint(1, 6, (1,), generator=generator))
    return torch.rand(k, generator=generator).sort(descending=True).values + 0.05, r


def _close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _same_update(A1, B1, A2, B2):
    return _close(B1 @ A1, B2 @ A2)


def _adapters(generator):
    """Equal updates with equal or with turned factors, and different ones with or without a common A."""
    r, m, n = 2, *_sizes(generator, 2, 4, 10)
    A, B = torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator)
    mix = torch.tensor([[2.0, 1.0], [1.0, 1.0]])  # its determinant is 1
    other = torch.randn(m, r, generator=generator)
    return [(A, B, mix @ A, B @ torch.linalg.inv(mix)), (A, B, A, other / other.norm() * B.norm()),
            (A, B, A.clone(), B.clone()), (A, B, A, -B)][torch.randint(4, (1,), generator=generator)]


def _phi(U, V):
    return (U.T @ V).square().sum().item() / min(U.shape[1], V.shape[1])


def _bases(generator):
    d, i, j = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((9, 14), (2, 4), (5, 8)))
    U, V = (torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for k in (i, j))
    return (U, V) if torch.rand(1, generator=generator) < 0.5 else (V, U)


def _random_projection(W_norm, r, m, n):
    return r / math.sqrt(m * n) * W_norm


def _weight(generator):
    m, n = _sizes(generator, 2, 20, 90)
    return 5 * torch.rand(1, generator=generator).item() + 1, int(torch.randint(2, 9, (1,), generator=generator)), m, n


def _offset(z, left, right, signs):
    Z = z.view(left.shape[1], right.shape[0])
    return signs * (left @ Z @ right).flatten()[:len(signs)] / math.sqrt(len(signs))


def _grid(generator):
    side, k, q = 8, *_sizes(generator, 2, 2, 6)
    H = torch.ones(1, 1)
    while len(H) < side:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    signs = torch.randint(2, (side * side - 5,), generator=generator) * 2.0 - 1
    left, right = H[:, torch.randperm(side, generator=generator)[:k]], H[torch.randperm(side, generator=generator)[:q]]
    return torch.randn(k * q, generator=generator), left, right, signs


def _unsigned(z, left, right, signs):
    return (left @ z.view(left.shape[1], -1) @ right).flatten()[:len(signs)]


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
        Mistake("two updates of the same size need not be the same: compare every entry of B A, not its norm",
                lambda A1, B1, A2, B2: bool(torch.isclose((B1 @ A1).norm(), (B2 @ A2).norm(), rtol=1e-3))),
        Mistake("A B does not fit: (r, in) @ (out, r). For a square layer with r = in it would have run and been wrong",
                lambda A1, B1, A2, B2: _close(A1 @ B1, A2 @ B2)),
        Mistake("the same A reads the same directions, but B decides what is written: compare B A",
                lambda A1, B1, A2, B2: _close(A1, A2)),
    ],
    "phi": [
        Mistake("you divide by the larger dimension: then a small subspace inside a large one would not get 1",
                lambda U, V: (U.T @ V).square().sum().item() / max(U.shape[1], V.shape[1])),
        Mistake("you add up the overlaps unsquared: the squared Frobenius norm is wanted",
                lambda U, V: (U.T @ V).norm().item() / min(U.shape[1], V.shape[1])),
        Mistake("the division is missing: this counts the directions in common and can exceed 1",
                lambda U, V: (U.T @ V).square().sum().item()),
        Mistake("you divide by d, the size of the space: only the subspaces' own dimensions count",
                lambda U, V: (U.T @ V).square().sum().item() / len(U)),
        Mistake("U V^T does not fit: the directions are the columns, so U^T V compares each with each",
                lambda U, V: (U @ V.T).square().sum().item() / min(U.shape[1], V.shape[1])),
    ],
    "chance": [
        Mistake("it is the larger subspace that is easy to hit: 32, not 4, is divided by 512", 4 / 512),
        Mistake("4 x 32 / 512 is the expected sum of squares before the division by min(i, j) = 4", 4 * 32 / 512),
        Mistake("two random subspaces of R^512 overlap a little, by pure chance", 0),
        Mistake("that is min / max; how large the space is has to come in", 4 / 32),
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
    "offset": [
        Mistake("the random signs are missing: without them weights that lie close move together",
                lambda z, left, right, signs: _unsigned(z, left, right, signs) / math.sqrt(len(signs))),
        Mistake("the division by sqrt(D) is missing: a column of D entries +1 and -1 has length sqrt(D)",
                lambda z, left, right, signs: signs * _unsigned(z, left, right, signs)),
        Mistake("you divide by D, but the length of a column of D entries +1 and -1 is sqrt(D)",
                lambda z, left, right, signs: signs * _unsigned(z, left, right, signs) / len(signs)),
        Mistake("z is laid out the other way: Z is (k, d/k), as many rows as left has columns, read row by row",
                lambda z, left, right, signs: signs * (left @ z.view(len(right), -1).T @ right).flatten()[:len(signs)]
                / math.sqrt(len(signs))),
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
    return grade(answer, _same_update, _adapters, MISTAKES["same_update"], rounds=8,
                 why="A and B are only two of many ways to write an update; what the layer feels is B A")


def phi(answer) -> Verdict:
    return grade(answer, _phi, _bases, MISTAKES["phi"],
                 "1 when one subspace holds the other, whatever basis either was given in")


def chance(answer) -> Verdict:
    return grade_value(answer, 32 / 512, MISTAKES["chance"],
                       "max(i, j) / d: a heat map of phi must be read against this floor, and it rises to the right",
                       hint="How much of a unit vector of R^512 lies, on average, in a given 32-dimensional subspace?")


def random_projection(answer) -> Verdict:
    return grade(answer, _random_projection, _weight, MISTAKES["random_projection"],
                 "the control of table 7: what any W shows between directions that mean nothing")


def offset(answer) -> Verdict:
    return grade(answer, _offset, _grid, MISTAKES["offset"],
                 "three small matrices in place of a D x d one: 600 MB become 1 MB")


def frozen_a_rank(answer) -> Verdict:
    return grade_value(answer, 12, MISTAKES["frozen_a_rank"],
                       "12 x 768 + 100 = 9,316 numbers: three times the rank for the same count",
                       hint="B has r columns: 512 r + 256 r numbers for fc1 and fc2, and 10 min(r, 10) for fc3.")

