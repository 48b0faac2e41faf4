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

from lumina.cli_benchmark import add_benchmark
from lumina.cli_convert import add_convert
from lumina.cli_data import add_data
from lumina.cli_doctor import add_doctor
from lumina.cli_launch import add_launch
from lumina.cli_plan import add_plan
from lumina.cli_sampling import add_composition, add_memory, add_sampling, add_sizes
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
        "MODEL is a run, a checkpoint, an inference folder or a public Lumina-T2I folder. Started by torchrun, "
        "deepspeed or srun, each process draws its share.",
        example='lumina sample runs/digits --prompt "a handwritten digit seven" --count 8 --height 8 --width 8 '
        "--out samples",
    )
    sample.add_argument("model", metavar="MODEL")
    sample.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="one or several prompts")
    sample.add_argument("--prompts-file", metavar="F", help="a file with a prompt on each line")
    sample.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    sample.add_argument("--count", type=int, default=1, metavar="N", help="samples of each prompt (default 1)")
    sample.add_argument("--steps", type=int, help="of the solver (default 50); the adaptive solvers take none")
    sample.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance (default 4; 1 is none)")
    sample.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    sample.add_argument("--solver", default="euler", help="euler (default), midpoint, heun, rk4, dopri5, dopri8, …")
    add_sizes(sample)
    add_sampling(sample)
    add_composition(sample)
    add_memory(sample)
    sample.add_argument("--seed", type=int, default=0, help="of the first sample; the next have the next (default 0)")
    sample.add_argument(
        "--batch-size", type=int, metavar="N", help="samples drawn at once (default 16, or fewer that all ranks draw)"
    )
    sample.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged (default) or last weights")
    sample.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    sample.add_argument("--text-encoder", metavar="NAME", help="for a public folder, which does not name its own")
    sample.add_argument("--vae", metavar="NAME", help="in place of the autoencoder that the folder names")
    sample.add_argument("--lora", metavar="DIR", help="an adapter in peft's format, merged into the model")
    sample.add_argument("--lora-scale", type=float, metavar="S", help="times what it adds (default 1)")
    sample.set_defaults(run=_sample)

    add_convert(verbs)
    add_data(verbs, _Parser)
    add_benchmark(verbs, _Parser)
    add_plan(verbs)
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


def _sample(arguments: argparse.Namespace) -> int | None:
    from lumina.inference.draw import draw

    return draw(arguments)


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
