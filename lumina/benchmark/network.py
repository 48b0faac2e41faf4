"""`lumina benchmark network`: all-reduce within hosts and over all, and messages between every two hosts.

Started as training is, by `lumina launch`'s hosts, torchrun, deepspeed, srun or mpirun: every rank runs it.
"""

import argparse
import dataclasses
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lumina.benchmark import record
from lumina.config.schema import ParallelConfig
from lumina.parallel.bandwidth import Exchange, Timing, backend_of, group_of
from lumina.parallel.mesh import Mesh, close_mesh, open_mesh

SLOW_SHARE = 0.5
_QUARTILE = 0.75
_ROWS_SHOWN = 20
_SECOND_LOOKS = 64
ALL_REDUCE, WITHIN, LINK = "all-reduce", "all-reduce within a host", "link"


@dataclass(frozen=True)
class Row:
    """A measurement.

    what: ALL_REDUCE, WITHIN or LINK.
    ranks: that took part; of a link the one that sent, and the one that received.
    hosts: of these ranks, by name, each once.
    bytes, seconds: of one message, or of the tensor that is reduced.
    bandwidth: bytes/s; of an all-reduce over n ranks the bytes times 2(n-1)/n, which every rank moves.
    latency: seconds, of a link.
    """

    what: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    bytes: int
    seconds: float
    bandwidth: float
    latency: float = 0.0


def benchmark_network(arguments: argparse.Namespace) -> None:
    """The verb: rank 0 prints a table, or the record as one line of JSON, and writes it to `--out`."""
    for name, value in (("--megabytes", arguments.megabytes), ("--repeats", arguments.repeats)):
        if value < 1:
            raise ValueError(f"{name} {value}: it is at least 1")
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds {arguments.seconds:g}: it is more than 0")
    mesh = open_mesh(ParallelConfig())
    try:
        if mesh.world.size == 1:
            raise ValueError(
                "a network takes several ranks: start it with torchrun, deepspeed or srun, as `torchrun "
                "--nproc-per-node 2 -m lumina benchmark network`"
            )
        wrong = _checked(arguments.out) if mesh.is_first else None
        if wrong := mesh.from_first(wrong):
            raise ValueError(wrong)
        rows = measure(mesh, arguments.megabytes * 10**6, arguments.repeats, arguments.seconds)
        if mesh.is_first:
            _show(arguments, mesh, rows)
    finally:
        close_mesh(mesh)


def _checked(out: str | None) -> str | None:
    """What is wrong with the place for results."""
    try:
        record.check_writable(out)
    except ValueError as error:
        return str(error)
    return None


def _show(arguments: argparse.Namespace, mesh: Mesh, rows: list[Row]) -> None:
    facts = record.surroundings(mesh.device) | {"backend": backend_of(), "ranks": mesh.world.size}
    content = facts | {"rows": [dataclasses.asdict(row) for row in rows]}
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(content), flush=True)
        return
    print(record.heading(facts))
    print(table_of(rows))
    print("\n" + verdict(rows), flush=True)


def measure(mesh: Mesh, largest: int, repeats: int, seconds: float) -> list[Row]:
    """Of all ranks; on the first, elsewhere empty.

    Args:
        largest: bytes of a message or a reduced tensor, at most.
        seconds: about what each measurement takes at most.
    """
    exchange = Exchange(mesh, largest, repeats, seconds)
    places = mesh.from_first(mesh.gather(_place()))
    hosts = _hosts(places)
    names = [places[ranks[0]][0] for ranks in hosts]
    host_of = {rank: number for number, ranks in enumerate(hosts) for rank in ranks}
    mine = host_of[mesh.world.rank]
    group, rows = group_of(mesh, hosts), []
    mesh.barrier()
    if len(hosts[mine]) > 1:
        found = exchange.all_reduce(group)
        if mesh.world.rank == hosts[mine][0]:
            rows.append(_reduced(WITHIN, hosts[mine], [names[mine]], found))
    mesh.barrier()
    if len(hosts) > 1:
        found = exchange.all_reduce()
        if mesh.is_first:
            rows.append(_reduced(ALL_REDUCE, range(mesh.world.size), names, found))

    def play(pairs: Sequence[tuple[int, int]]) -> None:
        mesh.barrier()
        for first, second in pairs:
            ranks = hosts[first][0], hosts[second][0]
            if mesh.world.rank in ranks:
                leads = mesh.world.rank == ranks[0]
                other = ranks[1] if leads else ranks[0]
                found = exchange.with_peer(other, leads)
                told = (names[mine], names[host_of[other]])
                bandwidth = found.bytes / found.seconds
                ends = (mesh.world.rank, other)
                rows.append(Row(LINK, ends, told, found.bytes, found.seconds, bandwidth, found.latency))

    for pairs in rounds(len(hosts)):
        play(pairs)
    slow = mesh.from_first(slow_links(_best(mesh.gather(rows) or [])))[:_SECOND_LOOKS]
    # A second time by themselves: something else may have been under way.
    for pair in dict.fromkeys(tuple(sorted(host_of[rank] for rank in row.ranks)) for row in slow):
        play([pair])
    return _best(mesh.gather(rows) or [])


