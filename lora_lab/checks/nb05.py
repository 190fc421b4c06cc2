"""Checks of notebook 05: LoRA from scratch."""

import torch

from lora_lab.checks import NOT_ATTEMPTED, Mistake, Verdict, blank, grade, grade_value, not_yet, right


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def _sizes(generator, low=5, high=14):
    """n, out, in, r: all different, r the smallest."""
    n_out, n_in, n = (torch.randperm(high - low, generator=generator)[:3] + low).tolist()
    return n, n_out, n_in, torch.randint(1, low, (), generator=generator).item()


def _without_gradient(x, W, A, B, s):
    with torch.no_grad():
        h = x @ W.T
    return h + s * (x @ A.T) @ B.T


def _in_place(W, A, B, s):
    W += s * B @ A
    return W


def _and_back(W, A, B, s):
    merged = _in_place(W, A, B, s).clone()
    W -= s * B @ A
    return merged


MISTAKES = {
    "last_saving_rank": [
        Mistake("at equality nothing is saved: r (m + n) must be smaller than m n, not equal",
                lambda m, n: m * n // (m + n)),
        Mistake("that is the largest possible rank; the adapter costs more than the weight long before",
                lambda m, n: min(m, n)),
        Mistake("a whole number is wanted: ranks are counted", lambda m, n: m * n / (m + n)),
    ],
    "lora_forward": [
        Mistake("the update is not divided by r: the scale is alpha / r",
                lambda x, W, b, A, B, alpha: x @ W.T + b + alpha * (x @ A.T) @ B.T),
        Mistake("alpha is missing: the scale is alpha / r",
                lambda x, W, b, A, B, alpha: x @ W.T + b + (x @ A.T) @ B.T / len(A)),
        Mistake("the bias is missing", lambda x, W, b, A, B, alpha: x @ W.T + alpha / len(A) * (x @ A.T) @ B.T),
        Mistake("the frozen part W x is missing: LoRA adds to it, it does not replace it",
                lambda x, W, b, A, B, alpha: b + alpha / len(A) * (x @ A.T) @ B.T),
        Mistake("A and B are swapped: x goes through A (r, in) first; for a square layer with r = in this would run",
                lambda x, W, b, A, B, alpha: x @ W.T + b + alpha / len(A) * (x @ B.T) @ A.T),
    ],
    "lora_gradients": [
        Mistake("the scale s is missing from both", lambda G, A, B, s: (B.T @ G, G @ A.T)),
        Mistake("these are the two gradients in the other order: dA comes first",
                lambda G, A, B, s: (s * G @ A.T, s * B.T @ G)),
        Mistake("that is the version printed on a popular page: G (out, in) and B^T (r, out) do not fit",
                lambda G, A, B, s: (s * G @ B.T, s * G.T @ A)),
    ],
    "moves_first": [
        Mistake("that is the answer for B = 0. Now A is zero: dB = s G A^T contains A, dA = s B^T G does not", "B"),
        Mistake("dB = s G A^T is zero when A is, so only one of them moves", "both"),
        Mistake("that is what happens when both are zero; here B is random, and dA = s B^T G contains it", "none"),
    ],
    "new_adapter": [
        Mistake("in and out are swapped: a weight of nn.Linear is (out, in), so A is (r, in) = (r, weight.shape[1])",
                lambda weight, r: (torch.randn(r, weight.shape[0]) / weight.shape[0] ** 0.5,
                                   torch.zeros(weight.shape[1], r))),
        Mistake("B must be zero, or the model changes before it is trained",
                lambda weight, r: (torch.randn(r, weight.shape[1]) / weight.shape[1] ** 0.5,
                                   torch.randn(weight.shape[0], r))),
        Mistake("A is zero as well: then no gradient ever arrives, and nothing can be learned",
                lambda weight, r: (torch.zeros(r, weight.shape[1]), torch.zeros(weight.shape[0], r))),
        Mistake("the standard deviation of A is not 1 / sqrt(in); torch.randn alone has 1, PEFT's uniform start 0.58 / "
                "sqrt(in)",
                lambda weight, r: (torch.randn(r, weight.shape[1]), torch.zeros(weight.shape[0], r))),
        Mistake("the right size, but uniform: asked is a normal distribution, torch.randn",
                lambda weight, r: (torch.empty(r, weight.shape[1]).uniform_(-1, 1) * (3 / weight.shape[1]) ** 0.5,
                                   torch.zeros(weight.shape[0], r))),
    ],
    "adapted": [
        Mistake("the gradient at x is wrong: the part through the frozen W is missing (no_grad or detach cuts it)",
                _without_gradient),
        Mistake("the gradient at x is wrong: the part through A and B is missing",
                lambda x, W, A, B, s: x @ W.T + s * (x.detach() @ A.T) @ B.T),
        Mistake("the scale s is missing", lambda x, W, A, B, s: x @ W.T + (x @ A.T) @ B.T),
    ],
    "scale": [
        Mistake("that does not divide by r at all", lambda alpha, r, rslora=False: alpha),
        Mistake("rslora is ignored: with it the divisor is the square root of r",
                lambda alpha, r, rslora=False: alpha / r),
        Mistake("that is rsLoRA's scale always; without rslora the divisor is r itself",
                lambda alpha, r, rslora=False: alpha / r ** 0.5),
    ],
    "merged_weight": [
        Mistake("right the first time, but W itself was changed: a second call would add the change twice", _in_place),
        Mistake("the right weight, but W was changed and then changed back: not every bit of it came back", _and_back),
        Mistake("the scale s is missing", lambda W, A, B, s: W + B @ A),
        Mistake("that takes the change off; merging adds it", lambda W, A, B, s: W - s * B @ A),
    ],
    "times_counted": [
        Mistake("A and B were saved besides the merged weight, so the change is there once more", 1),
        Mistake("it is in the saved weight already, and A and B add it again", 0),
        Mistake("once in the weight and once from A and B: nothing adds it a third time", 3),
    ],
}


def last_saving_rank(answer) -> Verdict:
    shapes = iter([(4, 4), (10, 256), (512, 784), (6, 3), (20, 7)])
    return grade(answer, lambda m, n: (m * n - 1) // (m + n), lambda g: next(shapes), MISTAKES["last_saving_rank"],
                 "above this rank an adapter is larger than what it adapts.")


def lora_forward(answer) -> Verdict:
    def draw(g):
        n, n_out, n_in, r = _sizes(g)
        return (_normal(g, n, n_in), _normal(g, n_out, n_in), _normal(g, n_out), _normal(g, r, n_in),
                _normal(g, n_out, r), 3.0 + torch.rand((), generator=g).item())

    return grade(answer, lambda x, W, b, A, B, alpha: x @ W.T + b + alpha / len(A) * (x @ A.T) @ B.T, draw,
                 MISTAKES["lora_forward"], "this one line is LoRA; everything else is care.")


def lora_gradients(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, r = _sizes(g)
        return _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, n_out, r), 1.5

    return grade(answer, lambda G, A, B, s: (s * B.T @ G, s * G @ A.T), draw, MISTAKES["lora_gradients"],
                 "dA contains B and dB contains A: the next section lives on that.")


def moves_first(answer) -> Verdict:
    return grade_value(answer, "A", MISTAKES["moves_first"],
                       "each gradient contains the other matrix, so the zero one is the one that moves.",
                       hint='Answer with "A", "B", "both" or "none".')


def new_adapter(answer) -> Verdict:
    by_message = [mistake.message for mistake in MISTAKES["new_adapter"]]
    for n_out, n_in, r in ((300, 700, 3), (640, 250, 5)):
        try:
            result = answer(torch.empty(n_out, n_in), r)
        except Exception as error:
            return not_yet(f"your function raised {type(error).__name__}: {error}")
        if blank(result):
            return NOT_ATTEMPTED
        if not isinstance(result, tuple | list) or len(result) != 2 or not all(map(torch.is_tensor, result)):
            return not_yet("two tensors were expected: A and B")
        A, B = result
        if A.shape == (r, n_out) or B.shape == (n_in, r):
            return not_yet(by_message[0])
        if A.shape != (r, n_in) or B.shape != (n_out, r):
            return not_yet(f"weight ({n_out}, {n_in}), r = {r}: expected A ({r}, {n_in}) and B ({n_out}, {r}), "
                           f"yours are {tuple(A.shape)} and {tuple(B.shape)}")
        if (B != 0).any():
            return not_yet(by_message[1])
        if not A.any():
            return not_yet(by_message[2])
        if A.unique().numel() < 0.9 * A.numel():
            return not_yet("the entries of A repeat: equal rows would stay equal in training")
        if not 0.9 < A.std().item() * n_in ** 0.5 < 1.1 or abs(A.mean().item()) * n_in ** 0.5 > 0.2:
            return not_yet(by_message[3])
        if A.abs().max() < 2 * A.std():  # uniform ones end at 1.73
            return not_yet(by_message[4])
    return right("the model starts as the base, and every row of A looks in a direction of its own.")


def adapted(answer) -> Verdict:
    def with_gradient(function):
        def both(x, W, A, B, s):
            x.requires_grad_(True)
            h = function(x, W, A, B, s)
            if blank(h):
                return h
            if not h.requires_grad:
                raise RuntimeError("nothing of your result depends on x for autograd: everything stood under no_grad")
            weights = torch.linspace(-1, 2, h.numel()).reshape(h.shape)
            return h, torch.autograd.grad((h * weights).sum(), x)[0]
        return both

    def draw(g):
        n, n_out, n_in, r = _sizes(g)
        return _normal(g, n, n_in), _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, n_out, r), 1.5

    mistakes = [Mistake(message, with_gradient(function)) for message, function in MISTAKES["adapted"]]
    truth = with_gradient(lambda x, W, A, B, s: x @ W.T + s * (x @ A.T) @ B.T)
    return grade(with_gradient(answer), truth, draw, mistakes,
                 "output and gradient are right: earlier adapters learn from true gradients.")


