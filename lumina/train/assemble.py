"""From a configuration to everything a run needs, checked before anything is written."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lumina.checkpoint.manifest import checkpoints_of
from lumina.config.files import PROBE
from lumina.config.schema import Config, DataConfig
from lumina.data.index import Access, Contents, DataSet, Index
from lumina.data.plan import Plan
from lumina.data.shard_index import ShardIndex
from lumina.data.sizing import AUDIO, LATENT, Shapes, Sizing, Stage
from lumina.encoders.text import TextEncoder, build_text_encoder
from lumina.encoders.vae import Vae, build_vae
from lumina.flow.loss import Objective
from lumina.model.config import FlagDiTConfig
from lumina.model.tokens import token_count
from lumina.parallel.layout import accumulation_steps
from lumina.parallel.mesh import Mesh, first_then_others

LOCK = ".lock"
_BEFORE_A_RUN = {LOCK, "logs", "hangs"}  # what may stand in its folder before its configuration does


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run is made of, beside the weights."""

    model: FlagDiTConfig
    objective: Objective
    vae: Vae
    text: TextEncoder | None
    index: Index
    plan: Plan
    sizing: Sizing
    accumulation_steps: int

    @property
    def multiple(self) -> int:
        """What the sides of a picture are cropped to a multiple of, in pixels."""
        return self.vae.factor * self.model.patch_size


def assemble(config: Config, model: FlagDiTConfig, mesh: Mesh, lanes: int | None = None) -> Parts:
    """
    Args:
        model: the sizes that `config` means.
        lanes: of the run that goes on; data.lanes, or a lane for each pack of a global batch, if None.

    Raises:
        ValueError: for whatever in `config` does not fit: sizes, encoders, data, layout.
    """
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
    index = open_index(config.data, mesh)
    sizing = sizing_of(config, model, vae)
    plan = plan_of(config, model, vae, index, sizing, lanes)
    check_conditions(index, model)
    return Parts(model, objective, vae, text, index, plan, sizing, accumulation_steps(config, mesh.data.size))


def open_index(data: DataConfig, mesh: Mesh) -> Index:
    """The data sets of a run; indexes that are missing are built by the first process.

    Raises:
        ValueError: as `Index.open`.
    """
    return first_then_others(mesh, lambda first: Index.open(*sets_of(data), build_missing=first))


def sets_of(data: DataConfig) -> tuple[list[DataSet], Access]:
    """The data sets that the settings name, and how their shards are reached."""
    sets = [DataSet(one.shards, one.weight) for one in data.sets] or [DataSet(data.shards)]
    return sets, Access(data.cache_dir, int(data.cache_gb * 1e9), data.index_dir, tuple(data.pipe_programs))


def sizing_of(config: Config, model: FlagDiTConfig, vae: Vae) -> Sizing:
    """What size samples are trained at."""
    data = config.data
    stages = tuple(Stage(stage.from_step, stage.resolution) for stage in data.stages) or (Stage(0, data.resolution),)
    if data.frames > 1 and not model.frames:
        raise ValueError(f"data.frames={data.frames}: set model.frames=true to train on samples of more than one frame")
    return Sizing(
        vae.factor * model.patch_size,
        stages,
        vae.factor,
        data.frames,
        data.frame_step,
        data.crop == "random",
        data.flip,
        config.run.seed,
    )


def plan_of(
    config: Config, model: FlagDiTConfig, vae: Vae, index: Index, sizing: Sizing, lanes: int | None = None
) -> Plan:
    """The plan of a run; `lanes` as in `assemble`.

    Raises:
        ValueError: where no sample can be used, one is longer than a pack, or of a kind that is not trained on.
    """
    return Plan(
        index.starts,
        index.weights,
        _checked_lengths(index, sizing, config, model, vae),
        tokens_per_pack=config.train.tokens_per_pack,
        global_batch_packs=config.train.global_batch_packs,
        lanes=lanes or config.data.lanes or config.train.global_batch_packs,
        window=config.data.shuffle_window,
        seed=config.run.seed,
        stage_of=sizing.stage_of,
    )


