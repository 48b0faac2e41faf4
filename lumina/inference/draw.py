"""`lumina sample`: prompts in, numbered files and samples.json out."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from lumina.inference.compose import Region
from lumina.inference.folder import SampleFolder
from lumina.inference.form import Form
from lumina.inference.pipeline import LuminaOutput, LuminaPipeline
from lumina.inference.reading import read_frames
from lumina.inference.style import Style

if TYPE_CHECKING:
    from lumina.parallel.apart import Apart

LARGEST_SEED = 2**63
LARGEST_BATCH = 16
"""Unless --batch-size says otherwise."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One sample to draw, and its place among all."""

    number: int
    prompt: str
    seed: int


def draw(arguments: argparse.Namespace) -> int | None:
    """Draw what `lumina sample` was asked for; the folder is there when all of it is.

    Where a launcher has started several processes, each draws a share of the batches.

    Returns:
        An exit code where another rank has failed, which says why.

    Raises:
        ValueError: for no prompt, an empty file of prompts, a folder that is not empty or cannot be written, a count
            below 1, a form that samples do not have, and whatever the pipeline refuses.
    """
    # Only here is asked for more than one process.
    from lumina.parallel.apart import FailedElsewhere, apart

    try:
        with ExitStack() as afterwards, apart() as ranks:
            folder = SampleFolder(Path(arguments.out))
            afterwards.callback(folder.close)
            _draw(folder, ranks, arguments)
    except FailedElsewhere as other:
        return other.code


