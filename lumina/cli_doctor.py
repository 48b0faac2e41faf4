"""`lumina doctor`. Torch is imported where hosts are looked at."""

import argparse


def add_doctor(verbs: argparse._SubParsersAction) -> None:
    """Add `doctor`."""
    from lumina.cli_launch import add_hosts

    doctor = verbs.add_parser(
        "doctor",
        help="look over this host, or all hosts of a run, before it is started",
        description="Say what is installed, which devices there are, what each operation runs on, and what is wrong, "
        "with its mend: of this host, or with --hostfile of every host of a run, and of the network between them. With "
        "CONFIG also whether that run can start: layout, memory, shards, checkpoint. The exit code is 1 where "
        "something fails.",
        example="lumina doctor\n  lumina doctor --hostfile hosts.txt configs/7b.yaml parallel.tensor=8",
    )
    add_hosts(doctor)
    doctor.add_argument("--port", type=int, metavar="P", help="of rank 0, to be free (default 29500, torchrun's)")
    doctor.add_argument("--no-bandwidth", action="store_true", help="start no ranks that measure the network")
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.add_argument("--on-host", metavar="JSON", help=argparse.SUPPRESS)  # how another doctor asks
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of a run")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int | None:
    from pathlib import Path

    if arguments.on_host is not None:
        from lumina.doctor.on_host import answer

        answer(arguments.on_host)
        return None
    if arguments.port is not None and not 1 <= arguments.port <= 65_535:
        raise ValueError(f"--port {arguments.port}: ports are from 1 to 65535")
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, not {arguments.ranks}")
    if arguments.config is not None and not Path(arguments.config).is_file():
        raise ValueError(f"{arguments.config}: no such configuration file")
    from lumina.cli_launch import environment_of_ranks, named_hosts
    from lumina.doctor.examine import Asked, examine

    hosts, launcher = named_hosts(arguments) or (None, "")
    return examine(
        Asked(
            config=arguments.config,
            overrides=tuple(arguments.overrides),
            hosts=hosts,
            launcher=launcher,
            ranks=arguments.ranks if hosts is None else None,
            port=29_500 if arguments.port is None else arguments.port,
            asked_port=arguments.port is not None,
            bandwidth=not arguments.no_bandwidth,
            as_json=arguments.json,
            environment=environment_of_ranks(),
        )
    )
