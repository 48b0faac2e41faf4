"""Checkpoints: whole or not visible, read by any stretch of any part, refused when damaged."""

import json
import math
import tempfile
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import CONFIG, MANIFEST, MANIFEST_HASH, plain_stretch, sha256_of
from lumina.checkpoint.save import Piece
from lumina.config.load import validate
from lumina.parallel.fragments import Part
from tests.parallel.runs import tiny_config
from tests.unit.checkpoints import save, save_on_ranks


@pytest.fixture
def config(tmp_path):
    return validate(tiny_config(tmp_path, tmp_path, checkpoint__keep=2), "test")


def cut(full, part, start=0, numel=None):
    """What is to be read: elements [start, start + numel) of the flattened part."""
    if part is not None:
        full = full.narrow(part.dim, part.start, part.stop - part.start)
    flat = full.flatten()[start:]
    return flat if numel is None else flat[:numel]


def test_any_stretch_of_pieces_comes_back(tmp_path, config):
    values = torch.randn(5, 7)
    flat = values.flatten()
    pieces = [[Piece("master", "w", (5, 7), a, flat[a:b])] for a, b in ((0, 10), (10, 11), (11, 35))]
    checkpoint = Checkpoint(save_on_ranks(tmp_path, config, pieces))
    assert torch.equal(checkpoint.state_dict("master")["w"], values)
    for start, numel in ((0, 35), (9, 3), (10, 1), (12, 23), (34, 1), (3, 0)):
        assert torch.equal(checkpoint.read("master", "w", start, numel), flat[start : start + numel])


def points(draw, size, most):
    """Cuts of [0, size) into at most `most` stretches, some of them perhaps empty."""
    return pairwise([0, *sorted(draw(st.lists(st.integers(0, size), max_size=most - 1))), size])


@st.composite
def layouts(draw, shape):
    """Every element of a tensor once, as (part, start, numel): cut along a dimension or none, then into stretches."""
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    parts = [None] if dim is None else [Part(dim, a, b) for a, b in points(draw, shape[dim], 3)]
    sizes = [cut(torch.empty(shape), part).numel() for part in parts]
    return [(part, a, b - a) for part, size in zip(parts, sizes, strict=True) for a, b in points(draw, size, 3)]


@st.composite
def two_layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    return shape, draw(layouts(shape)), draw(layouts(shape)), draw(st.randoms(use_true_random=False))


@settings(max_examples=80)
@given(two_layouts())
def test_what_one_layout_saves_any_other_reads(case):
    shape, saved, wanted, random = case
    full = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    pieces = [[Piece("master", "w", shape, of[1], cut(full, *of), of[0])] for of in saved]
    config = validate(tiny_config(Path("run"), Path("shards")), "test")
    lost = random.randrange(len(pieces))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(save_on_ranks(Path(folder) / "whole", config, pieces))
        for part, start, numel in wanted:
            assert torch.equal(checkpoint.read("master", "w", start, numel, part), cut(full, part, start, numel))
            assert torch.equal(checkpoint.read("master", "w", part=part), cut(full, part))
        assert torch.equal(checkpoint.state_dict("master")["w"], full)

        # All but one piece, and the others twice: what is left is read, and only that.
        kept = (pieces[:lost] + pieces[lost + 1 :]) * 2
        if not kept or not pieces[lost][0].values.numel():
            return
        checkpoint = Checkpoint(save_on_ranks(Path(folder) / "holed", config, kept))
        gone = pieces[lost][0].values
        with pytest.raises(ValueError, match=rf"master/w has {full.numel() - gone.numel()} of the elements"):
            checkpoint.state_dict("master")
        for part, start, numel in wanted:
            expected = cut(full, part, start, numel)
            if torch.isin(expected, gone).any():
                with pytest.raises(ValueError, match="pieces are missing"):
                    checkpoint.read("master", "w", start, numel, part)
            elif not across(shape, [of[0] for of in saved], part):
                assert torch.equal(checkpoint.read("master", "w", start, numel, part), expected)


def across(shape, parts, part):
    """Whether a part lies across those saved, so that it is cut from the whole tensor."""
    plain = [plain_stretch(shape, p, 0, None)[0] for p in (part, *parts)]
    return len({p.dim for p in plain if p is not None}) > 1


HALVES = [[None], *([Part(dim, 0, 2), Part(dim, 2, 4)] for dim in range(3))]


@pytest.mark.parametrize("saved", HALVES)
def test_every_stretch_along_every_dimension(tmp_path, config, saved):
    full = torch.arange(64.0).view(4, 4, 4)
    pieces = [[Piece("master", "w", (4, 4, 4), 0, cut(full, part), part)] for part in saved]
    checkpoint = Checkpoint(save_on_ranks(tmp_path, config, pieces))
    for part in (part for parts in HALVES for part in parts):
        for start, stop in combinations(range(0, cut(full, part).numel() + 1, 3), 2):
            wanted = cut(full, part, start, stop - start)
            assert torch.equal(checkpoint.read("master", "w", start, stop - start, part), wanted)


