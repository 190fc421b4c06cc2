"""What `pytest --nbval` lacks; loaded with `-p tests.nbval_strict`.

A kernel that has died is noticed within a second (nbval waits for the whole cell timeout), a cell without end ends in
about the time that such a cell may take, and a cell that was never run fails (nbval compares nothing and passes it).
"""

import os
import time
from queue import Empty

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell


def await_reply(self, msg_id, timeout=None):
    """As nbval's, but looks every second whether the kernel still lives."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            message = self.get_message("shell", timeout=1 if end is None else min(1, max(0, end - time.monotonic())))
        except Empty:
            if not self.is_alive():
                pytest.fail("the kernel died in this cell", pytrace=False)
            if end is not None and time.monotonic() >= end:
                raise
            continue
        if message["parent_header"].get("msg_id") == msg_id:
            if message["content"]["status"] == "aborted":
                raise RuntimeError("the kernel did not run the cell")
            return


RunningKernel.await_reply = await_reply


def cell_timeout(cell, given: float) -> float:
    """25 s, and five times the seconds that the stored progress lines of the cell give; at most `given`.

    A cell that works for more than 3 s shows progress, so one that runs on has gone astray. With the processor's
    instructions limited to SSE4.2 twelve times: beside another notebook a sweep of 7.3 s took more than 62 there."""
    times = 12 if os.environ.get("ATEN_CPU_CAPABILITY") == "default" else 5
    lines = [output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    stored = sum(float(line.split()[-2]) for line in lines if line.startswith("◷") and line.endswith(" s"))
    return min(given, 25 + times * stored)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not isinstance(item, IPyNbCell):
        return (yield)
    option = item.config.option
    given, option.nbval_cell_timeout = option.nbval_cell_timeout, cell_timeout(item.cell, option.nbval_cell_timeout)
    try:
        return (yield)
    finally:
        option.nbval_cell_timeout = given


def pytest_runtest_setup(item):
    if isinstance(item, IPyNbCell) and item.cell.source.strip() and item.cell.execution_count is None:
        pytest.fail("never run, so there is nothing to compare: python -m tools.notebooks run", pytrace=False)
