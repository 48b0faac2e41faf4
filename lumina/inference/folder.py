"""The folder that samples are written into: it is there when it is whole."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from lumina.inference.images import contact_sheet

LARGEST_SHEET = 400
"""Cells."""
_LONGEST_ROW = 12
"""Frames of a sample on the sheet of all; of more, so many at equal distances."""
_CELLS = ".cells"


class SampleFolder:
    """A folder beside `out` that becomes `out` when all is written. Several processes write into it, one makes it.

    All its files are numbered as the samples are, whoever writes them.
    """

    def __init__(self, out: Path):
        """
        Raises:
            ValueError: where `out` is not empty, or cannot be made.
        """
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} is not an empty folder; name a new one, so that nothing is overwritten")
        nearest = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"--out {out} cannot be written: {nearest} is no folder that you may write to")
        self.out, self._made = out, False
        self.partial = out.absolute().with_name(f".{out.name}.partial")

    def make(self) -> None:
        """Begin, in one process.

        Raises:
            ValueError: where the place beside `out` cannot be written.
        """
        try:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            (self.partial / _CELLS).mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"--out {self.out} cannot be written: {error.strerror or error}") from error
        self._made = True

    def check(self) -> None:
        """Raises ValueError where what another process has made is not seen here."""
        if not self.partial.is_dir():
            raise ValueError(
                f"--out {self.out} is not the same folder on all hosts; name one on a file system that they share"
            )

    def stem(self, number: int) -> Path:
        """Of the files of a sample, to which a suffix is added."""
        return self.partial / f"{number:06d}"

    def add_to_sheet(self, number: int, frames: Sequence[Image.Image]) -> None:
        """Keep the frames of a sample, as they are, for `finish`, if they find a place on the sheet."""
        row = _row(frames)
        if (number + 1) * len(row) > LARGEST_SHEET and number:
            return
        width, height = row[0].size
        strip = Image.new(row[0].mode, (len(row) * width, height))
        for place, frame in enumerate(row):
            strip.paste(frame, (place * width, 0))
        strip.save(self.partial / _CELLS / f"{number:06d}.{len(row)}.png")

    def finish(self, records: Sequence[dict[str, Any]], columns: int) -> None:
        """In the process that has made it, when all have written: samples.json, sheet.png, and the name.

        Args:
            records: of all samples.
            columns: samples in a row of the sheet, if they have one frame; of others each has a row.

        Raises:
            OSError: where it cannot be written.
        """
        if missing := [record["file"] for record in records if not (self.partial / record["file"]).is_file()]:
            raise OSError(f"{len(missing)} of {len(records)} files are not in {self.partial}, such as {missing[0]}")
        with self.writing():
            text = json.dumps(records, indent=1, ensure_ascii=False)
            (self.partial / "samples.json").write_text(text, encoding="utf-8")
            self._sheet(columns).save(self.partial / "sheet.png")
            shutil.rmtree(self.partial / _CELLS)
            if self.out.exists():
                self.out.rmdir()  # it is empty
            self.partial.rename(self.out)

    def _sheet(self, columns: int) -> Image.Image:
        cells, frames = [], 1
        for path in sorted((self.partial / _CELLS).iterdir()):
            frames = int(path.name.split(".")[1])
            with Image.open(path) as strip:
                width = strip.width // frames
                cells += [strip.crop((n * width, 0, (n + 1) * width, strip.height)) for n in range(frames)]
        return contact_sheet(cells, columns if frames == 1 else frames)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises OSError in a sentence where what is done within raises one."""
        try:
            yield
        except OSError as error:
            raise OSError(f"the samples could not be written to {self.out}: {error.strerror or error}") from error

    def close(self) -> None:
        """Remove, in the process that has made it, what has not become whole."""
        if self._made:
            shutil.rmtree(self.partial, ignore_errors=True)


def _row(frames: Sequence[Image.Image]) -> list[Image.Image]:
    if len(frames) <= _LONGEST_ROW:
        return list(frames)
    return [frames[round(place * (len(frames) - 1) / (_LONGEST_ROW - 1))] for place in range(_LONGEST_ROW)]
