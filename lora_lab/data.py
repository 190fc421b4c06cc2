"""MNIST as tensors in memory, split into the digits a base model knows (0-7) and those it has never met (8, 9)."""

import functools
import gzip
import hashlib
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lab.cache import folder, keep

OLD = tuple(range(8))  # the digits of the base model
NEW = (8, 9)  # the digits it is adapted to
MEAN, STD = 0.1307, 0.3081  # of the training pixels, scaled to 0..1

RAW = Path(__file__).parents[1] / "data" / "MNIST" / "raw"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


class DataError(RuntimeError):
    """A data file is missing or is not the original; the message names it and says what to do."""


class Digits(NamedTuple):
    """Images and their labels: x (n, 784) or (n, 1, 28, 28) float32, y (n,) int64."""

    x: Tensor
    y: Tensor

    def only(self, digits) -> "Digits":
        """The examples whose label is in `digits`, in their order."""
        keep = torch.isin(self.y, torch.tensor(tuple(digits)))
        return Digits(self.x[keep], self.y[keep])

    def sample(self, n: int, seed: int) -> "Digits":
        """`n` different examples drawn at random. Raises ValueError if there are not so many."""
        if not 0 <= n <= len(self.y):
            raise ValueError(f"cannot draw {n} different examples from {len(self.y)}")
        pick = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))[:n]
        return Digits(self.x[pick], self.y[pick])

    def plus(self, other: "Digits") -> "Digits":
        """These examples followed by the other's."""
        return Digits(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


def mnist(flat: bool = True) -> tuple[Digits, Digits]:
    """MNIST's 60,000 training and 10,000 test examples, normalised to mean 0 and standard deviation 1; x as (n, 784),
    or (n, 1, 28, 28) with flat=False. Each call returns fresh tensors. Source: LeCun, Cortes, Burges; data/README.md.

    Raises DataError if a file is missing and cannot be had, or is damaged."""
    train, test = _normalised(_pixels("train")), _normalised(_pixels("t10k"))
    return (train, test) if flat else tuple(part._replace(x=part.x.view(-1, 1, 28, 28)) for part in (train, test))


def few_digits(split: str, n: int, seed: int, digits=OLD + NEW) -> Digits:
    """`n` random examples of MNIST's "train" or "t10k" part with a label in `digits`; fewer from the same seed are the
    first of them. Unlike mnist(), it does not make floats of all the others: 220 MB, too much for several processes.

    Raises ValueError if there are not so many."""
    pixels, labels = _pixels(split)
    places, labels = Digits(torch.arange(len(labels)), labels).only(digits).sample(n, seed)  # (n,), (n,)
    return _normalised(Digits(pixels[places], labels))


@functools.cache
def _pixels(split: str) -> Digits:
    """As in the files: x (n, 28, 28) from 0 to 255."""
    return Digits(_read_idx(f"{split}-images-idx3-ubyte.gz"), _read_idx(f"{split}-labels-idx1-ubyte.gz").long())


def _normalised(pixels: Digits) -> Digits:
    return Digits(pixels.x.reshape(-1, 784).float().div_(255).sub_(MEAN).div_(STD), pixels.y.clone())


def _read_idx(name: str) -> Tensor:
    """One original file as bytes, (n, 28, 28) or (n,)."""
    path = RAW / name
    try:
        packed = path.read_bytes() if path.exists() else _fetched(name)
    except OSError as error:
        raise DataError(f"{path} could not be read: {error}. Make it readable, or put it back with "
                        "`git checkout -- data/MNIST/raw`.") from error
    if not _original(packed, name):
        raise DataError(f"{path} is not the original MNIST file ({len(packed):,} bytes, wrong checksum): damaged, cut "
                        "off or swapped. Put it back with `git checkout -- data/MNIST/raw`, or delete it and run this "
                        "again while online.")
    raw = bytearray(gzip.decompress(packed))  # a bytearray, since torch wants memory that it may write to
    shape = (-1, 28, 28) if "images" in name else (-1,)  # before the pixels: 4 bytes, and 4 for each axis
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)


def _original(packed: bytes, name: str) -> bool:
    return hashlib.sha256(packed).hexdigest() == SHA256[name]


def _fetched(name: str) -> bytes:
    """The file's bytes from the cache folder, after a download from torchvision's mirrors if it is not whole there.

    Only the original is kept: neither half a file nor the log-in page that some networks send instead."""
    from torchvision.datasets import MNIST  # here, not above: it takes a second

    kept = folder() / name
    if kept.exists() and _original(packed := kept.read_bytes(), name):
        return packed
    for mirror in MNIST.mirrors:
        packed = b""
        with suppress(OSError, HTTPException), urllib.request.urlopen(mirror + name, timeout=20) as response:
            packed = response.read()
        if _original(packed, name):
            with suppress(OSError):  # a full disk: the file is here all the same
                keep(kept, packed)
            return packed
    raise DataError(f"{RAW / name} is missing and could not be downloaded (no network?). It belongs to the course: "
                    "put it back with `git checkout -- data/MNIST/raw`, or run this again while online.")
