"""What works on this machine, and what to do about the rest. Notebook 00 shows it; so does

    python -m lora_lab.environment
"""

import importlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

RAW = Path(__file__).resolve().parents[1] / "data" / "MNIST" / "raw"
DATA_BYTES = {"train-images-idx3-ubyte.gz": 9912422, "train-labels-idx1-ubyte.gz": 28881,
              "t10k-images-idx3-ubyte.gz": 1648877, "t10k-labels-idx1-ubyte.gz": 4542}


class Check(NamedTuple):
    """One line of the report. `detail` varies from machine to machine; `remedy` is empty when ok."""

    name: str
    ok: bool
    detail: str
    remedy: str


def environment_report() -> list[Check]:
    """What the course needs, one Check each; every failure says what to do."""
    checks = [_check("Python", sys.version_info >= (3, 11), platform.python_version(),
                     "Install Python 3.11 or newer, delete .venv and run make lab.")]
    checks += [_check_package(line) for line in _requirements()]
    there = {path.name: path.stat().st_size for path in RAW.glob("*.gz")}
    wrong = [name for name, size in DATA_BYTES.items() if there.get(name) != size]
    checks.append(_check("MNIST files", not wrong, ", ".join(wrong) + " missing or damaged" if wrong else "all four",
                         "Put them back: git checkout -- data/MNIST/raw"))
    checks.append(_check("CPU cores", True, f"{os.cpu_count()} (the notebooks' times are for 2)", ""))
    free = _free_memory()
    checks.append(_check("free memory", free is None or free > 2, f"{free:.1f} GB" if free else "not measured here",
                         "Close other programs or other notebooks' kernels: a notebook takes up to 2 GB."))
    try:
        from lora_lab import cache  # here, not above: lora_lab may be what is broken
        checks.append(_check("cache folder", True, str(cache.folder()), ""))
    except (ImportError, OSError) as error:
        checks.append(_check("cache folder", False, str(error), "Set LORA_LAB_CACHE to a folder you can write to."))
    return [*checks, _check("network", True, "not needed: packages and data are here", "")]


def _check(name, ok, detail, remedy):
    return Check(name, bool(ok), detail, "" if ok else remedy)


def _requirements():
    try:
        return [line for line in metadata.requires("lora_lab") if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return ["lora_lab"]


def _check_package(requirement):
    """Does it import, and is its version in the range that the installed lora_lab asks for?"""
    name = re.match(r"[\w.-]+", requirement).group()
    try:
        importlib.import_module(name)
        version = metadata.version(name)
        return _check(name, Requirement(requirement).specifier.contains(version, prereleases=True), version,
                      f"This kernel has {version}, the course needs {requirement}: run make lab (or pip install -e .).")
    except Exception as error:  # whatever a broken package raises on import is for the reader to see
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        return _check(name, False, f"{type(error).__name__}: {reason}",
                      "Run make lab (or pip install -e .), and choose the kernel Python 3 (ipykernel) of .venv.")


def _free_memory():
    """In GB, or None where it is not cheap to know."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 1e6
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    report = environment_report()
    for check in report:
        print(f"{'ok ' if check.ok else 'NO '} {check.name}: {check.detail}")
        if check.remedy:
            print(f"    {check.remedy}")
    raise SystemExit(not all(check.ok for check in report))
