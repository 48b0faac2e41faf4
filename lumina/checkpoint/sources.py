"""What `lumina convert` reads: one interface over every folder that holds a model, one tensor in memory at a time."""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lumina.checkpoint.load import Checkpoint, latest_checkpoint
from lumina.checkpoint.manifest import EMA, FOLDER, MANIFEST, WEIGHTS, FileEntry, sha256_of
from lumina.checkpoint.tensor_reader import FLOATS, PickleFiles, PickleReader, SafetensorsReader, Stored, TensorReader
from lumina.config.schema import Config, FlowConfig, TextConfig, TrainedConfig, VaeConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.pretrained import check_hash, read_config, recorded_hashes, safetensors_files
from lumina.model.public import STEMS, parallel_warning, public_files, read_arguments, sizes_of, split_dim

# The autoencoder of the public models.
PUBLIC_VAE = VaeConfig(model="stabilityai/sd-vae-ft-ema")
KINDS = {"ema": EMA, "model": WEIGHTS}


class Source(ABC):
    """A model on disk: its tensors by kind and public name, read one at a time, and what is known of its training."""

    format: str
    path: Path
    """The folder with the tensors."""
    model: FlagDiTConfig
    tensors: dict[str, dict[str, Stored]]
    """By kind: `master`, `ema`, `exp_avg`, `exp_avg_sq`; a kind that is not there is not held."""
    config: Config | None = None
    """Of the run that trained it."""
    settings: dict[str, Any] | None = None
    """The flow, vae, text and trained sections that a pipeline needs."""
    step: int = 0
    optimizer_steps: int = 0

    def __init__(self):
        self.data: dict[str, Any] = {}
        self.training: dict[str, Any] = {}  # further facts, for those who read them
        self.software: dict[str, str] = {}
        self.notes: list[str] = []

    @abstractmethod
    def read(self, kind: str, name: str) -> Tensor:
        """A tensor as it is stored: its dtype, its shape.

        Raises:
            ValueError: where it is damaged or missing, naming the file.
        """

    @abstractmethod
    def files(self) -> list[Path]:
        """What the tensors are read from."""

    def check_files(self) -> dict[str, FileEntry]:
        """Size and SHA-256 of every file, by name.

        Raises:
            ValueError: for a file that is not the one that an earlier conversion into this folder recorded.
        """
        found = {file.name: FileEntry(bytes=file.stat().st_size, sha256=sha256_of(file)) for file in self.files()}
        for name, recorded in recorded_hashes(self.path).items():
            if name in found:
                check_hash(self.path / name, found[name].sha256, recorded)
        return found


def settings_of(config: Config, step: int) -> dict[str, Any]:
    """What a pipeline needs beside the model, of a run that has come to `step`."""
    settings = {"flow": config.flow.model_dump(), "vae": config.vae.model_dump()}
    if config.text:
        settings["text"] = config.text.model_dump()
    if trained := config.data.trained_by(step):
        settings["trained"] = trained.model_dump()
    return settings


def public_trained(arguments: Mapping[str, Any]) -> TrainedConfig | None:
    """What the public trainer's arguments say of the size of its pictures."""
    size = arguments.get("image_size")
    return TrainedConfig(resolution=size) if type(size) is int and size > 0 else None


def open_source(path: Path, config: FlagDiTConfig | None = None) -> Source:
    """A run (its newest checkpoint), a checkpoint of ours or of DeepSpeed, an inference or a public folder.

    Args:
        path: the folder.
        config: settles what the tensors of folders of others leave open.

    Raises:
        ValueError: for a folder that is none of these, or is damaged.
    """
    from lumina.checkpoint.deepspeed_folder import DeepSpeedSource, tag_folder

    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run, a checkpoint, an inference folder or a public one")
    if (path / MANIFEST).is_file():
        return source_of(Checkpoint(path))
    checkpoint = latest_checkpoint(path)
    if checkpoint is not None:
        return source_of(checkpoint)
    if tagged := tag_folder(path):
        try:
            return DeepSpeedSource(tagged, config)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{tagged}: its files are not laid out as DeepSpeed's are ({type(error).__name__}: {error})"
            ) from error
    if any(path.glob("consolidated*")):
        return PublicSource(path, config)
    if (path / FOLDER).is_dir() or (path / "config.yaml").is_file():
        raise ValueError(f"{path} is a run without a complete checkpoint yet; train it further")
    if (path / "config.json").is_file():
        return InferenceSource(path)
    raise ValueError(
        f"{path} holds no model: no {MANIFEST} or checkpoints of Lumina, no config.json, no consolidated* files and "
        "no *_model_states.pt of DeepSpeed"
    )


