"""`lumina data show`: what a global batch would be, in words and as a picture."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lumina.checkpoint.load import latest_checkpoint, model_config
from lumina.config.load import load_config
from lumina.config.schema import Config
from lumina.data.index import Index
from lumina.data.loader import Batch, Loader, Sample
from lumina.data.plan import DataState
from lumina.encoders.vae import build_vae
from lumina.train.assemble import check_conditions, plan_of, sets_of, sizing_of

_THUMBNAIL, _LABEL, _MARGIN = 128, 12, 4
_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def show(arguments: argparse.Namespace) -> None:
    """The verb: the global batch of step N, on one process, whatever ranks will share it.

    Raises:
        ValueError: as training would refuse the configuration or the data; or the picture cannot be written.
    """
    out = _picture_file(arguments.out)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.step < 1:
        raise ValueError(f"the first step is 1, not {arguments.step}")
    model = model_config(config)
    vae = build_vae(config.vae, model.in_channels)
    index = Index.open(*sets_of(config.data))
    check_conditions(index, model)
    sizing = sizing_of(config, model, vae)
    state, done = _nearest_state(config, arguments.step)
    plan = plan_of(config, model, vae, index, sizing, lanes=None if state is None else len(state.lanes))
    for step in range(done + 1, arguments.step):
        _, state = plan.batch(state or plan.start(index.hash), step)
    loader = Loader(
        index,
        plan,
        sizing,
        rank=0,
        world=1,
        channels=vae.pixel_channels,
        bad_samples=1.0,
        state=state,
        step=arguments.step - 1,
        seed=config.run.seed,
    )
    stream = iter(loader)
    batch = next(stream)
    stream.close()
    lengths = {
        id(sample): int(plan.tokens_of(np.array([sample.sample_id]), arguments.step)[0])
        for pack in batch.packs
        for sample in pack
    }
    print(f"step {arguments.step}: {batch.global_samples} samples in {len(batch.packs)} packs")
    for number, pack in enumerate(batch.packs):
        used = sum(lengths[id(sample)] for sample in pack)
        unused = 1 - used / plan.tokens_per_pack
        print(f"\npack {number}: {used:,} of {plan.tokens_per_pack:,} tokens ({unused:.1%} unused)")
        for sample in pack:
            print(f"  {_line(sample, lengths[id(sample)])}")
    if out is not None:
        try:
            _sheet(batch).save(out)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written ({error.strerror or error})") from error
        print(f"\n{out} shows them")


def _picture_file(out: str | None) -> Path | None:
    """Where the picture goes, looked at before the work begins."""
    if out is None:
        return None
    path = Path(out)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--out {out} is no picture; name one that ends in {', '.join(_FORMATS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {path.parent}")
    return path


def _nearest_state(config: Config, step: int) -> tuple[DataState | None, int]:
    """Where the run's checkpoint stands, if it has one before this step; the beginning otherwise."""
    checkpoint = latest_checkpoint(Path(config.run.dir))
    if checkpoint is None or checkpoint.manifest.step >= step:
        return None, 0
    return DataState.from_dict(checkpoint.manifest.data), checkpoint.manifest.step


def _line(sample: Sample, tokens: int) -> str:
    source = sample.pixels if sample.pixels is not None else sample.latent
    what = "×".join(str(side) for side in (len(source), *source.shape[2:]))
    said = "" if sample.caption is None else f" {sample.caption!r:.70}"
    label = "" if sample.label is None else f" label {sample.label}"
    stand_in = " (stands in for a bad one)" if sample.occurrence else ""
    return f"{tokens:6,} tokens  {what:>14}  epoch {sample.epoch}  {sample.key}{stand_in}{label}{said}"


def _sheet(batch: Batch) -> Image.Image:
    """A row of thumbnails a pack, the first frame of each sample; latents are grey."""
    longest = max(map(len, batch.packs))
    cell = _THUMBNAIL + _MARGIN
    sheet = Image.new("RGB", (longest * cell + _MARGIN, len(batch.packs) * (cell + _LABEL) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, pack in enumerate(batch.packs):
        top = _MARGIN + row * (cell + _LABEL)
        draw.text((_MARGIN, top), f"pack {row}: {len(pack)} samples", fill="black")
        for column, sample in enumerate(pack):
            thumbnail = _thumbnail(sample)
            thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
            sheet.paste(thumbnail, (_MARGIN + column * cell, top + _LABEL))
    return sheet


def _thumbnail(sample: Sample) -> Image.Image:
    if sample.pixels is None:
        return Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "lightgrey")
    levels = sample.pixels[0].add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).convert("RGB")
