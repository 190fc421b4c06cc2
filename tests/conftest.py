"""One thread for each test process, and a closing count of what the tests of the notebooks covered."""

import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the kernels that tests start inherit it


def pytest_terminal_summary(terminalreporter):
    """Add up what passing tests noted with record_property("what", number)."""
    counts = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for what, number in report.user_properties:
            counts[what] += number
    if counts:
        terminalreporter.section("the course in numbers")
        for what, number in counts.items():
            terminalreporter.write_line(f"{number:5d} {what}")
