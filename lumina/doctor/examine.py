"""`lumina doctor`: one table for this host, or for all hosts of a run."""

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lumina.config.exits import DONE, FAILED
from lumina.doctor.check import FAIL, OK, Check, as_table, folded, worst
from lumina.doctor.on_host import TOKEN, Request, checks_of, examine_host
from lumina.launch.hostfile import Host

_TOKEN_SECONDS = 40.0


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    hosts: those of a hostfile or a scheduler, and `launcher` how they are reached; None: this one alone.
    ranks: of this host, or None.
    environment: that ranks are to have.
    """

    config: str | None
    overrides: tuple[str, ...]
    hosts: Sequence[Host] | None
    launcher: str
    ranks: int | None
    port: int
    asked_port: bool
    bandwidth: bool
    as_json: bool
    environment: Mapping[str, str]


def examine(asked: Asked) -> int:
    """The verb; the exit code."""
    content, checks, hosts = _one_host(asked) if asked.hosts is None else _many_hosts(asked, asked.hosts)
    state = worst(checks)
    if asked.as_json:
        print(json.dumps(content | {"state": state, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _show(content, folded(checks, hosts), one=asked.hosts is None)
    return FAILED if state == FAIL else DONE


def _one_host(asked: Asked) -> tuple[dict[str, Any], list[Check], list[str]]:
    found, checks = examine_host(
        Request(
            slots=None if asked.ranks is None else tuple(range(asked.ranks)),
            world=asked.ranks,
            port=asked.port,
            asked_port=asked.asked_port,
            config=asked.config,
            overrides=asked.overrides,
        )
    )
    gpus = [device for device in found["devices"] if "CUDA" in device]
    ranks = min(len(gpus), asked.ranks or len(gpus))
    if asked.bandwidth and ranks > 1:
        from lumina.doctor.network import check_network
        from lumina.launch.hosts import LocalHost

        checks += check_network(LocalHost(ranks), asked.environment)
    return found, checks, [""]


def _many_hosts(asked: Asked, hosts: Sequence[Host]) -> tuple[dict[str, Any], list[Check], list[str]]:
    from lumina.doctor.fleet import ask, check_clocks, check_reached, check_same

    names = [host.name for host in hosts]
    _tell(f"looking at {len(hosts)} host{'s' * (len(hosts) > 1)} …")
    token = _leave_token(asked, hosts[0])
    world = sum(len(host.slots) for host in hosts)
    request = Request(
        world=world, asked_port=asked.asked_port, config=asked.config, overrides=asked.overrides, token=token
    )
    requests = {
        host.name: replace(request, slots=host.slots, port=asked.port if number == 0 else None).encode()
        for number, host in enumerate(hosts)
    }
    try:
        answers = ask(hosts, asked.launcher, requests)
    finally:
        if token is not None:
            ask(hosts[:1], asked.launcher, {names[0]: json.dumps({"remove": token})}, _TOKEN_SECONDS)
    checks = [*check_reached(answers), *check_same(answers), *check_clocks(answers)]
    reached = [host for host in hosts if answers[host.name].found is not None]
    for host in reached:
        of_host = checks_of(answers[host.name].found, host.name)
        checks += [check for check in of_host if (check.name, check.state) != ("clock", OK)]  # compared above
    if asked.bandwidth and sum(len(host.slots) for host in reached) > 1:
        from lumina.doctor.network import check_network
        from lumina.launch.hosts import Fleet

        _tell(f"measuring between {sum(len(host.slots) for host in reached)} ranks …")
        checks += check_network(Fleet(reached, asked.launcher), asked.environment)
    content = {"hosts": {name: answer.found for name, answer in answers.items()}, "from": socket.gethostname()}
    for found in content["hosts"].values():
        if found is not None:
            found.pop("checks")
    return content, checks, [host.name for host in reached]


def _leave_token(asked: Asked, first: Host) -> str | None:
    """A file by which the other hosts tell whether they have the same folder; None where there is no run."""
    from lumina.config.load import load_config
    from lumina.doctor.fleet import ask

    if asked.config is None:
        return None
    try:
        run_dir = load_config(asked.config, asked.overrides).run.dir
    except ValueError:  # which every host is going to say
        return None
    answer = ask([first], asked.launcher, {first.name: json.dumps({"leave": run_dir})}, _TOKEN_SECONDS)[first.name]
    return answer.said.get(TOKEN)


def _tell(text: str) -> None:
    print(f"lumina doctor: {text}", file=sys.stderr, flush=True)


def _show(content: dict[str, Any], checks: Sequence[Check], one: bool) -> None:
    if not one:
        print(as_table(checks))
        return
    from lumina.benchmark import record

    print(f"lumina {content['lumina']} on {content['host']}\n")
    print(as_table(checks))
    for number, device in enumerate(content["devices"]):
        print(f"\ndevice {number}: {device}", end="")
    absent = [name for name, there in content["optional"].items() if not there]
    print(f"\nnot installed, and not needed: {', '.join(absent)}" if absent else "", end="\n\n")
    kernels = content["kernels"]
    rows = [(name, *(of[name] for of in kernels.values())) for name in next(iter(kernels.values()))]
    print(record.table(["operation", *kernels], rows))
