"""`lumina sample`: prompts in, numbered files and samples.json out."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from lumina.inference.images import contact_sheet, save_sample
from lumina.inference.pipeline import LuminaPipeline

LARGEST_SHEET = 400
LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Job:
    """One sample to draw."""

    prompt: str
    seed: int


def draw(arguments: argparse.Namespace) -> None:
    """Draw what `lumina sample` was asked for; the folder is there when all of it is.

    Raises:
        ValueError: for no prompt, an empty file of prompts, a folder that is not empty or cannot be written, a count
            below 1, and whatever the pipeline refuses.
    """
    jobs = _jobs(arguments)
    out = Path(arguments.out)
    _check_folder(out)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if arguments.lora is None and arguments.lora_scale is not None:
        raise ValueError(f"--lora-scale {arguments.lora_scale} is of an adapter; name it by --lora DIR")
    pipeline = LuminaPipeline.from_pretrained(
        arguments.model,
        device=_device(arguments.device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[arguments.dtype],
        weights=arguments.weights,
        text=arguments.text_encoder,
        vae=arguments.vae,
    )
    lora_scale = 1.0 if arguments.lora_scale is None else arguments.lora_scale
    if arguments.lora is not None:
        pipeline.load_lora(arguments.lora, lora_scale)
    extrapolation = pipeline.extrapolation_for(
        arguments.height, arguments.width, arguments.frames, **_lengths(arguments)
    )
    settings = {
        "model": arguments.model,
        "weights": arguments.weights,
        "text_encoder": arguments.text_encoder,
        "vae": arguments.vae,
        **({} if arguments.lora is None else {"lora": arguments.lora, "lora_scale": lora_scale}),
        "height": arguments.height,
        "width": arguments.width,
        "frames": arguments.frames,
        "channels": arguments.channels,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "negative_prompt": arguments.negative_prompt,
        "solver": arguments.solver,
        "guided_channels": arguments.guided_channels,
        "guidance_interval": list(arguments.guidance_interval),
        **asdict(extrapolation),
    }
    with _whole_folder(out) as folder:
        _draw_into(folder, pipeline, jobs, settings, arguments)
    print(f"{len(jobs)} samples in {out}; all on one sheet: {out / 'sheet.png'}")


def _draw_into(
    folder: Path, pipeline: LuminaPipeline, jobs: list[Job], settings: dict[str, Any], arguments: argparse.Namespace
) -> None:
    """The files of all jobs, samples.json and sheet.png."""
    records, sheet = [], []
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=len(jobs))
        for first in range(0, len(jobs), arguments.batch_size):
            batch = jobs[first : first + arguments.batch_size]
            output = pipeline(
                [job.prompt for job in batch],
                arguments.height,
                arguments.width,
                arguments.frames,
                arguments.steps,
                arguments.guidance,
                [torch.Generator().manual_seed(job.seed) for job in batch],
                negative_prompt=arguments.negative_prompt,
                channels=arguments.channels,
                solver=arguments.solver,
                guided_channels=arguments.guided_channels,
                guidance_interval=tuple(arguments.guidance_interval),
                **_lengths(arguments),
            )
            for job, frames in zip(batch, output.frames, strict=True):
                path = save_sample(frames, folder / f"{len(records):06d}")
                records.append({"file": path.name, "prompt": job.prompt, "seed": job.seed, "settings": settings})
                if len(sheet) < LARGEST_SHEET:
                    sheet.append(frames[0])
            progress.advance(task, len(batch))
    (folder / "samples.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    columns = arguments.count if arguments.count > 1 else min(len(sheet), 8)
    contact_sheet(sheet, columns).save(folder / "sheet.png")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when all is written, and goes when something fails.

    Raises:
        ValueError: where the place beside `out` cannot be written.
    """
    partial = out.absolute().with_name(f".{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
    except OSError as error:
        raise OSError(f"the samples could not be written to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    if not prompts:
        raise ValueError("there is nothing to draw; give --prompt TEXT or --prompts-file F")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}; it must be at least 1")
    repeated = [prompt for prompt in prompts for _ in range(arguments.count)]
    if not 0 <= arguments.seed <= LARGEST_SEED - len(repeated):
        raise ValueError(
            f"--seed is {arguments.seed}; it must be at least 0 and below {LARGEST_SEED - len(repeated):,}"
        )
    return [Job(prompt, arguments.seed + i) for i, prompt in enumerate(repeated)]


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder; name a new one, so that nothing is overwritten")
    nearest = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: {nearest} is no folder that you may write to")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
