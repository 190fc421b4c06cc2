"""Checks of notebook 06: adapting to 8 and 9."""

from contextlib import suppress

import torch

from lora_lab.checks import (
    NOT_ATTEMPTED,
    Mistake,
    Verdict,
    WrongForm,
    blank,
    grade,
    grade_value,
    matrices,
    not_yet,
    right,
    same,
)


def _pick(y, n, generator, repeat=False):
    old = (y < 8).nonzero()[:, 0]
    if repeat:
        return old[torch.randint(len(old), (n,), generator=generator)]
    return old[torch.randperm(len(old), generator=generator)[:n]]


def _new(y):
    return (y >= 8).nonzero()[:, 0]


def _first_two(points):
    return sorted({max(range(len(points)), key=lambda k: points[k][axis]) for axis in (0, 1)})


def _front(points, beats):
    return [k for k, p in enumerate(points) if not any(beats(q, p) for q in points)]


def _dominates(q, p):
    return q[0] >= p[0] and q[1] >= p[1] and q != p


def _blended(x, W, As, Bs, mix, s):
    return x @ W.T + s * torch.einsum("ni,nj,jri,jor->no", x, mix, As, Bs)


def _rows(d8, d9, first=8, second=9):
    B = torch.zeros(10, 2)
    B[first, 0] = B[second, 1] = 1
    return torch.stack([d8, d9]), B


