"""Files that are there whole or not at all. Knows nothing about what they hold."""

import os
import tempfile
from collections.abc import Buffer
from pathlib import Path


def write_durably(path: Path, *pieces: Buffer) -> None:
    """Writes beside the file, to the disk, and moves it there: no reader sees half a file.

    Makes the folder.

    Args:
        path: the file.
        pieces: bytes, one after another.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
