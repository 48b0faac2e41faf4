"""Ways from JPEGs to float32 pictures of one scale: ours, and two as they are commonly written.

Each gives without end lists of (pixels float32 (3, height, width) in [-1, 1], caption); height and width are those of
the aspect bucket nearest to the picture, out of which a random part is cut.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lumina.benchmark.photographs import Photographs
from lumina.data.buckets import buckets, nearest_bucket
from lumina.data.index import Index
from lumina.data.loader import Loader
from lumina.data.plan import Plan
from lumina.data.sizing import Sizing, Stage

MULTIPLE = 16
"""Pixels of a patch: sides are multiples of it."""
AT_ONCE = 32
"""Pictures that are handed over together; about so many of ours, which come in packs of so many square ones' tokens."""
WINDOW = 1000
"""Pictures that are shuffled among themselves."""

Pictures = list[tuple[Tensor, str]]


def of_lumina(pictures: Photographs, resolution: int, workers: int) -> Iterator[Pictures]:
    """The loader that training uses."""
    index = Index.open([pictures.shards])
    sizing = Sizing(MULTIPLE, (Stage(0, resolution),), random_crop=True)
    plan = plan_of(index, sizing, AT_ONCE * (resolution // MULTIPLE) ** 2)
    for batch in Loader(index, plan, sizing, rank=0, world=1, channels=3, workers=workers):
        for pack in batch.packs:
            yield [(sample.pixels[0], sample.caption) for sample in pack]


def plan_of(index: Index, sizing: Sizing, tokens_per_pack: int, packs: int = 1, window: int = WINDOW) -> Plan:
    """A plan with as many lanes as packs, a patch being a token."""

    def tokens_of(ids: np.ndarray, step: int) -> np.ndarray:
        frames, heights, widths = sizing.sizes(index.shapes(ids), sizing.stage_of(step))
        return frames * (heights // sizing.multiple) * (widths // sizing.multiple)

    return Plan(
        index.starts,
        index.weights,
        tokens_of,
        tokens_per_pack=tokens_per_pack,
        global_batch_packs=packs,
        lanes=packs,
        window=window,
        seed=0,
        stage_of=sizing.stage_of,
    )


@cache
def target_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Pixels (height, width) that a picture is brought to."""
    choice = buckets(resolution // MULTIPLE)
    rows, columns = choice[int(nearest_bucket(height, width, choice))]
    return rows * MULTIPLE, columns * MULTIPLE


def plain_transform(image: Image.Image, resolution: int) -> Tensor:
    """Scaled until it covers its bucket, cut at random, (3, height, width) in [-1, 1]."""
    height, width = target_size(image.height, image.width, resolution)
    scale = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255).sub(0.5).div(0.5)


class _Transformed:
    """Of webdataset's samples."""

    def __init__(self, resolution: int):
        self.resolution = resolution

    def __call__(self, sample: tuple[Image.Image, str]) -> tuple[Tensor, str]:
        return plain_transform(sample[0], self.resolution), sample[1]


def of_webdataset(pictures: Photographs, resolution: int, workers: int) -> Iterator[Pictures]:
    """`WebDataset(…).shuffle(…).decode("pil")`, then Pillow and torch."""
    import webdataset

    shards = sorted(map(str, pictures.shards.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(WINDOW)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map(_Transformed(resolution))
        .repeat()
    )
    yield from webdataset.WebLoader(dataset, batch_size=AT_ONCE, num_workers=workers, collate_fn=list)


class Files(Dataset):
    """Pictures of a folder, each with the caption in the .txt beside it."""

    def __init__(self, folder: Path, resolution: int):
        self.paths, self.resolution = sorted(folder.glob("*.jpg")), resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        path = self.paths[number]
        with Image.open(path) as image:
            return plain_transform(image, self.resolution), path.with_suffix(".txt").read_text()


def of_files(pictures: Photographs, resolution: int, workers: int) -> Iterator[Pictures]:
    """A torch `Dataset` over the files and a `DataLoader`."""
    loader = DataLoader(
        Files(pictures.files, resolution),
        batch_size=AT_ONCE,
        shuffle=True,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


PIPELINES: dict[str, Callable[[Photographs, int, int], Iterator[Pictures]]] = {
    "lumina": of_lumina,
    "webdataset": of_webdataset,
    "files": of_files,
}
