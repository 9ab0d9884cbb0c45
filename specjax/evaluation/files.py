"""Writing a text file so that a reader sees the old one or the new one, never half of it."""

import os
from contextlib import suppress
from pathlib import Path


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace `path` with `text` (UTF-8) in one step, making its folder where needed.

    The text goes to a temporary file in the same folder first, because a rename is atomic only
    within one file system. Raises OSError naming `path` (a full disk, say) and then leaves the
    old file as it was and no temporary file behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A failed write knows its reason but not its file: the user needs both.
        raise OSError(error.errno, f"could not write: {error.strerror}", str(path)) from error
    finally:
        with suppress(OSError):  # gone after a rename; never hide the error above
            temporary.unlink()
