"""`lumina launch`. Torch is imported in the ranks alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_launch(verbs: argparse._SubParsersAction) -> None:
    """Add `launch`."""
    launch = verbs.add_parser(
        "launch",
        help="train on several processes and hosts, and start them again when one dies",
        description="Start the ranks of `lumina train CONFIG key=value …`, each with its output in RUN/logs: N on this "
        "host, those of a hostfile, or those of the Slurm job that this runs in. When a rank or a host dies, or the "
        "watchdog ends a run that hangs, all are started again from the newest checkpoint, on the hosts that are left "
        "where the layout lets them, and on all when they are back. Ctrl-C and SIGTERM save and end the run.",
        example="lumina launch --ranks 8 configs/600m.yaml parallel.tensor=2\n"
        "  lumina launch --hostfile hosts.txt configs/7b.yaml parallel.tensor=8",
    )
    add_hosts(launch)
    launch.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="a variable that every rank is to have; repeatable"
    )
    launch.add_argument("--max-restarts", type=int, default=100, metavar="R", help="(default 100)")
    launch.add_argument("config", metavar="CONFIG", help="YAML file")
    launch.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's")
    launch.set_defaults(run=_launch)


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which hosts, and how they are reached."""
    where = parser.add_argument_group("where")
    where.add_argument("--ranks", type=int, metavar="N", help="processes of this host, one for each GPU")
    where.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts, a line each: NAME slots=N")
    where.add_argument("--nodes", type=int, metavar="N", help="the first N hosts of the hostfile")
    where.add_argument("--include", metavar="HOSTS", help="these alone, as a@b:0,2 for host a and slots 0 and 2 of b")
    where.add_argument("--exclude", metavar="HOSTS", help="all but these")
    where.add_argument(
        "--launcher",
        choices=("auto", "pdsh", "ssh", "openmpi", "slurm"),
        default="auto",
        help="how hosts are reached (default auto: pdsh if it is installed, else ssh); slurm needs no hostfile",
    )


def _launch(arguments: argparse.Namespace) -> int:
    from lumina.config.load import load_config
    from lumina.launch.supervisor import Supervisor

    if sys.platform != "linux":
        raise RuntimeError("lumina launch runs on Linux; elsewhere use torchrun … -m lumina train")
    for name, value, least in (("--ranks", arguments.ranks, 1), ("--max-restarts", arguments.max_restarts, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    config = load_config(arguments.config, arguments.overrides)  # what is wrong with it is said once, here
    train = ["-m", "lumina", "train", arguments.config, *arguments.overrides]
    if arguments.debug:
        train.append("--debug")
    replica = config.parallel.tensor * config.parallel.pipeline * config.parallel.ring * config.parallel.ulysses
    packs, at_once = config.train.global_batch_packs, config.train.packs_per_forward

    def fits(world: int) -> bool:
        return world % replica == 0 and packs % (world // replica * at_once) == 0

    environment = environment_of_ranks(arguments.env)
    hosts = hosts_of(arguments)
    return Supervisor(hosts, train, Path(config.run.dir), arguments.max_restarts, fits, environment).run()


def environment_of_ranks(names: Sequence[str] = ()) -> dict[str, str]:
    """Variables that every rank is to have, on top of its host's: `environment.passed_on` of this process's."""
    import os

    from lumina.launch.environment import passed_on

    return passed_on(os.environ, names, Path.cwd(), Path.home())


def hosts_of(arguments: argparse.Namespace):
    """A `LocalHost`, or a `Fleet` of what `--hostfile` or Slurm gives.

    Raises:
        ValueError: for options that do not go together, and a hostfile that does not read.
    """
    from lumina.launch.hosts import Fleet, LocalHost

    found = named_hosts(arguments)
    if found is not None:
        return Fleet(*found)
    if arguments.ranks is None:
        raise ValueError(
            "--ranks N or --hostfile FILE is missing: say how many processes to start on this host, one for each "
            "GPU, or on which hosts"
        )
    return LocalHost(arguments.ranks)


def named_hosts(arguments: argparse.Namespace):
    """The hosts that `--hostfile` or Slurm gives, those of them that are chosen, and the launcher; or None.

    Raises:
        ValueError: as `hosts_of`.
    """
    from lumina.launch.hostfile import chosen, read_hostfile
    from lumina.launch.transport import choose_launcher, slurm_hosts

    if arguments.hostfile is not None:
        if arguments.ranks is not None:
            raise ValueError("--ranks is for this host alone; with --hostfile the slots of each host are its ranks")
        found = read_hostfile(arguments.hostfile)
    elif arguments.launcher == "slurm":
        found = slurm_hosts(arguments.ranks)
    else:
        for option in ("nodes", "include", "exclude"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} chooses from a hostfile: give --hostfile too")
        if arguments.launcher != "auto":
            raise ValueError(f"--launcher {arguments.launcher} reaches the hosts of a hostfile: give --hostfile too")
        return None
    launcher = choose_launcher(arguments.launcher)
    return chosen(found, arguments.nodes, arguments.include, arguments.exclude), launcher
