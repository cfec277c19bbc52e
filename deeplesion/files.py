"""Files are there as a whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes to a temporary name beside `path`, then renames; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that what an interrupted write left is written over by the next.
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
