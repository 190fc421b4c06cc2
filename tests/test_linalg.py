"""Linear algebra against numpy, closed forms and random matrices."""

import ast
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab import linalg
from tools import notebooks

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")


def matrices(low=1, high=5, entries=None):
    """Small matrices of whole numbers, (m, n), often of low rank."""
    entries = entries or st.integers(-4, 4)
    return st.tuples(st.integers(low, high), st.integers(low, high)).flatmap(
        lambda shape: st.lists(st.lists(entries, min_size=shape[1], max_size=shape[1]),
                               min_size=shape[0], max_size=shape[0]))


def built_in(number, *names):
    """Functions as a notebook builds them, and what they use from it."""
    cells = [c.source for c in notebooks.read(*notebooks.paths([number])).cells if c.cell_type == "code"]
    nodes = [node for source in cells for node in ast.parse(source).body]
    found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in found) == sorted(names), f"notebook {number} defines each of {names} once"
    namespace = {"torch": torch, "Fraction": Fraction}
    exec(compile(ast.Module(found, []), f"notebook {number}", "exec"), namespace)
    return [namespace[name] for name in names]


_, echelon, exact_rank = built_in("01", "find_pivot", "echelon", "exact_rank")
phi, = built_in("08", "phi")
effective_rank, randomized_svd = built_in("03", "effective_rank", "randomized_svd")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d, k, seed):
    return torch.linalg.qr(randn(d, k, seed=seed)).Q  # (d, k)


# --- echelon form and exact rank, as notebook 01 builds them -----------------------------------------------------

def in_words(matrix):
    R, steps = echelon(matrix)
    return R, [words for words, _ in steps]


def test_the_matrix_that_tutorials_get_wrong():
    R, steps = in_words([[1, 2, 3], [2, 4, 6], [3, 6, 9]])
    assert R == [[3, 6, 9], [0, 0, 0], [0, 0, 0]] and exact_rank([[1, 2, 3], [2, 4, 6], [3, 6, 9]]) == 1
    assert steps == ["swap row 1 and row 3", "row 2 -= 2/3 * row 1", "row 3 -= 1/3 * row 1"]


@given(matrices())
def test_exact_rank_is_numpys(matrix):
    assert exact_rank(matrix) == np.linalg.matrix_rank(np.array(matrix, dtype=float))


@given(matrices(), matrices())
def test_rank_of_a_transpose_and_of_a_product(A, B):
    assert exact_rank(A) == exact_rank(list(zip(*A, strict=True)))
    inner = min(len(A[0]), len(B))
    product = [[sum(row[k] * B[k][j] for k in range(inner)) for j in range(len(B[0]))] for row in A]
    assert exact_rank(product) <= min(exact_rank(A), exact_rank(B), inner)


@given(matrices())
def test_echelon_form_steps_down(matrix):
    R, _ = echelon(matrix)
    leads = [next((j for j, entry in enumerate(row) if entry), math.inf) for row in R]
    assert all(a < b or a == b == math.inf for a, b in zip(leads, leads[1:], strict=False))
    assert all(isinstance(entry, Fraction) for row in R for entry in row)


def replay(matrix, steps):
    rows = [[Fraction(x) for x in row] for row in matrix]
    for step in steps:
        words = step.split()
        if words[0] == "swap":
            i, j = int(words[2]) - 1, int(words[5]) - 1
            rows[i], rows[j] = rows[j], rows[i]
        else:
            i, factor, j = int(words[1]) - 1, Fraction(words[3]), int(words[6]) - 1
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[j], strict=True)]
    return rows


@given(matrices())
def test_the_steps_in_words_lead_to_the_result(matrix):
    R, steps = in_words(matrix)
    assert replay(matrix, steps) == R


@given(matrices())
def test_partial_pivoting_keeps_every_factor_at_most_1(matrix):
    factors = [Fraction(s.split()[3]) for s in in_words(matrix)[1] if "-=" in s]
    assert all(abs(factor) <= 1 for factor in factors)


