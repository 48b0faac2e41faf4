"""Small shards for the tests of this folder."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina.data.index import Index
from lumina.data.plan import Plan
from lumina.data.shard_index import index_path
from lumina.data.sizing import Sizing, Stage
from lumina.data.write import write_shards

SIZES = ((8, 8), (8, 12), (16, 8), (12, 12), (4, 20))


def png(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sample(number: int, **changes: object) -> dict[str, object]:
    height, width = SIZES[number % len(SIZES)]
    members = {"png": png(height, width, number), "txt": f" caption of {number}\n", "json": {"label": number % 3}}
    return {"__key__": f"s{number:04d}"} | members | changes


SIZING = Sizing(4, (Stage(0, None),))


def plan_of(
    index: Index,
    *,
    seed: int = 0,
    tokens_per_pack: int = 64,
    packs: int = 4,
    lanes: int = 4,
    window: int = 64,
    sizing: Sizing = SIZING,
) -> Plan:
    def tokens_of(ids: np.ndarray, step: int) -> np.ndarray:
        frames, heights, widths = sizing.sizes(index.shapes(ids), sizing.stage_of(step))
        tokens = frames * (heights // 4) * (widths // 4 + 1)
        return np.where(tokens > 0, tokens, 6)

    return Plan(
        index.starts,
        index.weights,
        tokens_of,
        tokens_per_pack=tokens_per_pack,
        global_batch_packs=packs,
        lanes=lanes,
        window=window,
        seed=seed,
        stage_of=sizing.stage_of,
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """make_shards(97, per_shard=40, name="a", bad=ids whose PNG is corrupted) → the folder."""

    def make(count: int, *, per_shard: int = 1000, name: str = "a", bad: set[int] | None = None) -> Path:
        broken = {"png": b"\x89PNG\r\n\x1a\nnothing more"}
        samples = [sample(number, **(broken if number in (bad or ()) else {})) for number in range(count)]
        write_shards(tmp_path / name, samples, name=name, samples_per_shard=per_shard)
        return tmp_path / name

    return make


@pytest.fixture
def shard(make_shards) -> Path:
    """One shard of 12 samples without an index."""
    shard = make_shards(12) / "a-000000.tar"
    index_path(shard).unlink()
    return shard


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    return plan_of


@pytest.fixture
def make_sample() -> Callable[..., dict[str, object]]:
    return sample
