"""Videos of digits: the pixels are scikit-learn's, and the brightest part goes where the caption says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lumina.data.decode import View, decode_view
from lumina.data.index import Index
from lumina.data.recipes.digits import WORDS
from lumina.data.recipes.moving_digits import (
    DIRECTIONS,
    HELD_WORDINGS,
    WORDINGS,
    caption_for,
    held_numbers,
    held_prompts,
    training_numbers,
    write_moving_digits,
)
from lumina.data.shard_index import KINDS
from tests.data.pictures import files

COUNT, FRAMES, SIZE = 700, 5, 18
# As a reader takes the words, whatever the recipe's own tables say.
MEANING = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "top": (-1, 0), "down": (1, 0), "bottom": (1, 0)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving") / "shards"
    summary = write_moving_digits(folder, count=COUNT, frames=FRAMES, size=SIZE, seed=3, workers=1)
    assert (summary.samples, summary.shards) == (COUNT, 2)
    return folder


def read_caption(caption: str) -> tuple[int, tuple[int, int]]:
    """The digit and direction of a caption."""
    words = re.findall(r"[a-z]+|\d", caption.lower())
    digits = {WORDS.index(word) if word in WORDS else int(word) for word in words if word in WORDS or word.isdigit()}
    directions = {MEANING[key] for word in words for key in MEANING if word in (key, f"{key}ward", f"{key}wards")}
    assert len(digits) == len(directions) == 1, caption
    return digits.pop(), directions.pop()


def test_the_digit_goes_where_the_caption_says(videos: Path) -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    index = Index.open([videos])
    assert len(index) == COUNT
    assert set(index.column("frames").tolist()) == {FRAMES}
    assert set(index.column("height").tolist()) == set(index.column("width").tolist()) == {SIZE}
    assert set(index.column("kind").tolist()) == {KINDS.index("video")}
    rows, columns = np.mgrid[:SIZE, :SIZE]
    seen, speeds, starts = set(), set(), set()
    for number in range(COUNT):
        members = index.read(number)
        decoded = decode_view(members, View(SIZE, SIZE, FRAMES), 1)
        light = (decoded.pixels[:, 0].numpy().astype(np.float64) + 1) / 2
        track = np.stack([(light * axis).sum((1, 2)) / light.sum((1, 2)) for axis in (rows, columns)], 1)
        digit, direction = read_caption(decoded.caption)
        fields = json.loads(members["json"])
        steps = np.diff(track, axis=0)
        # The whole digit stays on the canvas: the centroid moves by the same number of pixels in every frame.
        np.testing.assert_allclose(
            steps, np.tile(fields["pixels_a_frame"] * np.array(direction), (FRAMES - 1, 1)), atol=1e-5
        )
        top, left = fields["start"]
        original = truth.images[fields["digit_number"]]
        np.testing.assert_allclose(light[0, top : top + 8, left : left + 8] * 16, original, atol=16 / 255)
        assert light[0].sum() == pytest.approx(light[0, top : top + 8, left : left + 8].sum())
        assert truth.target[fields["digit_number"]] == digit == decoded.label == index.column("label")[number]
        assert fields["digit_number"] % 5 != 4, "every fifth is kept for judges"
        seen.add(fields["digit_number"])
        speeds.add((DIRECTIONS[fields["direction"]] == direction, fields["pixels_a_frame"]))
        starts.add((direction, top, left))
    assert len(seen) == COUNT, "no digit comes twice before all have come"
    assert speeds == {(True, 1), (True, 2)}
    assert {direction for direction, *_ in starts} == set(DIRECTIONS.values())
    assert {top for *_, top, _ in starts} == {left for *_, left in starts} == set(range(SIZE - 8 + 1))


def test_the_bytes_depend_on_the_seed_and_not_on_the_processes(videos: Path, tmp_path: Path) -> None:
    write_moving_digits(tmp_path / "again", count=COUNT, frames=FRAMES, size=SIZE, seed=3, workers=2)
    again = {name.replace("again", "shards"): content for name, content in files(tmp_path / "again").items()}
    assert again == files(videos)
    write_moving_digits(tmp_path / "other", count=20, frames=FRAMES, size=SIZE, seed=4, workers=1)
    drawn = []
    for folder in (tmp_path / "other", videos):
        index = Index.open([folder])
        drawn.append([json.loads(index.read(number)["json"]) for number in range(20)])
    for name in ("digit_number", "direction", "start", "wording"):
        assert [fields[name] for fields in drawn[0]] != [fields[name] for fields in drawn[1]], name


def test_held_out_digits_and_prompts_are_new() -> None:
    assert len(held_numbers()) == 359
    assert sorted([*held_numbers(), *training_numbers()]) == list(range(1797))
    trained = {
        caption_for(digit, direction, wording) for digit in (3, 8) for direction in DIRECTIONS for wording in WORDINGS
    }
    assert len(trained) > 0.99 * 2 * 4 * len(WORDINGS)
    for digit in (3, 8):
        for direction, step in DIRECTIONS.items():
            prompts = held_prompts(digit, direction)
            assert len(set(prompts)) == len(HELD_WORDINGS) == 4
            assert not trained.intersection(prompts)
            assert {read_caption(prompt) for prompt in prompts} == {(digit, step)}
    assert "an eight" in " ".join(held_prompts(8, "up"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "at least 1, not 0"),
        ({"frames": 1}, "at least 2 frames, not 1"),
        ({"frames": 6, "size": 12}, "at least 13 pixels, not 12"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_refused(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_moving_digits(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_moving_digits(tmp_path, count=1)
    with pytest.raises(ValueError, match="from 0 to 9, not 10"):
        held_prompts(10, "up")
    with pytest.raises(ValueError, match="one of left, right, up, down, not 'north'"):
        held_prompts(1, "north")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
