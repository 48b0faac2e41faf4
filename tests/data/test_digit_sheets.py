"""Sheets of digits: every cell is one of scikit-learn's pictures of the captioned digit, pixel for pixel."""

import io
import json
from collections import Counter

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from lumina.data.index import Index
from lumina.data.recipes.digit_sheets import GRIDS, write_digit_sheets
from lumina.data.recipes.digits import WORDINGS, caption_for, pixel_values
from lumina.data.recipes.generating import Summary


def test_cells_are_the_pictures_that_the_record_names(tmp_path):
    assert write_digit_sheets(tmp_path / "sheets", 60, seed=3, workers=1) == Summary(samples=60, shards=1)
    truth, index = load_digits(), Index.open([tmp_path / "sheets"])
    grids, digits = Counter(), Counter()
    for number in range(len(index)):
        members = index.read(number)
        record = json.loads(members["json"])
        sheet = pixel_values(np.asarray(Image.open(io.BytesIO(members["png"]))))
        rows, columns = record["rows"], record["columns"]
        assert sheet.shape == (8 * rows, 8 * columns)
        for cell, picture in enumerate(record["numbers"]):
            y, x = (8 * part for part in divmod(cell, columns))
            np.testing.assert_array_equal(sheet[y : y + 8, x : x + 8], truth.images[picture])
            assert truth.target[picture] == record["label"]
        assert members["txt"].decode() == caption_for(record["label"], WORDINGS[record["wording"]])
        grids[rows, columns] += 1
        digits[record["label"]] += 1
    assert set(grids) == set(GRIDS)
    assert min(grids.values()) >= 6
    assert len(digits) == 10


def test_the_bytes_depend_on_the_seed_alone(tmp_path):
    for name, seed, workers in (("one", 0, 1), ("two", 0, 2), ("other", 1, 1)):
        write_digit_sheets(tmp_path / name, 700, seed=seed, workers=workers)
    one, two, other = (Index.open([tmp_path / name]).hash for name in ("one", "two", "other"))
    assert one == two != other
