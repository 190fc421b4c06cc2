"""Make the course's environment and open it. Standard library only: this runs before anything is installed.

python -I tools/setup_env.py env           .venv with the tested versions (make env)
python -I tools/setup_env.py env test      the same with what the tests need (make test)
python -I tools/setup_env.py lab [PORT]    the same as env, then JupyterLab on notebook 00 (make lab)
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "lora_lab.stamp"  # "installing" while pip works, then "<fingerprint>" or "<fingerprint> test"
LOG = VENV / "pip.log"
OLDEST = (3, 11)
NO_NETWORK = re.compile("connection broken by|HTTPSConnectionPool|name resolution|ConnectionError")  # in pip's log
NO_BUILD = re.compile("No matching distribution|ResolutionImpossible")


# --- making .venv: each problem ends in one sentence (SystemExit prints it and no trace) ---------------------------

def make_env(test=False):
    """Make or mend .venv, or return at once if it is already right. `test` adds the packages of the test suite."""
    state = STAMP.read_text().split() if STAMP.exists() else []
    if state[:1] == [fingerprint()] and (not test or "test" in state):
        return
    test = test or "test" in state
    if VENV.exists() and not (VENV.is_dir() and os.access(VENV, os.W_OK)):
        raise SystemExit(f"{VENV} is not a folder that you can write to: delete it and run the same command again.")
    if VENV.exists() and (state == ["installing"] or not venv_version()):
        print("The .venv here is unfinished or does not run (an interrupted set-up?): it is made anew.")
        venv_python().unlink(missing_ok=True)  # first: a deletion cut short leaves nothing that looks whole
        shutil.rmtree(VENV)
    check_disk()
    if not VENV.exists():
        create_env()
    STAMP.write_text("installing")
    extras, versions = ".[test]" if test else ".", constraints()
    log = pip_install(*versions, "-e", extras)
    offline = NO_NETWORK.search(log) or "PIP_NO_INDEX" in os.environ
    if log and versions and NO_BUILD.search(log) and not offline:  # say, an older macOS
        print("\nThe tested versions have no build for this machine. So pip takes the newest packages that "
              "pyproject.toml allows: expect it to work, and small differences in what cells print.\n", flush=True)
        log = pip_install("-e", extras)
    if log:
        if not re.search("Installing collected packages:.*lora.lab", log):  # it stopped before it changed anything
            STAMP.write_text(" ".join(state))
        raise SystemExit("\n" + explain_pip(log))
    probe = subprocess.run([venv_python(), "-I", "-c", "import torch, torchvision, matplotlib, jupyterlab, lora_lab"],
                           capture_output=True, text=True)
    if probe.returncode:
        raise SystemExit(f"The packages are installed but do not load ({last_line(probe.stderr)}). "
                         "Delete the folder .venv and run the same command again.")
    STAMP.write_text(fingerprint() + (" test" if test else ""))
    print(f"The environment in .venv is ready (Python {venv_version()}).")


def pip_install(*arguments):
    """Run pip install; '' if all went well, else its log."""
    LOG.unlink(missing_ok=True)
    pip = [venv_python(), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--log", LOG]
    if not subprocess.call([*pip, *arguments], cwd=ROOT):
        return ""
    return LOG.read_text(errors="replace") if LOG.exists() else "no log"


def venv_python():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_version():
    """'3.12' for the Python in .venv, or '' if there is none that runs."""
    try:
        return subprocess.run([venv_python(), "-I", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
                              capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def fingerprint():
    """Changes whenever the set-up has to be done again."""
    files = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    return hashlib.sha256(files + f"{venv_version()} {ROOT}".encode()).hexdigest()[:16]


def create_env():
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise SystemExit(f"Python {platform.python_version()} ({sys.executable}) has no venv module: install it "
                         "(Debian, Ubuntu: sudo apt install python3-venv) and run the same command again.")
    try:
        VENV.mkdir()
        STAMP.write_text("installing")
    except OSError as error:
        raise SystemExit(f"The folder .venv cannot be made here ({error.strerror}): copy the course to a folder that "
                         "you can write to.") from None
    python = getattr(sys, "_base_executable", sys.executable)  # not the one of a .venv that is active right now
    made = subprocess.run([python, "-I", "-m", "venv", VENV], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"Python could not make .venv ({last_line(made.stderr or made.stdout)}). "
                         "Try another Python: make lab PYTHON=python3.12")


def constraints():
    """pip's arguments for the tested versions; none, and a sentence, for a Python they were not tested with."""
    tested = re.search(r"# tested with Python (.+)", (ROOT / "constraints.txt").read_text()).group(1).split()
    if venv_version() in tested:
        return ["-c", "constraints.txt"]
    print(f"The course was tested with Python {', '.join(tested)}; this is {venv_version()}. So pip takes the newest "
          "packages that pyproject.toml allows: expect it to work, and small differences in what cells print.")
    return []


