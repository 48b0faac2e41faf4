"""What `lumina convert` writes: the files of each layout, from a source, one tensor in memory at a time."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint.folder import write_text
from lumina.checkpoint.manifest import CONFIG, MOMENTS, FileEntry, sha256_of, step_folder, sync, write_manifest
from lumina.checkpoint.save import SaveState, manifest_of
from lumina.checkpoint.sources import Source
from lumina.checkpoint.tensor_file import TensorFile
from lumina.checkpoint.tensor_reader import FLOATS
from lumina.checkpoint.torch_file import TorchFile
from lumina.config.load import dump_config
from lumina.config.schema import Config
from lumina.model.config import FlagDiTConfig
from lumina.model.presets import PRESETS
from lumina.model.public import ARGUMENTS, STEMS, split_dim

DEFAULT_SHARD = 5 * 10**9
PACKAGES = ("lumina-t2x", "torch", "safetensors")

Files = dict[str, FileEntry]
Progress = Callable[[int], object]
"""Called with the bytes that were dealt with since the last call."""


def software() -> dict[str, str]:
    """Versions of what writes."""
    return {package: version(package) for package in PACKAGES}


def cast(values: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """`values` in another dtype.

    Raises:
        ValueError: for values that are not finite, or do not fit into the dtype; `where` names the tensor.
    """
    made = values.to(dtype)
    if not bool(torch.isfinite(made).all()):
        if bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{where} has values up to {float(values.abs().max()):.3g}, which {FLOATS[dtype]} cannot hold; "
                "convert to bf16 or fp32"
            )
        raise ValueError(f"{where} holds values that are not finite: it is broken; take an earlier checkpoint")
    return made


def write_inference(
    source: Source,
    kind: str,
    folder: Path,
    *,
    names: list[str],
    dtype: torch.dtype,
    shard_size: int,
    settings: Mapping[str, Any],
    progress: Progress,
) -> Files:
    """`config.json` and `model*.safetensors`, in files of at most `shard_size` bytes, with an index where several."""
    shapes = {name: source.tensors[kind][name].shape for name in names}
    shards = list(_shards({name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}, shard_size))
    files: Files = {}
    where: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFile(folder / name, {key: (dtype, shapes[key]) for key in held}, {"format": "pt"}) as file:
            for key in held:
                file.write(key, cast(source.read(kind, key), dtype, f"{source.path}: {kind}/{key}"))
                progress(prod(shapes[key]) * dtype.itemsize)
                where[key] = name
            files[name] = file.close()
    if len(shards) > 1:
        total = sum(prod(shape) * dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _text(folder, "model.safetensors.index.json", json.dumps(index, indent=2), files)
    tree = {"model": source.model.to_dict()} | dict(settings)
    _text(folder, "config.json", json.dumps(tree, indent=2, ensure_ascii=False), files)
    return files


def write_upstream(
    source: Source,
    kinds: Mapping[str, str],
    folder: Path,
    *,
    names: list[str],
    dtype: torch.dtype,
    parts: int,
    suffix: str,
    progress: Progress,
) -> Files:
    """`consolidated*.NN-of-MM.{suffix}`, split over `parts` as the public trainer does, and `model_args.pth`.

    `kinds`: kind of the source by "model" and "ema".
    """
    files: Files = {}
    for weights, kind in kinds.items():
        shapes = {name: source.tensors[kind][name].shape for name in names}
        listed = {name: (dtype, _part_shape(name, shape, parts)) for name, shape in shapes.items()}
        with ExitStack() as stack:
            outs = []
            for part in range(parts):
                path = folder / f"{STEMS[weights]}.{part:02d}-of-{parts:02d}.{suffix}"
                out = TorchFile(path, listed) if suffix == "pth" else TensorFile(path, listed, {"format": "pt"})
                outs.append(stack.enter_context(out))
            for name in names:
                values = cast(source.read(kind, name), dtype, f"{source.path}: {kind}/{name}")
                dim = split_dim(name)
                for part, out in enumerate(outs):
                    out.write(name, values if dim is None or parts == 1 else values.chunk(parts, dim)[part])
                progress(values.nbytes)
            files |= {out.path.name: out.close() for out in outs}
    torch.save(argparse.Namespace(**_arguments(source, dtype)), folder / ARGUMENTS)
    sync(folder / ARGUMENTS)
    _listed(folder, ARGUMENTS, files)
    return files


def check_parts(model: FlagDiTConfig, shapes: Mapping[str, tuple[int, ...]], parts: int) -> None:
    """
    Raises:
        ValueError: where a tensor cannot be shared by so many files.
    """
    for what, count in (("heads", model.n_heads), ("key-value heads", model.kv_heads)):
        if count % parts:
            raise ValueError(f"--model-parallel {parts} does not divide the {count} {what} of the model")
    for name, shape in shapes.items():
        dim = split_dim(name)
        if dim is not None and shape[dim] % parts:
            raise ValueError(f"--model-parallel {parts} does not divide {name}, which is {tuple(shape)}, along {dim}")


def _part_shape(name: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    dim = split_dim(name)
    if dim is None:
        return shape
    return (*shape[:dim], shape[dim] // parts, *shape[dim + 1 :])


def _arguments(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """What the public code asks `model_args.pth` for, and what the tensors do not tell of the sizes."""
    model = source.model
    preset = next(
        (name for name, sizes in PRESETS.items() if all(getattr(model, key) == value for key, value in sizes.items())),
        "Custom",
    )
    settings = source.settings or {}
    return {
        "model": f"DiT_Llama_{preset.upper() if preset != 'Custom' else preset}_patch{model.patch_size}",
        "qk_norm": model.qk_norm,
        "norm_eps": float(model.norm_eps),
        "n_heads": model.n_heads,
        "multiple_of": model.multiple_of,
        "ffn_dim_multiplier": model.ffn_dim_multiplier,
        "precision": FLOATS[dtype],
        "vae": settings.get("vae", {}).get("model"),
        "text_encoder": settings.get("text", {}).get("encoder"),
        "image_size": settings.get("trained", {}).get("resolution"),
        "path_type": settings.get("flow", {}).get("path"),
        "prediction": settings.get("flow", {}).get("prediction"),
        "step": source.step,
    }


def write_training(
    source: Source,
    kinds: Mapping[str, str],
    folder: Path,
    *,
    names: Mapping[str, list[str]],
    config: Config | None,
    progress: Progress,
) -> Files:
    """A run with one checkpoint, fp32.

    Args:
        kinds: of the source, by the kind that each becomes.
        names: of each such kind.
        config: for config.yaml.
    """
    inner = step_folder(folder, source.step)
    inner.mkdir(parents=True)
    files: Files = {}
    entries: list[tuple] = []
    dtype = torch.float32
    for kind, of_source in kinds.items():
        shapes = {name: source.tensors[of_source][name].shape for name in names[kind]}
        sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        for number, held in enumerate(_shards(sizes, DEFAULT_SHARD)):
            name_of_file = f"{kind}_{number:05d}.safetensors"
            listed = {f"{kind}/{name}": (dtype, (prod(shapes[name]),)) for name in held}
            with TensorFile(inner / name_of_file, listed, hash_tensors=True) as file:
                for name in held:
                    values = cast(source.read(of_source, name), dtype, f"{source.path}: {of_source}/{name}")
                    file.write(f"{kind}/{name}", values)
                    progress(values.nbytes)
                files[name_of_file] = file.close()
            for name in held:
                piece = {"file": name_of_file, "key": f"{kind}/{name}", "start": 0, "numel": prod(shapes[name])}
                entries.append((kind, name, list(shapes[name]), piece | {"sha256": file.hashes[f"{kind}/{name}"]}))
    if config is not None:
        _text(inner, CONFIG, dump_config(config), files)
    steps = source.optimizer_steps if MOMENTS[0] in kinds else 0
    state = SaveState(source.step, steps, data=source.data, model=source.model.to_dict())
    write_manifest(inner, manifest_of(state, files, entries))
    if config is not None:
        write_text(folder / CONFIG, dump_config(config))
    return {f"{inner.relative_to(folder).as_posix()}/{name}": entry for name, entry in files.items()}


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, cut where a file would pass `limit` bytes; a larger tensor has a file of its own."""
    held, total = [], 0
    for name, size in sizes.items():
        if held and total + size > limit:
            yield held
            held, total = [], 0
        held.append(name)
        total += size
    yield held


def _text(folder: Path, name: str, text: str, files: Files) -> None:
    write_text(folder / name, text)
    _listed(folder, name, files)


def _listed(folder: Path, name: str, files: Files) -> None:
    path = folder / name
    files[name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
