"""`lumina convert`: from any folder that holds a model to any layout, and the proof that it is still that model."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lumina.checkpoint.adapt import NEXTFRAME, AdaptedSource
from lumina.checkpoint.adapter import AdapterOnBase, write_adapter
from lumina.checkpoint.card import model_card
from lumina.checkpoint.folder import whole_folder, write_text
from lumina.checkpoint.load import model_config
from lumina.checkpoint.lora import LoraSource, pair_names
from lumina.checkpoint.manifest import EMA, MOMENTS, WEIGHTS, FileEntry
from lumina.checkpoint.prove import ConversionError, KindProof, prove_values, prove_weights
from lumina.checkpoint.sources import KINDS, Source, open_source, settings_of
from lumina.checkpoint.targets import (
    DEFAULT_SHARD,
    Files,
    check_parts,
    software,
    write_inference,
    write_training,
    write_upstream,
)
from lumina.checkpoint.tensor_reader import FLOATS
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.model.pretrained import RECORD

TARGETS = ("inference", "upstream", "training", "peft")
FORMATS = ("safetensors", "pth")
DTYPES = {name: dtype for dtype, name in FLOATS.items()}
# What each target takes; another refuses it.
_OPTIONS = {
    "weights": ("inference", "upstream", "peft"),
    "dtype": ("inference", "upstream"),
    "shard_size": ("inference",),
    "model_parallel": ("upstream",),
    "format": ("upstream",),
}

Progress = Callable[[str, int, int], object]
"""Called as progress(what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Request:
    """What to convert, and to what. None leaves an option to its default; where it does not apply it must be None.

    weights: "ema" or "model"; by default of inference the EMA where there is one, of upstream both where both are.
    dtype: "bf16", "fp32" or "fp16"; by default the source's.
    shard_size: bytes of a file at most; 5 GB by default.
    model_parallel: files that share the tensors; 1 by default.
    format: "safetensors" or "pth"; safetensors by default.
    config: configuration of a run, for what the source does not tell.
    drop: patterns of names that are left out.
    verify: compare the result with the source.
    """

    source: Path
    destination: Path
    to: str
    weights: str | None = None
    dtype: str | None = None
    shard_size: int | None = None
    model_parallel: int | None = None
    format: str | None = None
    config: Path | None = None
    drop: Sequence[str] = ()
    verify: bool = True


@dataclass(frozen=True)
class Converted:
    """What was done; `kinds`: of the source, by what each became; `moments`: tensors of moments that were compared."""

    destination: Path
    files: Files
    parameters: int
    step: int
    dtype: str
    kinds: dict[str, str]
    proofs: list[KindProof]
    moments: int
    notes: list[str]


def convert(request: Request, progress: Progress = lambda *_: None) -> Converted:
    """Write `request.destination`, which is there when it is whole and proven, and not before.

    Raises:
        ValueError: for a source that is no model, is damaged or holds code, a destination that is not empty, and
            options that do not apply or fit.
        ConversionError: where the result is not what the source is; nothing is then left of it.
        OSError: where the disk is full or fails; likewise.
    """
    _check_options(request)
    config = load_config(request.config) if request.config is not None else None
    sizes = model_config(config) if config is not None else None
    source = AdaptedSource(open_source(request.source, sizes), sizes, request.drop)
    plan = _PLANS[request.to](request, source, config)
    with whole_folder(request.destination, plan.bytes) as folder:
        progress("reading", 0, 0)
        read = source.check_files()
        files = plan.write(folder, _counter(progress, "writing", plan.bytes))
        proofs, moments = [], 0
        if request.verify:
            counter = _counter(progress, "comparing", plan.bytes)
            proofs, moments = _prove(source, plan.kinds, lambda: plan.open(folder), counter)
        kind = next(iter(plan.kinds.values()))
        parameters = plan.parameters or sum(prod(stored.shape) for stored in source.tensors[kind].values())
        converted = Converted(
            request.destination, files, parameters, source.step, FLOATS[plan.dtype], plan.kinds, proofs, moments,
            source.notes + plan.notes,
        )  # fmt: skip
        write_text(folder / RECORD, json.dumps(_record(request, source, read, converted), indent=1))
    return converted


@dataclass(frozen=True)
class _Plan:
    kinds: dict[str, str]
    """Of the source, by the kind that each becomes."""
    dtype: torch.dtype
    bytes: int
    notes: list[str]
    write: Callable[[Path, Callable[[int], object]], Files]
    open: Callable[[Path], Source] = open_source
    """What was written, as a model."""
    parameters: int | None = None
    """That are written, where they are not all of the model."""


def _check_options(request: Request) -> None:
    choices = {"to": TARGETS, "weights": tuple(KINDS), "dtype": tuple(DTYPES), "format": FORMATS}
    for option, allowed in choices.items():
        if (value := getattr(request, option)) is not None and value not in allowed:
            raise ValueError(f"--{option} is {value!r}; it is one of {', '.join(allowed)}")
    for option, targets in _OPTIONS.items():
        if getattr(request, option) is not None and request.to not in targets:
            flag, right = option.replace("_", "-"), " and ".join(targets)
            raise ValueError(f"--{flag} does not go with --to {request.to}; it is of --to {right}")
    for option in ("shard_size", "model_parallel"):
        if (value := getattr(request, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be at least 1")


def _kind_of(request: Request, source: AdaptedSource) -> str | None:
    """The kind that --weights asks for."""
    if request.weights is None:
        return None
    if KINDS[request.weights] not in source.weights:
        other = "model" if request.weights == "ema" else "ema"
        raise ValueError(f"{source.path} has no {request.weights} weights; give --weights {other}, or leave it out")
    return KINDS[request.weights]


def _dtype_of(request: Request, source: AdaptedSource, kinds: Sequence[str]) -> torch.dtype:
    """What --dtype asks for; the source's own, or fp32 where its tensors are of several."""
    if request.dtype is not None:
        return DTYPES[request.dtype]
    held = {stored.dtype for kind in kinds for stored in source.tensors[kind].values()}
    return held.pop() if len(held) == 1 else torch.float32


def _bytes(source: AdaptedSource, names: int, dtype: torch.dtype) -> int:
    return names * dtype.itemsize * sum(prod(shape) for shape in source.shapes.values())


def _to_inference(request: Request, source: AdaptedSource, config: Config | None) -> _Plan:
    kind = _kind_of(request, source) or (EMA if EMA in source.weights else WEIGHTS)
    dtype = _dtype_of(request, source, [kind])
    settings = settings_of(config, source.step) if config is not None else source.settings
    if settings is None:
        raise ValueError(
            f"{source.path} does not say which flow, text encoder and autoencoder its model was trained with; give "
            "--config CONFIG, the configuration of that run"
        )
    weights = next(name for name, of in KINDS.items() if of == kind)
    training = dict(source.training) | {
        "step": source.step,
        "weights": weights,
        "software": source.software,
    }

    def write(folder: Path, count: Callable[[int], object]) -> Files:
        name = Path(os.path.abspath(request.destination)).name
        write_text(folder / "README.md", model_card(name, source, kind, FLOATS[dtype], settings, weights))
        return write_inference(
            source,
            kind,
            folder,
            names=list(source.shapes),
            dtype=dtype,
            shard_size=request.shard_size or DEFAULT_SHARD,
            settings={**settings, "training": training},
            progress=count,
        )

    return _Plan({kind: kind}, dtype, _bytes(source, 1, dtype), [], write)


def _to_upstream(request: Request, source: AdaptedSource, config: Config | None) -> _Plan:
    if source.model.frames:
        raise ValueError(
            f"{source.path} has a {NEXTFRAME}, which the public layout does not know; leave it out by --drop "
            f"{NEXTFRAME}, and the model takes samples of one frame"
        )
    asked = _kind_of(request, source)
    kinds = [asked] if asked else source.weights
    dtype = _dtype_of(request, source, kinds)
    parts = request.model_parallel or 1
    notes = []
    if parts > 1:
        check_parts(source.model, source.shapes, parts)
        notes.append(
            f"in {parts} model-parallel files the public code norms queries and keys over each file's own heads, which "
            "this model was not trained with: its outputs there are not this model's"
        )
    if config is not None:
        source.settings = settings_of(config, source.step)
    of_weights = {weights: kind for weights, kind in KINDS.items() if kind in kinds}

    def write(folder: Path, count: Callable[[int], object]) -> Files:
        return write_upstream(
            source,
            of_weights,
            folder,
            names=list(source.shapes),
            dtype=dtype,
            parts=parts,
            suffix=request.format or FORMATS[0],
            progress=count,
        )

    return _Plan({kind: kind for kind in kinds}, dtype, _bytes(source, len(kinds), dtype), notes, write)


def _to_training(request: Request, source: AdaptedSource, config: Config | None) -> _Plan:
    # A run has both: what lacks one starts with the other.
    kinds = {kind: kind if kind in source.weights else source.weights[0] for kind in (WEIGHTS, EMA)}
    notes = [
        f"{source.path} has no {'EMA' if kind == EMA else 'last'} weights: they are the {of} ones"
        for kind, of in ((EMA, "last"), (WEIGHTS, "EMA"))
        if kind not in source.weights
    ]
    kinds |= {kind: kind for kind in MOMENTS if kind in source.tensors}
    config = config or source.config
    if config is not None:
        changed = {"run": config.run.model_copy(update={"dir": str(request.destination)})}
        if model_config(config) != source.model:
            changed["model"] = source.model.to_dict()
        config = config.model_copy(update=changed)
    else:
        notes.append("there is no config.yaml: `lumina train` asks for one, which --config CONFIG puts there")
    names = {kind: source.trained if kind in MOMENTS else list(source.shapes) for kind in kinds}

    def write(folder: Path, count: Callable[[int], object]) -> Files:
        return write_training(source, kinds, folder, names=names, config=config, progress=count)

    return _Plan(kinds, torch.float32, _bytes(source, len(kinds), torch.float32), notes, write)


def _to_peft(request: Request, source: AdaptedSource, config: Config | None) -> _Plan:
    of = source.original
    if not isinstance(of, LoraSource):
        raise ValueError(f"{source.path} has no adapters: --to peft is of runs with lora")
    if of.whole:
        raise ValueError(
            f"{source.path} has {len(of.whole)} tensors beside its adapters and their base, as {of.whole[0]}, for "
            "which peft's format has no room; --to inference merges all of it into one model"
        )
    if config is not None or source.dropped:
        raise ValueError("--to peft takes neither --config nor --drop: it writes the adapters as they are")
    kind = _kind_of(request, source) or EMA
    parameters = sum(prod(of.adapter(kind, name).shape) for layer in of.layers for name in pair_names(layer))

    return _Plan(
        {kind: kind},
        torch.float32,
        torch.float32.itemsize * parameters,
        [f"to be laid over the weights in {of.base.folder}, from train.init_from={of.config.train.init_from}"],
        lambda folder, count: write_adapter(of, kind, folder, count),
        lambda folder: AdapterOnBase(folder, of, kind),
        parameters,
    )


_PLANS = {"inference": _to_inference, "upstream": _to_upstream, "training": _to_training, "peft": _to_peft}


def _prove(
    source: AdaptedSource, kinds: Mapping[str, str], opened: Callable[[], Source], count: Callable[[int], object]
) -> tuple[list[KindProof], int]:
    """The result as anyone would open it, held against the source."""
    try:
        result = opened()
    except ValueError as error:
        raise ConversionError(f"the proof failed: what was written cannot be opened: {error}") from error
    if result.model != source.model:
        raise ConversionError(f"the proof failed: the result tells the sizes {result.model}, the source {source.model}")
    proofs, moments = [], 0
    for kind, of_source in kinds.items():
        if kind in MOMENTS:
            moments += prove_values(source, of_source, result, kind, count)
        else:
            proofs.append(prove_weights(source, of_source, result, kind, count))
    return proofs, moments


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], object]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, total)

    return count


def _record(
    request: Request, source: AdaptedSource, read: Mapping[str, FileEntry], converted: Converted
) -> dict[str, Any]:
    """conversion.json."""
    proof = None
    if request.verify:
        proof = {
            "input": "seeded noise, times and captions (or labels) of two samples, fp32",
            "weights": [one.to_dict() for one in converted.proofs],
            "moments": converted.moments,
        }
    return {
        "format": "lumina-conversion",
        "version": 1,
        "to": request.to,
        "source": {
            "path": str(request.source),
            "format": source.format,
            "step": source.step,
            "files": {name: entry.model_dump() for name, entry in read.items()},
        },
        "kinds": converted.kinds,
        "dtype": converted.dtype,
        "parameters": converted.parameters,
        "dropped": source.dropped,
        "initialised": source.initialised,
        "notes": converted.notes,
        "files": {name: entry.model_dump() for name, entry in converted.files.items()},
        "proof": proof,
        "software": software(),
    }
