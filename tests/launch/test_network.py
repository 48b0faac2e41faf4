"""By which interface a host reaches the others, on hosts with networks of all kinds."""

import json
import socket
import sys

import pytest

from lumina.parallel.network import Way, find_way, set_interfaces

ASK = """
import json, os, sys
from lumina.parallel.network import find_way, set_interfaces
for master, given in json.loads(sys.argv[1]):
    try:
        way = find_way(master, False, given, patience=0.0)
        set_interfaces(way, given)
        print(json.dumps([way.first, way.own, given]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""
BOTH = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}


def asked(cluster, host, *cases):
    """Of each (MASTER_ADDR, environment): address of rank 0, own address, environment then; or what was refused."""
    done = cluster.run(host, [sys.executable, "-c", ASK, json.dumps(cases)])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ip(cluster, host, *arguments):
    done = cluster.run(host, ["ip", *arguments])
    assert done.returncode == 0, done.stderr


@pytest.mark.multinode
def test_the_interface_that_leads_to_rank_0(cluster_of):
    cluster = cluster_of(["a", "b"])
    cases = ("a", {}), ("10.77.0.1", {"GLOO_SOCKET_IFNAME": "other0"}), ("127.0.0.1", {}), ("10.9.9.9", {}), ("x", {})
    on_a, on_b = asked(cluster, "a", *cases), asked(cluster, "b", *cases)
    assert on_a[0] == ["10.77.0.1", "10.77.0.1", BOTH]
    assert on_b[0] == ["10.77.0.1", "10.77.0.2", BOTH]
    assert on_a[1][2] == on_b[1][2] == {"GLOO_SOCKET_IFNAME": "other0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert on_b[2] == ["127.0.0.1", "127.0.0.1", {}]
    assert on_b[3] == (
        "nothing leads from b to the host of rank 0, MASTER_ADDR=10.9.9.9 (Network is unreachable): set MASTER_ADDR to "
        "an address that all hosts reach"
    )
    assert on_a[4].startswith("a knows no host MASTER_ADDR=x (")


@pytest.mark.multinode
def test_a_name_that_is_loopback_at_home(cluster_of):
    """As Debian enters it: only the host itself, that of rank 0, sees its name so."""
    cluster = cluster_of(["a", "b"], own_name="127.0.1.1")
    assert asked(cluster, "b", ("a", {})) == [["10.77.0.1", "10.77.0.2", BOTH]]
    ip(cluster, "a", "link", "add", "idle0", "type", "veth", "peer", "name", "idle1")  # down
    assert asked(cluster, "a", ("a", {}), ("b", {}), ("127.0.1.1", {})) == [
        ["127.0.1.1", "10.77.0.1", BOTH],
        ["10.77.0.2", "10.77.0.1", BOTH],
        ["127.0.1.1", "127.0.0.1", {}],
    ]
    ip(cluster, "a", "address", "add", "10.5.0.1/24", "dev", "idle0")
    assert asked(cluster, "a", ("a", {})) == [["127.0.1.1", "10.77.0.1", BOTH]]
    for end in ("idle0", "idle1"):
        ip(cluster, "a", "link", "set", end, "up")
    unsure, told, address = asked(cluster, "a", ("a", {}), ("a", {"NCCL_SOCKET_IFNAME": "=idle0"}), ("10.77.0.1", {}))
    assert unsure == (
        "a cannot tell by which of its networks other hosts reach it (eth0 with 10.77.0.1, idle0 with 10.5.0.1), for "
        "MASTER_ADDR=a stands for 127.0.0.1 here: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one of them, or "
        "MASTER_ADDR to this host's address there"
    )
    assert told == ["127.0.1.1", "10.5.0.1", {"GLOO_SOCKET_IFNAME": "idle0", "NCCL_SOCKET_IFNAME": "=idle0"}]
    assert address == ["10.77.0.1", "10.77.0.1", BOTH]
    ip(cluster, "a", "route", "add", "default", "via", "10.77.0.2")
    assert asked(cluster, "a", ("a", {})) == [["127.0.1.1", "10.77.0.1", BOTH]]


def test_one_host_stays_as_it_is():
    """Where all ranks are here nothing is set, whatever the host's name stands for."""
    environment = {}
    way = find_way("localhost", False, environment)
    set_interfaces(way, environment)
    assert (way.family, way.own, environment) == (socket.AF_INET, "127.0.0.1", {})
    assert find_way("127.0.1.1", True, environment).own == "127.0.0.1"


def test_what_is_set_is_left_alone():
    environment = {"GLOO_SOCKET_IFNAME": "a", "NCCL_SOCKET_IFNAME": ""}
    set_interfaces(Way(socket.AF_INET, "10.0.0.1", "10.0.0.2", "b"), environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "a", "NCCL_SOCKET_IFNAME": "=b"}