def cuda_wheels_ahead():
    """True if pip is about to take torch with its CUDA libraries, which PyPI serves for Linux."""
    indexes = os.environ.get("PIP_EXTRA_INDEX_URL", "") + os.environ.get("PIP_INDEX_URL", "")
    return sys.platform == "linux" and "cpu" not in indexes and not any(VENV.glob("lib/python*/site-packages/torch"))


def check_disk():
    cuda = cuda_wheels_ahead()
    needed, free = 9 if cuda else 3, shutil.disk_usage(ROOT).free / 1e9
    if cuda and not shutil.which("nvidia-smi"):
        print("No NVIDIA GPU here. On Linux, PyPI's torch brings several GB of CUDA libraries that the course does not "
              "need.\nTo take the small CPU wheels instead: stop this (Ctrl-C), copy the index address that "
              "pytorch.org/get-started shows\nfor Linux, Pip, CPU into the environment variable PIP_EXTRA_INDEX_URL, "
              "and run the same command again.\n", flush=True)
    if free < needed:
        raise SystemExit(f"Not enough disk space: the set-up needs about {needed} GB and {free:.1f} GB are free here. "
                         "Make room" + (", or take the CPU wheels (see README)" if cuda else "") +
                         ", and run the same command again.")


def explain_pip(log):
    """What went wrong in a pip run and what to do, from its log."""
    if "No space left on device" in log:
        return ("The disk is full: make room and run the same command again. If it is only the temporary folder, set "
                "TMPDIR to a folder on a larger disk.")
    if NO_NETWORK.search(log):
        return ("pip could not reach the network, which it needs once, for the packages (the course itself then works "
                "offline). Check the connection or proxy and run the same command again.")
    if NO_BUILD.search(log) and "PIP_NO_INDEX" in os.environ:
        return (f"The folder that PIP_FIND_LINKS names lacks a package for this system and Python {venv_version()}, as "
                "pip's last lines say: download it there (see README, To teach with it).")
    if NO_BUILD.search(log):
        return (f"A package has no build for this machine and Python {venv_version()} (pip's last lines name it). Try "
                "another Python (make lab PYTHON=python3.12), or conda with environment.yml (see README).")
    return f"pip could not install the packages: its last lines above say why, all of them are in {LOG.name} in .venv."


def last_line(text):
    return (text.strip().splitlines() or ["no message"])[-1]


# --- opening JupyterLab ---------------------------------------------------------------------------------------------

def check_port(port="0"):
    """JupyterLab finds a free port by itself; one that the user asks for must be free."""
    try:
        socket.create_server(("127.0.0.1", int(port))).close()
    except (ValueError, OverflowError):
        raise SystemExit(f"{port} is not a port: choose one from 1024 to 65535: make lab PORT=8899.") from None
    except OSError as error:
        raise SystemExit(f"Port {port} cannot be used ({os.strerror(error.errno)}). Choose another "
                         "one, or leave PORT out: JupyterLab then takes a free one.") from None


def open_lab(port=""):
    command = [str(venv_python()), "-m", "jupyterlab", "notebooks/00_start_here.ipynb"]
    if port:
        command += ["--port", port, "--ServerApp.port_retries=0"]
    if os.name == "posix" and os.geteuid() == 0:  # in a container; JupyterLab would refuse
        command.append("--allow-root")
    os.chdir(ROOT)
    sys.stdout.flush()
    if os.name == "nt":
        raise SystemExit(subprocess.call(command))
    os.execv(command[0], command)


def main(command="help", *words):
    if sys.version_info < OLDEST:
        raise SystemExit(f"LoRA Lab needs Python 3.11 or newer, and this is Python {platform.python_version()}. "
                         "Install a newer one (python.org), or name it: make lab PYTHON=python3.12")
    if command == "env":
        make_env(test="test" in words)
    elif command == "lab":
        check_port(" ".join(words) or "0")
        make_env()
        open_lab(*words)
    else:
        raise SystemExit(__doc__.strip())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. Run the same command again to go on.") from None
