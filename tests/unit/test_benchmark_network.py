"""`lumina benchmark network`: everybody meets everybody, numbers are those of the messages, slow links are named."""

import itertools

import pytest

from lumina.benchmark import network
from lumina.benchmark.network import ALL_REDUCE, LINK, WITHIN, Row, reference, rounds, slow_links, verdict
from lumina.cli import main
from lumina.doctor.check import FAIL, OK, WARNING
from lumina.doctor.network import judge
from lumina.launch.hostfile import Host
from tests.parallel.workers import run_ranks


@pytest.mark.parametrize("count", range(1, 10))
def test_everybody_meets_everybody_once(count):
    played = rounds(count)
    pairs = list(itertools.chain(*played))
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    assert len(played) == (count - 1 if count % 2 == 0 else count)  # the fewest in which that is possible
    for one in played:
        busy = list(itertools.chain(*one))
        assert len(busy) == len(set(busy))


def links(hosts, slow, factor=0.2):
    """All links between hosts, 1 GB/s but for those of `slow`."""
    return [
        Row(LINK, (a, b), (f"h{a}", f"h{b}"), 10**6, 1e-3, 1e9 * (factor if (a, b) in slow else 1), 1e-5 * (a + 1))
        for a, b in itertools.permutations(range(hosts), 2)
    ]


@pytest.mark.parametrize(
    ("hosts", "slow"),
    [
        (2, {(0, 1)}),
        (3, {(2, 0), (2, 1), (0, 2), (1, 2)}),  # more links than not
        (3, {(0, 1)}),
        (8, {(3, other) for other in range(8) if other != 3}),
        (8, set()),
    ],
)
def test_slow_links_are_told_from_the_others(hosts, slow):
    rows = links(hosts, slow)
    assert reference(rows) == 1e9
    assert {row.ranks for row in slow_links(rows)} == slow
    assert verdict(rows).endswith(": none") == (not slow)
    assert slow_links(links(hosts, slow, factor=0.51)) == []


def test_the_doctor_names_hosts_as_the_hostfile_does():
    hosts = [Host("x", (0, 1)), Host("y", (0, 1)), Host("z", (0,))]
    rows = [
        Row(LINK, ranks, ("one-name", "one-name"), 10**6, 1e-3, bandwidth, 1e-5)
        for ranks, bandwidth in {(0, 2): 1e9, (2, 0): 1e9, (0, 4): 4e8, (4, 0): 1e9, (2, 4): 1e9, (4, 2): 1e9}.items()
    ]
    rows += [Row(WITHIN, (0, 1), ("one-name",), 10**6, 1e-3, 2e9), Row(WITHIN, (2, 3), ("one-name",), 10**6, 1e-3, 1e9)]
    within, found = judge(rows, hosts)
    assert (within.state, within.finding) == (OK, "within a host 1.00 GB/s, the slowest on y")
    assert (found.state, found.finding) == (
        WARNING,
        "slowest pair x → z: 0.40 GB/s; slow, with 1.00 GB/s usual: x → z 0.40 GB/s",
    )
    assert "--exclude" in found.mend
    cut = [Row(LINK, (0, 4), ("", ""), 10**6, 1e-3, 9e7, 1e-5), *rows]
    assert [check.state for check in judge(cut, hosts)] == [OK, FAIL]


def as_hosts(rank, sizes, largest):
    """What is measured where ranks say that they are on hosts of these sizes; by the second rank what it has."""
    from lumina.config.schema import ParallelConfig
    from lumina.parallel.mesh import close_mesh, open_mesh

    names = [f"h{number}" for number, size in enumerate(sizes) for _ in range(size)]
    network._place = lambda: (names[rank], 0)
    mesh = open_mesh(ParallelConfig())
    rows = network.measure(mesh, largest, repeats=2, seconds=0.5)
    close_mesh(mesh)
    return rows


@pytest.mark.slow
def test_every_link_is_measured_in_both_directions():
    rows, *others = run_ranks(4, as_hosts, [2, 1, 1], 2**20)
    assert others == [[], [], []]  # the first rank has them all
    assert [row.ranks for row in rows if row.what == WITHIN] == [(0, 1)]
    assert [row.ranks for row in rows if row.what == ALL_REDUCE] == [(0, 1, 2, 3)]
    found = {row.ranks: row for row in rows if row.what == LINK}
    assert set(found) == set(itertools.permutations((0, 2, 3), 2))  # the first rank of each host
    assert found[2, 0].hosts == ("h1", "h0")
    for row in rows:
        share = {WITHIN: 2 * 1 / 2, ALL_REDUCE: 2 * 3 / 4, LINK: 1}[row.what]
        assert row.bandwidth == pytest.approx(row.bytes * share / row.seconds)
        assert 2**16 <= row.bytes <= 2**20
        assert (row.latency > 0) == (row.what == LINK)


def test_one_rank_has_nobody_to_talk_to(capsys):
    assert main(["benchmark", "network"]) == 2
    assert "a network takes several ranks" in capsys.readouterr().err
    assert main(["benchmark", "network", "--repeats", "0"]) == 2
    assert "--repeats 0: it is at least 1" in capsys.readouterr().err
