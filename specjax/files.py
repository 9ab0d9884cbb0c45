"""Writing files so that a reader sees the old one or the new one, never half of it.

With several processes only the first one writes: what the others hand in here is dropped, and
`replacing` is for the first alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from specjax.processes import is_first


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it takes the place of `path`.

    The temporary file lies in the same folder, because a rename is atomic only within one file
    system. Raises OSError naming `path` (a full disk, say) and then leaves the old file as it was
    and no temporary file behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # A failed write knows its reason but not its file: the user needs both.
        raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from error
    finally:
        with suppress(OSError):  # gone after a rename; never hide the error above
            temporary.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces `path` with `text` (UTF-8) in one step, making its folder where needed."""
    if not is_first():
        return
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_npz(path: str | os.PathLike, **arrays) -> None:
    """Replaces `path` with NumPy's archive of these arrays in one step."""
    if not is_first():
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def write_safetensors(path: str | os.PathLike, tensors: dict) -> None:
    """Replaces `path` with a safetensors file of NumPy arrays in one step."""
    if not is_first():
        return
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of a full disk, without the file's name
        raise OSError(f"{path}: could not write: {error}") from error
