"""The `lumina` command. One thin function a verb; torch and the rest of the house are imported inside it."""

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from lumina.cli_convert import add_convert
from lumina.cli_data import add_data
from lumina.cli_doctor import add_doctor
from lumina.cli_launch import add_launch
from lumina.config.exits import BAD_INPUT as EXIT_BAD_INPUT
from lumina.config.exits import DONE as EXIT_DONE
from lumina.config.exits import FAILED as EXIT_FAILED

_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


class _Parser(argparse.ArgumentParser):
    """Examples in every help, nearest option in every error, no abbreviations."""

    def __init__(self, *args, example: str = "", **kwargs):
        super().__init__(
            *args,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=f"example:\n  {example}" if example else None,
            **kwargs,
        )
        # Of every verb, where it is looked for after an error; a verb that is not given it leaves it as it was.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def parse_known_args(self, args=None, namespace=None):
        # Each parser refuses what it does not know, rather than the outermost for all: it knows the nearest option.
        namespace, unknown = super().parse_known_args(args, namespace)
        if hasattr(namespace, "overrides"):  # argparse looks for them in one place only: they may follow options too
            namespace.overrides += [word for word in unknown if _SETTING.match(word)]
            unknown = [word for word in unknown if not _SETTING.match(word)]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown.group(1).startswith("-"):
            close = difflib.get_close_matches(unknown.group(1).split("=")[0], list(self._option_string_actions), n=1)
            message = f"unknown option {unknown.group(1)}" + (f"; did you mean {close[0]}?" if close else "")
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    from lumina import __version__

    parser = _Parser(
        prog="lumina",
        description="Train Flag-DiT, a flow-matching diffusion transformer, and sample from it.",
        example="lumina data digits data/digits && lumina train configs/digits.yaml",
    )
    parser.add_argument("--version", action="version", version=f"lumina {__version__}")
    parser.set_defaults(debug=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    train = verbs.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train the run that CONFIG describes. A run that exists goes on from its newest checkpoint. "
        "Started by torchrun, deepspeed or srun, each process takes its part.",
        example="lumina train configs/digits.yaml train.steps=500 run.dir=runs/short",
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    train.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="with train.init_from: tensors that may be missing, left over or of other shapes, as 'cap_embedder.*'",
    )
    train.set_defaults(run=_train)
    add_launch(verbs)

    sample = verbs.add_parser(
        "sample",
        help="draw samples from prompts",
        description="Draw N samples of each prompt and write them, with samples.json and sheet.png, into a folder. "
        "MODEL is a run, a checkpoint, an inference folder or a public Lumina-T2I folder.",
        example='lumina sample runs/digits --prompt "a handwritten digit seven" --count 8 --height 8 --width 8 '
        "--out samples",
    )
    sample.add_argument("model", metavar="MODEL")
    sample.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="one or several prompts")
    sample.add_argument("--prompts-file", metavar="F", help="a file with a prompt on each line")
    sample.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    sample.add_argument("--count", type=int, default=1, metavar="N", help="samples of each prompt (default 1)")
    sample.add_argument("--height", type=int, default=256, help="pixels (default 256)")
    sample.add_argument("--width", type=int, default=256, help="pixels (default 256)")
    sample.add_argument("--frames", type=int, default=1, help="frames of a video, views of an object (default 1)")
    sample.add_argument("--steps", type=int, help="of the solver (default 50); the adaptive solvers take none")
    sample.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (default 4; 1 is none)")
    sample.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    sample.add_argument("--solver", default="euler", help="euler (default), midpoint, heun, rk4, dopri5, dopri8, …")
    sample.add_argument("--time-shift", type=float, default=1.0, metavar="M", help="shift of the time grid (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="of the first sample; the next have the next (default 0)")
    sample.add_argument("--batch-size", type=int, default=16, help="samples drawn at once (default 16)")
    sample.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged (default) or last weights")
    sample.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (default: fp32 on a CPU, else bf16)")
    sample.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    sample.add_argument("--text-encoder", metavar="NAME", help="for a public folder, which does not name its own")
    sample.add_argument("--vae", metavar="NAME", help="in place of the autoencoder that the folder names")
    sample.set_defaults(run=_sample)

    add_convert(verbs)
    add_data(verbs, _Parser)

    benchmark = verbs.add_parser(
        "benchmark",
        help="measure operations on this machine",
        description="Measure on this machine; on a GPU if there is one.",
        example="lumina benchmark kernels --hidden 4096",
    )
    subjects = benchmark.add_subparsers(dest="subject", required=True, metavar="WHAT", parser_class=_Parser)
    fused = subjects.add_parser(
        "kernels",
        help="the fused operations, beside eager torch, torch.compile, Liger and apex",
        description="Time each fused operation, forward and backward, with the bytes that it must move and the share "
        "of the copy bandwidth that they make, beside eager torch, torch.compile and, where they are installed, "
        "liger-kernel and apex.",
        example="lumina benchmark kernels --only swiglu --hidden 4096 --out swiglu.json",
    )
    fused.add_argument("--only", nargs="+", metavar="NAME", help="operations, by name (default: all)")
    fused.add_argument(
        "--hidden", nargs="+", type=int, default=[1536, 3072, 4096], metavar="D", help="(default 1536 3072 4096)"
    )
    fused.add_argument(
        "--against", nargs="+", metavar="NAME", help="lumina, torch, compile, liger, apex (default: all that are here)"
    )
    fused.set_defaults(run=_benchmark_kernels, default_tokens="4096 32768 131072; on a CPU 1024")
    attention = subjects.add_parser(
        "attention",
        help="the attention backends, and rings of them in one process",
        description="Time every attention backend that can run here, forward and backward, on one long sample, and "
        "rings of 2, 4 and 8 blocks of the default one in this process; with errors against float64.",
        example="lumina benchmark attention --head-dim 128 --tokens 131072",
    )
    attention.add_argument("--head-dim", nargs="+", type=int, default=[96, 128], metavar="E", help="(default 96 128)")
    attention.add_argument("--heads", type=int, metavar="H", help="(default 32; on a CPU 4)")
    attention.set_defaults(run=_benchmark_attention, default_tokens="4096 … 131072; on a CPU 2048")
    loader = subjects.add_parser(
        "loader",
        help="the data loader, beside webdataset and a plain torch Dataset",
        description="Time what photographs of a megapixel cost until they are pictures of RESOLUTION² pixels to train "
        "on, by the loader, by a webdataset pipeline and by a torch Dataset of files, each in processes of its own. "
        "With --minutes, watch the loader's memory instead; with --index, how an index of N samples starts.",
        example="lumina benchmark loader --dir /tmp/photographs --workers 0 1 4 --out loader.json",
    )
    instead = loader.add_mutually_exclusive_group()
    instead.add_argument("--minutes", type=float, metavar="M", help="run for so long and say how memory goes")
    instead.add_argument("--index", type=int, metavar="N", help="measure the start with N synthetic samples")
    loader.add_argument("--images", type=int, default=2000, metavar="N", help="photographs to make (default 2000)")
    loader.add_argument("--resolution", type=int, default=256, help="a multiple of 16 pixels (default 256)")
    loader.add_argument(
        "--workers", nargs="+", type=int, default=[0, 1], metavar="N", help="(default 0 1; of --minutes the largest)"
    )
    loader.add_argument("--repeats", type=int, default=5, metavar="N", help="of each measurement (default 5)")
    loader.add_argument("--samples", type=int, default=500, metavar="N", help="pictures of a measurement (default 500)")
    loader.add_argument("--dir", help="keep what is made here, or use what is (default: a temporary folder)")
    loader.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    loader.set_defaults(run=_benchmark_loader)
    checkpoint = subjects.add_parser(
        "checkpoint",
        help="saving, loading and converting, beside cp and torch.save",
        description="Time saves and loads of a model's state, hashes included, and its conversion, beside cp with "
        "fsync, torch.save and torch.load of the same bytes, with the memory that each takes.",
        example="lumina benchmark checkpoint --model 3b --state weights --dtype bf16 --dir /scratch",
    )
    checkpoint.add_argument("--model", default="600m", metavar="SIZE", help="600m (default), 3b or 7b")
    checkpoint.add_argument(
        "--state",
        choices=("training", "weights"),
        default="training",
        help="weights, EMA, moments (default)",
    )
    checkpoint.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default fp32)")
    checkpoint.add_argument("--repeats", type=int, default=3, metavar="N", help="(default 3)")
    checkpoint.add_argument("--dir", help="where to write (default: the system's folder for temporary files)")
    checkpoint.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    checkpoint.set_defaults(run=_benchmark_checkpoint)
    network = subjects.add_parser(
        "network",
        help="what ranks exchange in a second, within hosts and between every two",
        description="Measure all-reduce within each host and over all ranks, and messages between every two hosts, "
        "disjoint pairs at once. Start it as training is started: by torchrun, deepspeed, srun or mpirun; `lumina "
        "doctor --hostfile` does so by itself.",
        example="lumina benchmark network --megabytes 256 --out network.json",
    )
    network.add_argument("--megabytes", type=int, default=64, metavar="M", help="of a message, at most (default 64)")
    network.add_argument("--repeats", type=int, default=5, metavar="N", help="of each measurement (default 5)")
    network.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="each takes, at most about (default 1)"
    )
    network.add_argument("--json", action="store_true", help="print the record as one line")
    network.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    network.set_defaults(run=_benchmark_network)
    throughput = subjects.add_parser(
        "throughput",
        help="steps of training: tokens a second, TFLOP/s, memory and time by category",
        description="Time steps of training on packs of noise, with the real model, engine and optimizer, alone or "
        "under any launcher. key=value changes whatever a configuration sets.",
        example="lumina benchmark throughput --model 600m --tokens 4096 --layout zero=1 parallel.recompute=full",
    )
    throughput.add_argument("--model", default="600m", metavar="SIZE", help="600m (default), 3b, 5b or 7b")
    throughput.add_argument("--tokens", type=int, default=4096, metavar="T", help="of a sample (default 4096)")
    throughput.add_argument("--samples", type=int, default=1, metavar="N", help="of a pack (default 1)")
    throughput.add_argument(
        "--packs", type=int, metavar="N", help="of a replica in a step (default 1; 2 for each pipeline stage)"
    )
    throughput.add_argument(
        "--text-tokens", type=int, default=128, metavar="N", help="of a caption (default 128); 0: classes, no captions"
    )
    throughput.add_argument("--layout", default="", metavar="SIZES", help="as tp=2,pp=2,ring=4,ulysses=2,zero=1")
    throughput.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default bf16)")
    throughput.add_argument("--steps", type=int, default=10, metavar="N", help="that are timed (default 10)")
    throughput.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before (default 3)")
    throughput.add_argument(
        "--profile-steps", type=int, default=2, metavar="N", help="whose time is shared out (default 2; 0 for none)"
    )
    throughput.add_argument(
        "--peak", metavar="TFLOPS", help="of a device, or `measured` (default: that of the GPU's data sheet)"
    )
    throughput.add_argument("--trace", metavar="FILE", help="a new file for the trace, which Perfetto opens")
    throughput.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")
    throughput.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as model.n_layers=8")
    throughput.set_defaults(run=_benchmark_throughput)
    for parser_of in (fused, attention):
        tokens = parser_of.get_default("default_tokens")
        parser_of.add_argument("--tokens", nargs="+", type=int, metavar="T", help=f"(default {tokens})")
        parser_of.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default bf16)")
        parser_of.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
        parser_of.add_argument("--out", metavar="FILE", help="a new file for the numbers, as JSON")

    add_doctor(verbs)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from lumina.config.load import load_config

    allowed = [f"train.allow_missing={json.dumps(arguments.allow_missing)}"] if arguments.allow_missing else []
    config = load_config(arguments.config, [*arguments.overrides, *allowed])
    from lumina.train.stop import StopSignals

    with StopSignals() as signals:  # the imports to come take seconds, in which a run may be told to stop already
        from lumina.train.loop import train

        train(config, signals)


