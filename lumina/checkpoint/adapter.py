"""An adapter by itself, in peft's format: `adapter_config.json` and `adapter_model.safetensors`. peft is not needed."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina.checkpoint.folder import write_text
from lumina.checkpoint.lora import LoraSource, MergedWeights, pair_names
from lumina.checkpoint.manifest import FileEntry, sha256_of
from lumina.checkpoint.sources import Source
from lumina.checkpoint.targets import cast
from lumina.checkpoint.tensor_file import TensorFile
from lumina.model.lora import merged
from lumina.model.pretrained import load_safetensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
# Settings of peft that say how an adapter came to be, or are read here; what else is set changes what it computes.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the weights that the adapter is beside


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as it was read; what it adds to the weight of a layer is scales[layer] · B·A.

    pairs: A (rank, in) and B (out, rank), by the layer's name.
    """

    path: Path
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]


def read_adapter(folder: Path) -> Adapter:
    """
    Raises:
        ValueError: for a folder that is no adapter, is damaged, or of a kind that is more than B·A.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no adapter in peft's format: it has no {CONFIG}")
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} has no {TENSORS}; save the adapter as safetensors")
    try:
        config = json.loads((folder / CONFIG).read_text())
        _check(config)
        alpha, patterns, rooted = config["lora_alpha"], config.get("alpha_pattern") or {}, config.get("use_rslora")
        halves: dict[str, dict[str, Tensor]] = {}
        for key, values in load_safetensors(folder / TENSORS).items():
            found = _KEY.fullmatch(key)
            if found is None or values.dim() != 2:
                raise ValueError(f"its tensor {key} {tuple(values.shape)} is no A or B of a linear layer")
            halves.setdefault(found[1], {})[found[2]] = values
        pairs, scales = {}, {}
        for layer, half in halves.items():
            if half.keys() != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1]:
                raise ValueError(f"its tensors of {layer} are no pair")
            rank = half["A"].shape[0]
            own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), alpha)
            pairs[layer] = half["A"], half["B"]
            scales[layer] = float(own) / (rank**0.5 if rooted else rank)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{folder} cannot be used as an adapter: {error}") from error
    return Adapter(folder, pairs, scales)


def _check(config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{CONFIG} says peft_type {kind!r}; LORA is what is read")
    more = [f"{key}={value!r}" for key, value in config.items() if value and key not in _HARMLESS]
    if config.get("bias", "none") != "none":
        more.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights", True) not in _INITS:
        more.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if more:
        raise ValueError(f"{CONFIG} says {', '.join(more)}; plain LoRA is what is read, merge it with peft first")


def add_adapter(model: torch.nn.Module, adapter: Adapter, scale: float = 1.0) -> None:
    """Merge an adapter into the weights of a model, in place.

    Args:
        scale: times what the adapter adds.

    Raises:
        ValueError: where the model lacks a layer of it, or has one of another shape; nothing is then changed.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for layer, (a, b) in adapter.pairs.items():
        if layer not in linear:
            raise ValueError(f"{adapter.path} is beside a layer {layer}, which this model does not have")
        shape, product = tuple(linear[layer].weight.shape), (b.shape[0], a.shape[1])
        if shape != product:
            raise ValueError(f"{adapter.path} does not fit this model: {layer} is {shape}, and it is for {product}")
    for layer, (a, b) in adapter.pairs.items():
        weight = linear[layer].weight
        with torch.no_grad():
            weight.copy_(merged(weight, a.to(weight.device), b.to(weight.device), scale * adapter.scales[layer]))


def write_adapter(
    source: LoraSource, kind: str, folder: Path, progress: Callable[[int], object]
) -> dict[str, FileEntry]:
    """What `lumina convert --to peft` writes, fp32."""
    dtype = torch.float32
    names = {
        f"{_PREFIX}{layer}.lora_{which}.weight": name
        for layer in source.layers
        for which, name in zip("AB", pair_names(layer), strict=True)
    }
    read = {key: source.adapter(kind, name) for key, name in names.items()}
    with TensorFile(folder / TENSORS, {k: (dtype, tuple(v.shape)) for k, v in read.items()}, {"format": "pt"}) as file:
        for key, values in read.items():
            file.write(key, cast(values, dtype, f"{source.path}: {kind}/{names[key]}"))
            progress(values.numel() * dtype.itemsize)
        files = {TENSORS: file.close()}
    alpha = source.lora.rank if source.lora.alpha is None else source.lora.alpha
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": Path(source.config.train.init_from or "").name,
        "r": source.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": source.layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2))
    files[CONFIG] = FileEntry(bytes=(folder / CONFIG).stat().st_size, sha256=sha256_of(folder / CONFIG))
    return files


class AdapterOnBase(Source):
    """An adapter that was written, over the weights beside which it was trained: what a proof looks at."""

    format = "peft"

    def __init__(self, folder: Path, source: LoraSource, kind: str):
        super().__init__()
        self.path, self.model, self.kind = folder, source.model, kind
        adapter = read_adapter(folder)
        trained = {
            name: values
            for layer, pair in adapter.pairs.items()
            for name, values in zip(pair_names(layer), pair, strict=True)
        }
        (scale,) = set(adapter.scales.values())
        self._weights = MergedWeights(trained, scale, trained.__getitem__, source.base.read)
        self.tensors = {kind: dict(source.tensors[kind])}

    def read(self, kind: str, name: str) -> Tensor:
        return self._weights.read(name)

    def files(self) -> list[Path]:
        return [self.path / TENSORS, self.path / CONFIG]
