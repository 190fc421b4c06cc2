"""Checks of notebook 00: the first three exercises."""

import torch

from lora_lab.checks import Mistake, Verdict, grade, grade_value

MISTAKES = {
    "best_possible": [
        Mistake("8 of the 10 digits, but they are not equally frequent: count test digits, not classes", 0.8),
        Mistake("then it would have to answer 8 or 9 at times", 1.0),
        Mistake("that is a percentage; a number from 0 to 1 is wanted", 80.17),
        Mistake("that is the share of 8s and 9s: what it cannot get", 0.1983),
    ],
    "percent_trained": [
        Mistake("that is a share from 0 to 1; percent runs to 100", lambda trained, total: trained / total),
        Mistake("the share is upside down: divide by the total", lambda trained, total: 100 * total / trained),
        Mistake("that is the share that is NOT trained", lambda trained, total: 100 * (1 - trained / total)),
        Mistake("`total` holds the trained numbers already", lambda trained, total: 100 * trained / (trained + total)),
    ],
    "linear": [
        Mistake("(n, in) @ (out, in) does not fit: the inner sizes must be equal, so W is transposed",
                lambda x, W: x @ W),
        Mistake("the values are right, but examples are columns now: rows in, rows out", lambda x, W: W @ x.T),
    ],
}


def best_possible(answer) -> Verdict:
    return grade_value(answer, 0.8017, MISTAKES["best_possible"], "an accuracy means little before you know what was "
                       "possible.", hint="Right answers at best: all digits that are not 8 or 9.", tol=5e-4)


def percent_trained(answer) -> Verdict:
    def draw(g):
        total = torch.randint(1000, 9000, (1,), generator=g).item()
        return torch.randint(10, 400, (1,), generator=g).item(), total

    return grade(answer, lambda trained, total: 100 * trained / total, draw, MISTAKES["percent_trained"],
                 "this is the number that LoRA is famous for.")


def linear(answer) -> Verdict:
    return grade(answer, lambda x, W: x @ W.T,
                 lambda g: (torch.randn(4, 7, generator=g), torch.randn(5, 7, generator=g)), MISTAKES["linear"],
                 "one convention, everywhere in the course: W is (out, in), examples are rows.")
