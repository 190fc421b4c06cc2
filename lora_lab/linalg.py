"""Rank, SVD and subspaces: what a notebook builds and a later one uses."""

from fractions import Fraction

import torch
from torch import Tensor


def exact_rank(matrix) -> int:
    """The rank of a matrix of exact numbers, by Gaussian elimination with partial pivoting in exact fractions.

    `matrix`: rows of whole numbers, fractions or decimal strings, (m, n). Raises ValueError if the rows differ in
    length."""
    R = [[Fraction(entry) for entry in row] for row in matrix]
    if len({len(row) for row in R}) > 1:
        raise ValueError(f"the rows have different lengths: {[len(row) for row in R]}")
    rank = 0
    for column in range(len(R[0]) if R else 0):
        pivot = max(range(rank, len(R)), key=lambda i: abs(R[i][column]), default=None)
        if pivot is None or R[pivot][column] == 0:
            continue
        R[rank], R[pivot] = R[pivot], R[rank]
        for i in range(rank + 1, len(R)):
            factor = R[i][column] / R[rank][column]
            R[i] = [a - factor * b for a, b in zip(R[i], R[rank], strict=True)]
        rank += 1
    return rank


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


def subspace_similarity(U: Tensor, V: Tensor) -> float:
    """phi = |U^T V|_F^2 / min(i, j) in [0, 1] of two subspaces given by orthonormal columns U (d, i) and V (d, j).

    1: one contains the other; random subspaces: max(i, j) / d on average. Hu et al. 2021, section 7.2, eq. 4."""
    return ((U.T @ V).square().sum() / min(U.shape[1], V.shape[1])).item()
