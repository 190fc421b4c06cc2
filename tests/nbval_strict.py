"""What `pytest --nbval` lacks; loaded with `-p tests.nbval_strict`.

A kernel that has died is noticed within a second (nbval waits for the whole cell timeout), a cell without end ends
soon, and a cell that was never run fails (nbval compares nothing and passes it).
"""

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
QUIET = 40  # seconds: a cell that works for more than 3 s shows progress, so one that shows none has long gone astray


def cell_timeout(cell, given: float) -> float:
    """`given` for a cell whose stored output has a progress line, QUIET at most for any other."""
    return given if "◷" in str(cell.get("outputs")) else min(given, QUIET)


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
