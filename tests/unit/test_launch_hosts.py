"""Hostfiles, which hosts and slots are chosen of them, on how many a run goes on, and what environment they get."""

from itertools import product
from pathlib import Path

import pytest

from lumina.launch.environment import passed_on
from lumina.launch.hostfile import Host, chosen, largest_fitting, read_hostfile


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile(tmp_path):
    text = "# ours\n\nnode-1 slots=2\n  10.0.0.7\tslots=1   # a guest\nc slots=3 python=~/venv/bin/python dir=/w#x\n"
    assert read_hostfile(written(tmp_path, text.replace("#x", ""))) == [
        Host("node-1", (0, 1)),
        Host("10.0.0.7", (0,)),
        Host("c", (0, 1, 2), python="~/venv/bin/python", directory="/w"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host; a line is of the form NAME slots=N"),
        ("# nobody\n", "names no host"),
        ("a slots=1\nb\n", "line 2: 'b' is not of the form NAME slots=N [python=PATH] [dir=PATH]"),
        ("a slots=many\n", "line 1: 'a slots=many' is not of the form"),
        ("a slots=-1\n", "is not of the form"),
        ("slots=2\n", "is not of the form"),
        ("a:8\n", "'a:8' is not of the form"),  # of MPICH and Intel MPI
        ("a slots=1 python=/my venv/python\n", "is not of the form"),
        ("a slots=1 pyhton=/p\n", "line 1: pyhton= is none of slots=, python= and dir="),
        ("a slots=1 max_slots=2\n", "max_slots= is none of"),
        ("a slots=0\n", "line 1: slots=0: a host has at least 1, or no line"),
        ("a slots=1\nb slots=1\na slots=1\n", "line 3: a is there already; give its slots on one line"),
        ("-oProxyCommand=x slots=1\n", "line 1: no host is called -oProxyCommand=x"),
    ],
)
def test_what_a_hostfile_is_refused_for(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match="hosts") as refused:
        read_hostfile(path)
    assert sentence in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_hostfile_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"the hostfile .*absent cannot be read: No such file or directory"):
        read_hostfile(tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(ValueError, match=r"bytes cannot be read: .*utf-8"):
        read_hostfile(tmp_path / "bytes")


HOSTS = [Host("a", (0, 1)), Host("b", (0, 1, 2)), Host("c.example", (0,), python="/p")]
SPECS = ["a", "b", "c.example", "a:0", "a:1,0", "b:2", "b:0,2", "b:0,1,2", "c.example:0", "a:1,1"]
PAIRS = [f"{x}@{y}" for x, y in product(SPECS, SPECS) if x.partition(":")[0] != y.partition(":")[0]]
WRONG = ["d", "a:2", "a@d:0", "b:0,7", "a:x", "a@", "", "a:0:1"]


def test_choosing_is_what_deepspeed_does(monkeypatch):
    """Every single host and pair of hosts, included and excluded, and what is wrong in both."""
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = {host.name: len(host.slots) for host in HOSTS}
    compared = 0
    for text, exclude in product([*SPECS, *PAIRS, "a:0@b@c.example:0"], (False, True)):
        theirs = runner.parse_inclusion_exclusion(pool, *(("", text) if exclude else (text, "")))
        if not theirs:
            with pytest.raises(ValueError, match="leaves no host"):
                chosen(HOSTS, exclude=text)
            continue
        ours = chosen(HOSTS, exclude=text) if exclude else chosen(HOSTS, include=text)
        assert [(host.name, list(host.slots)) for host in ours] == [(name, sorted(s)) for name, s in theirs.items()]
        compared += 1
    assert compared > 100
    for text in filter(None, WRONG):  # to DeepSpeed an empty one is none
        with pytest.raises(ValueError):  # noqa: PT011 - its words are not ours
            runner.parse_inclusion_exclusion(pool, text, "")


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_wrong_choices_are_refused(option, text):
    with pytest.raises(ValueError, match=rf"--{option} {text}: "):
        chosen(HOSTS, **{option: text})


def test_what_choices_say():
    told = {}
    cases = {"none": {"include": "d"}, "slot": {"include": "b:1,3"}, "form": {"exclude": "b:"}}
    cases |= {
        "all": {"exclude": "a@b@c.example"},
        "two": {"nodes": 1, "include": "a"},
        "many": {"nodes": 4},
        "few": {"nodes": 0},
    }
    for name, choice in cases.items():
        with pytest.raises(ValueError, match="--") as refused:
            chosen(HOSTS, **choice)
        told[name] = str(refused.value)
    assert told == {
        "none": "--include d: the hostfile has no host d, but a, b, c.example",
        "slot": "--include b:1,3: b has no slot 3, but 3 from 0 on",
        "form": "--exclude b:: 'b:' is not of the form NAME or NAME:SLOT,SLOT",
        "all": "--exclude a@b@c.example leaves no host",
        "two": "--nodes, --include and --exclude each choose hosts: give one of them",
        "many": "--nodes 4: the hostfile has 3",
        "few": "--nodes 0: the hostfile has 3",
    }


def test_what_is_kept_of_a_host():
    assert chosen(HOSTS) == HOSTS
    assert chosen(HOSTS, nodes=2) == HOSTS[:2]
    assert chosen(HOSTS, include="c.example@b:0,1,2") == HOSTS[1:]  # in the order of the file; all slots are all
    assert chosen(HOSTS, include="b:2,0") == [Host("b", (0, 2), all_slots=False)]
    assert chosen(HOSTS, exclude="b:1@a") == [Host("b", (0, 2), all_slots=False), HOSTS[2]]


@pytest.mark.parametrize(
    ("fitting", "count"),
    [({4, 8, 12, 14}, 4), ({4, 8, 12}, 3), ({4, 8}, 2), ({8, 13}, 2), ({4, 10}, 1), ({2, 6, 10}, 0), (set(), 0)],
)
def test_the_most_hosts_that_a_run_fits_on(fitting, count):
    """Hosts of 4, 4, 4 and 2 slots have 4, 8, 12 and 14 ranks; 2, 6 and 10 would need them in another order."""
    hosts = [Host(name, tuple(range(slots))) for name, slots in zip("abcd", (4, 4, 4, 2), strict=True)]
    assert largest_fitting(hosts, fitting.__contains__) == hosts[:count]
    assert largest_fitting([], lambda _: True) == []


def test_what_is_passed_on(tmp_path):
    here = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1", "OMP_NUM_THREADS": "4", "LD_LIBRARY_PATH": "/l"}
    secret = {"AWS_SECRET_ACCESS_KEY": "s", "WANDB_API_KEY": "s", "HF_TOKEN": "s", "HOME": "/h", "MY": "x"}
    secret |= {"RANK": "3", "SLURM_PROCID": "1", "CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": ""}
    assert passed_on(here | secret, [], tmp_path) == here
    assert passed_on(here | secret, ["MY"], tmp_path) == here | {"MY": "x"}
    with pytest.raises(ValueError, match="--env YOUR: it is not set here; set it, or leave it out"):
        passed_on(here, ["YOUR"], tmp_path)


def test_deepspeeds_file_is_read(tmp_path):
    """That of the first folder which has one, over what is set here."""
    first, second = tmp_path / "work", tmp_path / "home"
    first.mkdir(), second.mkdir()
    lines = ["NCCL_IB_HCA=mlx5_0:1,mlx5_1:1", "# not this", "", "A='b c'", "NCCL_DEBUG=WARN", "E=", ""]
    (second / ".deepspeed_env").write_text("\n".join(lines))
    expected = {"NCCL_IB_HCA": "mlx5_0:1,mlx5_1:1", "A": "b c", "NCCL_DEBUG": "WARN", "E": ""}
    assert passed_on({"NCCL_DEBUG": "INFO"}, [], first, second) == expected
    (first / ".deepspeed_env").write_text("B=a=b\n")
    assert passed_on({}, [], first, second) == {"B": "a=b"}


@pytest.mark.parametrize("line", ["export A=b", "A", "=b", "A-B=c", "1A=b"])
def test_what_deepspeeds_file_is_refused_for(tmp_path, line):
    (tmp_path / ".deepspeed_env").write_text(f"OK=1\n{line}\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env, line 2: .* is not of the form NAME=VALUE"):
        passed_on({}, [], tmp_path)
