"""Loading: any stretch of any tensor of a checkpoint, whoever wrote it; files are checked before they are used."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lumina.checkpoint.manifest import CONFIG, TensorEntry, checkpoints_of, read_manifest, sha256_of
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.model.config import FlagDiTConfig


class Checkpoint:
    """An open checkpoint folder. Only the files that are read are checked, each once, by size and SHA-256."""

    def __init__(self, directory: Path):
        """
        Raises:
            ValueError: where `directory` holds no complete checkpoint.
        """
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._checked: set[str] = set()

    @property
    def config(self) -> Config:
        """The configuration of the run that wrote it."""
        return load_config(self._check(CONFIG))

    def names(self, kind: str) -> list[str]:
        """Tensors of a kind; none for a kind that was not saved."""
        return list(self.manifest.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self._entry(kind, name).shape)

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor, fp32; to its end by default.

        Raises:
            ValueError: for a tensor or stretch that the checkpoint lacks, or a file that is damaged, naming it.
        """
        entry = self._entry(kind, name)
        total = torch.Size(entry.shape).numel()
        stop = total if numel is None else start + numel
        values = torch.empty(stop - start)
        covered = 0
        for piece in entry.pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                with safe_open(self._check(piece.file), framework="pt") as file:
                    stored = file.get_slice(piece.key)[first - piece.start : last - piece.start]
                values[first - start : last - start] = stored
                covered += last - first
        if covered != stop - start:
            raise ValueError(
                f"{self.directory}: {kind}/{name} has {covered} of the elements {start} to {stop}; pieces are missing"
            )
        return values

    def state_dict(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind, whole."""
        return {name: self.read(kind, name).view(self.shape(kind, name)) for name in self.names(kind)}

    def _entry(self, kind: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[kind][name]
        except KeyError:
            raise ValueError(f"{self.directory} has no tensor {kind}/{name}") from None

    def _check(self, name: str) -> Path:
        path = self.directory / name
        if name not in self._checked:
            listed = self.manifest.files.get(name)
            if listed is None or Path(name).name != name:
                raise ValueError(f"{self.directory}: the manifest names {name!r}, which it does not list as a file")
            if not path.is_file() or path.stat().st_size != listed.bytes or sha256_of(path) != listed.sha256:
                raise ValueError(
                    f"{path} is missing or damaged: it is not the file that was saved (SHA-256 differs); "
                    f"remove {self.directory} to go on from the checkpoint before it"
                )
            self._checked.add(name)
        return path


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    folders = checkpoints_of(run_dir)
    return Checkpoint(folders[-1]) if folders else None


def model_config(config: Config) -> FlagDiTConfig:
    """The model's sizes in a run's configuration.

    Raises:
        ValueError: for sizes that do not fit together, and where `text` is given to a label-conditional model or
            missing for a text-conditional one.
    """
    sizes = FlagDiTConfig.from_dict(config.model)
    if sizes.text_conditional and config.text is None:
        raise ValueError("text is missing: a text-conditional model needs an encoder, as `text: {encoder: bytes}`")
    if not sizes.text_conditional and config.text is not None:
        raise ValueError("text is given, but model.num_classes makes the model label-conditional; remove one of them")
    return sizes
