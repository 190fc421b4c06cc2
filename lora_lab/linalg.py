"""Rank and truncated SVD: what notebooks 01 to 03 build and later ones use."""

import torch
from torch import Tensor


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