def source_of(checkpoint: Checkpoint) -> "CheckpointSource":
    """A checkpoint of ours, with adapters merged into the weights where it holds adapters.

    Raises:
        ValueError: where what it belongs to is missing or damaged.
    """
    from lumina.checkpoint.lora import BASE_RECORD, LoraSource

    return (LoraSource if BASE_RECORD in checkpoint.manifest.files else CheckpointSource)(checkpoint)


class CheckpointSource(Source):
    """A checkpoint of ours."""

    format = "checkpoint"

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self._checkpoint, manifest = checkpoint, checkpoint.manifest
        self.path = checkpoint.directory
        self.model = checkpoint.model
        if "config.yaml" in manifest.files:
            self.config = checkpoint.config
            self.settings = settings_of(self.config, manifest.step)
        self.step, self.optimizer_steps = manifest.step, manifest.optimizer_steps
        self.data, self.software = manifest.data, manifest.software
        self.training = _facts_of_run(self.path.parent.parent / "metrics.jsonl", self.step)
        dtype = next(dtype for dtype, name in FLOATS.items() if name == "fp32")
        self.tensors = {
            kind: {name: Stored(dtype, tuple(entry.shape)) for name, entry in entries.items()}
            for kind, entries in manifest.tensors.items()
        }

    def read(self, kind: str, name: str) -> Tensor:
        return self._checkpoint.read(kind, name).view(self.tensors[kind][name].shape)

    def files(self) -> list[Path]:
        return [self.path / name for name in self._checkpoint.manifest.files]

    def check_files(self) -> dict[str, FileEntry]:
        """As the manifest lists them: each is checked before it is read."""
        return dict(self._checkpoint.manifest.files)


