"""Seconds and peak memory of every notebook from an empty cache."""

import os
import tempfile
import threading
import time

import psutil

from benchmarks.timing import markdown
from tools.notebooks import execute, paths, read


class _Peak(threading.Thread):
    """Watches the memory of all child processes: the kernel and its workers (memory that they share counts once)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.cuda, self.watching = 0, 0, True

    def run(self):
        while self.watching:
            children = psutil.Process().children(recursive=True)
            total = sum(_of(child, lambda c: getattr(m := c.memory_full_info(), "pss", m.uss)) for child in children)
            if total > self.peak:
                self.peak, self.cuda = total, sum(_of(child, _cuda) for child in children)
            time.sleep(1)  # not more often: a look takes some 60 ms of a core, which the notebook lacks then


def _of(process, measure) -> int:
    try:
        return measure(process)
    except psutil.Error:  # it has ended
        return 0


def _cuda(process) -> int:
    """What the CUDA libraries of PyPI's torch take (Linux tells); the CPU builds do not have them."""
    maps = process.memory_maps() if hasattr(process, "memory_maps") else []
    return sum(getattr(m, "pss", 0) for m in maps if "nvidia" in m.path or "torch_cuda" in m.path)


def run() -> str:
    rows = []
    for path in paths():
        with tempfile.TemporaryDirectory() as empty:
            os.environ["LORA_LAB_CACHE"] = empty
            watch = _Peak()
            watch.start()
            seconds = execute(read(path))
            watch.watching = False
            watch.join()
        rows.append([path.stem, f"{seconds:.0f}", f"{watch.peak / 1e9:.2f}", f"{(watch.peak - watch.cuda) / 1e9:.2f}"])
    return markdown(["notebook", "seconds", "peak memory, GB", "without the CUDA libraries of PyPI's torch, GB"], rows)
