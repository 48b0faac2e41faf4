"""What size samples are trained at, what is cut out of them, and that both depend on the sample's identity alone."""

import io
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lumina.checkpoint.load import model_config
from lumina.config.load import validate
from lumina.data.decode import decode_view
from lumina.data.decode.geometry import clip_of
from lumina.data.index import Index
from lumina.data.lanes import PlannedSample
from lumina.data.loader import Loader
from lumina.data.sizing import IMAGE, LATENT, VIDEO, Shapes, Sizing, Stage
from lumina.data.write import write_shards
from lumina.parallel.mesh import Mesh, World
from lumina.train.assemble import Parts, assemble
from tests.data.conftest import SIZES, plan_of, png, sample
from tests.data.streams import global_stream, samples_of, take
from tests.data.test_decode_audio import tone, written
from tests.data.test_decode_video import encoded, grey
from tests.parallel.runs import TINY_MODEL, tiny_config


def shapes_of(sizes: list[tuple[int, ...]], kind: int = IMAGE) -> Shapes:
    """(height, width) or (height, width, frames) of each."""
    columns = np.array([(*size, 1)[:3] for size in sizes], np.int64).T
    return Shapes(np.full(len(sizes), kind), *columns)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def loaders(index: Index, sizing: Sizing, **plan: object) -> Callable[..., Loader]:
    def open_loader(rank: int, world: int, **options: object) -> Loader:
        options = {"channels": 1, "bad_samples": 0.0} | options
        return Loader(index, plan_of(index, sizing=sizing, **plan), sizing, rank=rank, world=world, **options)

    return open_loader


# Sizes


def public_table(side: int) -> list[tuple[int, int]]:
    """(height, width) in patches by the public rule: from (w, h) = (n, 1), h + 1 where it fits, else w - 1."""
    width, height, table = side * side, 1, []
    while width > 0:
        if max(Fraction(width, height), Fraction(height, width)) <= 4:
            table.append((height, width))
        width, height = (width, height + 1) if (height + 1) * width <= side * side else (width - 1, height)
    return table


def shown(size: tuple[int, int], bucket: tuple[int, int]) -> Fraction:
    """The share of a picture that a bucket shows."""
    return min(Fraction(size[0] * bucket[1], size[1] * bucket[0]), Fraction(size[1] * bucket[0], size[0] * bucket[1]))


PICTURES = [
    (256, 256),
    (1000, 1000),
    (1080, 1920),
    (1920, 1080),
    (3000, 4000),
    (600, 400),
    (90, 3000),
    (3000, 90),
    (37, 51),
]
"""(height, width): square, landscape, portrait, beyond the table on both sides, and smaller than the bucket."""


