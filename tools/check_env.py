"""What works on this machine, and what to do about the rest: one line for each thing that the course needs.

make check, or python tools/check_env.py; notebook 00 runs it too. Standard library only, up to what it checks.
"""

import importlib
import platform
import re
import sys
from importlib import metadata
from typing import NamedTuple

INSTALL = "Run make lab (or pip install -e .), and choose the kernel Python 3 (ipykernel) of .venv."


class Check(NamedTuple):
    """`detail` varies from machine to machine; `remedy` says what to do and is empty when all is well."""

    name: str
    detail: str
    remedy: str = ""


def environment_report() -> list[Check]:
    """What the course needs, one Check each."""
    old = sys.version_info < (3, 11)
    checks = [Check("Python", platform.python_version(),
                    "Install Python 3.11 or newer, delete .venv and run make lab." if old else "")]
    checks += [attempt(re.match(r"[\w.-]+", line)[0], package, line, remedy=INSTALL) for line in requirements()]
    checks += [attempt("MNIST", digits, remedy="Put the files back: git checkout -- data/MNIST/raw"),
               attempt("memory", memory, remedy="Close other programs and other notebooks: one takes up to 2 GB."),
               attempt("cache", cache_folder, remedy="Set LORA_LAB_CACHE to a folder that you can write to.")]
    return checks


def attempt(name, probe, *arguments, remedy) -> Check:
    """What `probe` found; or, if it raised, what it raised and the remedy."""
    try:
        return Check(name, probe(*arguments))
    except Exception as error:  # whatever a broken package raises is for the reader to see
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        return Check(name, f"{type(error).__name__}: {reason}", INSTALL if isinstance(error, ImportError) else remedy)


def requirements() -> list[str]:
    try:
        return [line for line in metadata.requires("lora_lab") if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return ["lora_lab"]


def package(requirement) -> str:
    """Does it import, and is its version in the range that the course asks for?"""
    name = re.match(r"[\w.-]+", requirement)[0]
    importlib.import_module(name)
    from packaging.requirements import Requirement  # jupyterlab brings it
    version = metadata.version(name)
    if not Requirement(requirement).specifier.contains(version, prereleases=True):
        raise ValueError(f"this kernel has {version}, the course needs {requirement}")
    return version


def digits() -> str:
    from lora_lab.data import mnist
    return " and ".join(f"{len(part.y):,}" for part in mnist()) + " digits"


def memory() -> str:
    import psutil  # ipykernel brings it
    free = psutil.virtual_memory().available / 1e9
    if free < 2:
        raise MemoryError(f"only {free:.1f} GB are free")
    return f"{free:.0f} GB free"


def cache_folder() -> str:
    from lora_lab import cache
    return str(cache.folder())


def main(words) -> None:
    """Print the report; with "details" also what is well. Exits with the number of checks that failed."""
    report = environment_report()
    for check in report:
        detail = f": {check.detail}" if check.remedy or "details" in words else ""
        print(f"{'FAILS' if check.remedy else 'ok   '} {check.name}{detail}")
        if check.remedy:
            print(f"      {check.remedy}")
    if failed := sum(bool(check.remedy) for check in report):
        sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