MISTAKES = {
    "all_ten": [
        Mistake("half would be right if the groups were equally large; there are four times as many old digits", 0.5),
        Mistake("that is the accuracy on 8 and 9 alone", 1.0),
        Mistake("that is a percentage; a number from 0 to 1 is wanted", 19.83),
        Mistake("that is what is lost, not what is right", 0.8017),
        Mistake("divide by all 10,000 test digits, not by the old ones", 1983 / 8017),
        Mistake("that is what the model above reaches; the question is how much is possible. Give three digits.", 0.19),
        Mistake("that is what the model above reaches; the question is how much is possible", 0.189),
        Mistake("two of ten classes, but they are not equally frequent: count the digits", 0.2),
    ],
    "replay_indices": [
        Mistake("some old examples come more than once: draw without repetition",
                lambda y, n, g: torch.cat([_new(y), _pick(y, n, g, repeat=True)])),
        Mistake("always the first n old examples: that is no random choice",
                lambda y, n, g: torch.cat([_new(y), (y < 8).nonzero()[:n, 0]])),
        Mistake("examples with label 8 or 9 are missing: all of them belong to it",
                lambda y, n, g: torch.cat([_new(y)[:n], _pick(y, n, g)])),
        Mistake("the replayed part contains 8s or 9s: draw from the old digits only, and return their places in y",
                lambda y, n, g: torch.cat([_new(y), torch.randperm(len(y), generator=g)[:n]])),
    ],
    "front": [
        Mistake("those are only the best in each number; unbeaten compromises belong to the front too", _first_two),
        Mistake("every point is beaten, if only by itself: require that the other is better in one of the two numbers",
                lambda points: []),
        Mistake("that drops a point as soon as another is better in one number; it must be at least as good in both",
                lambda points: _front(points, lambda q, p: (q[0] > p[0] or q[1] > p[1]) and q != p)),
        Mistake("of two equal points neither beats the other: both stay",
                lambda points: [k for k, p in enumerate(points) if not any(
                    j != k and q[0] >= p[0] and q[1] >= p[1] for j, q in enumerate(points))]),
        Mistake("points.index(p) finds only the first of several equal points: count along, with enumerate",
                lambda points: [points.index(points[k]) for k in _front(points, _dominates)]),
        Mistake("indices are wanted, not the points themselves",
                lambda points: sorted(points[k] for k in _front(points, _dominates))),
        Mistake("that keeps the points that beat nobody: the comparison is the wrong way round",
                lambda points: _front(points, lambda q, p: _dominates(p, q))),
        Mistake("a point that is equal in one number and worse in the other is beaten, too",
                lambda points: _front(points, lambda q, p: q[0] > p[0] and q[1] > p[1])),
    ],
    "two_row_adapter": [
        Mistake("rows 8 and 9 are exchanged", lambda d8, d9: _rows(d8, d9, 9, 8)),
        Mistake("the order of the results: A (2, in) first, then B (10, 2)", lambda d8, d9: _rows(d8, d9)[::-1]),
        Mistake("off by one: the row of digit 8 is number 8, counted from 0", lambda d8, d9: _rows(d8, d9, 7, 8)),
        Mistake("d8 and d9 go into rows 0 and 1; they belong into rows 8 and 9", lambda d8, d9: _rows(d8, d9, 0, 1)),
        Mistake("both rows get the sum: then the change has rank one",
                lambda d8, d9: (torch.stack([d8, d9]), _rows(d8, d9)[1] + _rows(d8, d9, 9, 8)[1])),
    ],
    "adapter_bytes": [
        Mistake("those are numbers; each takes bytes_per_number bytes",
                lambda shapes, r, bytes_per_number=4: sum(r * (m + n) for m, n in shapes)),
        Mistake("that is the size of the weights themselves; the adapter stores A and B only",
                lambda shapes, r, bytes_per_number=4: bytes_per_number * sum(m * n for m, n in shapes)),
        Mistake("those are bits: 8 of them are a byte",
                lambda shapes, r, bytes_per_number=4: 8 * bytes_per_number * sum(r * (m + n) for m, n in shapes)),
        Mistake("W itself is not in the file, only A and B",
                lambda shapes, r, bytes_per_number=4: bytes_per_number * sum(m * n + r * (m + n) for m, n in shapes)),
        Mistake("that takes 4 bytes a number, whatever bytes_per_number says",
                lambda shapes, r, bytes_per_number=4: 4 * sum(r * (m + n) for m, n in shapes)),
        Mistake("B (out, r) is missing",
                lambda shapes, r, bytes_per_number=4: bytes_per_number * sum(r * n for _, n in shapes)),
    ],
    "blended_forward": [
        Mistake("the A's are blended and the B's are blended, and then multiplied: that brings in B_i A_j of two "
                "different adapters. Blend what the adapters give, B_j A_j x",
                lambda x, W, As, Bs, mix, s: x @ W.T + s * torch.einsum(
                    "ni,nj,jri,nk,kor->no", x, mix, As, mix, Bs)),
        Mistake("each example gets only the adapter with the largest share; the others have theirs as well",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, torch.eye(len(As))[mix.argmax(1)], s)),
        Mistake("every example gets the same blend; row k of `mix` is for example k alone",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, mix.mean(0).expand(len(x), -1), s)),
        Mistake("all adapters count in full, for every example: `mix` is not used",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, torch.ones_like(mix), s)),
        Mistake("the base is blended too: W x belongs in once, whatever the shares add up to",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, mix, s) + (mix.sum(1)[:, None] - 1) * (x @ W.T)),
        Mistake("the shares are used as they are given; nobody asked that they add up to 1",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, mix / mix.sum(1, keepdim=True), s)),
        Mistake("the scale s is missing", lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, mix, 1.0)),
        Mistake("W x, the base's own part, is missing",
                lambda x, W, As, Bs, mix, s: _blended(x, W, As, Bs, mix, s) - x @ W.T),
    ],
    "serve": [
        Mistake("merged weights hold one task; the next request would need an un-merge and a new merge", "merged"),
        Mistake("answer with one of the two words", "both"),
    ],
}


def all_ten(answer) -> Verdict:
    return grade_value(answer, 0.1983, MISTAKES["all_ten"],
                       "a perfect reader of two digits that has lost the other eight looks like a bad model of all.",
                       hint="Right answers at best: none of 8,017 and all of 1,983. Divide by 10,000.", tol=4e-4)