def _sample(arguments: argparse.Namespace) -> None:
    from lumina.inference.draw import draw

    draw(arguments)


def _benchmark_kernels(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.kernels import benchmark_kernels

    benchmark_kernels(arguments)


def _benchmark_attention(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.attention import benchmark_attention

    benchmark_attention(arguments)


def _benchmark_throughput(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.throughput import benchmark_throughput

    benchmark_throughput(arguments)


def _benchmark_loader(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.loader import benchmark_loader

    benchmark_loader(arguments)


def _benchmark_network(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.network import benchmark_network

    benchmark_network(arguments)


def _benchmark_checkpoint(arguments: argparse.Namespace) -> None:
    from lumina.benchmark.checkpoint import benchmark_checkpoint

    benchmark_checkpoint(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code, as `config.exits` lists them."""
    given = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed's launcher puts it before all else unless told --no_local_rank; the environment has it already.
    parsed = _parser().parse_args([word for word in given if not re.fullmatch(r"--local[-_]rank=\d+", word)])
    return _guarded(parsed.run, parsed)


def _guarded(verb: Callable[[argparse.Namespace], int | None], parsed: argparse.Namespace) -> int:
    try:
        code = verb(parsed)
    except KeyboardInterrupt:
        print("lumina: interrupted", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - the one place where errors become exit codes
        if parsed.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" rank {rank}:"
        if isinstance(error, ValueError):
            print(f"lumina {parsed.verb}:{where} {_one_line(error)}", file=sys.stderr)
            return EXIT_BAD_INPUT
        kind = "" if isinstance(error, RuntimeError | OSError) else f"{type(error).__name__}: "
        hint = "" if parsed.debug else " (--debug shows where)"
        print(f"lumina {parsed.verb}:{where} {kind}{_one_line(error)}{hint}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE if code is None else code


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
