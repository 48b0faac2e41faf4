"""The digits: scikit-learn's values come back exactly, captions are of the training wordings only."""

import json
from pathlib import Path

import numpy as np
import pytest

from lumina.data.decode import View, decode_view
from lumina.data.index import Index
from lumina.data.recipes.digits import (
    HELD_WORDINGS,
    WORDINGS,
    WORDS,
    Summary,
    caption_for,
    held_prompts,
    pixel_values,
    write_digits,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    assert write_digits(folder) == Summary(samples=1797, shards=4)
    return folder


def test_pictures_are_exactly_those_of_scikit_learn(digits: Path) -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    index = Index.open([digits])
    assert len(index) == 1797
    assert index.column("label").tolist() == truth.target.tolist()
    assert set(index.column("height").tolist()) == set(index.column("width").tolist()) == {8}
    used = set()
    for number in range(len(index)):
        members = index.read(number)
        decoded = decode_view(members, View(8, 8), 1)
        grey = np.round((decoded.pixels[0, 0].numpy() + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(pixel_values(grey), truth.images[number])
        np.testing.assert_array_equal(grey, np.round(truth.images[number] * 255 / 16))
        assert index.key(number) == f"digit-{number:05d}"
        wording = json.loads(members["json"])["wording"]
        assert decoded.caption == caption_for(int(truth.target[number]), WORDINGS[wording])
        used.add((wording, decoded.label))
    assert len(used) > 1400, "nearly every sample has a caption of its own"


def test_the_same_seed_gives_the_same_data_set(digits: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "again")
    assert Index.open([tmp_path / "again"]).hash == Index.open([digits]).hash
    write_digits(tmp_path / "other", seed=1)
    assert Index.open([tmp_path / "other"]).hash != Index.open([digits]).hash


def test_held_prompts_are_new_sentences_about_one_digit() -> None:
    trained = {caption_for(digit, wording) for digit in range(10) for wording in WORDINGS}
    assert len(trained) == 10 * len(WORDINGS)
    assert len(WORDINGS) >= 12
    for digit in range(10):
        prompts = held_prompts(digit)
        assert len(set(prompts)) == len(HELD_WORDINGS) >= 4
        for prompt in prompts:
            assert prompt not in trained
            words = prompt.replace("?", "").split()
            assert [word for word in words if word in WORDS or word.isdigit()] in ([WORDS[digit]], [str(digit)])
    assert caption_for(8, "this is {a_word}") == "this is an eight"
    with pytest.raises(ValueError, match="from 0 to 9, not 10"):
        held_prompts(10)
