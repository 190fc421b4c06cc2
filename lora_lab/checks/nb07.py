"""Checks of notebook 07: rank and alpha."""

import math
import re
from statistics import mean, pstdev, stdev, variance

import torch

from lora_lab.checks import Mistake, Verdict, grade, grade_value


def _seeds(middle, reach_of_one):
    return math.floor((reach_of_one / middle) ** 2) + 1


def _paired_seeds(a, b, t, *, scatter=stdev):
    d = [x - y for x, y in zip(a, b, strict=True)]
    return _seeds(mean(d), t * scatter(d))


def _unpaired_seeds(a, b, t):
    return _seeds(mean(a) - mean(b), t * math.sqrt(variance(a) + variance(b)))


def _draw_scores(generator):
    """Scores of two settings: what a seed does to both is large, their own difference small, up or down; in some draws
    large, so that fewer seeds would do than there are."""
    n = int(torch.randint(4, 9, (), generator=generator))
    seeds, noise = torch.rand(2, n, generator=generator, dtype=torch.float64)  # (n,) each
    ahead = 0.008 + 0.008 * torch.rand((), generator=generator, dtype=torch.float64)
    ahead = ahead * 10 if torch.rand((), generator=generator) < 0.3 else ahead
    ahead = ahead if torch.rand((), generator=generator) < 0.5 else -ahead
    b = 0.5 + 0.4 * seeds
    return (b + ahead + 0.1 * (noise - noise.mean())).tolist(), b.tolist(), 2.0 + n / 10


def _doubled(valid, gain, *, last_tried=False, against_start=False, both_ways=False):
    r = 1
    while 2 * r in valid:
        gained = valid[2 * r] - valid[1 if against_start else r]
        if (abs(gained) if both_ways else gained) < gain:
            return 2 * r if last_tried else r
        r *= 2
    return r


def _draw_validation(generator):
    """Accuracies of r = 1, 2, ..., 256: they rise to the end, once by exactly the gain; or rise, crawl or dip deep, and
    so on. All in 1024ths, which are exact in binary."""
    steps, gain = torch.randint(20, 51, (9,), generator=generator) / 1024, 10 / 1024  # (9,)
    steps[0] += 0.25
    if torch.rand((), generator=generator) < 0.7:
        stop = int(torch.randint(1, 5, (), generator=generator))
        crawl, dip = [gain / 2, gain / 2, -gain], [-2 * gain, gain / 2, gain / 2]
        steps[stop:stop + 3] = torch.tensor(crawl if torch.rand((), generator=generator) < 0.6 else dip)
        steps[7], steps[8] = 0.1875, -0.0625
    else:
        steps[4] = gain
    return {2**k: float(steps[:k + 1].sum()) for k in range(9)}, gain


def _doubled_without_end(valid, gain):
    r = 1
    while valid[2 * r] - valid[r] >= gain:
        r *= 2
    return r


def _report(valid, test, *, choose_by, score_by):
    r = max({"valid": valid, "test": test}[choose_by], key={"valid": valid, "test": test}[choose_by].get)
    return r, {"valid": valid, "test": test}[score_by][r]


def _draw_two_tables(generator):
    """Two tables {r: accuracy} whose best ranks differ. The first has a close second, sometimes the best of the second;
    at the first's best rank the second table is sometimes higher, sometimes lower."""
    order = torch.randperm(8, generator=generator).tolist()
    values = [(torch.rand(8, generator=generator) * 0.4 + 0.3).tolist() for _ in range(2)]
    for table, best in zip(values, order, strict=False):
        table[best] = 0.9 + 0.01 * best
    valid, test = values
    close = order[1] if torch.rand((), generator=generator) < 0.5 else min(order[2:])
    valid[close] = valid[order[0]] - 0.0005
    test[order[0]] = valid[order[0]] + (0.005 if torch.rand((), generator=generator) < 0.5 else -0.2)
    test[order[1]] = 0.999
    return [{2**k: value for k, value in enumerate(table)} for table in values]


