"""By which network this host reaches the others: found by the route to rank 0, for gloo, NCCL and the watchdog.

Left to itself gloo takes the address that the host's own name stands for, on many systems 127.0.1.1, and NCCL may take
a bridge of containers: ranks on other hosts then connect to themselves, and hang.
"""

import ipaddress
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PATIENCE_SECONDS = 60.0  # a scheduler may enter the name of rank 0's host only when that is up
_ELSEWHERE = {socket.AF_INET: "203.0.113.1", socket.AF_INET6: "2001:db8::1"}  # of documents, and nobody's
_PORT = 9  # any: nothing is sent


@dataclass(frozen=True)
class Way:
    """Between this host and that of rank 0.

    first: the address of rank 0's host as this host knows it.
    own: the address of this host as others reach it; loopback where all ranks are here.
    interface: that has `own`.
    """

    family: socket.AddressFamily
    first: str
    own: str
    interface: str | None


def find_way(master: str, one_host: bool, given: Mapping[str, str], patience: float = _PATIENCE_SECONDS) -> Way:
    """
    Args:
        master: name or address of rank 0's host.
        one_host: whether all ranks are known to be here.
        given: the environment; an interface named in it is not doubted.
        patience: seconds to wait for the name to be known.

    Raises:
        ValueError: where the name stays unknown, nothing leads to it, or the host's own name hides which of several
            networks it is.
    """
    family, first = _resolve(master, patience)
    try:
        own = _source(family, first)
    except OSError as error:
        raise ValueError(
            f"nothing leads from {socket.gethostname()} to the host of rank 0, MASTER_ADDR={master} "
            f"({error.strerror}): set MASTER_ADDR to an address that all hosts reach"
        ) from error
    if one_host or not _is_loopback(own) or master == "localhost" or _is_loopback(master):
        return Way(family, first, own, _interface_of(own))
    # A host's own name, which on that host stands for loopback.
    interface, own = _outward(family, master, own, given)
    return Way(family, first, own, interface)


def set_interfaces(way: Way, environment: dict[str, str] | os._Environ) -> None:
    """Have gloo and NCCL take the interface of `way`, where nobody has said which to take."""
    if way.interface is None or _is_loopback(way.own):
        return
    for name in VARIABLES:
        if not environment.get(name):
            # NCCL takes a bare name for the beginning of one.
            environment[name] = f"={way.interface}" if name.startswith("NCCL") else way.interface


def _resolve(master: str, patience: float) -> tuple[socket.AddressFamily, str]:
    deadline = time.monotonic() + patience
    while True:
        try:
            found = socket.getaddrinfo(master, _PORT, type=socket.SOCK_DGRAM)
            break
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{socket.gethostname()} knows no host MASTER_ADDR={master} ({error.strerror}): set it to a name "
                    "or address of rank 0's host that all hosts know"
                ) from error
            time.sleep(min(1.0, patience))
    family, _, _, _, address = next((one for one in found if one[0] == socket.AF_INET), found[0])
    return family, address[0]


def _source(family: socket.AddressFamily, target: str) -> str:
    """The address from which packets to another leave: nothing is sent, the system only chooses a route."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, _PORT))
        return probe.getsockname()[0]


def _outward(
    family: socket.AddressFamily, master: str, loopback: str, given: Mapping[str, str]
) -> tuple[str | None, str]:
    """Interface and address of the network to others: the one that is given, that of the default route, the only one.

    Where there is none all ranks are here.
    """
    ours = [(interface, address) for interface, address in _addresses(family) if not _is_loopback(address)]
    for variable in VARIABLES:
        named = given.get(variable, "").removeprefix("=").split(",")[0]
        if found := [one for one in ours if one[0] == named]:
            return found[0]
    try:
        default = _source(family, _ELSEWHERE[family])
        return _interface_of(default), default
    except OSError:  # no default route
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        ours = [one for one in ours if one[0] in up]
    if len({interface for interface, _ in ours}) > 1:
        told = ", ".join(f"{interface} with {address}" for interface, address in ours)
        raise ValueError(
            f"{socket.gethostname()} cannot tell by which of its networks other hosts reach it ({told}), for "
            f"MASTER_ADDR={master} stands for {loopback} here: set {' and '.join(VARIABLES)} to one of them, or "
            "MASTER_ADDR to this host's address there"
        )
    return ours[0] if ours else (None, loopback)


def _interface_of(address: str) -> str | None:
    families = (socket.AF_INET, socket.AF_INET6)
    return next((name for family in families for name, own in _addresses(family) if own == address), None)


def _addresses(family: socket.AddressFamily) -> list[tuple[str, str]]:
    """(interface, address), those of IPv6 without the scope that is part of some."""
    return [
        (interface, entry.address.split("%")[0])
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == family
    ]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:  # a name
        return False
