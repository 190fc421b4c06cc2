"""Interleaved timing: all contestants in turn, in one process, so that a machine that drifts drifts for all."""

import random
import statistics
import time
from collections.abc import Callable


def interleaved(contestants: dict[str, Callable], rounds: int, warmup: int = 5) -> dict[str, list[float]]:
    """Seconds of each call, by name; in every round each contestant runs once, in a new random order."""
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for k in range(-warmup, rounds):
        names = list(contestants)
        shuffle(names)
        for name in names:
            started = time.perf_counter()
            contestants[name]()
            if k >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(a: list[float], b: list[float]) -> str:
    """The median of the pair-wise ratios a / b, and their middle half."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
