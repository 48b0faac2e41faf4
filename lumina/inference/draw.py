"""`lumina sample`: prompts in, numbered files and samples.json out."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from lumina.config.schema import TextConfig, VaeConfig
from lumina.inference.images import contact_sheet, save_sample
from lumina.inference.pipeline import LuminaPipeline

LARGEST_SHEET = 400


@dataclass(frozen=True)
class Job:
    """One sample to draw."""

    prompt: str
    seed: int


def draw(arguments: argparse.Namespace) -> None:
    """Everything is checked, and the first batch drawn, before the folder is made.

    Raises:
        ValueError: for no prompt, an empty file of prompts, a folder that is not empty or cannot be written, a count
            below 1, and whatever the pipeline refuses.
    """
    jobs = _jobs(arguments)
    out = Path(arguments.out)
    _check_folder(out)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    pipeline = LuminaPipeline.from_pretrained(
        arguments.model,
        device=_device(arguments.device),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[arguments.dtype],
        weights=arguments.weights,
        text=TextConfig(encoder=arguments.text_encoder) if arguments.text_encoder else None,
        vae=VaeConfig(model=arguments.vae) if arguments.vae else None,
    )
    settings = {
        "model": arguments.model,
        "weights": arguments.weights,
        "height": arguments.height,
        "width": arguments.width,
        "frames": arguments.frames,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "negative_prompt": arguments.negative_prompt,
        "solver": arguments.solver,
        "time_shift": arguments.time_shift,
    }
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
                solver=arguments.solver,
                time_shift=arguments.time_shift,
            )
            out.mkdir(parents=True, exist_ok=True)
            for job, frames in zip(batch, output.frames, strict=True):
                path = save_sample(frames, out / f"{len(records):06d}")
                records.append({"file": path.name, "prompt": job.prompt, "seed": job.seed, "settings": settings})
                if len(sheet) < LARGEST_SHEET:
                    sheet.append(frames[0])
            progress.advance(task, len(batch))
    (out / "samples.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    contact_sheet(sheet, columns=arguments.count if arguments.count > 1 else min(len(sheet), 8)).save(out / "sheet.png")
    print(f"{len(records)} samples in {out}; all on one sheet: {out / 'sheet.png'}")


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file is not None:
        path = Path(arguments.prompts_file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {path} cannot be read as UTF-8 text: {error}") from error
        from_file = [line.strip() for line in lines if line.strip()]
        if not from_file:
            raise ValueError(f"--prompts-file {path} is empty; write a prompt on each line")
        prompts += from_file
    if not prompts:
        raise ValueError("there is nothing to draw; give --prompt TEXT or --prompts-file F")
    if arguments.count < 1:
        raise ValueError(f"--count is {arguments.count}; it must be at least 1")
    if arguments.seed < 0:
        raise ValueError(f"--seed is {arguments.seed}; it must be at least 0")
    repeated = [prompt for prompt in prompts for _ in range(arguments.count)]
    return [Job(prompt, arguments.seed + i) for i, prompt in enumerate(repeated)]


def _check_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder; name a new one, so that nothing is overwritten")
    try:
        existed = out.exists()
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
        if not existed:
            out.rmdir()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
