"""The set-up: three lists of packages that agree, and an error message for each way it fails."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_lab import data
from tools import check_env, setup_env

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}  # conda-forge's name: PyPI's name
# In two halves, so that this file passes its own test.
REGISTRY_HOSTS = ["pypi" + ".org", "pythonhosted" + ".org", "download." + "pytorch.org", "conda." + "anaconda.org",
                  "registry." + "npmjs", "deb." + "debian.org"]


# --- one list of packages in three files ------------------------------------------------------------------------

def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ranges(lines):
    return {r.name: r.specifier for r in map(Requirement, lines)}


def test_constraints_pin_every_direct_dependency_inside_its_range():
    extras = pyproject()["optional-dependencies"]
    wanted = ranges([*pyproject()["dependencies"], *extras["test"], *extras["dev"]])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned.keys() == wanted.keys()
    outside = {name: version for name, version in pinned.items() if not wanted[name].contains(version)}
    assert not outside


def test_ranges_shut_out_no_newer_version():
    extras = pyproject()["optional-dependencies"].values()
    specifiers = ranges(line for part in [pyproject()["dependencies"], *extras] for line in part).values()
    assert {s.operator for specifier in specifiers for s in specifier} == {">="}
    assert pyproject()["requires-python"] == ">=3.11"


def test_environment_yml_has_the_same_ranges():
    listed = re.findall(r"^  - ([\w-]+) *(>?=[\d.]+)?(?: +#.*)?$", (ROOT / "environment.yml").read_text(), re.M)
    conda = {CONDA_NAMES.get(name, name): spec for name, spec in listed if name not in ("conda-forge", "nodefaults")}
    python = conda.pop("python").removeprefix("=")  # one version, since Binder would take 3.10 for a range
    assert python in re.search("# tested with Python (.+)", (ROOT / "constraints.txt").read_text())[1].split()
    assert SpecifierSet(pyproject()["requires-python"]).contains(python)
    assert conda.pop("pip") == ""
    assert conda == {name: str(spec) for name, spec in ranges(pyproject()["dependencies"]).items()}


def test_no_file_names_a_package_registry():
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and not name.endswith(".gz")]
    found = [(str(file.relative_to(ROOT)), host) for file in files if file.is_file() for host in REGISTRY_HOSTS
             if host in file.read_text(errors="replace")]
    assert not found


def test_readme_links_exactly_the_notebooks_that_exist():
    linked = re.findall(r"\(notebooks/(\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert sorted(linked) == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


# --- how the set-up fails: one sentence, and what to do ---------------------------------------------------------

@pytest.fixture
def course(tmp_path, monkeypatch):
    """setup_env in an empty copy of the course, with 100 GB free and no pip run."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(setup_env, "STAMP", tmp_path / ".venv" / "lora_lab.stamp")
    monkeypatch.setattr(setup_env, "LOG", tmp_path / ".venv" / "pip.log")
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda path: SimpleNamespace(free=100e9))
    return tmp_path


def fake_pip(monkeypatch, log="", code=0):
    """Replaces pip (subprocess.call) and the import that follows it; returns the list of pip's command lines."""
    calls, run = [], subprocess.run

    def call(command, **_):
        calls.append([str(word) for word in command])
        setup_env.LOG.write_text(log)
        return code

    def run_but_no_import(command, **options):
        if "import torch" in str(command[-1]):
            return SimpleNamespace(returncode=0, stderr="")
        return run([*command, "--without-pip"] if "venv" in command else command, **options)

    monkeypatch.setattr(setup_env.subprocess, "call", call)
    monkeypatch.setattr(setup_env.subprocess, "run", run_but_no_import)
    return calls


def test_an_old_python_is_told_so(monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match="needs Python 3.11 or newer"):
        setup_env.main("env")


