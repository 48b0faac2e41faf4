"""Decoding packs ahead in background processes, in order."""

import signal
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lumina.data.decode import (
    BadSampleError,
    View,
    caption_of,
    encoders_of,
    label_of,
    load_latent,
    load_text_features,
    parse_json,
    probe,
    view_levels,
)
from lumina.data.index import ShardReader
from lumina.data.processes import end_with_the_caller, process_context


@dataclass(frozen=True)
class Request:
    """What is wanted of a sample.

    view: of its picture or video; without one, latents.
    crop: in [0, 1): which of the crops of the latents.
    usable: false where its header was bad or it is smaller than a patch: it is read to say which.
    """

    sample_id: int
    view: View | None
    crop: float = 0.0
    usable: bool = True


@dataclass
class RawSample:
    """A decoded sample on its way between processes.

    levels: of its pixels, as `view_levels` gives them; None where there are latents. The trainer makes floats of
        them, which are four times as long and would take longer to hand over than to make.
    latent: mean and deviation of the posterior, (frames, 2·channels, rows, columns).
    text, null_text: features (tokens, width) of the caption and of the empty one, where they were made beforehand.
    encoders: which autoencoder and text encoder made them, in words.
    """

    # numpy, not torch: tensors would travel by shared memory, of which containers have little, and by a file
    # descriptor each, of which a pack of many samples needs more than a process may open.
    levels: np.ndarray | None
    latent: np.ndarray | None
    text: np.ndarray | None
    null_text: np.ndarray | None
    caption: str | None
    label: int | None
    encoders: dict[str, str | None]


@dataclass(frozen=True)
class PackDecoder:
    """Reads and decodes the samples of a pack; in place of a bad one stands the reason, a str."""

    reader: ShardReader
    channels: int

    def __call__(self, requests: list[Request]) -> list[RawSample | str]:
        """RawSample or reason for each; `ValueError` if a shard is gone."""
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> RawSample | str:
        try:
            members = self.reader.read(request.sample_id)
            if not request.usable:
                found = probe(members)  # its header may be what is wrong
                if found.kind == "audio":
                    raise BadSampleError("sound is not trained on")
                wrong = "does not divide into whole patches" if found.kind == "latent" else "is smaller than a patch"
                raise BadSampleError(f"{found.kind} of {found.height}×{found.width} {wrong}")
            fields = parse_json(members)
            texts = load_text_features(members) or (None, None)
            said = (caption_of(members, fields), label_of(fields), encoders_of(fields))
            if request.view is not None:
                return RawSample(view_levels(members, request.view, self.channels), None, *texts, *said)
            crops = load_latent(members)
            return RawSample(None, crops[int(request.crop * len(crops))], *texts, *said)
        except BadSampleError as error:
            return str(error)


@dataclass(frozen=True)
class _Failure:
    """An error in a worker that is no bad sample."""

    sentence: str
    details: str
    by_user: bool


class _Packs(Dataset):
    def __init__(self, decoder: PackDecoder) -> None:
        self.decoder = decoder

    def __getitem__(self, requests: list[Request]) -> list[RawSample | str] | _Failure:
        # torch would pack any exception into a page of traceback; the trainer is told in a sentence.
        try:
            return self.decoder(requests)
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: it is raised again in the trainer
            return _Failure(str(error), traceback.format_exc(), isinstance(error, ValueError))


def decoded_in_order(
    decoder: PackDecoder, packs: Iterable[list[Request]], workers: int
) -> Iterator[list[RawSample | str]]:
    """Decode `packs` one after another, `workers` processes running up to two packs ahead each.

    Raises:
        ValueError: a shard cannot be read.
        RuntimeError: a worker died or failed otherwise.
    """
    if workers == 0:
        yield from map(decoder, packs)
        return
    running = iter(
        DataLoader(
            _Packs(decoder),
            sampler=packs,
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            num_workers=workers,
            prefetch_factor=2,
            multiprocessing_context=process_context(),
            # Its own, lest it draw from the trainer's random state.
            generator=torch.Generator(),
        )
    )
    try:
        while True:
            try:
                result = next(running)
            except StopIteration:
                return
            except RuntimeError as error:
                raise RuntimeError(f"a data worker died ({str(error).splitlines()[0]})") from error
            if isinstance(result, _Failure):
                error = (
                    ValueError(result.sentence)
                    if result.by_user
                    else RuntimeError(f"a data worker failed: {result.sentence}")
                )
                error.add_note(result.details)
                raise error
            yield result
    finally:
        running._shutdown_workers()


def _begin(_: int) -> None:
    # Ctrl-C, and many a scheduler's SIGTERM, reach the whole group: the trainer finishes its step, and needs them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_the_caller()  # torch's own watch looks for a change of the parent process, which is the fork server


def _as_it_is(pack: list[RawSample | str]) -> list[RawSample | str]:
    return pack