def scale(answer) -> Verdict:
    def draw(g):
        alpha, r = torch.randint(5, 40, (2,), generator=g).tolist()
        return float(alpha), r

    def both(function):
        def values(alpha, r):
            plain, stable = function(alpha, r), function(alpha, r, rslora=True)
            return ... if blank(plain) or blank(stable) else (plain, stable)
        return values

    mistakes = [Mistake(message, both(function)) for message, function in MISTAKES["scale"]]
    return grade(both(answer), both(lambda alpha, r, rslora=False: alpha / (r ** 0.5 if rslora else r)), draw, mistakes,
                 "with it, alpha can stay as it is when r changes.")


def merged_weight(answer) -> Verdict:
    def draw(g):
        _, n_out, n_in, r = _sizes(g)
        return _normal(g, n_out, n_in), _normal(g, r, n_in), _normal(g, n_out, r), 1.5

    def twice(function):
        def values(W, A, B, s):
            before, first = W.clone(), function(W, A, B, s)
            return first if blank(first) else (first.clone(), function(W, A, B, s), bool(torch.equal(W, before)))
        return values

    mistakes = [Mistake(message, twice(function)) for message, function in MISTAKES["merged_weight"]]
    return grade(twice(answer), twice(lambda W, A, B, s: W + s * B @ A), draw, mistakes,
                 "two calls give the same weight, and the base can still be had back.")


def times_counted(answer) -> Verdict:
    return grade_value(answer, 2, MISTAKES["times_counted"],
                       "the file must hold either W with A and B, or W + s B A alone.",
                       hint="Count the places in the saved file that contain the change.")
