"""A folder that is there when it is whole, and not before."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina.checkpoint.manifest import sync, write_durably


@contextmanager
def whole_folder(destination: Path, size: int) -> Iterator[Path]:
    """A hidden folder beside `destination` that takes its name at the end, and goes when something fails.

    Args:
        destination: not there, or empty.
        size: bytes that are going to be written.

    Raises:
        ValueError: for a destination that holds something, or cannot be written.
        OSError: where the disk has not as much room, or fails.
    """
    destination = Path(os.path.abspath(destination))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is not an empty folder; name a new one, so that nothing is overwritten")
    partial = destination.with_name(f".{destination.name}.partial")
    above = [folder for folder in destination.parents if not folder.exists()]
    try:
        if partial.exists():  # left by one that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{destination} cannot be written: {error.strerror or error}") from error
    done = False
    try:
        free = shutil.disk_usage(partial).free
        if free < size:
            raise OSError(
                f"{destination} needs {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left; free some, or "
                "name a folder on another disk"
            )
        yield partial
        for folder, _, _ in os.walk(partial):
            sync(Path(folder))
        if destination.exists():
            destination.rmdir()  # it is empty
        partial.rename(destination)
        done = True
        sync(destination.parent)
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in above:
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a file, and flush it to the disk."""
    write_durably(path, text.encode())