def _draw(folder: SampleFolder, ranks: "Apart", arguments: argparse.Namespace) -> None:
    jobs = _jobs(arguments)
    size = arguments.batch_size
    if size is None:
        size = min(LARGEST_BATCH, -(-len(jobs) // ranks.world.size))
    if size < 1:
        raise ValueError(f"--batch-size is {size}; it must be at least 1")
    form = Form.of(arguments)
    regions, style = _regions(arguments), _style(arguments)
    device = _device(arguments.device, ranks)
    ranks.first(folder.make)
    folder.check()
    pipeline = _pipeline(arguments, device)
    form = form.of_model(pipeline)
    lengths = _lengths(arguments)
    extrapolation = pipeline.extrapolation_for(form.height, form.width, form.frames, **lengths)
    settings = _settings(arguments, pipeline, form) | {"batch_size": size} | asdict(extrapolation)
    save = form.writer(pipeline.vae, device)

    def call(batch: list[Job]) -> LuminaOutput:
        # The first sample of all leads in every batch, so that style does not depend on how jobs are shared out.
        led = arguments.share_style and batch[0] is not jobs[0]
        batch = [jobs[0], *batch] if led else batch
        output = pipeline(
            [job.prompt for job in batch],
            form.height,
            form.width,
            form.frames,
            arguments.steps,
            arguments.guidance,
            [torch.Generator().manual_seed(job.seed) for job in batch],
            negative_prompt=arguments.negative_prompt,
            channels=form.channels,
            solver=arguments.solver,
            guided_channels=arguments.guided_channels,
            guidance_interval=tuple(arguments.guidance_interval),
            regions=regions,
            style=style,
            callback=lambda *_: ranks.look(),
            **lengths,
        )
        return replace(output, frames=output.frames[1:], latents=output.latents[1:]) if led else output

    # Whole batches are shared out: with the same --batch-size the files are the same to the last bit under any number
    # of ranks, for how numbers are rounded depends on what else is in a batch.
    batches = ranks.share([jobs[first : first + size] for first in range(0, len(jobs), size)])
    _draw_batches(batches, call, save, folder, ranks)
    ranks.meet()
    records = [
        {"file": f"{job.number:06d}{form.suffix}", "prompt": job.prompt, "seed": job.seed, "settings": settings}
        for job in jobs
    ]

    def finish() -> None:
        folder.finish(records, arguments.count if arguments.count > 1 else min(len(jobs), 8))
        print(f"{len(jobs)} samples in {folder.out}; all on one sheet: {folder.out / 'sheet.png'}")

    ranks.first(finish)


def _draw_batches(
    batches: list[list[Job]],
    call: Callable[[list[Job]], LuminaOutput],
    save: Callable[..., None],
    folder: SampleFolder,
    ranks: "Apart",
) -> None:
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not (ranks.is_first and console.is_terminal)) as progress:
        task = progress.add_task("drawing", total=sum(map(len, batches)))
        for batch in batches:
            output = call(batch)
            for job, frames, latents in zip(batch, output.frames, output.latents, strict=True):
                with folder.writing():
                    save(frames, latents, folder.stem(job.number))
                    folder.add_to_sheet(job.number, frames)
            progress.advance(task, len(batch))
            ranks.look()


def _regions(arguments: argparse.Namespace) -> list[Region]:
    regions = []
    for *box, text in arguments.region:
        try:
            left, top, right, bottom = map(float, box)
        except ValueError as error:
            raise ValueError(
                f"--region {' '.join(box)} {text!r}: LEFT TOP RIGHT BOTTOM are four numbers from 0 to 1, then TEXT"
            ) from error
        regions.append(Region(text, left, top, right, bottom))
    return regions


def _style(arguments: argparse.Namespace) -> Style | None:
    if arguments.style_of is None:
        if arguments.style_prompt:
            raise ValueError("--style-prompt says what the picture of --style-of shows; give that, too")
        return Style() if arguments.share_style else None
    if arguments.share_style:
        raise ValueError("give --style-of or --share-style, not both: samples take their style from one of the two")
    frames = read_frames(arguments.style_of)
    if len(frames) > 1:
        raise ValueError(f"--style-of {arguments.style_of} has {len(frames)} frames; give a single picture")
    return Style(frames[0], arguments.style_prompt)


def _pipeline(arguments: argparse.Namespace, device: torch.device) -> LuminaPipeline:
    if arguments.lora is None and arguments.lora_scale is not None:
        raise ValueError(f"--lora-scale {arguments.lora_scale} is of an adapter; name it by --lora DIR")
    if arguments.cpu_offload and device.type == "cpu":
        raise ValueError("--cpu-offload is for sampling on a GPU; on the CPU all weights are there already")
    name = arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")
    pipeline = LuminaPipeline.from_pretrained(
        arguments.model,
        device="cpu" if arguments.cpu_offload else device,
        dtype=_DTYPES[name],
        weights=arguments.weights,
        text=arguments.text_encoder,
        vae=arguments.vae,
    )
    if arguments.lora is not None:
        pipeline.load_lora(arguments.lora, _lora_scale(arguments))
    if arguments.cpu_offload:
        pipeline.enable_model_cpu_offload(device)
    if arguments.vae_tiling:
        pipeline.enable_vae_tiling()
    if arguments.vae_slicing:
        pipeline.enable_vae_slicing()
    return pipeline


def _lora_scale(arguments: argparse.Namespace) -> float:
    return 1.0 if arguments.lora_scale is None else arguments.lora_scale


def _settings(arguments: argparse.Namespace, pipeline: LuminaPipeline, form: Form) -> dict[str, Any]:
    """What drew the samples, but for what is chosen by their length."""
    parameter = next(pipeline.model.parameters())
    return {
        "model": arguments.model,
        "weights": arguments.weights,
        "text_encoder": arguments.text_encoder,
        "vae": arguments.vae,
        **({} if arguments.lora is None else {"lora": arguments.lora, "lora_scale": _lora_scale(arguments)}),
        "vae_tiling": arguments.vae_tiling,
        "vae_slicing": arguments.vae_slicing,
        "dtype": next(name for name, dtype in _DTYPES.items() if dtype == parameter.dtype),
        "device": parameter.device.type,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "negative_prompt": arguments.negative_prompt,
        "solver": arguments.solver,
        "guided_channels": arguments.guided_channels,
        "guidance_interval": list(arguments.guidance_interval),
        "regions": arguments.region,
        "share_style": arguments.share_style,
        "style_of": arguments.style_of,
        "style_prompt": arguments.style_prompt,
        **asdict(form),
    }


def _lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of lengths, as the pipeline takes it; None where nothing was."""
    names = ("rope", "rope_factor", "rope_switch", "proportional_attention", "trained_length", "time_shift")
    return {name: getattr(arguments, name) for name in names}


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        path = Path(arguments.prompts_file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ValueError(f"--prompts-file {path} cannot be read: {reason}") from error
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise ValueError(f"--prompts-file {path} is empty; write a prompt on each line")
        prompts += from_file
    if not prompts and arguments.region:
        prompts = [""]  # all that is asked for is in the regions
    if not prompts:
        raise ValueError("there is nothing to draw; give --prompt TEXT or --prompts-file F")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}; it must be at least 1")
    repeated = [prompt for prompt in prompts for _ in range(arguments.count)]
    if not 0 <= arguments.seed <= LARGEST_SEED - len(repeated):
        raise ValueError(
            f"--seed is {arguments.seed}; it must be at least 0 and below {LARGEST_SEED - len(repeated):,}"
        )
    return [Job(number, prompt, arguments.seed + number) for number, prompt in enumerate(repeated)]


def _device(name: str | None, ranks: "Apart") -> torch.device:
    """Of this rank: a GPU of its own unless `name` is another kind.

    Raises:
        ValueError: for a device that cannot be used here, or one GPU for several ranks.
    """
    from lumina.parallel.mesh import device_of

    several = ranks.world.size > 1
    if name is None and (several or not torch.cuda.is_available()):
        device = device_of(ranks.world)
    else:
        try:
            device = torch.device("cuda" if name is None else name)
            if device.type == "meta":
                raise RuntimeError("it holds no data")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
        if several and device.index is not None and device.type != "cpu":
            raise ValueError(
                f"--device {name} is one for {ranks.world.size} ranks; leave it out, and each takes a GPU of its own"
            )
        if several and device.type == "cuda":
            device = device_of(ranks.world)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
