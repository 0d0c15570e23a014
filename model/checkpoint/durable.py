"""Files that are there after a power cut: written once and synced, or replaced in one step.

It knows nothing of what they hold.
"""

import hashlib
import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a new file; one that is there already is an error."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Write a file, or put it in the place of the old one: readers see either, never a part."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    write(temporary, data)
    temporary.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
