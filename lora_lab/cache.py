"""Where results that take time are kept between sessions."""

import hashlib
import os
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path


def folder() -> Path:
    """The cache folder: $LORA_LAB_CACHE, else .cache/ beside the notebooks, else (read-only checkout) in the home
    folder, else in the temporary folder. It can be deleted at any time."""
    chosen = os.environ.get("LORA_LAB_CACHE")
    candidates = [Path(chosen)] if chosen else [
        Path(__file__).parents[1] / ".cache", Path("~/.cache/lora_lab"), Path(tempfile.gettempdir(), "lora_lab_cache")]
    for path in candidates:
        with suppress(OSError, RuntimeError):  # RuntimeError: "~" for a user without a home folder
            path = path.expanduser()
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path
    raise OSError(f"no folder to keep results in could be written: {', '.join(map(str, candidates))}. "
                  "Set LORA_LAB_CACHE to a folder that you can write to.")


def digest(content: bytes) -> str:
    """12 hexadecimal digits that change when the content does."""
    return hashlib.sha256(content).hexdigest()[:12]


def key(*settings) -> str:
    """12 hexadecimal digits that change when any setting changes (by its repr)."""
    return digest(repr(settings).encode())


@contextmanager
def written_whole(path: Path):
    """`with written_whole(path) as tmp:` write `tmp`; `path` then appears complete or, after an error, not at all."""
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def keep(path: Path, content: bytes) -> None:
    """Write a file that every process would write alike."""
    try:
        with written_whole(path) as part:
            part.write_bytes(content)
    except PermissionError:  # Windows, while another process reads the file: then it is there already
        if not path.exists():
            raise
