"""Runs with `lora`: their checkpoints hold adapters, and the run's folder, once, the weights that these are beside.

`RUN/base` is an inference folder with the frozen weights, as they were stored where the run started from; `base.json`
in each checkpoint says what its files must be. Whoever opens such a checkpoint sees a whole model, the adapters merged
into its weights.
"""

import copy
import json
import shutil
from collections.abc import Callable, Collection
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lumina.checkpoint.folder import whole_folder
from lumina.checkpoint.load import Checkpoint
from lumina.checkpoint.manifest import EMA, WEIGHTS, FileEntry, sha256_of
from lumina.checkpoint.sources import CheckpointSource, InferenceSource, Source, settings_of
from lumina.checkpoint.targets import DEFAULT_SHARD, write_inference
from lumina.checkpoint.tensor_reader import Stored
from lumina.config.schema import Config, LoraConfig
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.lora import merged

BASE, BASE_RECORD = "base", "base.json"


def pair_names(layer: str) -> tuple[str, str]:
    """Names of A (rank, in) and B (out, rank) beside a layer, as peft gives them."""
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


class MergedWeights:
    """Weights under their public names: trained ones, or those of a base with what adapters add."""

    def __init__(
        self,
        trained: Collection[str],
        scale: float,
        read_trained: Callable[[str], Tensor],
        read_base: Callable[[str], Tensor],
    ):
        """
        Args:
            trained: names of adapters and of whatever else the base does not have.
            scale: of the product of an adapter.
            read_trained, read_base: give a tensor by name.
        """
        self._trained, self._scale = trained, scale
        self._read_trained, self._read_base = read_trained, read_base

    def read(self, name: str) -> Tensor:
        """fp32, (the weight's shape)."""
        if name in self._trained:
            return self._read_trained(name)
        weight = self._read_base(name).float()
        a, b = pair_names(name.removesuffix(".weight"))
        if a not in self._trained:
            return weight
        a, b = (self._read_trained(one).to(weight.device) for one in (a, b))
        return merged(weight, a, b, self._scale)


class Base:
    """The weights beside which adapters were trained."""

    def __init__(self, folder: Path, record: str, where: Path):
        """
        Args:
            folder: RUN/base.
            record: the content of `base.json`.
            where: what has it.

        Raises:
            ValueError: where the weights are not in the folder, or not as they were.
        """
        self.folder, self.record = folder, record
        try:
            files = json.loads(record)["files"]
            self.files = {name: FileEntry.model_validate(entry) for name, entry in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where / BASE_RECORD}: damaged, it lists no files") from error
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry.bytes:
                raise ValueError(
                    f"{path} is missing, or no file of {entry.bytes:,} bytes: {where} holds adapters, and the weights "
                    f"beside which they were trained are in {folder}; keep a run's folder together"
                )
        self._source = InferenceSource(folder)
        (self._kind,) = self._source.tensors
        self._checked = False

    @staticmethod
    def of(checkpoint: Checkpoint) -> "Base":
        """In the folder of the run that the checkpoint is of."""
        folder = checkpoint.directory.absolute().parent.parent / BASE
        return Base(folder, checkpoint.text(BASE_RECORD), checkpoint.directory)

    @property
    def tensors(self) -> dict[str, Stored]:
        return self._source.tensors[self._kind]

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            ValueError: for a damaged file, naming it.
        """
        if not self._checked:
            for file, entry in self.files.items():
                if sha256_of(self.folder / file) != entry.sha256:
                    raise ValueError(
                        f"{self.folder / file} is damaged: it is not what adapters were trained beside (SHA-256)"
                    )
            self._checked = True
        return self._source.read(self._kind, name)


class LoraSource(CheckpointSource):
    """A checkpoint of a run with `lora`, as a whole model."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.lora: LoraConfig = self.config.lora
        # Whoever trains on from the merged weights trains all of them.
        self.config = self.config.model_copy(update={"lora": None})
        self.optimizer_steps = 0
        self.base = Base.of(checkpoint)
        saved = {name: checkpoint.shape(WEIGHTS, name) for name in checkpoint.names(WEIGHTS)}
        self.layers = [name.removesuffix(".lora_A.default.weight") for name in saved if ".lora_A." in name]
        self.whole = [name for name in saved if not is_adapter(name)]
        """What was trained, or drawn, beside the adapters: the base lacks it."""
        shapes = {name: stored.shape for name, stored in self.base.tensors.items()}
        shapes |= {name: saved[name] for name in self.whole}
        self.tensors = {
            kind: {name: Stored(torch.float32, shape) for name, shape in shapes.items()} for kind in (WEIGHTS, EMA)
        }
        self._merged = {
            kind: MergedWeights(
                saved, self.lora.scale, lambda name, kind=kind: self.adapter(kind, name), self.base.read
            )
            for kind in (WEIGHTS, EMA)
        }

    def read(self, kind: str, name: str) -> Tensor:
        return self._merged[kind].read(name)

    def adapter(self, kind: str, name: str) -> Tensor:
        """A trained tensor by its name in the checkpoint, fp32."""
        return self._checkpoint.read(kind, name).view(self._checkpoint.shape(kind, name))

    def files(self) -> list[Path]:
        return [*super().files(), *(self.base.folder / name for name in self.base.files)]

    def check_files(self) -> dict[str, FileEntry]:
        return super().check_files() | {f"{BASE}/{name}": entry for name, entry in self.base.files.items()}


def write_base(
    source: Source,
    kind: str,
    names: list[str],
    run_dir: Path,
    config: Config,
    model: FlagDiTConfig,
    progress: Callable[[int], object],
) -> str:
    """Write RUN/base, in place of one that is there; returns what `base.json` of the checkpoints says of it.

    Args:
        source: of whose `kind` the tensors `names` are taken, as they are stored (fp32 where that differs).
        model: the sizes of the run's model.
        progress: as of `write_inference`.

    Raises:
        OSError: where the disk is full or fails.
    """
    folder = run_dir / BASE
    if folder.exists():  # of a start that came to no checkpoint
        shutil.rmtree(folder)
    stored = [source.tensors[kind][name] for name in names]
    dtypes = {one.dtype for one in stored}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    taken = copy.copy(source)
    taken.model = model
    with whole_folder(folder, dtype.itemsize * sum(prod(one.shape) for one in stored)) as partial:
        files = write_inference(
            taken,
            kind,
            partial,
            names=names,
            dtype=dtype,
            shard_size=DEFAULT_SHARD,
            settings=settings_of(config, 0),
            progress=progress,
        )
    return json.dumps({"files": {name: entry.model_dump() for name, entry in files.items()}}, indent=1)


def read_base(checkpoint: Checkpoint, model: FlagDiTConfig) -> tuple[FlagDiT, Base]:
    """A model with the base's weights, fp32, and what the checkpoint itself has of frozen ones; and the base.

    What is trained is left as memory happens to be: each rank reads its own part of that.
    """
    base = Base.of(checkpoint)
    with torch.device("meta"):
        made = FlagDiT(model)
    made.to_empty(device="cpu")
    saved = set(checkpoint.names(WEIGHTS))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in base.tensors:
                parameter.copy_(base.read(name))
            elif name in saved and not parameter.requires_grad:
                parameter.copy_(checkpoint.read(WEIGHTS, name).view_as(parameter))
    return made, base
