"""Sheets of scikit-learn's handwritten digits: one to four of a kind beside each other, with the caption of one.

What they teach is to draw, all over a picture of any size, what the caption says: captions on regions build on that.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lumina.data.recipes.digits import WORDINGS, caption_for
from lumina.data.recipes.generating import Draws, Progress, Summary, check_seed, generate_shards
from lumina.data.recipes.moving_digits import real_digits

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))
"""Rows and columns of a sheet, all as likely."""


@dataclass(frozen=True)
class _Recipe:
    seed: int

    def __call__(self, number: int) -> dict[str, Any]:
        images, digits = real_digits()
        draws = Draws("digit sheets", self.seed, number)
        rows, columns = draws.choice(GRIDS)
        digit = draws.below(10)
        of_kind = np.flatnonzero(digits == digit).tolist()
        numbers = [draws.choice(of_kind) for _ in range(rows * columns)]
        cells = images[numbers].reshape(rows, columns, 8, 8)
        wording = draws.below(len(WORDINGS))
        stored = io.BytesIO()
        Image.fromarray(cells.swapaxes(1, 2).reshape(rows * 8, columns * 8)).save(stored, "PNG")
        return {
            "__key__": f"sheet-{number:06d}",
            "png": stored.getvalue(),
            "txt": caption_for(digit, WORDINGS[wording]),
            "json": {"label": digit, "rows": rows, "columns": columns, "numbers": numbers, "wording": wording},
        }


def write_digit_sheets(
    out: str | Path,
    count: int = 4000,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write sheets to `out` in shards of at most 500.

    A sample has the members .png (8 or 16 pixels high and wide, 8-bit grey), .txt (a caption of `digits.WORDINGS`) and
    .json ({"label": digit, "rows", "columns", "numbers": of the digits in scikit-learn's set, row by row, "wording"}).

    Raises:
        ValueError: a number is too small, or the folder is not empty or cannot be written.
    """
    check_seed(seed)
    return generate_shards(out, _Recipe(seed), count, name="sheets", workers=workers, progress=progress)
