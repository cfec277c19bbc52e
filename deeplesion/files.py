"""Files are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Writes to a temporary name beside `path`, then renames; makes the folder if need be.

    `content`: what to write, or a function that writes it to an open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that what an interrupted write left is written over by the next.
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is on disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