def _place() -> tuple[str, int]:
    """The host's name, and by which network of it: containers of one name are told apart."""
    network = Path("/proc/self/ns/net")
    return socket.gethostname(), network.stat().st_ino if network.exists() else 0


def _hosts(places: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Ranks of each host, by the first of them."""
    found: dict[tuple[str, int], list[int]] = {}
    for rank, place in enumerate(places):
        found.setdefault(tuple(place), []).append(rank)
    return list(found.values())


def _best(of_ranks: Sequence[Sequence[Row]]) -> list[Row]:
    """Of what was measured twice the faster one."""
    rows = sorted((row for rows in of_ranks for row in rows), key=lambda row: row.bandwidth)
    found = {(row.what, row.ranks): row for row in rows}
    return [found[key] for key in sorted(found)]


def _reduced(what: str, ranks: Sequence[int], hosts: Sequence[str], found: Timing) -> Row:
    moved = found.bytes * 2 * (len(ranks) - 1) / len(ranks)
    return Row(what, tuple(ranks), tuple(hosts), found.bytes, found.seconds, moved / found.seconds)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every two of `count` once, in as few rounds as can be; nobody twice in one (the circle method of tournaments)."""
    seats = list(range(count + count % 2))  # one who meets the empty seat has a rest
    played = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        played.append([tuple(sorted(pair)) for pair in pairs if max(pair) < count])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return played


def reference(rows: Sequence[Row]) -> float:
    """Bandwidth of a link that is as it should be: that of the upper quartile.

    With three hosts of which one is slow, four of six links are: their median would be the fault itself.
    """
    links = sorted(row.bandwidth for row in rows if row.what == LINK)
    return links[ceil(_QUARTILE * len(links)) - 1] if links else 0.0


def slow_links(rows: Sequence[Row]) -> list[Row]:
    """Those below half of what is usual between these hosts, the slowest first."""
    usual = reference(rows)
    slow = [row for row in rows if row.what == LINK and row.bandwidth < SLOW_SHARE * usual]
    return sorted(slow, key=lambda row: row.bandwidth)


def verdict(rows: Sequence[Row]) -> str:
    """The slowest link, and which are slow."""
    links = [row for row in rows if row.what == LINK]
    if not links:
        return "one host: nothing was measured between hosts"
    slowest = min(links, key=lambda row: row.bandwidth)
    said = f"slowest link: {' → '.join(slowest.hosts)}, {rate(slowest.bandwidth)} (usual: {rate(reference(rows))})"
    slow = [" → ".join(row.hosts) for row in slow_links(rows)]
    return f"{said}; below half of the usual: {', '.join(slow) or 'none'}"


def rate(bandwidth: float) -> str:
    """In words."""
    return f"{bandwidth / 1e9:.2f} GB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.2f} MB/s"


def table_of(rows: Sequence[Row]) -> str:
    """Markdown; of the links the slowest."""
    links = sorted((row for row in rows if row.what == LINK), key=lambda row: row.bandwidth)
    shown = [row for row in rows if row.what != LINK] + links[:_ROWS_SHOWN]
    lines: list[Sequence[Any]] = []
    for row in shown:
        where = " → ".join(row.hosts) if row.what == LINK else _short(row.hosts)
        latency = f"{row.latency * 1e6:.0f}" if row.what == LINK else ""
        lines.append(
            (row.what, where, f"{row.bytes / 1e6:.1f}", f"{row.seconds * 1e3:.2f}", rate(row.bandwidth), latency)
        )
    table = record.table(("what", "where", "MB", "ms", "bandwidth", "latency, µs"), lines)
    left = len(links) - _ROWS_SHOWN
    return table + (f"\n\nand {left} faster links" if left > 0 else "")


def _short(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:4]) + (f" … ({len(hosts)} hosts)" if len(hosts) > 4 else "")
