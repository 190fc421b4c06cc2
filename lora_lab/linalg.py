"""Rank, SVD and the geometry of subspaces: what notebooks 01, 02, 03 and 08 build, for later use."""

from fractions import Fraction

import torch
from torch import Tensor


def row_echelon(matrix) -> tuple[list[list[Fraction]], list[str]]:
    """Gaussian elimination with partial pivoting, in exact fractions.

    `matrix`: rows of whole numbers, fractions or decimal strings, (m, n). Returns the row echelon form and the steps
    taken, in words. The number of rows that are not zero is the rank. Raises ValueError if the rows differ in length.
    """
    R = [[Fraction(entry) for entry in row] for row in matrix]
    if len({len(row) for row in R}) > 1:
        raise ValueError(f"the rows have different lengths: {[len(row) for row in R]}")
    steps, top = [], 0
    for column in range(len(R[0]) if R else 0):
        if top == len(R):
            break
        pivot = max(range(top, len(R)), key=lambda i: abs(R[i][column]))
        if R[pivot][column] == 0:
            continue
        if pivot != top:
            R[top], R[pivot] = R[pivot], R[top]
            steps.append(f"swap row {top + 1} and row {pivot + 1}")
        for i in range(top + 1, len(R)):
            if factor := R[i][column] / R[top][column]:
                R[i] = [a - factor * b for a, b in zip(R[i], R[top], strict=True)]
                steps.append(f"row {i + 1} -= {factor} * row {top + 1}")
        top += 1
    return R, steps


def exact_rank(matrix) -> int:
    """The rank of a matrix of exact numbers: the rows of its echelon form that are not zero."""
    return sum(any(row) for row in row_echelon(matrix)[0])


def numerical_rank(W: Tensor, tol: float | None = None) -> int:
    """How many singular values of W (m, n) exceed `tol`; by default max(m, n) * eps * sigma_1, as in numpy."""
    S = torch.linalg.svdvals(W)
    if S.numel() == 0:
        return 0
    tol = max(W.shape) * torch.finfo(W.dtype).eps * S[0].item() if tol is None else tol
    return int((S > tol).sum())


def truncate(W: Tensor, r: int) -> Tensor:
    """The best rank-r approximation of W (m, n) in the Frobenius and the spectral norm (Eckart-Young-Mirsky)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]  # (m, r) * (r,) @ (r, n) -> (m, n)


def split(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) with B @ A = truncate(W, r): each takes the square roots of the singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()  # (r,)
    return root[:, None] * Vh[:r], U[:, :r] * root


def energy(S: Tensor) -> Tensor:
    """Share of the squared singular values in the first 1, 2, ... of them: (k,) -> (k,), ending at 1."""
    return S.square().cumsum(0) / S.square().sum()


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): k equal ones give k."""
    p = S / S.sum()
    p = p[p > 0]
    return torch.exp(-(p * p.log()).sum()).item()


def randomized_svd(W: Tensor, r: int, oversample: int = 10, iterations: int = 2, seed: int = 0):
    """The first r singular triples of W (m, n), nearly: U (m, r), S (r,), Vh (r, n), in O(m n r) operations.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(r + oversample, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], width, generator=generator, dtype=W.dtype)).Q  # (m, width)
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q  # (m, width)
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)  # of a (width, n) matrix
    return (Q @ U)[:, :r], S[:r], Vh[:r]


def subspace_similarity(U: Tensor, V: Tensor) -> float:
    """phi = |U^T V|_F^2 / min(i, j) in [0, 1] of two subspaces given by orthonormal columns U (d, i) and V (d, j).

    1: one contains the other; random subspaces: max(i, j) / d on average. Hu et al. 2021, section 7.2, eq. 4."""
    return ((U.T @ V).square().sum() / min(U.shape[1], V.shape[1])).item()


def amplification(delta_W: Tensor, W: Tensor, r: int) -> float:
    """|delta_W|_F / |U^T W V|_F, with U (m, r) and V (n, r) the top singular directions of delta_W (m, n).

    How much the update amplifies what W has in the update's own directions. Hu et al. 2021, section 7.3, table 7."""
    U, _, Vh = torch.linalg.svd(delta_W, full_matrices=False)
    return (delta_W.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm()).item()
