"""What the recipes share before anything is written: one item of a data set, its key, and what is left out."""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from lumina.data.decode import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

MEDIA_EXTENSIONS = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS, "npy")
"""Files that become samples: pictures, videos, sounds, and arrays of pixels."""

# A tar header has 100 bytes for the name, of which the extension and the number of an equal key need some. Longer
# names need a second header.
_KEY_BYTES = 86


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be.

    Attributes:
        name: what its key is made of: a path without extension.
        media: the file, stored byte for byte.
        caption: None where there is none.
        fields: text of its .json, None where there is none.
    """

    name: str
    media: str
    caption: str | None
    fields: str | None = None


class Skips:
    """Counts and lists what cannot become a sample.

    Args:
        report: file to which each is written, a JSON object a line; made with the first.
    """

    def __init__(self, report: Path) -> None:
        self.report = report
        self.reported = False  # whether the user was told of the report
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._first: list[str] = []
        self._stream = None

    def add(self, item: str, reason: str, *, allowed: bool, detail: str = "") -> None:
        """Note one. `allowed`: it is left out by itself or by the user's wish; otherwise `settle` refuses."""
        (self.counts if allowed else self.refused)[reason] += 1
        if not allowed and len(self._first) < 10:
            self._first.append(f"{item}{f' ({detail})' if detail else ''}")
        if self._stream is None:
            # Names of files need not be UTF-8; Python's escape of such a byte is also JSON's.
            self._stream = self.report.open("w", encoding="utf-8", errors="backslashreplace")
        record = {"item": item, "reason": reason} | ({"detail": detail} if detail else {})
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def settle(self, mend: str) -> None:
        """Close the report.

        Raises:
            ValueError: something that is not allowed was noted.
        """
        self.close()
        if self.refused:
            self.reported = True
            first = ", ".join(self._first)
            raise ValueError(f"{_counted(self.refused)}: {first}; all are listed in {self.report}; {mend}")

    def summary(self) -> str:
        """What was left out and allowed, by reason."""
        return _counted(self.counts)

    def close(self) -> None:
        """Close the report; again is no error."""
        if self._stream is not None:
            self._stream.close()


class Keys:
    """Legible keys, each given once: letters, digits, '-', '_' and '/', and `-2`, `-3` … behind repeated ones."""

    def __init__(self) -> None:
        # Digests rather than keys: a hundred bytes an item would be gigabytes.
        self._given: set[bytes] = set()
        self._repeats: dict[bytes, int] = {}

    def of(self, name: str) -> str:
        """The key for a path without extension."""
        key = legible(name)
        if (digest := _digest(key)) not in self._given:
            self._given.add(digest)
            return key
        number = self._repeats.get(digest, 1)
        while True:
            number += 1
            if (other := _digest(f"{key}-{number}")) not in self._given:
                self._given.add(other)
                self._repeats[digest] = number
                return f"{key}-{number}"


def legible(name: str) -> str:
    """A path with runs of other signs than letters, digits, '-' and '_' replaced by '_', and cut where too long."""
    parts = (re.sub(r"[^\w-]+", "_", part) for part in name.split("/") if part not in ("", ".", ".."))
    key = "/".join(parts) or "_"
    encoded = key.encode()
    if len(encoded) <= _KEY_BYTES:
        return key
    start = encoded[: _KEY_BYTES - 9].decode(errors="ignore").rstrip("/")
    return f"{start}-{blake2b(encoded, digest_size=4).hexdigest()}"


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; "" without one."""
    return os.path.splitext(name)[1][1:].lower()


def media_fault(path: str) -> tuple[str, str] | None:
    """(reason, detail) why a file cannot be stored, None if it can."""
    if "\0" in path:
        return "wrong path", "it holds a zero byte"
    if extension_of(path) not in MEDIA_EXTENSIONS:
        return "format not read", f".{extension_of(path)} is none of {', '.join(MEDIA_EXTENSIONS)}"
    try:
        facts = os.stat(path)
    except OSError as error:
        return "missing file", f"{path}: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return "no file", f"{path} is a folder or a device"
    if not os.access(path, os.R_OK):
        return "unreadable file", f"{path}: permission denied"
    if facts.st_size == 0:
        return "empty file", path
    return None


def caption_fault(caption: object) -> str | None:
    """Why a value is no caption, None if it is one."""
    if not isinstance(caption, str):
        return f"a caption is text, not {type(caption).__name__}"
    if not caption.strip():
        return "the caption is empty"
    if "\0" in caption:
        return "the caption holds zero bytes"
    if any("\ud800" <= sign <= "\udfff" for sign in caption):
        return "the caption is not UTF-8"
    return None


def located(path: str, root: Path) -> tuple[str, str]:
    """(absolute path, name for the key) of a path that data gives relative to `root`, or absolute."""
    joined = os.path.normpath(os.path.join(root, path))
    relative = os.path.relpath(joined, root)
    # Outside the root the way there says more about the machine than about the sample.
    parts = relative.split(os.sep)
    name = "/".join(joined.split(os.sep)[-2:]) if parts[0] == ".." else relative
    return joined, os.path.splitext(name)[0]


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for a folder and all below it in sorted order.

    Links are followed, but not in circles; folders whose name begins with a dot are left alone.

    Raises:
        ValueError: a folder cannot be read.
    """
    yield from _walk(folder, ())


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    try:
        facts = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be read ({error.strerror})") from error
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    yield folder, [entry.name for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(entry.path, (*above, here))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} × {reason}" for reason, count in counts.most_common())


def _digest(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=12).digest()