def test_only_parts_that_are_no_stretch_are_stored_as_parts(tmp_path, config):
    shapes = {"rows": (4, 6), "columns": (4, 6), "vector": (6,), "one row": (1, 6), "every column": (4, 6)}
    parts = [Part(0, 1, 3), Part(1, 2, 5), Part(0, 2, 6), Part(1, 2, 6), Part(1, 0, 6)]
    pieces = [Piece("master", *item, 1, torch.ones(3), part) for item, part in zip(shapes.items(), parts, strict=True)]
    folder = save(tmp_path, config, pieces=pieces)
    stored = json.loads((folder / MANIFEST).read_text())["tensors"]["master"]
    assert {name: (piece["part"], piece["start"]) for name in stored for piece in stored[name]["pieces"]} == {
        "rows": (None, 7),
        "columns": ([1, 2, 5], 1),
        "vector": (None, 3),
        "one row": (None, 3),
        "every column": (None, 1),
    }


def test_a_part_is_read_from_the_files_that_hold_it(tmp_path, config):
    full = torch.arange(24.0).view(4, 6)
    halves = [Part(1, 0, 3), Part(1, 3, 6)]
    folder = save_on_ranks(
        tmp_path, config, [[Piece("master", "w", (4, 6), 0, cut(full, part), part)] for part in halves]
    )
    (folder / "rank_00001.safetensors").unlink()
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.read("master", "w", part=halves[0]), cut(full, halves[0]))
    assert torch.equal(checkpoint.read("master", "w", 7, 2), full[1, 1:3])
    with pytest.raises(ValueError, match=r"rank_00001.safetensors is missing or damaged"):
        checkpoint.read("master", "w", 7, 3)


@pytest.mark.parametrize(
    ("start", "numel", "part", "message"),
    [
        (0, 7, None, "has 6 elements, not 0 to 7"),
        (-1, 2, None, "has 6 elements, not -1 to 1"),
        (0, 4, Part(0, 0, 1), "has 3 elements, not 0 to 4"),
        (0, 5, Part(1, 0, 2), "has 4 elements, not 0 to 5"),
        (0, None, Part(1, 2, 4), r"shape \(2, 3\) has no Part"),
        (0, None, Part(2, 0, 1), r"shape \(2, 3\) has no Part"),
    ],
)
def test_what_the_tensor_does_not_have_is_refused(tmp_path, config, start, numel, part, message):
    with pytest.raises(ValueError, match=f"master/w: .*{message}"):
        Checkpoint(save(tmp_path, config)).read("master", "w", start, numel, part)


def test_one_rank_writes_a_tensor_once(tmp_path, config):
    pieces = [Piece("master", "w", (6,), start, torch.ones(3)) for start in (0, 3)]
    with pytest.raises(AssertionError, match="master/w twice"):
        save(tmp_path, config, pieces=pieces)


def test_a_manifest_of_version_1_is_read(tmp_path, config):
    values = torch.arange(6.0).view(2, 3)
    pieces = [[Piece("master", "w", (2, 3), a, values.flatten()[a:b])] for a, b in ((0, 2), (2, 6))]
    folder = save_on_ranks(tmp_path, config, pieces)
    names = ("rank_00000.safetensors", "rank_00001.safetensors", CONFIG)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    stored = [
        {"file": "rank_00000.safetensors", "key": "master/w", "start": 0, "numel": 2},
        {"file": "rank_00001.safetensors", "key": "master/w", "start": 2, "numel": 4},
    ]
    manifest = {
        "format": "lumina-checkpoint",
        "version": 1,
        "step": 1,
        "optimizer_steps": 1,
        "data": {},
        "tensors": {"master": {"w": {"shape": [2, 3], "pieces": stored}}},
        "files": files,
        "software": {"torch": "2.0"},
    }
    (folder / MANIFEST_HASH).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    checkpoint = Checkpoint(folder)
    assert torch.equal(checkpoint.state_dict("master")["w"], values)
    assert checkpoint.read("master", "w", 1, 2, Part(1, 1, 3)).tolist() == [2.0, 4.0]
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 4}))
    with pytest.raises(ValueError, match="not a Lumina checkpoint of version 1, 2, 3"):
        Checkpoint(folder)


def test_a_missing_piece_is_named(tmp_path, config):
    folder = save(tmp_path, config, pieces=[Piece("master", "w", (6,), 0, torch.arange(4.0))])
    with pytest.raises(ValueError, match="master/w has 4 of the elements 0 to 6"):
        Checkpoint(folder).read("master", "w")