def test_the_script_can_be_parsed_by_an_old_python():
    ast.parse(Path(setup_env.__file__).read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("version, found", [("Python 3.9.2", "Python 3.9.2"), (None, "no Python")])
@pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make and sh")
def test_make_names_the_python_it_found(tmp_path, version, found):
    python = tmp_path / "python3"
    if version:
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit 0\nexit 1\n')
        python.chmod(0o755)
    made = subprocess.run(["make", "lab", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode
    assert f"needs Python 3.11 or newer; found here: {found}." in made.stderr


def test_no_venv_module(course, monkeypatch):
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        setup_env.make_env()
    assert not (course / ".venv").exists()


@pytest.mark.parametrize("index, needed", [("", 9), ("https://example.org/cpu", 3)])
def test_no_disk_space_is_noticed_before_pip(course, monkeypatch, capsys, index, needed):
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_env.sys, "platform", "linux")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    with pytest.raises(SystemExit, match=f"needs about {needed} GB and 1.0 GB are free"):
        setup_env.make_env()
    assert ("take the small CPU wheels" in capsys.readouterr().out) == (needed == 9)
    assert not (course / ".venv").exists()


def test_a_file_in_the_place_of_the_environment(course):
    setup_env.VENV.write_text("")
    with pytest.raises(SystemExit, match="is not a folder that you can write to: delete it"):
        setup_env.make_env()


def test_a_copied_or_renamed_course_is_set_up_again(course, monkeypatch):
    before = setup_env.fingerprint()
    moved = shutil.copytree(course, course / "moved")
    monkeypatch.setattr(setup_env, "ROOT", moved)
    assert setup_env.fingerprint() != before


@pytest.mark.parametrize("log, sentence, tries", [
    ("Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution found", "network", 1),
    ("OSError: [Errno 28] No space left on device", "The disk is full", 1),
    ("ERROR: No matching distribution found for torch", "has no build for this machine", 2),
    ("ERROR: something else", "last lines above say why", 1),
])
def test_a_failed_pip_is_explained_and_tried_again(course, monkeypatch, log, sentence, tries):
    monkeypatch.setattr(setup_env, "constraints", lambda: ["-c", "constraints.txt"])
    calls = fake_pip(monkeypatch, log, code=1)
    for attempt in (1, 2):
        with pytest.raises(SystemExit, match=sentence):
            setup_env.make_env()
        assert len(calls) == attempt * tries


def test_packages_missing_in_a_folder_of_ones_own_are_no_matter_of_the_machine(course, monkeypatch):
    monkeypatch.setattr(setup_env, "constraints", lambda: ["-c", "constraints.txt"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    calls = fake_pip(monkeypatch, "ERROR: No matching distribution found for setuptools>=77", code=1)
    with pytest.raises(SystemExit, match="The folder that PIP_FIND_LINKS names lacks"):
        setup_env.make_env()
    assert len(calls) == 1


def test_a_machine_that_the_tested_versions_have_no_build_for_gets_the_ranges(course, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "constraints", lambda: ["-c", "constraints.txt"])
    calls = fake_pip(monkeypatch)

    def call(command, **_):
        calls.append([str(word) for word in command])
        setup_env.LOG.write_text("ERROR: ResolutionImpossible: for help visit")
        return "-c" in command

    monkeypatch.setattr(setup_env.subprocess, "call", call)
    setup_env.make_env()
    assert ["-c" in command for command in calls] == [True, False]
    assert "no build for this machine" in capsys.readouterr().out and setup_env.STAMP.read_text() != "installing"


def test_a_second_run_does_nothing_and_the_test_extra_is_added_when_asked_for(course, monkeypatch):
    calls = fake_pip(monkeypatch)
    setup_env.make_env()
    setup_env.make_env()
    setup_env.make_env(test=True)
    setup_env.make_env(test=True)
    setup_env.make_env()
    assert [call[-1] for call in calls] == [".", ".[test]"]


def test_a_changed_list_of_packages_is_installed_into_the_same_environment(course, monkeypatch):
    calls = fake_pip(monkeypatch)
    setup_env.make_env()
    (course / ".venv" / "kept").touch()
    (course / "constraints.txt").write_text("# tested with Python 3.11\nnumpy==9.9\n")
    setup_env.make_env()
    assert len(calls) == 2 and (course / ".venv" / "kept").exists()


def test_an_update_that_pip_cannot_begin_leaves_the_environment_as_it_is(course, monkeypatch):
    fake_pip(monkeypatch)
    setup_env.make_env(test=True)
    before = setup_env.STAMP.read_text()
    (course / "constraints.txt").write_text("# tested with Python 3.11\nnumpy==9.9\n")
    fake_pip(monkeypatch, "build: Installing collected packages: setuptools\nconnection broken by", code=1)
    with pytest.raises(SystemExit, match="network"):
        setup_env.make_env()
    assert setup_env.STAMP.read_text() == before


def test_an_update_that_stops_half_way_is_not_trusted(course, monkeypatch):
    fake_pip(monkeypatch)
    setup_env.make_env()
    (course / "constraints.txt").write_text("# tested with Python 3.11\nnumpy==9.9\n")
    fake_pip(monkeypatch, "Installing collected packages: numpy, lora_lab\nNo space left on device", code=1)
    with pytest.raises(SystemExit, match="The disk is full"):
        setup_env.make_env()
    assert setup_env.STAMP.read_text() == "installing"


@pytest.mark.parametrize("damage", ["interrupted", "dead Python"])
def test_a_half_made_environment_is_made_anew(course, monkeypatch, capsys, damage):
    calls = fake_pip(monkeypatch)
    setup_env.make_env()
    (course / ".venv" / "left over").touch()
    if damage == "interrupted":
        setup_env.STAMP.write_text("installing")
    else:
        setup_env.venv_python().unlink()
    setup_env.make_env()
    assert "made anew" in capsys.readouterr().out
    assert len(calls) == 2 and not (course / ".venv" / "left over").exists()


def test_an_untested_python_gets_the_ranges_and_is_told_so(course, monkeypatch, capsys):
    calls = fake_pip(monkeypatch)
    (course / "constraints.txt").write_text("# tested with Python 3.1 3.2\n")
    setup_env.make_env()
    assert "-c" not in calls[0]
    assert "tested with Python 3.1, 3.2" in capsys.readouterr().out


def test_a_tested_python_gets_the_tested_versions(course, monkeypatch):
    calls = fake_pip(monkeypatch)
    (course / "constraints.txt").write_text("# tested with Python 3.1 {}.{}\n".format(*sys.version_info))
    setup_env.make_env()
    assert calls[0][-4:] == ["-c", "constraints.txt", "-e", "."]


def test_a_port_in_use(course):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with pytest.raises(SystemExit, match=f"Port {port} cannot be used"):
            setup_env.main("lab", port)


@pytest.mark.parametrize("port", ["lab", "99999", "88 99"])
def test_a_port_that_is_none(course, port):
    with pytest.raises(SystemExit, match=f"{port} is not a port"):
        setup_env.main("lab", *port.split())


# --- the report of notebook 00 ------------------------------------------------------------------------------------

def test_the_report_is_all_ok_where_the_tests_run():
    assert {check.name for check in check_env.environment_report() if check.remedy} <= {"memory"}


def test_the_report_explains_a_missing_package_an_old_one_and_a_damaged_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"half a fi")
    monkeypatch.setattr(check_env, "requirements", lambda: ["no_such_package>=1", "numpy>=999", "tqdm>=1"])
    monkeypatch.setattr(data, "RAW", tmp_path)
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "train-images-idx3-ubyte.gz" / "below a file"))
    data._pixels.cache_clear()
    monkeypatch.setattr(check_env, "memory", lambda: "enough")
    failed = {check.name: check for check in check_env.environment_report() if check.remedy}
    assert failed.keys() == {"no_such_package", "numpy", "MNIST", "cache"}
    assert "No module named" in failed["no_such_package"].detail
    assert "the course needs numpy>=999" in failed["numpy"].detail and "make lab" in failed["numpy"].remedy
    assert "train-images" in failed["MNIST"].detail and "git checkout" in failed["MNIST"].remedy
    with pytest.raises(SystemExit) as ended:
        check_env.main([])
    said = capsys.readouterr().out
    assert ended.value.code == 4 and said.count("FAILS") == 4 and "ok    tqdm\n" in said


@pytest.mark.parametrize("tool", [setup_env, check_env], ids=lambda tool: tool.__name__)
def test_what_runs_before_the_packages_work_imports_only_the_standard_library(tool):
    tree = ast.parse(Path(tool.__file__).read_text())
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
