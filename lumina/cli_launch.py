"""`lumina launch`. Torch is imported in the ranks alone."""

import argparse
import sys
from pathlib import Path


def add_launch(verbs: argparse._SubParsersAction) -> None:
    """Add `launch`."""
    launch = verbs.add_parser(
        "launch",
        help="train on several processes of this host, and start them again when one dies",
        description="Start N ranks of `lumina train CONFIG key=value …` on this host, each with its output in "
        "RUN/logs. When a rank dies, or the watchdog ends a run that hangs, all are started again from the newest "
        "checkpoint. Ctrl-C and SIGTERM save and end the run.",
        example="lumina launch --ranks 8 configs/600m.yaml parallel.tensor=2",
    )
    launch.add_argument("--ranks", type=int, metavar="N", help="processes, one for each GPU")
    launch.add_argument("--max-restarts", type=int, default=100, metavar="R", help="(default 100)")
    launch.add_argument("--hostfile", help=argparse.SUPPRESS)
    launch.add_argument("config", metavar="CONFIG", help="YAML file")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    launch.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    from lumina.config.load import load_config
    from lumina.launch.supervisor import Supervisor

    if arguments.hostfile is not None:
        raise ValueError(
            "--hostfile: lumina launch starts the ranks of this host alone; on several hosts use "
            f"deepspeed --hostfile {arguments.hostfile} --module --no_local_rank lumina train {arguments.config}"
        )
    if arguments.ranks is None:
        raise ValueError("--ranks N is missing: say how many processes to start, one for each GPU")
    for name, value, least in (("--ranks", arguments.ranks, 1), ("--max-restarts", arguments.max_restarts, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    config = load_config(arguments.config, arguments.overrides)  # what is wrong with it is said once, here
    train = [sys.executable, "-m", "lumina", "train", arguments.config, *arguments.overrides]
    if arguments.debug:
        train.append("--debug")
    return Supervisor(arguments.ranks, train, Path(config.run.dir), arguments.max_restarts).run()