def _checked_lengths(
    index: Index, sizing: Sizing, config: Config, model: FlagDiTConfig, vae: Vae
) -> Callable[[np.ndarray, int], np.ndarray]:
    """(ids, step) → lengths in tokens. A sample of unknown size is planned as long as the median of its own set.

    Raises:
        ValueError: where no sample can be used, one is longer than a pack, or of a kind that is not trained on.
    """
    shapes, counts = index.contents.shapes, index.contents.counts
    if (shapes.kind == AUDIO).any():
        raise ValueError("data.shards hold audio, which this version indexes and does not train on")
    if not model.frames and ((shapes.kind == LATENT) & (shapes.frames > 1)).any():
        raise ValueError("data.shards hold latents of more than one frame; set model.frames=true to train on them")

    def lengths(of: Shapes, stage: int) -> np.ndarray:
        frames, heights, widths = sizing.sizes(of, stage)
        rows, columns = heights // vae.factor, widths // vae.factor
        tokens = token_count(frames, rows, columns, model.patch_size, model.text_conditional)
        return np.where(frames > 0, tokens, 0)

    known = True
    for number in range(len(sizing.stages)):
        tokens = lengths(shapes, number)
        known &= bool((tokens > 0).all())
        if not tokens.any():
            raise ValueError(f"none of {len(index)} samples can be used: each is unreadable or smaller than one patch")
        too_long = tokens > config.train.tokens_per_pack
        if too_long.any():
            worst = int(tokens.argmax())
            frames, height, width = (int(of[worst]) for of in (shapes.frames, shapes.height, shapes.width))
            raise ValueError(
                f"{int(counts[too_long].sum())} of {len(index)} samples do not fit in train.tokens_per_pack="
                f"{config.train.tokens_per_pack}: one of {frames} × {height} × {width} (frames, height, width) has "
                f"{tokens[worst]} tokens; set it to at least {tokens[worst]}, or lower data.resolution or data.frames"
            )
    if known:
        return lambda ids, step: lengths(index.shapes(ids), sizing.stage_of(step))
    medians = [_medians(index, partial(lengths, stage=stage)) for stage in range(len(sizing.stages))]
    firsts = np.array([starts[0] for starts in index.starts])

    def tokens_of(ids: np.ndarray, step: int) -> np.ndarray:
        stage = sizing.stage_of(step)
        tokens = lengths(index.shapes(ids), stage)
        return np.where(tokens > 0, tokens, medians[stage][np.searchsorted(firsts, ids, side="right") - 1])

    return tokens_of


def _medians(index: Index, lengths: Callable[[Shapes], np.ndarray]) -> np.ndarray:
    """Of each set the median length of those whose length is known; that of all where a set has none."""

    def median(contents: Contents) -> int:
        tokens = lengths(contents.shapes)
        order = tokens.argsort()
        order = order[tokens[order] > 0]
        if not len(order):
            return 0
        counts = contents.counts[order].cumsum()
        return int(tokens[order][np.searchsorted(counts, counts[-1] / 2)])

    of_sets = [median(index.contents_of(number)) for number in range(len(index.starts))]
    return np.array([own or median(index.contents) for own in of_sets])


def check_conditions(index: Index, model: FlagDiTConfig) -> None:
    """Refuse, by `ValueError`, a data set that lacks what the model is conditioned on."""
    if model.text_conditional:
        count, what = index.contents.uncaptioned, "has no caption, on which the model is conditioned"
        missing = index.find(lambda table: table.columns["caption_length"] == -1) if count else None
    else:
        labels, what = index.contents.labels, f"has no label from 0 to {model.num_classes - 1}"
        what += f", which model.num_classes={model.num_classes} asks for"
        outside = labels is None or labels[1] >= model.num_classes
        wrong = index.contents.unlabelled or outside

        def unfit(table: ShardIndex) -> np.ndarray:
            return (table.columns["label"] == -1) | (table.columns["label"] >= model.num_classes)

        missing = index.find(unfit) if wrong else None
    if missing is not None:
        raise ValueError(f"{index.name(missing)} {what}")


def holds_no_run(run_dir: Path) -> bool:
    """Whether a folder is there and holds something else than a run."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    held = any(name not in _BEFORE_A_RUN and not name.startswith(PROBE) for name in names)
    return held and not (run_dir / "config.yaml").is_file() and not checkpoints_of(run_dir)


@contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Make the run's folder, or accept one that holds a run already, and keep other processes out while it lasts.

    Raises:
        ValueError: for a folder that cannot be written, holds something else, or is in use.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        other = holds_no_run(run_dir)
        lock = (run_dir / LOCK).open("w")
    except OSError as error:
        raise ValueError(f"run.dir={run_dir} cannot be written: {error.strerror or error}") from error
    with lock:
        if other:
            (run_dir / LOCK).unlink()
            raise ValueError(f"run.dir={run_dir} is not empty and holds no run of Lumina; name a new folder")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"run.dir={run_dir} is in use: another process trains there; wait for it, or name another folder"
            ) from error
        yield
