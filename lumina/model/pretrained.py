"""Reading and writing weights: Lumina's inference folder and the public Lumina-T2I checkpoint folder.

Nothing that is read can run code: safetensors and JSON, and what `lumina.model.inert` reads of public `.pth` files.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lumina.model.config import FlagDiTConfig
from lumina.model.inert import load_inert
from lumina.model.public import STEMS, parallel_warning, public_files, read_arguments, sizes_of, split_dim

if TYPE_CHECKING:
    from lumina.model.flag_dit import FlagDiT


RECORD = "conversion.json"
"""What `lumina convert` writes down of the files that it wrote, beside them."""


def save_pretrained(model: "FlagDiT", directory: Path, extra: dict[str, Any] | None = None) -> None:
    """`config.json` ({"model": sizes} and what `extra` adds) and `model*.safetensors`."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model": model.config.to_dict()} | (extra or {}), indent=2))
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_torch_state_dict(state, directory, filename_pattern="model{suffix}.safetensors")
    (directory / RECORD).unlink(missing_ok=True)  # of a model that was here before


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of an inference folder.

    Raises:
        ValueError: where there is none, or it is not one of ours.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds neither config.json nor consolidated* files; it is no model folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # broken JSON and broken UTF-8 alike
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: has no section `model`; it was not written by Lumina")
    return config


def load_pretrained(directory: Path, config: FlagDiTConfig | None, weights: str) -> "FlagDiT":
    """See `FlagDiT.from_pretrained`."""
    if weights not in ("ema", "model"):
        raise ValueError(f"weights is {weights!r}; it is `ema` or `model`")
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder")
    if any(directory.glob("consolidated*")):
        state = _read_public_weights(directory, weights)
        if config is None:
            shapes = {key: tuple(value.shape) for key, value in state.items()}
            config = sizes_of(shapes, read_arguments(directory), directory)
    else:
        written = FlagDiTConfig.from_dict(read_config(directory)["model"])
        if config is not None and config != written:
            raise ValueError(f"{directory}/config.json gives other sizes than the config passed beside it")
        config = written
        state = _read_safetensors(directory)
    return build(config, state, str(directory))


def build(config: FlagDiTConfig, state: dict[str, Tensor], source: str) -> "FlagDiT":
    """A model of `config` that holds `state`; `source` names it in errors.

    A `nextframe_token` that the state lacks is initialised, with a warning: no public file has one.

    Raises:
        ValueError: for missing or unexpected keys or shapes, listing them.
    """
    from lumina.model.flag_dit import FlagDiT

    with torch.device("meta"):
        model = FlagDiT(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = dict(state)
    if config.frames and "nextframe_token" not in state:
        warnings.warn(f"{source} has no nextframe_token: it is initialised, and needs training", stacklevel=3)
        dtype = state["eol_token"].dtype if "eol_token" in state else torch.float32
        state["nextframe_token"] = new_nextframe_token(config.dim).to(dtype)
    check_fit(expected, {key: tuple(value.shape) for key, value in state.items()}, source)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What is wrong with each tensor, by name, where a model's shapes are not those that are found."""
    problems = {key: f"missing {key}" for key in expected if key not in found}
    problems |= {key: f"unexpected {key}" for key in found if key not in expected}
    return problems | {
        key: f"{key} is {shape} instead of {expected[key]}"
        for key, shape in found.items()
        if key in expected and shape != expected[key]
    }


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Hold the shapes of tensors found in `source` against those of a model.

    Raises:
        ValueError: for missing or unexpected keys or other shapes, listing them.
    """
    if problems := misfits(expected, found):
        raise ValueError(f"{source} does not fit the model: {listed(problems)}")


def listed(problems: Mapping[str, str]) -> str:
    """In one line, the first of many."""
    shown = list(problems.values())
    return "; ".join(shown[:8]) + ("" if len(shown) <= 8 else f"; and {len(shown) - 8} more")


def new_nextframe_token(dim: int) -> Tensor:
    """What a model that learned no `nextframe_token` starts to train one from: the same each time, fp32."""
    return torch.randn(dim, generator=torch.Generator().manual_seed(0)) * 0.02


def _read_safetensors(directory: Path) -> dict[str, Tensor]:
    files = safetensors_files(directory)
    check_recorded(files)
    return {key: value for file in files for key, value in load_safetensors(file).items()}


def safetensors_files(directory: Path) -> list[Path]:
    """The files of an inference folder's weights.

    Raises:
        ValueError: where there is none, one that the index lists is missing, or the index is damaged.
    """
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has a config.json but no model*.safetensors")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _files_in(index)
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which {index.name} lists")
        files = [directory / name for name in names]
    return files


def _files_in(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged, it does not say which file holds which tensor") from error


def recorded_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a conversion wrote into a folder, by name; none where it wrote down nothing.

    Raises:
        ValueError: for a damaged record.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return {name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, it does not list the files that were written; remove it") from error


def check_recorded(files: Iterable[Path]) -> None:
    """Read files through, where a conversion wrote down their SHA-256.

    Raises:
        ValueError: for one that is not what was written.
    """
    for path in files:
        recorded = recorded_hashes(path.parent).get(path.name)
        if recorded is not None:
            with path.open("rb") as file:
                check_hash(path, hashlib.file_digest(file, "sha256").hexdigest(), recorded)


def check_hash(path: Path, found: str, recorded: str) -> None:
    """
    Raises:
        ValueError: where the SHA-256 that was `found` is not the recorded one.
    """
    if found != recorded:
        raise ValueError(
            f"{path} is damaged: it is not the file that was converted (SHA-256 differs from that in {RECORD}); "
            "convert it anew"
        )


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; a damaged one is a `ValueError` that names it."""
    from safetensors import SafetensorError

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error})") from error


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    state = load_inert(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: is no state dict, which maps names to tensors")
    return state


def _read_public_weights(directory: Path, weights: str) -> dict[str, Tensor]:
    for which in ("ema", "model") if weights == "ema" else ("model",):
        if files := public_files(directory, which):
            check_recorded(files)
            read = load_safetensors if files[0].suffix == ".safetensors" else _load_state_dict
            return _merge([read(file) for file in files], directory)
    raise ValueError(f"{directory} has no {STEMS['model']}.NN-of-MM.safetensors or .pth file")


def _merge(parts: list[dict[str, Tensor]], directory: Path) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    warnings.warn(parallel_warning(directory, len(parts)), stacklevel=5)
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"{directory}: its model-parallel files do not hold the same keys")
    dims = {key: split_dim(key) for key in parts[0]}
    return {
        key: first if dims[key] is None else torch.cat([part[key] for part in parts], dim=dims[key])
        for key, first in parts[0].items()
    }
