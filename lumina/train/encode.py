"""`lumina data encode`: what the frozen encoders make of a data set, written once, so that training needs neither."""

import argparse
import io
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumina.checkpoint.load import model_config
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.data.decode import BadSampleError, pixels_of
from lumina.data.index import Index
from lumina.data.lanes import PlannedSample
from lumina.data.loader import bad_budget
from lumina.data.shard_index import index_path, parse_header
from lumina.data.sizing import LATENT, Sizing
from lumina.data.sources import LocalSource
from lumina.data.workers import PackDecoder, RawSample, Request, decoded_in_order
from lumina.data.write import write_shard
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import Vae, build_vae
from lumina.parallel.mesh import World, device_of
from lumina.train.assemble import sets_of, sizing_of

_DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
_VIEWED_BY = ("resolution", "crop", "flip", "frames", "frame_step")
_AT_ONCE = 16
"""Samples that are decoded, and encoded, together."""


class ShardEncoder:
    """Encodes shards one by one, each into a shard of its own, so that any ranks can share the work and go on with it.

    Args:
        crops: of each sample, so many views: the n-th drawn as in epoch n.
        dtype: of what is written.
        workers: processes that decode ahead.
    """

    def __init__(
        self,
        index: Index,
        sizing: Sizing,
        vae: Vae,
        text: TextEncoder | None,
        *,
        crops: int,
        dtype: np.dtype,
        workers: int,
    ):
        self._index, self._sizing, self._vae, self._text = index, sizing, vae, text
        self._crops, self._dtype, self._workers = crops, dtype, workers
        self._null = None if text is None else self._features([""])[0]
        self.facts = {
            "vae": vae.describe(),
            "text": None if text is None else text.describe(),
            "crops": crops,
            "dtype": np.dtype(dtype).name,
        }

    def encode(self, shard: int, out: Path, left_out: Callable[[str, str], object]) -> int:
        """Write shard number `shard` to `out`, and its index beside it when that is whole; neither if all are bad.

        Args:
            left_out: called with the key of each sample that cannot be read and the reason.

        Returns:
            Samples written.
        """
        written = 0

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal written
            for sample in self._samples(shard, left_out):
                written += 1
                yield sample

        samples = counted()
        if (first := next(samples, None)) is not None:
            write_shard(out, itertools.chain([first], samples))
        return written

    def _samples(self, shard: int, left_out: Callable[[str, str], object]) -> Iterator[dict[str, Any]]:
        first, stop = self._index.reader.starts[shard : shard + 2].tolist()
        groups = [list(range(i, min(i + _AT_ONCE, stop))) for i in range(first, stop, _AT_ONCE)]
        decoder = PackDecoder(self._index.reader, self._vae.pixel_channels)
        decoded = decoded_in_order(decoder, (self._requests(ids) for ids in groups), self._workers)
        for ids, raw in zip(groups, decoded, strict=True):
            views = {i: raw[n * self._crops : (n + 1) * self._crops] for n, i in enumerate(ids)}
            for i in ids:
                if bad := next((view for view in views[i] if isinstance(view, str)), None):
                    left_out(self._index.key(i), bad)
                    del views[i]
            if views:
                yield from self._encoded(views)

    def _requests(self, ids: list[int]) -> list[Request]:
        shapes = self._index.shapes(np.array(ids))
        if (shapes.kind == LATENT).any():
            raise ValueError(f"{self._index.name(ids[0])} holds latents already; encode the pictures they came from")
        sizes = np.stack(self._sizing.sizes(shapes, 0), -1).tolist()
        return [
            Request(
                i, self._sizing.view(PlannedSample(i, crop), tuple(size), 0) if size[0] else None, usable=size[0] > 0
            )
            for i, size in zip(ids, sizes, strict=True)
            for crop in range(self._crops)
        ]

    def _encoded(self, views: dict[int, list[RawSample]]) -> Iterator[dict[str, Any]]:
        # Pictures of one size are encoded in one call; those of other sizes in others.
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, of in views.items():
            by_shape.setdefault(of[0].levels.shape, []).append(i)
        latents: dict[int, Tensor] = {}
        for (frames, *_), ids in by_shape.items():
            pixels = torch.cat([pixels_of(view.levels) for i in ids for view in views[i]])
            moments = torch.cat(self._vae.moments(pixels), 1)
            latents |= dict(zip(ids, moments.unflatten(0, (len(ids), self._crops, frames)), strict=True))
        features = [None] * len(views)
        if self._text is not None:
            features = self._features([self._caption(i, of[0]) for i, of in views.items()])
        for (i, of), text in zip(views.items(), features, strict=True):
            sample = {"__key__": self._index.key(i), "latent.npy": self._array(latents[i])}
            if of[0].caption is not None:
                sample["txt"] = of[0].caption
            if text is not None:
                sample |= {"text.npy": self._array(text), "text.null.npy": self._array(self._null)}
            encoders = {"vae": self.facts["vae"], "text": self.facts["text"]}
            sample["json"] = ({} if of[0].label is None else {"label": of[0].label}) | {"encoders": encoders}
            yield sample

    def _caption(self, i: int, view: RawSample) -> str:
        if view.caption is None:
            raise ValueError(f"{self._index.name(i)} has no caption, of which features are to be made; see `text:`")
        return view.caption

    def _features(self, captions: list[str]) -> list[Tensor]:
        """Of each caption, its tokens alone."""
        features, mask = self._text(captions)
        return [of[here].cpu() for of, here in zip(features, mask, strict=True)]

    def _array(self, values: Tensor) -> bytes:
        array = values.cpu().numpy().astype(self._dtype)
        if not np.isfinite(array).all():
            raise BadSampleError(f"{np.dtype(self._dtype).name} cannot hold what the encoder gives; take --dtype fp32")
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        return stream.getvalue()


