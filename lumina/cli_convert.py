"""`lumina convert`. Torch and the rest of the house are imported inside it."""

import argparse
import sys
from pathlib import Path


def add_convert(verbs: argparse._SubParsersAction) -> None:
    """Add `convert`."""
    convert = verbs.add_parser(
        "convert",
        help="make a model folder of another layout, and prove that it is the same model",
        description="Read SRC (a run, a checkpoint, an inference folder, a public Lumina-T2I folder or a DeepSpeed "
        "checkpoint) and write DST: an inference folder, a public folder, a run that training goes on from or, of a "
        "run with lora, the adapters alone, as peft keeps them. The result is compared with SRC, block by block, "
        "before DST is there.",
        example="lumina convert runs/digits digits-inference --to inference --dtype bf16",
    )
    convert.add_argument("source", metavar="SRC")
    convert.add_argument("destination", metavar="DST", help="a new or empty folder")
    convert.add_argument("--to", required=True, choices=("inference", "upstream", "training", "peft"))
    convert.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="of inference and peft the averaged ones where there are any, of upstream both unless told; not of "
        "training",
    )
    convert.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="(default: as in SRC; training is fp32)")
    convert.add_argument("--shard-size", metavar="BYTES", help="of inference: a file at most, as 500MB (default 5GB)")
    convert.add_argument(
        "--model-parallel", type=int, metavar="N", help="of upstream: files that share each tensor (default 1)"
    )
    convert.add_argument("--format", choices=("safetensors", "pth"), help="of upstream (default safetensors)")
    convert.add_argument("--config", metavar="CONFIG", help="YAML file of a run: what a folder of others does not tell")
    convert.add_argument("--drop", nargs="+", default=[], metavar="PATTERN", help="tensors to leave out, by name")
    convert.add_argument("--no-verify", action="store_true", help="do not compare the result with SRC")
    convert.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from lumina.checkpoint.convert import Request, convert
    from lumina.data.recipes.making import parse_bytes

    request = Request(
        source=Path(arguments.source),
        destination=Path(arguments.destination),
        to=arguments.to,
        weights=arguments.weights,
        dtype=arguments.dtype,
        shard_size=None if arguments.shard_size is None else parse_bytes(arguments.shard_size),
        model_parallel=arguments.model_parallel,
        format=arguments.format,
        config=None if arguments.config is None else Path(arguments.config),
        drop=arguments.drop,
        verify=not arguments.no_verify,
    )
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)
        done = convert(
            request, lambda what, now, total: bar.update(task, description=what, completed=now, total=total or None)
        )
    for note in done.notes:
        print(f"lumina convert: note: {note}", file=sys.stderr)
    size = sum(entry.bytes for entry in done.files.values())
    print(
        f"{done.destination}: {done.parameters:,} parameters of step {done.step:,}, {', '.join(done.kinds)} in "
        f"{done.dtype}, {len(done.files)} files, {size:,} bytes"
    )
    for proof in done.proofs:
        what = "bit-equal" if proof.exact else f"within {proof.worst:.1e} (allowed {proof.tolerance:.1e})"
        print(f"proof of {proof.result}: {proof.tensors} tensors as in the source; outputs of each block {what}")
    if done.moments:
        print(f"proof of moments: {done.moments} tensors bit-equal")
    if not done.proofs:
        print("not compared with the source (--no-verify)")
