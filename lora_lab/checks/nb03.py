"""Checks of notebook 03, low-rank approximation."""

import re

import torch

from lora_lab.checks import Mistake, Verdict, grade, grade_value, matrices, not_yet
from lora_lab.linalg import energy


def _size(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=g))


def _first_at(share_so_far: torch.Tensor, share: float) -> int:
    return int((share_so_far < share).sum()) + 1


def _components(X, share, centred=True, squared_twice=False, ascending=False, roots=False):
    X = X - X.mean(0) if centred else X
    values = torch.linalg.eigvalsh(X.T @ X).clamp(min=0)
    values = values if ascending else values.flip(0)
    power = 1 if squared_twice else 0.25 if roots else 0.5  # energy squares what it gets
    return _first_at(energy(values ** power), share)


def _escaped(W, Q):
    return ((W - Q @ (Q.T @ W)).norm() / W.norm()).item()


def _factors(D, r, to_A=0.5, to_B=0.5):
    """A and B from the SVD of D; the powers say how much of the singular values each of them takes."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return S[:r, None] ** to_A * Vh[:r], U[:, :r] * S[:r] ** to_B


def _told(function):
    """Shapes and product: many pairs have the same product, and each of them is right."""
    def judged(W_before, W_after, r):
        found = function(W_before, W_after, r)
        if found is ... or found is None:
            return found
        A, B = matrices(found, "two matrices, A (r, in) and B (out, r)")
        shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
        if B.shape[-1:] == A.shape[:1]:
            return shapes, B @ A
        return shapes, A @ B if A.shape[-1:] == B.shape[:1] else A  # the other way round
    return judged


MISTAKES = {
    "components": [
        Mistake("That is the code as it was: neither centred, nor are the squares right. Two repairs are needed.",
                lambda X, share: _components(X, share, centred=False, squared_twice=True)),
        Mistake("The squares are right now, but X is not centred: the average example counts as a component.",
                lambda X, share: _components(X, share, centred=False)),
        Mistake("X is centred now, but energy squares the eigenvalues, which are squares already: hand it their roots.",
                lambda X, share: _components(X, share, squared_twice=True)),
        Mistake("X.mean() is one number for all: subtract the mean of each column, X.mean(0).",
                lambda X, share: _components(X - X.mean(), share, centred=False)),
        Mistake("The mean is taken off each row, the examples; centring takes it off each column: X.mean(0).",
                lambda X, share: _components(X - X.mean(1, keepdim=True), share, centred=False)),
        Mistake("You also divide by the standard deviation, and then every pixel has the same variance: centre only.",
                lambda X, share: _components((X - X.mean(0)) / X.std(0), share)),
        Mistake("Variance is the square of a singular value: the shares are those of the squares (what energy does).",
                lambda X, share: _components(X, share, roots=True)),
        Mistake("Your result does not depend on share.", lambda X, share: _components(X, 0.9)),
        Mistake("eigvalsh returns the smallest eigenvalue first; turn the list round before adding up.",
                lambda X, share: _components(X, share, ascending=True)),
    ],
    "best_rank": [
        Mistake("Three tastes, yes, but average, generosity and quality are in the table too: beside an average of 6 "
                "these three together are nearly one more direction.", 3),
        Mistake("Counted exactly, generosity and quality are two more directions. But beside an average of 6 they are "
                "so small that one direction nearly holds both, and a fifth cannot be told from 30 % of the marks.", 5),
        Mistake("The highest rank fits the *seen* marks best, and that says little about the unseen ones.", 20),
        Mistake("One direction can say who is generous and which film is good, but nothing about taste.", 1),
    ],
    "escaped": [
        Mistake("That is the square of the relative error: take norms, not sums of squares.",
                lambda W, Q: _escaped(W, Q) ** 2),
        Mistake("That is the share that Q caught. What escaped is the rest, W - Q Q^T W.",
                lambda W, Q: ((Q.T @ W).norm() / W.norm()).item()),
        Mistake("You return the norm of what escaped; divide it by the norm of W.",
                lambda W, Q: (W - Q @ (Q.T @ W)).norm().item()),
        Mistake("Norms do not subtract: |W| - |Q Q^T W| is not |W - Q Q^T W|.",
                lambda W, Q: (1 - (Q.T @ W).norm() / W.norm()).item()),
    ],
    "growth": [
        Mistake("The sketch touches every entry of W, and there are n squared of them: its cost cannot grow only "
                "like n.", (4, 64)),
        Mistake("Those are the factors for twice the side. From 4,096 to 16,384 it is four times.", (4, 8)),
        Mistake("At fixed r the sketch has no third factor n: O(mnr), with r = 20 throughout.", (64, 64)),
        Mistake("That is the right pair in the wrong order: the sketch comes first.", (64, 16)),
    ],
    "conclusion": [
        Mistake("B is right, but full rank alone does not show it: white noise has full rank too.", ("B", 1)),
        Mistake("B is right, but these fifty are more than the 16 to 32 ranks that suffice: to stand out is not to be "
                "needed.", ("B", 2)),
        Mistake("Measurement 1 says the opposite of A: a rank of 512 is the highest possible.", ("A", 1)),
        Mistake("Measurement 2 says that a few directions stand out, not that the others are zero: 90 % of the energy "
                "takes over 200 singular values, so W is not of low rank.", ("A", 2)),
        Mistake("Measurement 3 says what the task needs, not what W is: even at rank 64 the error is over half of W's "
                "norm.", ("A", 3)),
        Mistake("Accuracy does notice damage: look at the ranks 2, 4 and 8 in the table.", ("C", 3)),
        Mistake("The rank of W says nothing about how fine a measure accuracy is. The table does: see ranks 2 to 8.",
                ("C", 1)),
        Mistake("If accuracy were too coarse, it would not collapse below rank 16, as it does in the table.",
                ("C", 2)),
    ],
    "extract": [
        Mistake("You decompose the weight after fine-tuning. W_before is there already and would count twice: "
                "decompose the difference.", lambda W_before, W_after, r: _factors(W_after, r)),
        Mistake("The sign is turned round: what was learned is W_after - W_before.",
                lambda W_before, W_after, r: _factors(W_before - W_after, r)),
        Mistake("You return B first; A (r, in) comes first.",
                lambda W_before, W_after, r: _factors(W_after - W_before, r)[::-1]),
        Mistake("Both factors carry the singular values, so the product has their squares. Give them to one of the "
                "two, or their roots to each.", lambda W_before, W_after, r: _factors(W_after - W_before, r, 1, 1)),
        Mistake("The singular values are missing: all of the r directions count the same in your product.",
                lambda W_before, W_after, r: _factors(W_after - W_before, r, 0, 0)),
    ],
}


def components(answer) -> Verdict:
    def draw(g):
        n, d = _size(g, 60, 90), _size(g, 20, 40)
        scale = torch.arange(1, d + 1) ** -0.7  # (d,)
        share = (0.7, 0.8, 0.9, 0.95)[_size(g, 0, 4)]
        return torch.randn(n, d, generator=g).exp() * scale + 0.6 * torch.rand(d, generator=g), share  # skewed

    return grade(answer, _components, draw, MISTAKES["components"],
                 "both errors made the data look simpler than they are, and nothing crashed.")


def best_rank(answer) -> Verdict:
    return grade_value(answer, 4, MISTAKES["best_rank"],
                       "three tastes and the average: the rank that predicts best counts what stands out.",
                       hint="Count the directions that stand out from whim and would repeat in marks not yet given.")


def escaped(answer) -> Verdict:
    def draw(g):
        m, n = _size(g, 12, 20), _size(g, 25, 40)
        return torch.randn(m, n, generator=g), torch.linalg.qr(torch.randn(m, _size(g, 3, 8), generator=g)).Q

    return grade(answer, _escaped, draw, MISTAKES["escaped"],
                 "the error of a sketch can be measured without the SVD that it stands in for.")


def growth(answer) -> Verdict:
    return grade_value(answer, (16, 64), MISTAKES["growth"],
                       "the gap itself grows like n / r, so the sketch wins most where it is needed most.",
                       hint="Put 4n in place of n in n * n * 20 and in n ** 3; answer with a pair (sketch, full).")


def conclusion(answer) -> Verdict:
    # "b3" and ["B", 3] say it as well; an A within a word is none
    letter, *numbers = re.findall("(?<![A-Z])[ABC](?![A-Z])|[123]", str(answer).upper()) or [""]
    if letter in ("A", "B", "C") and numbers and set(numbers) <= {"1", "2", "3"}:
        answer = letter, int(min(numbers))
    elif letter in ("A", "B", "C"):
        return not_yet(f"{letter} is half of an answer: name the measurement too, as in (\"A\", 1).")
    return grade_value(answer, ("B", 3), MISTAKES["conclusion"],
                       "error in the norm and error in the task are two things; only the second one is paid for.",
                       hint='Answer with a pair such as ("A", 1): a letter A, B or C and a number 1, 2 or 3.')


def extract(answer) -> Verdict:
    def draw(g):
        m, n = _size(g, 6, 12), _size(g, 14, 22)
        W = torch.randn(m, n, generator=g)  # (m, n)
        return W, W + 0.3 * torch.randn(m, n, generator=g), _size(g, 1, 5)

    mistakes = [Mistake(message, _told(function)) for message, function in MISTAKES["extract"]]
    return grade(_told(answer), _told(lambda before, after, r: _factors(after - before, r)), draw, mistakes,
                 "W stays whole and only the news is squeezed: the idea of LoRA, here after the fact.")