def encode(arguments: argparse.Namespace) -> None:
    """The verb: this rank's share of the shards, those that are not there yet.

    Raises:
        ValueError: the folder cannot be written, or holds what other encoders or data made, or something else; or
            more samples cannot be read than data.bad_samples allows.
    """
    if arguments.crops < 1:
        raise ValueError(f"--crops must be at least 1, not {arguments.crops}")
    config = load_config(arguments.config, arguments.overrides)
    model, world = model_config(config), World.from_environment()
    if config.data.stages:
        raise ValueError("data.stages: encode each resolution into a folder of its own, by data.resolution")
    device = device_of(world)
    vae = build_vae(config.vae, model.in_channels, device)
    text = build_text_encoder(config.text, device) if config.text is not None else None
    index = Index.open(*sets_of(config.data))
    encoder = ShardEncoder(
        index,
        sizing_of(config, model, vae),
        vae,
        text,
        crops=arguments.crops,
        dtype=_DTYPES[arguments.dtype],
        workers=config.data.workers,
    )
    out = Path(arguments.out)
    facts = encoder.facts | {"data": index.hash, **config.data.model_dump(include=set(_VIEWED_BY))}
    if config.data.crop == "random" or config.data.flip:
        facts["seed"] = config.run.seed
    try:
        _same_work(out, facts)
        _encode_share(config, index, encoder, out, world)
    except OSError as error:  # what is read is refused by sentences of its own
        raise ValueError(f"{error.filename or out} cannot be written ({error.strerror or error})") from error


def _encode_share(config: Config, index: Index, encoder: ShardEncoder, out: Path, world: World) -> None:
    seen = written = left_out = 0
    last = ""
    for shard in range(world.rank, len(index.shards), world.size):
        name = index.shards[shard].source.name
        # Two sets may hold shards of one name.
        target = out / f"{name.removesuffix('.tar')}-{shard:06d}.tar"
        count, before = 0, _samples_of(target)
        if before is None:
            reasons: dict[str, str] = {}
            count = encoder.encode(shard, target, reasons.__setitem__)
            for key, reason in reasons.items():
                last = f"; the last is sample {key} of {name}: {reason}"
                print(f"sample {key} of {name} is left out: {reason}", file=sys.stderr)
            said = "is written" if count else f"is not written: no sample of {name} can be read"
            print(f"{target.name} {said}", file=sys.stderr)
        # Those of earlier starts count, or starting again would be a way past the budget.
        seen, written = seen + len(index.shards[shard]), written + count
        left_out += len(index.shards[shard]) - (count if before is None else before)
        if left_out > bad_budget(config.data.bad_samples, seen, len(index)):
            raise ValueError(
                f"{left_out} of {seen} samples cannot be read, more than data.bad_samples={config.data.bad_samples} "
                f"allows{last}"
            )
    print(f"{written:,} samples encoded into {out}" + (f", {left_out:,} left out" if left_out else ""))


def _samples_of(target: Path) -> int | None:
    """How many samples a shard that was written holds; None if it is not there, or not whole."""
    if not target.is_file() or not index_path(target).is_file():
        return None
    header = parse_header(LocalSource(target), LocalSource(index_path(target)))
    return len(header) if header is not None and header.shard_size == target.stat().st_size else None


def _same_work(out: Path, facts: dict[str, Any]) -> None:
    path = out / "encoding.json"
    out.mkdir(parents=True, exist_ok=True)
    # In this order: another rank may just have begun.
    held = [name for name in os.listdir(out) if not name.startswith(".")]
    if held and not path.is_file():
        raise ValueError(f"{out} is not empty and holds nothing that was encoded ({held[0]}); name a new folder")
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    # Complete or not at all, and of several ranks the first: a link to what is written already.
    part = path.with_name(f".encoding-{secrets.token_hex(4)}.part")
    part.write_text(text)
    try:
        os.link(part, path)
    except FileExistsError:
        before = _read_facts(path)
        changed = [key for key in facts if before.get(key) != facts[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{out} was made with {key}={before.get(key)!r}, not {facts[key]!r}; go on with that, or name another "
                "folder"
            ) from None
    finally:
        part.unlink()


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, or name another") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (no object); delete its folder, or name another")
    return facts
