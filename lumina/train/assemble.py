"""From a configuration to everything a run needs, checked before anything is written."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lumina.checkpoint.manifest import checkpoints_of
from lumina.config.schema import Config
from lumina.data.decode import cropped_size
from lumina.data.index import Index
from lumina.data.order import epoch_order
from lumina.data.plan import Plan
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import Vae, build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import token_count
from lumina.parallel.layout import accumulation_steps
from lumina.parallel.mesh import Mesh, first_then_others

_LOCK = ".lock"


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run is made of, beside the weights."""

    model: FlagDiTConfig
    objective: Objective
    vae: Vae
    text: TextEncoder | None
    index: Index
    plan: Plan
    accumulation_steps: int

    @property
    def multiple(self) -> int:
        """What the sides of a picture are cropped to a multiple of, in pixels."""
        return self.vae.factor * self.model.patch_size


def assemble(config: Config, model: FlagDiTConfig, mesh: Mesh) -> Parts:
    """
    Args:
        model: the sizes that `config` means.

    Raises:
        ValueError: for whatever in `config` does not fit: sizes, encoders, data, layout.
    """
    if config.checkpoint.asynchronous:
        raise ValueError("checkpoint.async=true: in this version training waits for a save; set checkpoint.async=false")
    if config.log.wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(
            "log.wandb_project is set but wandb is not installed; run `pip install 'lumina-t2x[wandb]'` or unset it"
        )
    objective = Objective.build(**config.flow.model_dump())
    vae = build_vae(config.vae, model.in_channels, mesh.device)
    if vae.pixel_channels not in (1, 3):
        raise ValueError(
            f"model.in_channels={model.in_channels} makes vae.model {config.vae.model} take {vae.pixel_channels} "
            "channels, but pictures have 1 or 3; set model.in_channels to one of them, or name another autoencoder"
        )
    text = None
    if config.text is not None:
        text = build_text_encoder(config.text, mesh.device)
        if text.width != model.cap_feat_dim:
            raise ValueError(
                f"model.cap_feat_dim={model.cap_feat_dim}, but the features of text.encoder {config.text.encoder} are "
                f"{text.width} wide; set model.cap_feat_dim={text.width}"
            )
    index = first_then_others(mesh, lambda first: Index.open(config.data.shards, build_missing=first))
    if not model.frames and (index.frames > 1).any():
        raise ValueError("data.shards hold samples of more than one frame; set model.frames=true to train on them")
    _check_conditions(index, model)
    plan = Plan(
        lambda epoch: epoch_order(config.run.seed, epoch, len(index)),
        lambda ids: sample_tokens(index, ids, model, vae),
        config.train.tokens_per_pack,
        config.train.global_batch_packs,
        index.name,
    )
    return Parts(model, objective, vae, text, index, plan, accumulation_steps(config, mesh.data.size))


def sample_tokens(index: Index, ids: np.ndarray, model: FlagDiTConfig, vae: Vae) -> np.ndarray:
    """Tokens of samples as they will be cropped; 0 for those whose size is unknown or below one patch."""
    heights, widths = cropped_size(index.heights[ids], index.widths[ids], vae.factor * model.patch_size)
    tokens = token_count(
        index.frames[ids].astype(np.int64),
        heights.astype(np.int64) // vae.factor,
        widths.astype(np.int64) // vae.factor,
        model.patch_size,
        model.text_conditional,
    )
    return np.where((heights > 0) & (widths > 0), tokens, 0)


def _check_conditions(index: Index, model: FlagDiTConfig) -> None:
    """Refuse a data set that lacks what the model is conditioned on."""
    if model.text_conditional:
        wrong, what = index.caption_lengths < 0, "has no caption, on which the model is conditioned"
    else:
        wrong = (index.labels < 0) | (index.labels >= model.num_classes)
        what = f"has no label from 0 to {model.num_classes - 1}, which model.num_classes={model.num_classes} asks for"
    if wrong.any():
        raise ValueError(f"{index.name(int(wrong.argmax()))} {what}; so do {int(wrong.sum())} of {len(index)} samples")


@contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Make the run's folder, or accept one that holds a run already, and keep other processes out while it lasts.

    Raises:
        ValueError: for a folder that cannot be written, holds something else, or is in use.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held = any(path.name != _LOCK for path in run_dir.iterdir())
        lock = (run_dir / _LOCK).open("w")
    except OSError as error:
        raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror or error}") from error
    with lock:
        if held and not (run_dir / "config.yaml").is_file() and not checkpoints_of(run_dir):
            (run_dir / _LOCK).unlink()
            raise ValueError(f"run.dir={run_dir} is not empty and holds no run of Lumina; name a new folder")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"run.dir={run_dir} is in use: another process trains there; wait for it, or name another folder"
            ) from error
        yield
