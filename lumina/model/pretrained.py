"""Reading and writing weights: Lumina's inference folder and the public Lumina-T2I checkpoint folder.

Nothing that is read can run code: safetensors and JSON, and for public `.pth` files torch's weights-only
unpickler with `argparse.Namespace` as the one class allowed.
"""

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lumina.model.config import FlagDiTConfig
from lumina.model.presets import PRESETS

if TYPE_CHECKING:
    from lumina.model.flag_dit import FlagDiT

# How the public trainer splits parameters over model-parallel files.
_SPLIT_ON_DIM_0 = re.compile(
    r"(wq|wk|wv|wk_y|wv_y|w1|w3|x_embedder|cap_embedder\.1|mlp\.0|adaLN_modulation\.1|final_layer\.linear)"
    r"\.(weight|bias)$|(q_norm|k_norm|ky_norm)\.(weight|bias)$|attention\.gate$"
)
_SPLIT_ON_DIM_1 = re.compile(r"(wo|w2|t_embedder\.mlp\.2|y_embedder\.embedding_table)\.weight$")


def save_pretrained(model: "FlagDiT", directory: Path, extra: dict[str, Any] | None = None) -> None:
    """`config.json` ({"model": sizes} and what `extra` adds) and `model*.safetensors`."""
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model": model.config.to_dict()} | (extra or {}), indent=2))
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_torch_state_dict(state, directory, filename_pattern="model{suffix}.safetensors")


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
        config = _public_config(directory, state, config)
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
        state["nextframe_token"] = torch.randn(config.dim, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
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


def _read_safetensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has a config.json but no model*.safetensors")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _files_in(index)
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise ValueError(f"{directory} lacks {', '.join(missing)}, which {index.name} lists")
        files = [directory / name for name in names]
    return {key: value for file in files for key, value in load_safetensors(file).items()}


def _files_in(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged, it does not say which file holds which tensor") from error


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file; a damaged one is a `ValueError` that names it."""
    from safetensors import SafetensorError

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error})") from error


def _load_pickle(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file}: refused, it is damaged or holds more than weights and settings ({reason})"
        ) from error


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    state = _load_pickle(file)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: is no state dict, which maps names to tensors")
    return state


def _load_arguments(file: Path) -> dict[str, Any]:
    loaded = _load_pickle(file)
    if isinstance(loaded, argparse.Namespace):
        return vars(loaded)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: holds a {type(loaded).__name__}, not the arguments of a training run")
    return loaded


def _read_public_weights(directory: Path, weights: str) -> dict[str, Tensor]:
    stems = ["consolidated_ema", "consolidated"] if weights == "ema" else ["consolidated"]
    for stem in stems:
        for suffix in ("safetensors", "pth"):
            files = sorted(directory.glob(f"{stem}.[0-9]*-of-*.{suffix}"))
            if files:
                _check_complete(files, directory)
                read = load_safetensors if suffix == "safetensors" else _load_state_dict
                return _merge([read(file) for file in files], directory)
    raise ValueError(f"{directory} has no {stems[-1]}.NN-of-MM.safetensors or .pth file")


def _check_complete(files: list[Path], directory: Path) -> None:
    found = [re.search(r"\.(\d+)-of-(\d+)\.", file.name) for file in files]
    total = int(found[0].group(2))
    present = [int(match.group(1)) for match in found]
    if present != list(range(total)):
        lacking = [f"{i:02d}-of-{total:02d}" for i in range(total) if i not in present]
        raise ValueError(f"{directory} is not complete: of {total} model-parallel files it lacks {', '.join(lacking)}")


def _merge(parts: list[dict[str, Tensor]], directory: Path) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    warnings.warn(
        f"{directory} was trained on {len(parts)} model-parallel ranks, with norms over each rank's own heads; "
        "no full-width model gives exactly its outputs",
        stacklevel=5,
    )
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"{directory}: its model-parallel files do not hold the same keys")
    merged = {}
    for key, first in parts[0].items():
        if _SPLIT_ON_DIM_0.search(key):
            merged[key] = torch.cat([part[key] for part in parts])
        elif _SPLIT_ON_DIM_1.search(key):
            merged[key] = torch.cat([part[key] for part in parts], dim=1)
        else:
            merged[key] = first
    return merged


def _public_config(directory: Path, state: dict[str, Tensor], config: FlagDiTConfig | None) -> FlagDiTConfig:
    """Sizes from the tensors, then from `model_args.pth`, then from `config`; what contradicts is refused."""
    if config is not None:
        return config
    arguments_file = directory / "model_args.pth"
    arguments = _load_arguments(arguments_file) if arguments_file.is_file() else {}

    def shape(key: str) -> tuple[int, ...]:
        if key not in state:
            raise ValueError(f"{directory}: has no tensor {key}; these are not the weights of a Flag-DiT")
        return tuple(state[key].shape)

    dim, patch_elements = shape("x_embedder.weight")
    # Patches of 2 are all that was published; a model_args name such as ..._patch2 says so too.
    named = re.search(r"patch(\d+)", str(arguments.get("model", "")))
    patch_size = int(named.group(1)) if named else 2
    if patch_elements % patch_size**2:
        raise ValueError(
            f"{directory}: patches of {patch_elements} values are not {patch_size} × {patch_size}; pass config"
        )
    sizes = {
        "patch_size": patch_size,
        "in_channels": patch_elements // patch_size**2,
        "dim": dim,
        "n_layers": 1 + max((int(key.split(".")[1]) for key in state if key.startswith("layers.")), default=-1),
        "learn_sigma": shape("final_layer.linear.weight")[0] == 2 * patch_elements,
        "qk_norm": "layers.0.attention.q_norm.weight" in state,
        "frames": "nextframe_token" in state,
    }
    if "y_embedder.embedding_table.weight" in state:
        sizes["num_classes"] = shape("y_embedder.embedding_table.weight")[0] - 1
        sizes["n_heads"] = _heads_of_label_model(directory, arguments, dim)
    else:
        sizes["cap_feat_dim"] = shape("cap_embedder.1.weight")[1]
        sizes["n_heads"] = shape("layers.0.attention.gate")[0]
    if sizes["n_heads"] and (kv := shape("layers.0.attention.wk.weight")[0]) != dim:
        sizes["n_kv_heads"] = kv * sizes["n_heads"] // dim
    if isinstance(arguments.get("norm_eps"), float):
        sizes["norm_eps"] = arguments["norm_eps"]
    return _with_ffn(FlagDiTConfig(**sizes), shape("layers.0.feed_forward.w1.weight")[0], directory)


def _heads_of_label_model(directory: Path, arguments: dict[str, Any], dim: int) -> int:
    if isinstance(arguments.get("n_heads"), int):
        return arguments["n_heads"]
    for preset in PRESETS.values():
        if preset["dim"] == dim:
            return preset["n_heads"]
    raise ValueError(f"{directory}: the tensors do not tell how many heads a label-conditional model has; pass config")


def _with_ffn(config: FlagDiTConfig, hidden: int, directory: Path) -> FlagDiTConfig:
    """`config` with the rounding that gives a feed-forward network `hidden` wide."""
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, hidden / int(8 * config.dim / 3)):
            candidate = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if candidate.ffn_dim == hidden:
                return candidate
    raise ValueError(f"{directory}: no rounding gives a feed-forward width of {hidden}; pass config")
