"""Which hosts, and which devices of each: DeepSpeed's hostfile, and its --include and --exclude."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)(?P<rest>(?:\s+\w+=\S+)*)")
_CHOICE = re.compile(r"(?P<name>[^:]+)(?::(?P<slots>\d+(?:,\d+)*))?")
_KEYS = ("python", "dir")


@dataclass(frozen=True)
class Host:
    """A host as `ssh` or the scheduler knows it.

    slots: numbers of its devices, a rank for each.
    all_slots: whether these are all that the hostfile gives it.
    python, directory: of Lumina there; None: where they are on the host that launches, below the home folder of each.
    """

    name: str
    slots: tuple[int, ...]
    all_slots: bool = True
    python: str | None = None
    directory: str | None = None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of lines such as ``node-1 slots=8``, in their order; ``python=PATH`` and ``dir=PATH`` may follow.

    Raises:
        ValueError: for a file that cannot be read, and a line that says something else, naming it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the hostfile {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        where, found = f"{path}, line {number}", _LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"{where}: {line!r} is not of the form NAME slots=N [python=PATH] [dir=PATH]")
        name, slots = found["name"], int(found["slots"])
        more = dict(item.split("=", 1) for item in found["rest"].split())
        if unknown := [key for key in more if key not in _KEYS]:
            raise ValueError(f"{where}: {unknown[0]}= is none of slots=, python= and dir=")
        if name.startswith("-"):
            raise ValueError(f"{where}: no host is called {name}")
        if name in hosts:
            raise ValueError(f"{where}: {name} is there already; give its slots on one line")
        if slots < 1:
            raise ValueError(f"{where}: slots={slots}: a host has at least 1, or no line")
        hosts[name] = Host(name, tuple(range(slots)), python=more.get("python"), directory=more.get("dir"))
    if not hosts:
        raise ValueError(f"the hostfile {path} names no host; a line is of the form NAME slots=N")
    return list(hosts.values())


def chosen(
    hosts: Sequence[Host], nodes: int | None = None, include: str | None = None, exclude: str | None = None
) -> list[Host]:
    """Those that are to take part, in their order.

    Args:
        nodes: the first so many.
        include, exclude: as DeepSpeed writes them, ``a@b:0,2``: host a, and slots 0 and 2 of b.

    Raises:
        ValueError: for more than one of these, a host or slot that is not there, and if none is left.
    """
    if sum(choice is not None for choice in (nodes, include, exclude)) > 1:
        raise ValueError("--nodes, --include and --exclude each choose hosts: give one of them")
    if nodes is not None:
        if not 1 <= nodes <= len(hosts):
            raise ValueError(f"--nodes {nodes}: the hostfile has {len(hosts)}")
        return list(hosts[:nodes])
    if include is not None:
        named = _named(include, "--include", hosts)
        return [_with(host, named[host.name]) for host in hosts if host.name in named]
    if exclude is not None:
        named = _named(exclude, "--exclude", hosts)
        left = [_with(host, set(host.slots) - named.get(host.name, set())) for host in hosts]
        if not (left := [host for host in left if host.slots]):
            raise ValueError(f"--exclude {exclude} leaves no host")
        return left
    return list(hosts)


def _named(text: str, option: str, hosts: Sequence[Host]) -> dict[str, set[int]]:
    slots_of, named = {host.name: set(host.slots) for host in hosts}, {}
    for item in text.split("@"):
        found = _CHOICE.fullmatch(item)
        if found is None:
            raise ValueError(f"{option} {text}: {item!r} is not of the form NAME or NAME:SLOT,SLOT")
        name = found["name"]
        if name not in slots_of:
            raise ValueError(f"{option} {text}: the hostfile has no host {name}, but {', '.join(slots_of)}")
        slots = {int(slot) for slot in found["slots"].split(",")} if found["slots"] else slots_of[name]
        if beyond := slots - slots_of[name]:
            raise ValueError(f"{option} {text}: {name} has no slot {min(beyond)}, but {len(slots_of[name])} from 0 on")
        named[name] = named.get(name, set()) | slots
    return named


def _with(host: Host, slots: Iterable[int]) -> Host:
    kept = tuple(sorted(slots))
    return replace(host, slots=kept, all_slots=kept == host.slots)


def largest_fitting(hosts: Sequence[Host], fits: Callable[[int], bool]) -> list[Host]:
    """The first of these hosts, as many as a run fits on, by its number of ranks; empty where it fits on none."""
    for count in range(len(hosts), 0, -1):
        if fits(sum(len(host.slots) for host in hosts[:count])):
            return list(hosts[:count])
    return []