MISTAKES = {
    "seeds_needed": [
        Mistake("you add up the scatter of a and of b as if they had nothing to do with each other. They share their "
                "seeds: a seed that is hard for one is hard for the other. Form d = a - b first, then its scatter.",
                _unpaired_seeds),
        Mistake("you solved for sqrt(n), not for n. Half the reach takes four times the seeds: square it.",
                lambda a, b, t: math.floor(math.sqrt(_paired_seeds(a, b, t) - 1)) + 1),
        Mistake("you solved for sqrt(n), not for n, and where b is ahead your number of seeds is negative: square it.",
                lambda a, b, t: (lambda d: math.ceil(t * stdev(d) / mean(d)))(
                    [x - y for x, y in zip(a, b, strict=True)])),
        Mistake("one seed short: with your n the interval still contains 0. Round up, not down.",
                lambda a, b, t: _paired_seeds(a, b, t) - 1),
        Mistake("a number of seeds is whole: round up",
                lambda a, b, t: (lambda d: (t * stdev(d) / mean(d)) ** 2)([x - y for x, y in zip(a, b, strict=True)])),
        Mistake("t is missing: the interval reaches t standard errors to each side, not one",
                lambda a, b, t: _paired_seeds(a, b, 1)),
        Mistake("you divide by the square root of the seeds you have, and then count seeds once more. s is the scatter "
                "of single seeds: what you look for is the n under the root.",
                lambda a, b, t: _paired_seeds(a, b, t / math.sqrt(len(a)))),
        Mistake("you divide the squared deviations by n. The mean is itself taken from the n values, so divide by "
                "n - 1: stdev does, and so does torch's .std().",
                lambda a, b, t: _paired_seeds(a, b, t, scatter=pstdev)),
        Mistake("a and b are lists, which cannot be subtracted as a whole. Go through them in pairs: "
                "[x - y for x, y in zip(a, b)].", lambda a, b, t: a - b),
    ],
    "alpha_for_sqrt": [
        Mistake("multiplied instead of divided: with your value both rules differ by a factor r0. Write down "
                "alpha / r0 = alpha_sqrt / sqrt(r0) and solve for alpha_sqrt.",
                lambda alpha, r0: alpha * math.sqrt(r0)),
        Mistake("alpha / r0 is the scale s itself. The square-root rule divides by sqrt(r0) once more, so its alpha "
                "has to be larger than s.", lambda alpha, r0: alpha / r0),
        Mistake("the same alpha under both rules gives the same s only at r = 1.", lambda alpha, r0: alpha),
    ],
    "honest_report": [
        Mistake("this still chooses by the test set. A rank chosen there is the luckiest of all on these examples; "
                "choose by `valid`.", lambda valid, test: _report(valid, test, choose_by="test", score_by="test")),
        Mistake("a choice by both together is a choice by the test set as well: choose by `valid` alone",
                lambda valid, test: (lambda r: (r, test[r]))(max(valid, key=lambda r: valid[r] + test[r]))),
        Mistake("this still chooses by the test set; choose by `valid`, report `test`",
                lambda valid, test: _report(valid, test, choose_by="test", score_by="valid")),
        Mistake("the choice is right, but the accuracy you report is the one you chose by, the luckiest of all. "
                "Report the test accuracy of the chosen rank.",
                lambda valid, test: _report(valid, test, choose_by="valid", score_by="valid")),
        Mistake("max over a dictionary compares its keys, here the ranks. To compare the accuracies: "
                "max(valid, key=valid.get).", lambda valid, test: (max(valid), test[max(valid)])),
        Mistake("the rank is right. Report what it has on the test set, whether that is more than on `valid` or less.",
                lambda valid, test: (lambda r: (r, min(valid[r], test[r])))(max(valid, key=valid.get))),
        Mistake("return the rank first, then its accuracy.",
                lambda valid, test: _report(valid, test, choose_by="valid", score_by="test")[::-1]),
    ],
    "choose_rank": [
        Mistake("you return the rank that did not pay any more. The one before it is as good at half the price.",
                lambda valid, gain: _doubled(valid, gain, last_tried=True)),
        Mistake("a rise that is too small is enough for you: a doubling has to gain at least `gain`, as a difference, "
                "not in proportion",
                lambda valid, gain: _doubled(valid, 1e-9)),
        Mistake("a fall is no gain: compare the difference itself, not its size",
                lambda valid, gain: _doubled(valid, gain, both_ways=True)),
        Mistake("the last doubling, to 256, belongs to the table too", lambda valid, gain: min(
            _doubled(valid, gain), 128)),
        Mistake("a gain of exactly `gain` still pays: >=", lambda valid, gain: _doubled(valid, gain * 1.0001)),
        Mistake("you compare with r = 1 each time, so the gain never seems to end. Compare each rank with the one "
                "before it.", lambda valid, gain: _doubled(valid, gain, against_start=True)),
        Mistake("you go on to the end of the table, which trains every rank. The point of the procedure is to stop at "
                "the first doubling that does not pay.", lambda valid, gain: max(valid, key=valid.get)),
        Mistake("the table ends at 256, and where every doubling pays your loop asks it for 512. Ask whether 2 * r is "
                "in `valid` before you look it up.", _doubled_without_end),
    ],
    "what_next": [
        Mistake("fc3 has 10 rows: 10 is the largest rank that its update can have. No more is to be had.", "a"),
        Mistake("another seed brings another luck, a point or two. What is missing here is more.", "b"),
        Mistake("merging changes the file, not what the model computes.", "d"),
    ],
}


def seeds_needed(answer) -> Verdict:
    return grade(answer, _paired_seeds, _draw_scores, MISTAKES["seeds_needed"],
                 "what all runs of a seed share drops out of the difference, so few seeds can settle what many "
                 "unpaired ones would not.")


def alpha_for_sqrt(answer) -> Verdict:
    def draw(generator):
        alpha, r0 = (int(torch.randint(2, 200, (), generator=generator)) for _ in range(2))
        return float(alpha), r0

    return grade(answer, lambda alpha, r0: alpha / math.sqrt(r0), draw, MISTAKES["alpha_for_sqrt"],
                 "the two rules are two ways to go on from a rank where they agree; this pins them together.")


def honest_report(answer) -> Verdict:
    return grade(answer, lambda valid, test: _report(valid, test, choose_by="valid", score_by="test"), _draw_two_tables,
                 MISTAKES["honest_report"],
                 "validation data choose, test data judge, once: only then is the reported number one to expect again.")


def choose_rank(answer) -> Verdict:
    return grade(answer, _doubled, _draw_validation, MISTAKES["choose_rank"],
                 "it stops by itself, and has then trained only one rank more than it uses.", rounds=12)


def what_next(answer) -> Verdict:
    letter = re.match(r"\W*([a-z])\b", answer, re.I) if isinstance(answer, str) else None  # "c) because ..." too
    cleaned = letter[1].lower() if letter else answer
    return grade_value(cleaned, "c", MISTAKES["what_next"],
                       "the last layer can only recombine what the layers below hand it. With those adapted as well, "
                       "100 steps led further than the last layer alone went.",
                       hint='Answer with one letter: "a", "b", "c" or "d".')