def replay_indices(answer) -> Verdict:
    messages = [mistake.message for mistake in MISTAKES["replay_indices"]]
    for seed, size, n in ((1, 300, 60), (2, 500, 90)):
        y = torch.randint(10, (size,), generator=torch.Generator().manual_seed(seed))
        k = len(_new(y))
        picks = []
        for draw in (3, 4, 3):
            try:
                found = answer(y.clone(), n, torch.Generator().manual_seed(draw))
            except Exception as error:
                return not_yet(f"your function raised {type(error).__name__}: {error}")
            if found is None:
                return not_yet("your function returns nothing: is `return` missing?")
            if blank(found):
                return NOT_ATTEMPTED
            with suppress(TypeError, ValueError, RuntimeError):  # a list of numbers will do
                found = torch.as_tensor(found)
            whole = torch.is_tensor(found) and found.dtype in (torch.int64, torch.int32)
            if not whole or found.ndim != 1:
                return not_yet("a tensor of indices was expected, one axis, whole numbers")
            if len(found) and not 0 <= found.min() <= found.max() < size:
                return not_yet(f"places in y run from 0 to {size - 1}, yours from {found.min()} to {found.max()}")
            if len(found) > 10 > found.max():
                return not_yet("those are labels; asked are their places in y")
            picks.append(found)
        pick = picks[0]
        new, old = pick[y[pick] >= 8], pick[y[pick] < 8]
        if len(new.unique()) < k:
            return not_yet(messages[2])
        if len(new) > k:
            twice = len(pick) - len(new) == n
            return not_yet("some 8s or 9s come more than once" if twice else messages[3])
        if len(old) != n:
            return not_yet(f"{n} old examples were expected, you have {len(old)}")
        if len(old.unique()) < n:
            return not_yet(messages[0])
        if sorted(picks[0].tolist()) == sorted(picks[1].tolist()):
            return not_yet(messages[1])
        often = torch.cat([torch.as_tensor(answer(y.clone(), n, torch.Generator().manual_seed(d))) for d in range(100)])
        if len(often.unique()) < size:
            return not_yet("in 100 draws some old examples never came: draw from all of them")
        if sorted(picks[0].tolist()) != sorted(picks[2].tolist()):
            return not_yet("the same generator state gives different examples: draw with the generator you are given")
    return right("these are the batches that keep 0 to 7 alive.")


def front(answer) -> Verdict:
    def draw(g):
        points = [(a, b) for a, b in torch.randint(0, 9, (14, 2), generator=g).tolist()]
        if torch.rand((), generator=g) < 0.4:
            points[3] = (9, 9)  # better than all others, in both
        return points,

    def ordered(function):
        def values(points):
            found, wanted = function(points), _front(points, _dominates)
            found = sorted(found) if isinstance(found, set | list | tuple) else found
            if not blank(found) and not same(found, wanted):
                raise WrongForm(f"here {len(wanted)} of the {len(points)} points are on the front; you return {found}")
            return found
        return values

    mistakes = [Mistake(message, ordered(function)) for message, function in MISTAKES["front"]]
    return grade(ordered(answer), lambda points: _front(points, _dominates), draw, mistakes,
                 "the front is the honest summary of a trade-off.")


def two_row_adapter(answer) -> Verdict:
    def product(function):
        def values(d8, d9):
            result = function(d8, d9)
            if blank(result):
                return result
            A, B = matrices(result, "two matrices, A (2, n) and B (10, 2)")
            if A.shape != (2, len(d8)) or B.shape != (10, 2):
                raise WrongForm(f"expected A (2, {len(d8)}) and B (10, 2), got {tuple(A.shape)} and {tuple(B.shape)}")
            return B.to(d8.dtype) @ A.to(d8.dtype)  # B may hold whole numbers
        return values

    mistakes = [Mistake(message, product(function)) for message, function in MISTAKES["two_row_adapter"]]
    return grade(product(answer), lambda d8, d9: (BA := _rows(d8, d9))[1] @ BA[0],
                 lambda g: (torch.randn(7, generator=g), torch.randn(7, generator=g)), mistakes,
                 "B says where, A says what.")


def adapter_bytes(answer) -> Verdict:
    def draw(g):
        shapes = [tuple(s) for s in torch.randint(5, 90, (3, 2), generator=g).tolist()]
        return shapes, *torch.randint(2, 9, (2,), generator=g).tolist()

    def truth(shapes, r, bytes_per_number=4):
        return bytes_per_number * sum(r * (m + n) for m, n in shapes)

    return grade(answer, truth, draw, MISTAKES["adapter_bytes"],
                 "this is why 28 of these adapters fit where one model did, and of GPT-3's over 9,000.")


def blended_forward(answer) -> Verdict:
    def draw(g):
        n, n_out, n_in, r, m = 9, 5, 7, 2, 3
        return (torch.randn(n, n_in, generator=g), torch.randn(n_out, n_in, generator=g),
                torch.randn(m, r, n_in, generator=g), torch.randn(m, n_out, r, generator=g),
                torch.rand(n, m, generator=g), 1.5)

    return grade(answer, _blended, draw, MISTAKES["blended_forward"],
                 "one 1 in a row of `mix` picks an adapter, several shares blend them, and a row of zeros is the base.")


def serve(answer) -> Verdict:
    return grade_value(answer, "unmerged", MISTAKES["serve"], "the base is read once for a batch of many customers.",
                       hint='Answer with "merged" or "unmerged".')
