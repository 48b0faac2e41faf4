"""From a configuration to everything a run needs, checked before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lumina.config.schema import Config
from lumina.data.decode import cropped_size
from lumina.data.index import Index
from lumina.data.order import epoch_order
from lumina.data.plan import Plan
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import Vae, build_vae
from lumina.flow.loss import Objective
from lumina.inference.pipeline import model_config
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import token_count
from lumina.parallel.mesh import Mesh

T = TypeVar("T")


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


def assemble(config: Config, mesh: Mesh) -> Parts:
    """
    Raises:
        ValueError: for whatever in `config` does not fit: sizes, encoders, data, layout.
    """
    model = model_config(config)
    objective = Objective.build(**config.flow.model_dump())
    accumulation_steps = _accumulation_steps(config, mesh)
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
    plan = Plan(
        lambda epoch: epoch_order(config.run.seed, epoch, len(index)),
        lambda ids: sample_tokens(index, ids, model, vae),
        config.train.tokens_per_pack,
        config.train.global_batch_packs,
        index.name,
    )
    return Parts(model, objective, vae, text, index, plan, accumulation_steps)


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


def _accumulation_steps(config: Config, mesh: Mesh) -> int:
    packs, ranks, at_once = config.train.global_batch_packs, mesh.data_size, config.train.packs_per_forward
    if packs % ranks:
        raise ValueError(
            f"train.global_batch_packs={packs} cannot be shared by {ranks} data-parallel ranks; "
            f"the nearest number that can is {max(1, round(packs / ranks)) * ranks}"
        )
    of_rank = packs // ranks
    if of_rank % at_once:
        fitting = min((d for d in range(1, of_rank + 1) if of_rank % d == 0), key=lambda d: abs(d - at_once))
        raise ValueError(
            f"train.packs_per_forward={at_once} does not divide the {of_rank} packs that each rank has in a step; "
            f"the nearest number that does is {fitting}"
        )
    return of_rank // at_once


def first_then_others(mesh: Mesh, work: Callable[[bool], T]) -> T:
    """`work(True)` on the first process, and only then `work(False)` on the others.

    Raises:
        ValueError: on every process where the first raised one.
    """
    result, error = None, None
    if mesh.is_first:
        try:
            result = work(True)
        except ValueError as raised:
            error = raised
    if mesh.any(error is not None):
        raise error or ValueError("the first process refused its input; it says why")
    return result if mesh.is_first else work(False)


def prepare_run_folder(run_dir: Path) -> None:
    """Make the run's folder, or accept one that holds a run already.

    Raises:
        ValueError: for a folder that cannot be written, or holds something else.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror or error}") from error
    if not (run_dir / "config.yaml").is_file() and any(run_dir.iterdir()):
        raise ValueError(f"run.dir={run_dir} is not empty and holds no run of Lumina; name a new folder")
