"""How fast the ranks of a run will exchange what they have to, measured by as many ranks on the same hosts."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from lumina.benchmark.network import ALL_REDUCE, LINK, WITHIN, Row, rate, reference, slow_links
from lumina.config.files import PROBE
from lumina.doctor.check import FAIL, OK, WARNING, Check, listed
from lumina.launch.hostfile import Host
from lumina.launch.hosts import Fleet, LocalHost
from lumina.launch.once import run_once

LIMIT_SECONDS = 300
_MEGABYTES, _REPEATS, _SECONDS = 64, 3, 0.5
_CUT_SHARE = 0.1  # of what is usual: such a link holds up any run
_MEND_LINK = (
    "look at cable, port and negotiated speed (ethtool, ibstat), and which interface is used (NCCL_SOCKET_IFNAME, "
    "GLOO_SOCKET_IFNAME); leave the host out with --exclude until then"
)
_MEND_FAILED = (
    "let TCP connections through between the hosts on all ports, and name the interface that joins them with "
    "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; --no-bandwidth leaves this out"
)


def check_network(hosts: LocalHost | Fleet, environment: Mapping[str, str]) -> Iterator[Check]:
    """Bandwidth within the hosts and between them; `hosts` are opened and closed here."""
    wanted = {"megabytes": _MEGABYTES, "repeats": _REPEATS, "seconds": _SECONDS}
    options = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
    folder = PurePosixPath("/tmp") / f"{PROBE.lstrip('.')}{secrets.token_hex(8)}"
    arguments = ["-m", "lumina", "benchmark", "network", "--json", *options]
    try:
        outcome = run_once(hosts, arguments, folder, LIMIT_SECONDS, environment)
    except RuntimeError as error:
        yield Check("network", FAIL, str(error), _MEND_FAILED)
        return
    rows = next((found for line in outcome.lines if (found := _rows(line)) is not None), None)
    if rows is None:
        said = outcome.why or (f'it said: "{outcome.lines[-1]}"' if outcome.lines else "no results")
        yield Check("network", FAIL, f"ranks cannot work together: {said}", _MEND_FAILED)
        return
    yield from judge(rows, hosts.all)


def _rows(line: str) -> list[Row] | None:
    if not line.startswith("{"):
        return None
    try:
        fields = json.loads(line)["rows"]
    except (ValueError, KeyError):
        return None
    return [Row(**(row | {"ranks": tuple(row["ranks"]), "hosts": tuple(row["hosts"])})) for row in fields]


def judge(rows: Sequence[Row], hosts: Sequence[Host]) -> Iterator[Check]:
    """What was measured, by the hosts' names in the hostfile."""
    name_of: dict[int, str] = {}
    for host in hosts:
        name_of |= {len(name_of) + slot: host.name for slot in range(len(host.slots))}
    within = [row for row in rows if row.what == WITHIN]
    if within:
        slowest = min(within, key=lambda row: row.bandwidth)
        where = f", the slowest on {name_of[slowest.ranks[0]]}" if len(within) > 1 else ""
        yield Check("all-reduce", OK, f"within a host {rate(slowest.bandwidth)}{where}")
    for row in rows:
        if row.what == ALL_REDUCE:
            yield Check("all-reduce", OK, f"over {len(row.ranks)} ranks {rate(row.bandwidth)}")
    links = sorted((row for row in rows if row.what == LINK), key=lambda row: row.bandwidth)
    if not links:
        return
    usual, slow = reference(rows), slow_links(rows)
    told = [f"{_pair(row, name_of)} {rate(row.bandwidth)}" for row in slow]
    slowest = f"slowest pair {_pair(links[0], name_of)}: {rate(links[0].bandwidth)}"
    latency = max(links, key=lambda row: row.latency)
    if not slow:
        longest = f"longest latency {latency.latency * 1e6:.0f} µs ({_pair(latency, name_of)})"
        yield Check("links", OK, f"{slowest}; usual {rate(usual)}; {longest}")
        return
    cut = slow[0].bandwidth < _CUT_SHARE * usual
    finding = f"{slowest}; slow, with {rate(usual)} usual: {listed(told)}"
    common = set.intersection(*({name_of[rank] for rank in row.ranks} for row in slow))
    if len(slow) > 1 and common:
        finding += f"; {listed(sorted(common))} is in all of them"
    yield Check("links", FAIL if cut else WARNING, finding, _MEND_LINK)


def _pair(row: Row, name_of: Mapping[int, str]) -> str:
    return " → ".join(name_of[rank] for rank in row.ranks)
