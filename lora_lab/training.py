"""Training on tensors in memory, and accuracy on the digits that matter here."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.data import NEW, OLD, Digits
from lora_lab.progress import progress


class History(NamedTuple):
    """What `fit` saw: the loss of each step, and what `watch` returned, by step."""

    loss: list[float]
    watched: dict[int, object]


def fit(model: nn.Module, data: Digits, *, seed: int, lr: float, epochs: float | None = None, steps: int | None = None,
        batch_size: int = 128, weight_decay: float = 0.0,
        watch: Callable[[nn.Module], object] | None = None, watch_at=(), label: str | None = "fit") -> History:
    """Train, in place, those parameters of `model` that require a gradient.

    AdamW on the cross-entropy of `data` (x (n, ...), y (n,)), in batches drawn by index without replacement within an
    epoch. The learning rate goes up to `lr` and down again in one cycle, AdamW's beta1 down and up (arXiv 1708.07120).
    Give either `epochs` or `steps`. `watch(model)` is called before step k for each k in `watch_at` (k = the number of
    steps means: at the end). `label` names the progress line; None: no line.
    The same seed on the same number of threads gives bit-identical weights; the caller's random state is untouched.
    Raises ValueError when there is nothing to train, no data, not exactly one of `epochs` and `steps`, or nothing to
    watch with.
    """
    x, y = data
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("every parameter of the model is frozen: nothing to train. Inject LoRA or unfreeze something.")
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(f"training needs as many labels as examples, and at least one: got {len(x)} and {len(y)}")
    if (epochs is None) == (steps is None):
        raise ValueError("give either epochs or steps")
    if watch_at and watch is None:
        raise ValueError("watch_at says when to watch, and there is no watch")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    per_epoch = -(-len(x) // batch_size)
    steps = round(epochs * per_epoch) if steps is None else steps
    if steps < 1:
        raise ValueError(f"{steps} steps: nothing to train for")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1)
    order = torch.Generator().manual_seed(seed)
    losses, watched, watch_at = [], {}, set(watch_at)
    bar = progress(total=steps, desc=label, disable=label is None)
    with torch.random.fork_rng(devices=[]), _mode(model, training=True), bar:
        torch.manual_seed(seed)  # for dropout
        for step in range(steps):
            if step in watch_at:
                with torch.random.fork_rng(devices=[]):  # to watch changes nothing
                    watched[step] = watch(model)
                model.train()
            if step % per_epoch == 0:
                batches = torch.randperm(len(x), generator=order).split(batch_size)
            batch = batches[step % per_epoch]  # (b,)
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            bar.update()
        if steps in watch_at:
            watched[steps] = watch(model)
    return History(torch.stack(losses).tolist(), watched)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch_size: int = 2000) -> Tensor:
    """The model's outputs (n, classes) in evaluation mode, computed in batches."""
    with _mode(model, training=False):
        return torch.cat([model(part) for part in x.split(batch_size)])


@contextmanager
def _mode(model: nn.Module, training: bool):
    """Training or evaluation mode inside the block, afterwards the model's own again, after an error too."""
    was_training = model.training
    try:
        yield model.train(training)
    finally:
        model.train(was_training)


class Accuracy(NamedTuple):
    """Shares of right answers, 0 to 1: over the old digits (0-7), the new ones (8, 9), all, and for each digit."""

    old: float
    new: float
    all: float
    digits: tuple[float, ...]


def accuracy(model: nn.Module, data: Digits) -> Accuracy:
    """How often the largest logit is the label; a group without examples is nan."""
    right = logits(model, data.x).argmax(1) == data.y  # (n,)

    def share(digits) -> float:
        return right[torch.isin(data.y, torch.tensor(digits))].float().mean().item()

    return Accuracy(share(OLD), share(NEW), share(OLD + NEW), tuple(share((d,)) for d in OLD + NEW))
