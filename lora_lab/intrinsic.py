"""Training a whole network through a few numbers: the random subspaces of notebook 08 (Li et al. 2018, 1804.08838)."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call


def hadamard(n: int) -> Tensor:
    """The n x n matrix of +1 and -1 with orthogonal rows (Sylvester); n is a power of two."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])  # twice as large
    if len(H) != n:
        raise ValueError(f"{n} is not a power of two")
    return H


class RandomSubspace(nn.Module):
    """theta = theta_0 + P z: only z (d,) is trained; theta (D,) are the `names`d parameters of `model`, or all of them.

    The columns of P (D, d) are fixed, random and nearly orthonormal: d columns of a Hadamard matrix, a random sign for
    each row, divided by sqrt(D). P is never stored: with Z = z as (k, d/k), P z is the first D of signs * vec(H1 Z H2),
    over sqrt(D), where H1 (rows, k) and H2 (d/k, side) are random columns and rows of hadamard(side), side^2 >= D.
    The model is frozen. Raises ValueError if d is not a multiple of k or does not fit.
    """

    def __init__(self, model: nn.Module, d: int, seed: int, names=None, k: int = 10):
        super().__init__()
        chosen = {n: p for n, p in model.requires_grad_(False).named_parameters() if names is None or n in names}
        self.names = list(chosen)
        self.start = [p.detach() for p in chosen.values()]
        self.D = sum(p.numel() for p in self.start)
        side = 2 ** math.ceil(math.log2(self.D) / 2)
        if d % k or d // k > side:
            raise ValueError(f"d = {d} must be a multiple of {k}, and at most {k * side:,}")
        g, H, rows = torch.Generator().manual_seed(seed), hadamard(side), math.ceil(self.D / side)
        self.left = H[:rows, torch.randperm(side, generator=g)[:k]]  # (rows, k): further rows of H come after D
        self.right = H[torch.randperm(side, generator=g)[:d // k]]  # (d/k, side)
        self.signs = torch.randint(2, (rows * side,), generator=g) * 2.0 - 1  # (rows * side,), a few more than D
        self.steps = self.signs / math.sqrt(self.D)
        self.z = nn.Parameter(torch.zeros(d))
        self.model = [model]  # in a list: z is then the only parameter here

    def _mixed(self) -> Tensor:
        Z = self.z.view(self.left.shape[1], -1)  # (d,) -> (k, d/k)
        return self.steps * (self.left @ (Z @ self.right)).flatten()  # (rows, k) @ (k, side) -> (rows * side,)

    def offset(self) -> Tensor:
        """P z, (D,)."""
        return self._mixed()[:self.D]

    def weights(self) -> dict[str, Tensor]:
        """theta_0 + P z, in the parameters' shapes."""
        sizes = [p.numel() for p in self.start]
        parts = self._mixed().split([*sizes, len(self.signs) - self.D])
        return {name: p + part.view(p.shape) for name, p, part in zip(self.names, self.start, parts, strict=False)}

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.model[0], self.weights(), (x,))
