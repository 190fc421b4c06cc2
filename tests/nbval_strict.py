"""What `pytest --nbval` lacks; loaded with `-p tests.nbval_strict`.

A kernel that has died is noticed within a second (nbval waits for the whole cell timeout). The cell timeout is how long
a progress line may stand still, so that a slow machine may take its time over a sweep; a cell that shows none, and no
figure either, gets SILENT of it, whatever it prints, and one whose progress line moves on and on LONGEST times as much.
A cell that was never run fails (nbval compares nothing and passes it).
"""

import time
from queue import Empty

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

SILENT, LONGEST = 0.4, 2


def await_reply(self, msg_id, timeout):
    """As nbval's, but looks every second whether the kernel lives and what it has said meanwhile."""
    heard = self.heard = vars(self).get("heard", [])  # for get_message
    start = moved = time.monotonic()
    patience = SILENT * timeout
    while True:
        try:
            message = self.kc.get_shell_msg(timeout=min(1, timeout))
        except Empty:
            if not self.is_alive():
                pytest.fail("the kernel died in this cell", pytrace=False)
            while self.kc.iopub_channel.msg_ready():
                heard.append(self.kc.get_iopub_msg())
                if heard[-1]["msg_type"] == "display_data":
                    patience = timeout
                elif heard[-1]["msg_type"] == "update_display_data":
                    moved = time.monotonic()
            if time.monotonic() >= min(start + LONGEST * timeout, moved + patience):
                raise
            continue
        if message["parent_header"].get("msg_id") == msg_id:
            if message["content"]["status"] == "aborted":
                raise RuntimeError("the kernel did not run the cell")
            return


def get_message(self, stream, timeout=None):
    """As nbval's, but first what await_reply has heard. It is asked for what a cell puts out, once the cell is over."""
    return self.heard.pop(0) if self.heard else self.kc.get_iopub_msg(timeout=timeout)


RunningKernel.await_reply = await_reply
RunningKernel.get_message = get_message


def pytest_runtest_setup(item):
    if isinstance(item, IPyNbCell) and item.cell.source.strip() and item.cell.execution_count is None:
        pytest.fail("never run, so there is nothing to compare: python -m tools.notebooks run", pytrace=False)