@pytest.mark.parametrize(("resolution", "count", "most"), [(256, 49, 288), (512, 97, 1088)])
def test_pictures_take_the_buckets_of_the_public_recipe(resolution: int, count: int, most: int) -> None:
    sizing = Sizing(16, (Stage(0, resolution),))
    table = public_table(resolution // 16)
    assert len(table) == count
    assert max(height * (width + 1) for height, width in table) == most
    random = np.random.default_rng(resolution)
    sizes = PICTURES + [tuple(size) for size in random.integers(20, 2000, (300, 2)).tolist()]
    frames, heights, widths = sizing.sizes(shapes_of(sizes), 0)
    assert set(frames.tolist()) == {1}
    for size, height, width in zip(sizes, heights.tolist(), widths.tolist(), strict=True):
        bucket = height // 16, width // 16
        assert (height % 16, width % 16) == (0, 0)
        assert bucket in table
        best = max(shown(size, other) for other in table)
        assert shown(size, bucket) == best, f"{size} is shown less of by {bucket} than it could be"
        equal = [other for other in table if shown(size, other) == best]
        assert bucket[0] * bucket[1] == max(height * width for height, width in equal)
        assert bucket[0] * (bucket[1] + 1) <= most
    found = dict(zip(sizes, zip(heights.tolist(), widths.tolist(), strict=True), strict=True))
    assert found[1000, 1000] == (resolution, resolution)
    assert found[90, 3000] == (resolution // 2, 2 * resolution)
    assert found[3000, 90] == (2 * resolution, resolution // 2)
    assert found[1080, 1920] == {256: (192, 336), 512: (384, 672)}[resolution]
    assert found[1920, 1080] == {256: (336, 192), 512: (672, 384)}[resolution]


def test_without_a_resolution_pictures_keep_their_size_but_for_a_part_of_a_patch() -> None:
    sizing = Sizing(8, (Stage(0, None),))
    _, heights, widths = sizing.sizes(shapes_of([(8, 8), (23, 100), (7, 64), (64, 7), (0, 0)]), 0)
    assert heights.tolist() == [8, 16, 0, 0, 0]
    assert widths.tolist() == [8, 96, 0, 0, 0]


def test_clips_are_as_long_as_there_are_frames() -> None:
    sizing = Sizing(8, (Stage(0, None),), frames=4, frame_step=3)
    lengths = [1, 2, 3, 4, 6, 7, 9, 10, 11, 100]
    frames, _, _ = sizing.sizes(shapes_of([(8, 8, n) for n in lengths], VIDEO), 0)
    assert frames.tolist() == [min(4, len(range(0, n, 3))) for n in lengths]


def test_latents_keep_their_size() -> None:
    sizing = Sizing(16, (Stage(0, 256),), factor=8, frames=2, frame_step=2)
    sizes = [(32, 32, 1), (20, 64, 1), (4, 4, 16), (3, 4, 1), (4, 5, 1)]
    frames, heights, widths = sizing.sizes(shapes_of(sizes, LATENT), 0)
    assert frames.tolist() == [1, 1, 16, 0, 0]
    assert heights.tolist() == [256, 160, 32, 0, 0]
    assert widths.tolist() == [256, 512, 32, 0, 0]


def test_what_is_no_sizing() -> None:
    for stages, sentence in (
        ((), "must start with from_step=0"),
        ((Stage(1, 32),), r"must start with from_step=0 and go up, not \[1\]"),
        ((Stage(0, 32), Stage(5, 64), Stage(5, 96)), r"not \[0, 5, 5\]"),
        ((Stage(0, 40),), "data.resolution=40 must be a multiple of 16 pixels"),
        ((Stage(0, 0),), "data.resolution=0 must be a multiple"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Sizing(16, stages)


# Stages


def test_stages_change_at_their_step_and_the_stream_goes_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "p", [sample(number) for number in range(120)], name="p", samples_per_shard=40)
    index = Index.open([tmp_path / "p"])
    sizing = Sizing(4, (Stage(0, 8), Stage(4, 16), Stage(6, None)), random_crop=True, flip=True)
    open_loader = loaders(index, sizing, tokens_per_pack=40, lanes=2, packs=4)
    stream = iter(open_loader(0, 1))
    sizes = [SIZES[number % len(SIZES)] for number in range(120)]
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(1, 9):
        for one in samples_of([next(stream)]):
            seen[one.sample_id, one.epoch] += 1
            height, width = one.pixels.shape[-2:]
            assert height % 4 == width % 4 == 0
            if step < 6:
                table = public_table(2 if step < 4 else 4)
                assert (height // 4, width // 4) in table
                best = max(shown(sizes[one.sample_id], bucket) for bucket in table)
                assert shown(sizes[one.sample_id], (height, width)) == best
            else:
                assert (height, width) == sizes[one.sample_id]
    stream.close()
    assert set(seen.values()) == {1}
    whole, end = global_stream(open_loader, 1, None, 8)
    for breaks in (3, 5):
        before, middle = global_stream(open_loader, 2, None, breaks)
        after, last = global_stream(open_loader, 4, middle, 8 - breaks, step=breaks)
        assert before + after == whole
        assert last == end


# What is cut out


def identities(count: int) -> list[PlannedSample]:
    return [PlannedSample(i // 4, i % 4 // 2, i % 2 * 1000) for i in range(count)]


def chi_squared(counts: Counter, cells: int) -> float:
    expected = sum(counts.values()) / cells
    return sum((n - expected) ** 2 / expected for n in counts.values()) + (cells - len(counts)) * expected


def test_crops_and_flips_are_uniform() -> None:
    """Every place where a picture, a video's clip or its mirror image can lie comes equally often."""
    rows, columns = 19, 21
    video = np.zeros((7, rows, columns, 3), np.uint8)
    video[..., 0] = np.arange(rows)[:, None]
    video[..., 1] = np.arange(columns)
    video[..., 2] = np.arange(7)[:, None, None]
    members = {"npy": npy(video), "txt": b"x"}
    sizing = Sizing(16, (Stage(0, None),), frames=3, frame_step=2, random_crop=True, flip=True, seed=5)
    found: Counter[tuple] = Counter()
    for place in identities(2880):
        pixels = decode_view(members, sizing.view(place, (3, 16, 16), 0), 3).pixels
        levels = ((pixels + 1) * 127.5).round().int()
        (top, left), flipped = levels[0, :2, 0, 0].tolist(), bool(levels[0, 1, 0, 0] > levels[0, 1, 0, 15])
        first = int(levels[0, 2, 0, 0])
        assert levels[:, 2, 0, 0].tolist() == [first, first + 2, first + 4]
        found[top, left - 15 * flipped, flipped, first] += 1
    cells = 4 * 6 * 2 * 3
    assert {key[0] for key in found} == set(range(4))
    assert {key[1] for key in found} == set(range(6))
    assert len(found) == cells
    assert chi_squared(found, cells) < 214  # 143 degrees of freedom: 1e-4


def test_without_randomness_the_middle_is_shown() -> None:
    sizing = Sizing(8, (Stage(0, None),), seed=5)
    picture = np.arange(10 * 12, dtype=np.uint8).reshape(10, 12, 1)
    for place in identities(20):
        pixels = decode_view({"npy": npy(picture), "txt": b"x"}, sizing.view(place, (1, 8, 8), 0), 1).pixels
        assert ((pixels[0, 0] + 1) * 127.5).round().int().tolist() == picture[1:9, 2:10, 0].tolist()


def test_draws_differ_with_each_part_of_the_identity() -> None:
    def drawn(seed: int, *identity: int) -> tuple:
        sizing = Sizing(8, (Stage(0, 16),), random_crop=True, flip=True, seed=seed)
        view = sizing.view(PlannedSample(*identity), (1, 16, 16), 0)
        return view.down, view.across, view.start, sizing.crop(PlannedSample(*identity))

    identities = [(seed, i, epoch, again) for seed in (0, 1) for i in (0, 1) for epoch in (0, 1) for again in (0, 1)]
    draws = [drawn(*identity) for identity in identities]
    assert draws == [drawn(*identity) for identity in identities]
    assert len({number for draw in draws for number in draw}) == 4 * 16
    # Written down once: another machine must draw these, or a run could not go on there.
    assert drawn(3, 7, 1, 0) == pytest.approx(DRAWN, abs=1e-15)


DRAWN = (0.6779294926179642, 0.25310618459240064, 0.690788605421276, 0.23101056106363438)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_crops_are_the_same_under_any_world_and_differ_between_epochs(tmp_path: Path, workers: int) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (19, 22, 1), dtype=np.uint8) for _ in range(40)]
    samples = [{"__key__": f"{i:03d}", "npy": npy(picture), "txt": "x"} for i, picture in enumerate(pictures)]
    write_shards(tmp_path / "p", samples, name="p", samples_per_shard=10)
    index = Index.open([tmp_path / "p"])
    sizing = Sizing(4, (Stage(0, 12),), random_crop=True, flip=True, seed=9)
    open_loader = loaders(index, sizing, tokens_per_pack=60, seed=9)
    whole, _ = global_stream(open_loader, 1, None, 10)
    for world in (2, 4):
        assert global_stream(open_loader, world, None, 10, workers=workers)[0] == whole
    seen: dict[int, set[bytes]] = {}
    for sample_id, epoch, occurrence, _, _, _, (shape, pixels), *_ in (one for pack in whole for one in pack):
        view = sizing.view(PlannedSample(sample_id, epoch, occurrence), (1, *shape[2:]), 0)
        assert decode_view(index.read(sample_id), view, 1).pixels.numpy().tobytes() == pixels
        seen.setdefault(sample_id, set()).add(pixels)
    epochs = Counter(one[0] for pack in whole for one in pack)
    assert max(epochs.values()) >= 3
    again = [sample_id for sample_id, count in epochs.items() if count > 1]
    assert sum(len(seen[sample_id]) > 1 for sample_id in again) > 0.9 * len(again)


# Everything in one set


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_videos_and_latents_in_one_set(tmp_path: Path, workers: int) -> None:
    random = np.random.default_rng(1)
    latents = {i: random.normal(size=(3, 2, 4, 6, 8)).astype(np.float16) for i in range(0, 60, 4)}
    film = encoded("h264.mp4", frames=9)
    samples = []
    for i in range(60):
        kinds = (
            {"latent.npy": npy(latents.get(i, np.zeros(1))), "text.npy": npy(np.full((3, 5), i, np.float16))}
            | {"text.null.npy": npy(np.zeros((1, 5), np.float16)), "json": {"encoders": {"vae": "v", "text": "t"}}},
            {"png": png(12, 20, i)},
            {"mp4": film},
            {"npy": npy(np.repeat(np.arange(2 + i % 7, dtype=np.uint8) * 10, 128).reshape(-1, 8, 16, 1))},
        )  # fmt: skip
        samples.append({"__key__": f"{i:02d}", "txt": f"caption {i}"} | kinds[i % 4])
    write_shards(tmp_path / "mix", samples, name="m", samples_per_shard=20)
    index = Index.open([tmp_path / "mix"])
    sizing = Sizing(4, (Stage(0, None),), factor=2, frames=3, frame_step=2, random_crop=True)
    open_loader = loaders(index, sizing, tokens_per_pack=700)
    found = samples_of(take(open_loader(0, 1), 10))
    assert {one.sample_id for one in found} == set(range(60))
    starts, crops = Counter(), Counter()
    for one in found:
        i = one.sample_id
        assert one.caption == f"caption {i}"
        if i % 4 == 0:
            same = [(one.latent.numpy() == crop).all() for crop in latents[i]]
            assert same.count(True) == 1
            crops[same.index(True)] += 1
            assert one.pixels is None
            assert (one.text.shape, one.text.unique().tolist(), one.null_text.shape) == ((3, 5), [i], (1, 5))
            assert one.encoders == {"vae": "v", "text": "t"}
            continue
        levels = (one.pixels + 1) * 127.5
        assert one.latent is None
        if i % 4 == 1:
            assert one.pixels.shape == (1, 1, 12, 20)
        elif i % 4 == 2:
            assert one.pixels.shape == (3, 1, 48, 64)
            numbers = [min(range(9), key=lambda n: abs(grey(n) - float(frame[0, 30, 40]))) for frame in levels]
            assert numbers == [numbers[0], numbers[0] + 2, numbers[0] + 4]
            starts[numbers[0]] += 1
        else:
            there = 2 + i % 7
            assert len(levels) == min(3, (there + 1) // 2)
            numbers = (levels[:, 0, 0, 0] / 10).round().int().tolist()
            assert numbers == list(range(numbers[0], there, 2))[: len(levels)]
    assert len(starts) == 5, "clips begin anywhere"
    assert len(crops) == 3
    whole, _ = global_stream(open_loader, 1, None, 4)
    for world in (2, 4):
        assert global_stream(open_loader, world, None, 4, workers=workers)[0] == whole


# What is refused at the start of a run


class OneProcess(Mesh):
    """A mesh of one, without process groups."""

    def any(self, flag: bool) -> bool:
        return flag


def test_audio_is_refused(tmp_path: Path) -> None:
    sounds = [{"__key__": f"{i}", "txt": "a tone"} | written(tone(16000, 0.1), 16000) for i in range(2)]
    pictures = [{"__key__": f"p{i}", "txt": "a picture", "png": png(8, 8)} for i in range(20)]
    write_shards(tmp_path / "s", pictures + sounds, name="s", samples_per_shard=11)
    config = validate(tiny_config(tmp_path / "run", tmp_path / "s"), "test")
    with pytest.raises(ValueError, match=r"data\.shards hold audio, which this version indexes and does not train on"):
        assemble(config, model_config(config), OneProcess(World(0, 1, 0), torch.device("cpu")))


def assembled(tmp_path: Path, **changes: object) -> Parts:
    config = validate(tiny_config(tmp_path / "run", tmp_path, **changes), "test")
    return assemble(config, model_config(config), OneProcess(World(0, 1, 0), torch.device("cpu")))


@pytest.mark.parametrize("stages", [[(0, None)], [(0, 4), (10, 8)]])
def test_a_sample_of_unknown_size_is_as_long_as_others_of_its_set(tmp_path: Path, stages: list) -> None:
    """The median of its set; that of all where a set has no other."""
    bad = {"png": b"no picture"}
    sides = {"small": [None, 4, 4, 6, 4, None], "large": [12, 14, None, 14], "none": [None]}
    for name, of in sides.items():
        pictures = [{"png": png(side, 3 * side, i)} if side else bad for i, side in enumerate(of)]
        samples = [{"__key__": f"{i}", "txt": name} | picture for i, picture in enumerate(pictures)]
        write_shards(tmp_path / name, samples, name=name, samples_per_shard=2)
    sets = [{"shards": [str(tmp_path / name)]} for name in sides]
    data = {"sets": sets, "stages": [{"from_step": step, "resolution": side} for step, side in stages]}
    plan = assembled(tmp_path, data=data, train__tokens_per_pack=400).plan
    for step, resolution in stages:
        tokens = plan.tokens_of(np.arange(11), step).tolist()
        # Patches of 2×2 and a nextline token a row; at a resolution all of 3 : 1 take one bucket.
        lengths = {side: side // 2 * (side * 3 // 2 + 1) for side in (4, 6, 12, 14)}
        if resolution is not None:
            lengths = dict.fromkeys(lengths, tokens[1])
        assert tokens[:6] == [lengths[side or 4] for side in sides["small"]]
        assert tokens[6:10] == [lengths[side or 14] for side in sides["large"]]
        assert tokens[10] == lengths[6], "of 4, 4, 4, 6, 12, 14, 14 pixels"


def test_a_label_that_does_not_read_is_a_bad_sample_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    model = {"model": TINY_MODEL | {"num_classes": 3}, "text": None}
    labels = [b'{"label": 2}', b"{", b'{"label": "x"}', b'{"label": 0}']
    samples = [{"__key__": f"{i}", "png": png(8, 8, i), "txt": "x", "json": of} for i, of in enumerate(labels)]
    for name, last in (("good", b'{"label": 1}'), ("none", b"{}"), ("high", b'{"label": 3}')):
        more = {"__key__": "last", "png": png(8, 8, 9), "txt": "x", "json": last}
        write_shards(tmp_path / name, [*samples, more], name=name, samples_per_shard=9)
    parts = assembled(tmp_path, data={"shards": [str(tmp_path / "good")]}, **model)
    loader = Loader(parts.index, parts.plan, parts.sizing, rank=0, world=1, channels=1, bad_samples=1.0)
    found = samples_of(take(loader, 3))
    assert {one.sample_id: one.label for one in found} == {0: 2, 3: 0, 4: 1}
    assert {one.occurrence for one in found} == {0, 2, 3}
    for name in ("none", "high"):
        with pytest.raises(ValueError, match=rf"sample last of {name}-000000\.tar has no label from 0 to 2, which"):
            assembled(tmp_path, data={"shards": [str(tmp_path / name)]}, **model)


def test_a_clip_of_a_step_that_does_not_fit_is_no_clip() -> None:
    sizing = Sizing(4, (Stage(0, None),), frames=4, frame_step=5)
    for length in range(1, 30):
        (frames,), _, _ = sizing.sizes(shapes_of([(4, 4, length)], VIDEO), 0)
        clip = clip_of(sizing.view(PlannedSample(length, 0), (int(frames), 4, 4), 0), length)
        assert len(clip) == frames
        assert clip[-1] < length
