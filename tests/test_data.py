"""The data: the loader against torchvision's own parser, and each way in which a file can be wrong."""

import gzip
import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from lora_lab import cache, data
from lora_lab.data import NEW, OLD, SHA256, DataError, Digits, mnist

TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
ROOT = Path(data.__file__).parents[1]
ORIGINALS = data.RAW


@pytest.fixture(scope="module")
def flat():
    return mnist()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """torchvision's mirrors moved to a loopback port where nobody listens; an empty cache."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{nobody.getsockname()[1]}/"])
        monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
        yield


@pytest.fixture
def raw(monkeypatch, tmp_path, no_network):
    """A copy of the four files that a test may spoil, read afresh."""
    folder = tmp_path / "raw"
    shutil.copytree(data.RAW, folder)
    monkeypatch.setattr(data, "RAW", folder)
    data._pixels.cache_clear()
    yield folder
    data._pixels.cache_clear()


class Mirror(http.server.BaseHTTPRequestHandler):
    """The original files, as one of torchvision's mirrors serves them; each kind of bad mirror under its own path."""

    half_sent = threading.Event()

    def do_GET(self):
        kind, _, name = self.path.strip("/").rpartition("/")
        body = (ORIGINALS / name).read_bytes()
        self.send_response(404 if kind == "empty" else 200)
        if kind == "login":
            body = b"<html>Please log in to the network of this hotel</html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "cut":
            body = body[:len(body) // 2]
        if kind == "slow":
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            Mirror.half_sent.set()
            self.rfile.read(1)  # until the other side goes away
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def mirror():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def start(code, *arguments, **environment):
    """Another Python process that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=os.environ | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir())


# --- what it gives ----------------------------------------------------------------------------------------------

def test_shapes_and_types(flat):
    for part, n in zip(flat, (60_000, 10_000), strict=True):
        assert part.x.shape == (n, 784) and part.x.dtype == torch.float32
        assert part.y.shape == (n,) and part.y.dtype == torch.int64


def test_images_are_the_same_numbers_in_another_shape(flat):
    train, test = mnist(flat=False)
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert torch.equal(test.x.flatten(1), flat[1].x) and torch.equal(test.y, flat[1].y)


def test_the_training_pixels_have_mean_0_and_standard_deviation_1(flat):
    assert flat[0].x.mean().item() == pytest.approx(0, abs=1e-3)
    assert flat[0].x.std().item() == pytest.approx(1, abs=1e-3)
    assert flat[1].x.mean().item() == pytest.approx(0, abs=0.02)  # scaled by the training pixels' numbers


def test_label_counts_are_the_published_ones(flat):
    assert [part.y.bincount().tolist() for part in flat] == [TRAIN_COUNTS, TEST_COUNTS]


@pytest.mark.parametrize("part, prefix", [(0, "train"), (1, "t10k")])
def test_equals_torchvisions_own_parser(flat, tmp_path, part, prefix):
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / kind).write_bytes(gzip.decompress((data.RAW / f"{prefix}-{kind}-ubyte.gz").read_bytes()))
    pixels = read_image_file(str(tmp_path / "images-idx3"))
    x, y = flat[part]
    assert torch.equal(y, read_label_file(str(tmp_path / "labels-idx1")))
    torch.testing.assert_close(x, (pixels.reshape(-1, 784).float() / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-5)
    back = x.mul(0.3081).add(0.1307).mul(255).round().to(torch.uint8)  # the normalisation loses nothing
    assert torch.equal(back.view(-1, 28, 28), pixels)


def test_each_call_gives_tensors_of_its_own():
    first, second = mnist()[1], mnist()[1]
    first.x.zero_()
    first.y.zero_()
    assert second.x.abs().sum() > 0 and second.y.sum() > 0
    assert mnist()[1].y.bincount().tolist() == TEST_COUNTS


def test_the_checksums_in_the_code_are_those_of_the_readme():
    listed = (ROOT / "data/README.md").read_text(encoding="utf-8")
    for name, checksum in SHA256.items():
        assert f"`{name}`" in listed and f"`{checksum}`" in listed
        assert hashlib.sha256((data.RAW / name).read_bytes()).hexdigest() == checksum


# --- splitting and drawing --------------------------------------------------------------------------------------

@pytest.fixture
def few():
    return Digits(torch.arange(10.0).view(5, 2), torch.tensor([8, 0, 9, 8, 7]))


def test_old_and_new_digits_are_a_partition(flat):
    test = flat[1]
    old, new = test.only(OLD), test.only(NEW)
    assert len(old.y) == sum(TEST_COUNTS[:8]) and len(new.y) == sum(TEST_COUNTS[8:])
    assert set(old.y.tolist()) == set(range(8)) and set(new.y.tolist()) == {8, 9}


@pytest.mark.parametrize("digits, rows", [((8,), [0, 3]), ([7, 9], [2, 4]), ({0}, [1]), (range(10), [0, 1, 2, 3, 4]),
                                          ((), []), ((3,), [])])
def test_only_keeps_rows_and_their_order(few, digits, rows):
    kept = few.only(digits)
    assert torch.equal(kept.x, few.x[rows]) and torch.equal(kept.y, few.y[rows])


def test_a_sample_is_without_repetition_and_fixed_by_its_seed(few):
    drawn = few.sample(5, seed=3)
    assert sorted(drawn.x[:, 0].tolist()) == few.x[:, 0].tolist()
    assert torch.equal(few.sample(3, seed=3).x, few.sample(3, seed=3).x)
    assert len({tuple(few.sample(3, seed=s).x[:, 0].tolist()) for s in range(8)}) > 1
    assert all(torch.equal(few.x[few.x[:, 0] == x[0]][0], x) and few.y[few.x[:, 0] == x[0]] == y
               for x, y in zip(*drawn, strict=True))  # x and y stay together


def test_a_sample_leaves_the_callers_random_state_alone(few):
    before = torch.get_rng_state()
    few.sample(2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [-1, 6])
def test_a_sample_that_cannot_be_drawn(few, n):
    with pytest.raises(ValueError, match=rf"{n} different examples from 5"):
        few.sample(n, seed=0)


def test_plus_appends(few):
    both = few.plus(few.only((9,)))
    assert both.y.tolist() == [8, 0, 9, 8, 7, 9] and torch.equal(both.x[5], few.x[2])


# --- files that are wrong ---------------------------------------------------------------------------------------

def corrupt(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def swap(path):
    other = path.with_name(path.name.replace("t10k", "train"))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [corrupt, truncate, swap, Path.unlink, replace_by_folder,
                                  lambda path: path.write_bytes(b"")],
                         ids=["one bit", "truncated", "swapped", "missing and offline", "a folder", "empty"])
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_wrong_file_is_named(raw, name, harm):
    harm(raw / name)
    with pytest.raises(DataError) as caught:
        mnist()
    named = [name, name.replace("t10k", "train")] if harm is swap else [name]
    assert any(str(raw / n) in str(caught.value) for n in named)
    if harm is not replace_by_folder:
        assert "git checkout -- data/MNIST/raw" in str(caught.value)


def test_after_a_failure_a_mended_file_is_read(raw):
    name = raw / "t10k-labels-idx1-ubyte.gz"
    good = name.read_bytes()
    truncate(name)
    with pytest.raises(DataError):
        mnist()
    name.write_bytes(good)
    assert mnist()[1].y.bincount().tolist() == TEST_COUNTS


# --- the fallback -----------------------------------------------------------------------------------------------

@pytest.fixture
def labels_missing(raw):
    path = raw / "t10k-labels-idx1-ubyte.gz"
    path.unlink()
    return path.name


@pytest.mark.parametrize("bad", ["", "empty/", "login/", "cut/"], ids=["none", "404", "log-in page", "cut off"])
def test_a_missing_file_is_downloaded_past_a_bad_mirror(labels_missing, mirror, monkeypatch, bad):
    monkeypatch.setattr(MNIST, "mirrors", [mirror + bad, mirror])
    assert data._read_idx(labels_missing).shape == (10_000,)
    assert [p.name for p in cache.folder().iterdir()] == [labels_missing]


def test_a_download_is_kept(labels_missing, mirror, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [mirror])
    data._read_idx(labels_missing)
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert data._read_idx(labels_missing).shape == (10_000,)


def test_a_download_that_cannot_be_kept_is_used_all_the_same(labels_missing, mirror, monkeypatch):
    def full_disk(path, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(MNIST, "mirrors", [mirror])
    monkeypatch.setattr(data, "keep", full_disk)
    assert data._read_idx(labels_missing).shape == (10_000,)


def test_a_damaged_download_is_not_trusted(labels_missing, mirror, monkeypatch):
    kept = cache.folder() / labels_missing
    kept.write_bytes(b"half a file")
    with pytest.raises(DataError, match=labels_missing):
        data._read_idx(labels_missing)
    monkeypatch.setattr(MNIST, "mirrors", [mirror])
    assert data._read_idx(labels_missing).shape == (10_000,)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == SHA256[labels_missing]


@pytest.mark.parametrize("bad", ["login/", "cut/", "empty/"])
def test_a_bad_mirror_alone_leaves_nothing(labels_missing, mirror, monkeypatch, bad):
    monkeypatch.setattr(MNIST, "mirrors", [mirror + bad])
    with pytest.raises(DataError, match=labels_missing):
        data._read_idx(labels_missing)
    assert not list(cache.folder().iterdir())


# --- other processes --------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path
from torchvision.datasets import MNIST
from lora_lab import data
MNIST.mirrors, data.RAW = [sys.argv[1]], Path(sys.argv[2])
train, test = data.mnist()
print(train.y.bincount().tolist(), test.y.bincount().tolist())
"""


def test_two_processes_that_load_and_download_at_once(mirror, tmp_path):
    both = [start(LOAD, mirror, tmp_path / "nothing", LORA_LAB_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert out.strip() == f"{TRAIN_COUNTS} {TEST_COUNTS}", error
    assert {p.name for p in (tmp_path / "cache").iterdir()} == set(SHA256)


def test_a_kill_in_the_middle_of_the_first_load(mirror, tmp_path):
    Mirror.half_sent.clear()
    process = start(LOAD, mirror + "slow/", tmp_path / "nothing", LORA_LAB_CACHE=str(tmp_path / "cache"))
    assert Mirror.half_sent.wait(120), process.communicate(timeout=10)
    process.kill()
    process.communicate(timeout=30)
    again = start(LOAD, mirror, tmp_path / "nothing", LORA_LAB_CACHE=str(tmp_path / "cache"))
    out, error = again.communicate(timeout=120)
    assert out.strip() == f"{TRAIN_COUNTS} {TEST_COUNTS}", error


READ_ONLY = """
import os, sys, tempfile
from pathlib import Path
from lora_lab import cache, data
tree = Path(data.__file__).parents[1]
assert str(tree) == sys.argv[1], tree
if os.geteuid() == 0:  # whom no permission binds
    os.setgid(65534)
    os.setuid(65534)
try:
    (tree / "probe").touch()
except PermissionError:
    train, test = data.mnist()
    print(test.y.bincount().tolist(), tree in cache.folder().parents)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of folders do not bind on Windows")
def test_a_read_only_checkout():
    with tempfile.TemporaryDirectory() as top:
        top = Path(top).resolve()
        tree = top / "checkout"
        shutil.copytree(ROOT / "lora_lab", tree / "lora_lab", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "data", tree / "data")
        folders = [top, *(p for p in [tree, *tree.rglob("*")] if p.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        try:
            environment = {k: v for k, v in os.environ.items() if k != "LORA_LAB_CACHE"}
            out = subprocess.run([sys.executable, "-c", READ_ONLY, str(tree)], capture_output=True, text=True, cwd="/",
                                 env=environment | {"PYTHONPATH": str(tree), "HOME": str(tree)}, timeout=120)
        finally:
            for folder in folders:
                folder.chmod(0o755)
    assert out.stdout.strip() == f"{TEST_COUNTS} False", out.stderr


# --- the cache folder -------------------------------------------------------------------------------------------

def test_the_cache_folder_is_the_one_that_is_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "a" / "b"))
    assert cache.folder() == tmp_path / "a" / "b" and cache.folder().is_dir()


def test_a_chosen_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Set LORA_LAB_CACHE"):
        cache.folder()


def test_without_a_home_folder_the_temporary_one_is_used(monkeypatch, tmp_path):
    (tmp_path / ".cache").touch()  # a file where the folder would be
    monkeypatch.delenv("LORA_LAB_CACHE", raising=False)
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "lora_lab" / "cache.py"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache.folder() == tmp_path / "lora_lab_cache"


def test_a_key_changes_with_every_setting():
    keys = [cache.key(*settings) for settings in [(), (1,), (2,), (1.0,), ("1",), (1, 2), ((1, 2),), ({"lr": 1},)]]
    assert len(set(keys)) == len(keys) and all(len(k) == 12 for k in keys)
    assert cache.key({"lr": 1}) == keys[-1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), cache.written_whole(path) as part:
        part.write_text("half of what was to be")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with cache.written_whole(path) as part:
        part.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_result_that_another_process_reads_at_the_moment_is_kept_already(tmp_path, monkeypatch):
    """Windows refuses to replace a file that is open; os.replace does so here."""
    def refuse(source, target):
        raise PermissionError(f"{target} is used by another process")

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "result").write_bytes(b"same")
    cache.keep(tmp_path / "result", b"same")
    with pytest.raises(PermissionError):
        cache.keep(tmp_path / "other", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["result"]
