"""The public Lumina-T2I checkpoint folder: its files, how it splits tensors over them, and what sizes they tell.

`consolidated.NN-of-MM.{pth,safetensors}`, one a model-parallel rank, `consolidated_ema.*` likewise, and
`model_args.pth`, a pickled `argparse.Namespace`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina.model.config import FlagDiTConfig
from lumina.model.inert import load_inert
from lumina.model.presets import PRESETS

STEMS = {"ema": "consolidated_ema", "model": "consolidated"}
ARGUMENTS = "model_args.pth"

# How the public trainer splits parameters over model-parallel files.
_SPLIT_ON_DIM_0 = re.compile(
    r"(wq|wk|wv|wk_y|wv_y|w1|w3|x_embedder|cap_embedder\.1|mlp\.0|adaLN_modulation\.1|final_layer\.linear)"
    r"\.(weight|bias)$|(q_norm|k_norm|ky_norm)\.(weight|bias)$|attention\.gate$"
)
_SPLIT_ON_DIM_1 = re.compile(r"(wo|w2|t_embedder\.mlp\.2|y_embedder\.embedding_table)\.weight$")

Shapes = Mapping[str, Sequence[int]]


def split_dim(key: str) -> int | None:
    """Along which dim model-parallel files share a tensor; None where each has all of it."""
    if _SPLIT_ON_DIM_0.search(key):
        return 0
    return 1 if _SPLIT_ON_DIM_1.search(key) else None


def parallel_warning(directory: Path, files: int) -> str:
    """What is to be known of a model in several files."""
    return (
        f"{directory} was trained on {files} model-parallel ranks, with norms over each rank's own heads; "
        "no full-width model gives exactly its outputs"
    )


def public_files(directory: Path, weights: str) -> list[Path]:
    """The files of the "ema" or the "model" weights, one a model-parallel rank; none where the folder lacks them.

    Raises:
        ValueError: where some of them are missing, naming them.
    """
    for suffix in ("safetensors", "pth"):
        files = sorted(directory.glob(f"{STEMS[weights]}.[0-9]*-of-*.{suffix}"))
        if files:
            _check_complete(files, directory)
            return files
    return []


def _check_complete(files: list[Path], directory: Path) -> None:
    found = [re.search(r"\.(\d+)-of-(\d+)\.", file.name) for file in files]
    total = int(found[0].group(2))
    present = [int(match.group(1)) for match in found]
    if present != list(range(total)):
        lacking = [f"{i:02d}-of-{total:02d}" for i in range(total) if i not in present]
        raise ValueError(f"{directory} is not complete: of {total} model-parallel files it lacks {', '.join(lacking)}")


def read_arguments(directory: Path) -> dict[str, Any]:
    """What `model_args.pth` says of the training run; nothing where there is none.

    Raises:
        ValueError: for a file that holds something else.
    """
    file = directory / ARGUMENTS
    if not file.is_file():
        return {}
    loaded = load_inert(file)
    if isinstance(loaded, argparse.Namespace):
        return vars(loaded)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: holds a {type(loaded).__name__}, not the arguments of a training run")
    return loaded


def sizes_of(shapes: Shapes, arguments: Mapping[str, Any], source: Path) -> FlagDiTConfig:
    """The sizes that the tensors tell, then `arguments`, those of a training run; `source` is named in errors.

    Raises:
        ValueError: for tensors of no Flag-DiT, or where they leave a size open.
    """

    def shape(key: str) -> Sequence[int]:
        if key not in shapes:
            raise ValueError(f"{source}: has no tensor {key}; these are not the weights of a Flag-DiT")
        return shapes[key]

    dim, patch_elements = shape("x_embedder.weight")
    # Patches of 2 are all that was published; a model_args name such as ..._patch2 says so too.
    named = re.search(r"patch(\d+)", str(arguments.get("model", "")))
    patch_size = int(named.group(1)) if named else 2
    if patch_elements % patch_size**2:
        raise ValueError(
            f"{source}: patches of {patch_elements} values are not {patch_size} × {patch_size}; pass config"
        )
    sizes = {
        "patch_size": patch_size,
        "in_channels": patch_elements // patch_size**2,
        "dim": dim,
        "n_layers": 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith("layers.")), default=-1),
        "learn_sigma": shape("final_layer.linear.weight")[0] == 2 * patch_elements,
        "qk_norm": "layers.0.attention.q_norm.weight" in shapes,
        "frames": "nextframe_token" in shapes,
    }
    if "y_embedder.embedding_table.weight" in shapes:
        sizes["num_classes"] = shape("y_embedder.embedding_table.weight")[0] - 1
        sizes["n_heads"] = _heads_of_label_model(source, arguments, dim)
    else:
        sizes["cap_feat_dim"] = shape("cap_embedder.1.weight")[1]
        sizes["n_heads"] = shape("layers.0.attention.gate")[0]
    if sizes["n_heads"] and (kv := shape("layers.0.attention.wk.weight")[0]) != dim:
        sizes["n_kv_heads"] = kv * sizes["n_heads"] // dim
    if isinstance(arguments.get("norm_eps"), float):
        sizes["norm_eps"] = arguments["norm_eps"]
    return _with_ffn(FlagDiTConfig(**sizes), shape("layers.0.feed_forward.w1.weight")[0], arguments, source)


def _heads_of_label_model(source: Path, arguments: Mapping[str, Any], dim: int) -> int:
    if isinstance(arguments.get("n_heads"), int):
        return arguments["n_heads"]
    for preset in PRESETS.values():
        if preset["dim"] == dim:
            return preset["n_heads"]
    raise ValueError(f"{source}: the tensors do not tell how many heads a label-conditional model has; pass config")


def _with_ffn(config: FlagDiTConfig, hidden: int, arguments: Mapping[str, Any], source: Path) -> FlagDiTConfig:
    """`config` with the rounding that gives a feed-forward network `hidden` wide; that of `arguments` if it does."""
    told = {key: arguments[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in arguments}
    if isinstance(told.get("multiple_of"), int) and isinstance(told.get("ffn_dim_multiplier"), int | float | None):
        candidate = replace(config, **told)
        if candidate.ffn_dim == hidden:
            return candidate
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, hidden / int(8 * config.dim / 3)):
            candidate = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if candidate.ffn_dim == hidden:
                return candidate
    raise ValueError(f"{source}: no rounding gives a feed-forward width of {hidden}; pass config")
