"""Checks of notebook 04: the base model."""

import torch
import torch.nn.functional as F

from lora_lab.checks import Mistake, Verdict, grade, grade_value


def _integers(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator)


MISTAKES = {
    "mask": [
        Mistake("that is right for 0 to 7 only: it compares with 8 and never looks at `digits`",
                lambda y, digits: y < 8),
        Mistake("that looks at the first and the last digit only and takes all between them as well",
                lambda y, digits: (y >= min(digits)) & (y <= max(digits))),
        Mistake("the right values, but as numbers: indexing with 0 and 1 would take rows 0 and 1; return booleans",
                lambda y, digits: torch.isin(y, torch.tensor(digits)).long()),
        Mistake("those are the examples to leave out: the mask is the wrong way round",
                lambda y, digits: ~torch.isin(y, torch.tensor(digits))),
        Mistake("the right values, but in a list: return a tensor of booleans",
                lambda y, digits: torch.isin(y, torch.tensor(digits)).tolist()),
    ],
    "count": [
        Mistake("the biases are missing: each layer has one for every output",
                lambda sizes: sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))),
        Mistake("a bias belongs to each output of a layer; you count one for each input",
                lambda sizes: sum(a * b + a for a, b in zip(sizes, sizes[1:], strict=False))),
        Mistake("those are the widths added up; a layer has a weight for every pair of input and output", sum),
    ],
    "overall": [
        Mistake("that is the mean of two percentages; the groups differ in size, so count right answers",
                lambda a, n, b, m: (a + b) / 2),
        Mistake("that is the number of right answers; divide by the number of examples",
                lambda a, n, b, m: a * n + b * m),
    ],
    "reliability": [
        Mistake("that is the share of each true class that is recognised: its row; the answers j stand in column j",
                lambda c: c.diag() / c.sum(1).clamp(min=1)),
        Mistake("that is the share of the most frequent true class among the answers j, which need not be j itself",
                lambda c: c.max(0).values / c.sum(0).clamp(min=1)),
        Mistake("right, but nan where a class is never answered: 0 / 0; 0 is wanted there",
                lambda c: c.diag() / c.sum(0)),
        Mistake("that divides by all examples; of the answers j is wanted, so divide by the sum of column j",
                lambda c: c.diag() / c.sum()),
        Mistake("those are shares of each column for every true class, (k, k); the right answers are the diagonal",
                lambda c: c / c.sum(0).clamp(min=1)),
    ],
    "logit_gradient": [
        Mistake("n times too large: F.cross_entropy is the mean over the n examples",
                lambda z, y: z.softmax(1) - F.one_hot(y, z.shape[1])),
        Mistake("the sign is reversed: this is the step downhill, the gradient points uphill",
                lambda z, y: (F.one_hot(y, z.shape[1]) - z.softmax(1)) / len(z)),
        Mistake("the softmax runs over the examples (dim 0); each example's classes must sum to 1 (dim 1)",
                lambda z, y: (z.softmax(0) - F.one_hot(y, z.shape[1])) / len(z)),
        Mistake("the bracket [k = y] is missing: the true class must be pushed up",
                lambda z, y: z.softmax(1) / len(z)),
    ],
    "share_right": [
        Mistake("argmax(0) runs over the examples; the largest class of each example is argmax(1)",
                lambda z, y: (z.argmax(0) == y[:z.shape[1]]).float().mean().item()),
        Mistake("that is the number of right answers; a share is wanted",
                lambda z, y: (z.argmax(1) == y).sum().item()),
        Mistake("that is the share of wrong answers", lambda z, y: (z.argmax(1) != y).float().mean().item()),
    ],
    "share_of_nines": [
        Mistake("they will be answered 8, not 9: no example ever asks for a larger logit 9", 1.0),
        Mistake("not even by chance: being pushed down by every batch is worse than guessing", 0.1),
        Mistake("8 and 9 do look alike, but looking alike makes a 9 be read as 8", 0.5),
    ],
}


def mask(answer) -> Verdict:
    def draw(g):
        some = _integers(g, 2, 6, 1).item()
        return _integers(g, 0, 10, 40), tuple(torch.randperm(10, generator=g)[:some].tolist())

    def with_type(function):
        def both(y, digits):
            found = function(y, digits)
            if found is ... or found is None:
                return found
            return torch.as_tensor(found), str(found.dtype) if torch.is_tensor(found) else f"a {type(found).__name__}"
        return both

    mistakes = [Mistake(message, with_type(function)) for message, function in MISTAKES["mask"]]
    return grade(with_type(answer), with_type(lambda y, d: torch.isin(y, torch.tensor(d))), draw, mistakes,
                 "every split of this course, old or new, is such a mask.")


def count(answer) -> Verdict:
    return grade(answer, lambda sizes: sum(a * b + b for a, b in zip(sizes, sizes[1:], strict=False)),
                 lambda g: (_integers(g, 2, 60, 3 + _integers(g, 0, 3, 1).item()).tolist(),), MISTAKES["count"],
                 "counting from shapes is how LoRA's savings will be computed, without building anything.")


def overall(answer) -> Verdict:
    def draw(g):
        (a, b), (n, m) = torch.rand(2, generator=g).tolist(), _integers(g, 10, 90, 2).tolist()
        return a, n, b, m + 100

    return grade(answer, lambda a, n, b, m: (a * n + b * m) / (n + m), draw, MISTAKES["overall"],
                 "one number over all digits can hide that two of them fail completely.")


def reliability(answer) -> Verdict:
    def draw(g):
        k = _integers(g, 4, 9, 1).item()
        counts = _integers(g, 0, 50, k, k) + 20 * torch.eye(k, dtype=torch.long)
        counts[:, _integers(g, 0, k, 1).item()] = 0  # a class that is never answered
        return counts,

    return grade(answer, lambda c: c.diag() / c.sum(0).clamp(min=1), draw, MISTAKES["reliability"],
                 "who uses a model sees its answers, not the truth: a row can be near 100 % and the column poor.")


def logit_gradient(answer) -> Verdict:
    def truth(z, y):
        z.requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(z, y), z)[0]

    def draw(g):
        return torch.randn(7, 5, generator=g), _integers(g, 0, 4, 7)  # the last class never occurs, as 8 and 9 here

    return grade(answer, truth, draw, MISTAKES["logit_gradient"],
                 "autograd agrees; it is also why nothing ever speaks for an unseen class.")


def share_right(answer) -> Verdict:
    return grade(answer, lambda z, y: (z.argmax(1) == y).float().mean().item(),
                 lambda g: (torch.randn(9, 4, generator=g), _integers(g, 0, 4, 9)), MISTAKES["share_right"],
                 "the shape error that would have told was cut away; a model known to be good told it in the end.")


def share_of_nines(answer) -> Verdict:
    return grade_value(answer, 0.0, MISTAKES["share_of_nines"],
                       "no example of either training asks for a larger logit 9, and now all ask for a larger 8.",
                       hint="Think of the sign of the gradient at logit 9.", tol=0.02)
