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
        self.peak, self.watching = 0, True

    def run(self):
        while self.watching:
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.uss)
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.3)


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
        rows.append([path.stem, f"{seconds:.0f}", f"{watch.peak / 2**30:.1f}"])
    return markdown(["notebook", "seconds", "peak memory, GiB"], rows)