class InferenceSource(Source):
    """`config.json` and `model*.safetensors`: one set of weights."""

    format = "inference"

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        tree = read_config(path)
        self.model = FlagDiTConfig.from_dict(tree["model"])
        try:
            self.settings = _settings_in(tree)
        except ValueError as error:
            raise ValueError(f"{path}/config.json: {str(error).splitlines()[0]}") from error
        training = tree.get("training")
        self.training = dict(training) if isinstance(training, dict) else {}
        self.step = _count(self.training.get("step"))
        kind = KINDS.get(self.training.get("weights"), WEIGHTS)
        readers = [SafetensorsReader(file) for file in safetensors_files(path)]
        self._files = [reader.path for reader in readers]
        self._reader_of: dict[str, TensorReader] = {key: reader for reader in readers for key in reader.tensors}
        twice = [key for key, count in Counter(key for r in readers for key in r.tensors).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: {twice[0]} is in two of its files; keep the files of one model in a folder")
        self.tensors = {kind: {key: reader.tensors[key] for key, reader in self._reader_of.items()}}

    def read(self, kind: str, name: str) -> Tensor:
        return self._reader_of[name].read(name)

    def files(self) -> list[Path]:
        return self._files


class PublicSource(Source):
    """`consolidated*` files of the public trainer, one a model-parallel rank, joined."""

    format = "public"

    def __init__(self, path: Path, config: FlagDiTConfig | None):
        super().__init__()
        self.path = path
        pickled = PickleFiles()
        self._readers: dict[str, list[TensorReader]] = {}
        for weights, kind in KINDS.items():
            if files := public_files(path, weights):
                pth = files[0].suffix == ".pth"
                self._readers[kind] = [PickleReader(f, pickled) if pth else SafetensorsReader(f) for f in files]
                self._files = [*getattr(self, "_files", []), *files]
        if not self._readers:
            raise ValueError(f"{path} has no {STEMS['model']}.NN-of-MM.safetensors or .pth file")
        self.tensors = {kind: self._joined(readers) for kind, readers in self._readers.items()}
        arguments = read_arguments(path)
        shapes = {key: stored.shape for key, stored in next(iter(self.tensors.values())).items()}
        self.model = sizes_of(shapes, arguments, path) if config is None else config
        told = arguments.get("norm_eps")
        if isinstance(told, float) and told != self.model.norm_eps:
            raise ValueError(f"model.norm_eps={self.model.norm_eps}, but {path} was trained with {told}")
        self.settings = {"flow": FlowConfig().model_dump(), "vae": PUBLIC_VAE.model_dump()}
        if trained := public_trained(arguments):
            self.settings["trained"] = trained.model_dump()
        named = path.name if path.name.isdigit() else None  # as results/checkpoints/0030000
        self.step = _count(arguments.get("step", named))
        if (parts := max(len(readers) for readers in self._readers.values())) > 1:
            self.notes.append(parallel_warning(path, parts))

    def _joined(self, readers: list[TensorReader]) -> dict[str, Stored]:
        first = readers[0].tensors
        if any(reader.tensors.keys() != first.keys() for reader in readers):
            raise ValueError(f"{self.path}: its model-parallel files do not hold the same keys")
        joined = {}
        for key, stored in first.items():
            shape, dim = list(stored.shape), split_dim(key)
            if dim is not None and len(readers) > 1:
                if any(len(r.tensors[key].shape) <= dim for r in readers):
                    raise ValueError(f"{self.path}: {key} is {stored.shape}, which cannot be split over files")
                shape[dim] = sum(reader.tensors[key].shape[dim] for reader in readers)
            joined[key] = Stored(stored.dtype, tuple(shape))
        return joined

    def read(self, kind: str, name: str) -> Tensor:
        readers, dim = self._readers[kind], split_dim(name)
        if dim is None or len(readers) == 1:
            return readers[0].read(name)
        stored = self.tensors[kind][name]
        whole, at = None, 0
        for reader in readers:
            part = reader.read(name)
            if whole is None:
                whole = part.new_empty(stored.shape)
            whole.narrow(dim, at, part.shape[dim]).copy_(part)
            at += part.shape[dim]
        return whole

    def files(self) -> list[Path]:
        return self._files


def _settings_in(tree: dict[str, Any]) -> dict[str, Any]:
    """Of config.json, with the defaults that are not written there."""
    settings = {
        "flow": FlowConfig.model_validate(tree.get("flow", {})).model_dump(),
        "vae": VaeConfig.model_validate(tree.get("vae", {})).model_dump(),
    }
    for name, section in (("text", TextConfig), ("trained", TrainedConfig)):
        if name in tree:
            settings[name] = section.model_validate(tree[name]).model_dump()
    return settings


def _count(value: Any) -> int:
    """A number of steps, as foreign files tell it: 0 where they do not."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,8}", value):
        return int(value)
    return value if type(value) is int and 0 <= value < 10**8 else 0


def _facts_of_run(metrics: Path, step: int) -> dict[str, Any]:
    """What a run's metrics say of its training up to a step; nothing where they cannot be read."""
    if not metrics.is_file():
        return {}
    by_step: dict[int, dict[str, Any]] = {}
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                if int(entry["step"]) <= step:
                    # A resume writes steps again that a kill cost it: the last line of a step counts.
                    by_step[entry["step"]] = {k: entry.get(k) for k in ("samples", "tokens", "loss")}
            except (ValueError, KeyError, TypeError):  # a line cut off by a kill
                continue
    losses = [entry["loss"] for _, entry in sorted(by_step.items())[-100:] if entry["loss"] is not None]
    facts = {key: sum(entry[key] or 0 for entry in by_step.values()) for key in ("samples", "tokens")}
    return facts | ({"loss": round(sum(losses) / len(losses), 6)} if losses else {})