def test_exact_numbers_stay_exact():
    third = Fraction(1, 3)
    assert exact_rank([[third, 1], [1, 3]]) == 1
    assert exact_rank([["0.1", "0.3"], ["0.3", "0.9"]]) == 1
    assert exact_rank([[0.1, 0.3], [0.3, 0.9]]) == 2  # the floats nearest to them are not in proportion


@pytest.mark.parametrize("matrix, rank", [([[]], 0), ([[0, 0]], 0), ([[0, 5]], 1), ([[0], [0], [7]], 1)])
def test_degenerate_matrices(matrix, rank):
    assert exact_rank(matrix) == rank


def test_the_argument_is_not_changed():
    matrix = [[0, 1], [2, 3]]
    exact_rank(matrix)
    assert matrix == [[0, 1], [2, 3]]


# --- rank of floating-point matrices -----------------------------------------------------------------------------

@pytest.mark.parametrize("m, n, r", [(7, 4, 2), (4, 7, 4), (30, 50, 9), (3, 3, 0)])
def test_numerical_rank_is_numpys(m, n, r):
    W = randn(m, r, seed=1) @ randn(r, n, seed=2)
    assert linalg.numerical_rank(W) == np.linalg.matrix_rank(W.numpy()) == r
    assert linalg.numerical_rank(W.float()) == r


def test_noise_makes_full_rank_and_a_tolerance_undoes_it():
    W = randn(20, 3, seed=1) @ randn(3, 12, seed=2) + 1e-6 * randn(20, 12, seed=3)
    assert linalg.numerical_rank(W) == 12 and linalg.numerical_rank(W, tol=1e-3) == 3
    assert linalg.numerical_rank(torch.zeros(0, 4)) == 0 and linalg.numerical_rank(torch.zeros(2, 4)) == 0


# --- truncation --------------------------------------------------------------------------------------------------

@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 8), st.integers(0, 99))
def test_tail_energy_identity(m, n, r, seed):
    r = min(r, m, n)
    W = randn(m, n, seed=seed)
    S = np.linalg.svd(W.numpy(), compute_uv=False)
    rest = W - linalg.truncate(W, r)
    assert rest.square().sum().item() == pytest.approx((S[r:] ** 2).sum(), abs=1e-9)
    assert np.linalg.norm(rest.numpy(), 2) == pytest.approx(S[r] if r < len(S) else 0, abs=1e-9)
    assert linalg.numerical_rank(linalg.truncate(W, r), tol=1e-9) == r


def test_no_rival_of_the_same_rank_comes_closer():
    W = randn(8, 5)
    best = (W - linalg.truncate(W, 2)).norm()
    for seed in range(200):
        A = randn(2, 5, seed=seed)
        B = torch.linalg.lstsq(A.T, W.T).solution.T  # the best (8, 2) for this A
        assert (W - B @ A).norm() >= best - 1e-9


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 8), st.integers(0, 99))
def test_split_multiplies_to_the_truncation(m, n, r, seed):
    W, r = randn(m, n, seed=seed), min(r, m, n)
    A, B = linalg.split(W, r)
    assert A.shape == (r, n) and B.shape == (m, r)
    torch.testing.assert_close(B @ A, linalg.truncate(W, r))
    S = torch.from_numpy(np.linalg.svd(W.numpy(), compute_uv=False)[:r].copy())
    torch.testing.assert_close(A @ A.T, torch.diag(S))  # the square roots are shared evenly
    torch.testing.assert_close(B.T @ B, torch.diag(S))


# --- spectra (effective rank: as notebook 03 builds it) ----------------------------------------------------------

def test_energy():
    torch.testing.assert_close(linalg.energy(torch.tensor([2.0, 1.0, 1.0])), torch.tensor([4 / 6, 5 / 6, 1.0]))
    W = randn(9, 6)
    kept = linalg.energy(torch.linalg.svdvals(W))
    assert kept[-1].item() == pytest.approx(1) and bool((kept.diff() >= 0).all())
    share = linalg.truncate(W, 3).square().sum() / W.square().sum()
    assert kept[2].item() == pytest.approx(share.item())


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("size", [1e-3, 1.0, 250.0])
def test_effective_rank_of_k_equal_values_is_k(k, size):
    S = torch.cat([torch.full((k,), size), torch.zeros(5)])
    assert effective_rank(S) == pytest.approx(k, rel=1e-5)


def test_effective_rank_of_two_values_in_closed_form():
    p = 0.8
    expected = math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert effective_rank(torch.tensor([4.0, 1.0], dtype=torch.float64)) == pytest.approx(expected)


# --- randomised SVD, as notebook 03 builds it --------------------------------------------------------------------

@pytest.mark.parametrize("m, n", [(60, 40), (40, 60), (12, 200)])
def test_randomised_svd_is_exact_on_a_matrix_of_that_rank(m, n):
    W = (randn(m, 5, seed=1) @ randn(5, n, seed=2)).float()
    U, S, Vh = randomized_svd(W, 5)
    assert U.shape == (m, 5) and S.shape == (5,) and Vh.shape == (5, n)
    torch.testing.assert_close(U * S @ Vh, W, rtol=0, atol=1e-4)
    np.testing.assert_allclose(S, np.linalg.svd(W.numpy(), compute_uv=False)[:5], rtol=1e-5)
    torch.testing.assert_close(U.T @ U, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(5), rtol=0, atol=1e-5)


def test_randomised_svd_is_near_on_a_decaying_spectrum_and_fixed_by_its_seed():
    U, V = orthonormal(80, 50, 1), orthonormal(60, 50, 2)
    S = 0.8 ** torch.arange(50, dtype=torch.float64)
    W = (U * S @ V.T).float()
    got = randomized_svd(W, 8)
    np.testing.assert_allclose(got[1], S[:8], rtol=1e-3)
    assert (W - got[0] * got[1] @ got[2]).norm() < 1.01 * (W - linalg.truncate(W, 8)).norm()
    assert all(torch.equal(a, b) for a, b in zip(got, randomized_svd(W, 8), strict=True))
    assert not torch.equal(got[0], randomized_svd(W, 8, seed=1)[0])
    before = torch.get_rng_state()
    randomized_svd(W, 3)
    assert torch.equal(torch.get_rng_state(), before)


# --- subspaces, as notebook 08 compares them ---------------------------------------------------------------------

def test_similarity_of_a_subspace_with_a_part_of_itself_is_1():
    U = orthonormal(30, 8, seed=1)
    turned = U[:, :3] @ orthonormal(3, 3, seed=2)  # another basis of the same plane
    assert phi(U, turned) == pytest.approx(1)
    assert phi(U[:, :3], U[:, 3:]) == pytest.approx(0, abs=1e-12)
    assert phi(U[:, :4], U[:, 2:5]) == pytest.approx(2 / 3)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_similarity_from_the_principal_angles(i, j, seed):
    U, V = orthonormal(20, i, seed), orthonormal(20, j, seed + 1000)
    cosines = np.linalg.svd((U.T @ V).numpy(), compute_uv=False)
    found = phi(U, V)
    assert found == pytest.approx((cosines ** 2).sum() / min(i, j)) and -1e-12 <= found <= 1 + 1e-12
    assert found == pytest.approx(phi(V, U))


@pytest.mark.parametrize("d, i, j", [(64, 2, 8), (64, 8, 2), (40, 5, 5), (100, 1, 30)])
def test_random_subspaces_are_alike_by_the_larger_share_of_the_space(d, i, j):
    drawn = [phi(orthonormal(d, i, 2 * k), orthonormal(d, j, 2 * k + 1)) for k in range(200)]
    mean, error = np.mean(drawn), np.std(drawn) / math.sqrt(len(drawn))
    assert abs(mean - max(i, j) / d) < 4 * error
