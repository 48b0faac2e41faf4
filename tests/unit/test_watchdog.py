"""Who is blamed, by heartbeats and times that a test makes up; and where a thread stands."""

import json
import multiprocessing
import sys
import threading
import time
import types
from dataclasses import asdict, replace

import pytest
import torch

from lumina.config.exits import HANG
from lumina.parallel import watchdog
from lumina.parallel.activity import Activity, Phase
from lumina.parallel.mesh import Mesh, World, first_then_others
from lumina.parallel.monitor import Beat, Monitor, Peer
from lumina.parallel.place import place_of

TIMEOUT = 10.0


def peers(world, hosts=1, stages=1):
    return [Peer(r, f"h{r * hosts // world}", 1000 + r, r * stages // world, r == 0) for r in range(world)]


def beat(rank, number=1, **changes):
    """At step 7, in a product of its own, for no time."""
    values = {
        "step": 7,
        "phase": Phase.BATCH,
        "batch": 0,
        "idle": 0.0,
        "progress": 30,
        "collective": None,
        "place": "lumina/model/attention.py:10 in forward",
        "waits": False,
        "calls": {"world": 7},
        "own": 0.0,
        "samples": 0.0,
    }
    return Beat(rank=rank, number=number, **values | changes)


def waits(rank, idle, step=7, phase=Phase.TOTALS, **changes):
    """In the sum of the step."""
    place = {"collective": "all_reduce", "place": "lumina/parallel/mesh.py:9 in sum", "waits": True}
    return beat(rank, step=step, phase=phase, idle=idle, **place | changes)


def judged(beats, now=100.0, world=None, stages=1):
    """Of beats that are heard at 100 s."""
    monitor = Monitor(peers(world or len(beats), stages=stages), TIMEOUT)
    for one in beats:
        monitor.hear(one, 100.0)
    return monitor.judge(now)


def test_a_silent_rank():
    monitor = Monitor(peers(4, hosts=2), TIMEOUT)
    for rank in range(4):
        monitor.hear(waits(rank, 0.0, phase=Phase.OPTIMIZER) if rank != 2 else beat(2, batch=3), 100.0)
    for rank in (0, 1, 3):
        monitor.hear(waits(rank, 9.0, number=2), 109.0)
    assert monitor.judge(110.0) is None
    verdict = monitor.judge(110.1)
    assert (verdict.kind, verdict.ranks) == ("silent", [2])
    assert verdict.text == (
        "rank 2 (host h1, pid 1002, pipeline stage 0) has not been heard of for 10.1 s; it was at step 7, forward and "
        "backward of micro-batch 3, at lumina/model/attention.py:10 in forward; waiting: ranks 0–1, 3 in all_reduce "
        "(called at lumina/parallel/mesh.py:9 in sum) of step 7"
    )


@pytest.mark.parametrize("last", [beat(1, idle=0.4), waits(1, 0.4)], ids=["at work", "in the same sum"])
def test_silence_is_told_as_silence(last):
    """Of a rank that is stopped, whatever it was at when it was last heard of, and whoever waits for it."""
    monitor = Monitor(peers(2), TIMEOUT)
    monitor.hear(last, 100.0)
    for second in range(1, 11):
        monitor.hear(waits(0, second + 0.3, number=1 + second), 100.0 + second)
        assert monitor.judge(100.0 + second) is None
    verdict = monitor.judge(110.1)
    assert (verdict.kind, verdict.ranks) == ("silent", [1])


def test_silence_counts_while_a_run_is_opened_and_idleness_does_not():
    opening = [beat(rank, step=0, phase=Phase.OPENING, idle=500.0) for rank in range(2)]
    opening[1] = replace(opening[1], collective="broadcast", waits=True)
    assert judged(opening, now=109.0) is None
    assert judged(opening, now=111.0).kind == "silent"


def test_old_news_changes_nothing():
    monitor = Monitor(peers(2), TIMEOUT)
    monitor.hear(beat(1, number=5, step=9), 100.0)
    monitor.hear(beat(1, number=4, step=8), 108.0)
    monitor.hear(beat(9), 108.0)  # nobody
    assert monitor.beats(108.0)[1]["step"] == 9
    assert monitor.judge(111.0).ranks == [1]


def test_a_rank_that_never_spoke_is_not_blamed():
    assert judged([waits(0, 0.0), waits(1, 0.0)], now=101.0, world=3) is None
    monitor = Monitor(peers(3), TIMEOUT)
    monitor.hear(beat(0), 100.0)
    monitor.left(1, "", 100.0)
    assert monitor.unheard() == [2]


def test_who_slept_does_not_blame_others_for_it():
    monitor = Monitor(peers(2), TIMEOUT)
    monitor.hear(beat(1), 100.0)
    monitor.slept(50.0)
    assert monitor.judge(159.0) is None
    assert monitor.judge(160.5).ranks == [1]


def test_a_rank_without_progress_that_others_wait_for():
    data = {"phase": Phase.DATA, "place": "lumina/data/loader.py:5 in _next"}
    assert judged([waits(0, 9.8), beat(1, idle=9.9, **data)]) is None
    verdict = judged([waits(0, 9.8), beat(1, idle=10.1, **data), waits(2, 1.0)])
    assert (verdict.kind, verdict.ranks) == ("stuck", [1])
    assert "rank 1 (host h0, pid 1001, pipeline stage 0) has made no progress for 10.1 s; it is at" in verdict.text
    assert "waiting for data, at lumina/data/loader.py:5 in _next; waiting: ranks 0, 2 in all_reduce" in verdict.text


def test_nobody_waits_for_a_rank_that_is_ahead():
    """Rank 1 draws a long preview; rank 2 has stopped before it, and it is rank 2 that rank 0 waits for."""
    drawing = beat(1, idle=30.0, phase=Phase.PREVIEW)
    assert judged([waits(0, 5.0), drawing, beat(2, idle=5.0)]) is None
    assert judged([waits(0, 30.0), drawing, beat(2, idle=20.0)]).ranks == [2]
    # Once all wait for the picture alone, it has taken too long.
    assert judged([waits(0, 5.0, step=8), drawing, waits(2, 5.0, step=8)]).ranks == [1]


def test_a_slow_file_system_stops_nobody():
    assert judged([beat(rank, idle=100.0, phase=Phase.DATA) for rank in range(3)]) is None


@pytest.mark.parametrize(("odd", "blamed"), [([3], [3]), ([0], [0]), ([2, 3], [0, 1, 2, 3])])
def test_collectives_that_do_not_match(odd, blamed):
    other = {"collective": "all_gather", "place": "x.py:1 in f", "step": 8}
    verdict = judged([waits(rank, 11.0, **(other if rank in odd else {})) for rank in range(4)])
    assert (verdict.kind, verdict.ranks) == ("mismatch", blamed)
    assert "they stand in calls that do not match" in verdict.text
    assert "all_reduce (called at lumina/parallel/mesh.py:9 in sum) of step 7" in verdict.text
    assert "all_gather (called at x.py:1 in f) of step 8" in verdict.text


def test_all_in_the_same_collective():
    verdict = judged([waits(rank, 11.0 + rank) for rank in range(3)])
    assert (verdict.kind, verdict.ranks) == ("mismatch", [0, 1, 2])
    assert "for 11.0 s, and all stand at the same place: ranks 0–2 in all_reduce" in verdict.text
    assert judged([waits(0, 11.0), waits(1, 11.0), waits(2, 3.0)]) is None


def test_on_gpus_the_rank_that_is_behind_is_blamed():
    """Their collectives return at once: ranks are seen to wait for the device, wherever they wait."""
    device = {"waits": True, "place": "lumina/parallel/engine.py:1 in accumulate"}
    beats = [beat(0, idle=12.0, phase=Phase.OPTIMIZER, **device), beat(1, idle=12.0, **device)]
    verdict = judged(beats)
    assert (verdict.kind, verdict.ranks) == ("stuck", [1])
    assert judged([beats[0], replace(beats[1], idle=1.0)]) is None


def test_a_failed_rank_that_others_have_not_noticed():
    monitor = Monitor(peers(2), TIMEOUT)
    monitor.hear(waits(0, 0.0), 100.0)
    monitor.hear(beat(1), 100.0)
    monitor.left(1, "OSError: gone", 100.0)
    assert monitor.judge(104.9) is None
    verdict = monitor.judge(105.1)
    assert (verdict.kind, verdict.ranks) == ("failed", [1])
    assert "failed: OSError: gone; rank 0 had not noticed 5 s later" in verdict.text


def test_ranks_that_have_ended_well_are_not_missed():
    monitor = Monitor(peers(2), TIMEOUT)
    monitor.hear(beat(0), 100.0)
    monitor.hear(beat(1), 100.0)
    monitor.left(1, "", 100.0)
    monitor.hear(beat(0, number=2), 115.0)
    assert monitor.judge(116.0) is None


def test_many_ranks_are_told_shortly():
    monitor = Monitor(peers(64, hosts=8), TIMEOUT)
    for rank in range(64):
        monitor.hear(waits(rank, 0.0), 100.0 if rank >= 56 else 111.0)
    verdict = monitor.judge(111.0)
    assert verdict.ranks == list(range(56, 64))
    assert verdict.text.count("pipeline stage") == 4
    assert "; and so ranks 60–63; waiting: ranks 0–55 in all_reduce" in verdict.text
    assert len(verdict.text) < 1200


def slowest(shares, samples=600.0, stages=1):
    """Of ranks whose own work takes these shares of the time."""
    monitor = Monitor([replace(p, leads=False) for p in peers(len(shares), stages=stages)], TIMEOUT)
    for rank, share in enumerate(shares):
        monitor.hear(beat(rank, own=share * samples, samples=samples), 100.0)
    return monitor.straggler()


def told(straggler):
    return straggler.rank, round(straggler.ratio, 6)


def test_a_straggler_is_named():
    assert told(slowest([0.5, 0.9, 0.5, 0.6])) == (1, 1.8)
    assert told(slowest([0.4, 0.8])) == (1, 2.0)


def test_chance_is_no_straggler():
    assert slowest([0.5, 0.58, 0.5, 0.5]) is None  # less than a fifth
    assert slowest([0.5, 0.65, 0.5], samples=110.0) is None  # 3 σ of 110 looks are 0.14
    assert slowest([0.5, 0.65, 0.5], samples=4000.0).rank == 1
    assert slowest([0.1, 0.9], samples=90.0) is None
    assert slowest([0.9]) is None


def test_stages_of_a_pipeline_are_not_compared():
    assert slowest([0.4, 0.4, 0.9, 0.9], stages=2) is None
    assert told(slowest([0.4, 0.8, 0.9, 0.9], stages=2)) == (1, 2.0)


def test_the_deputy_is_on_another_host():
    assert watchdog.deputy_of(peers(4, hosts=2)) == 2
    assert watchdog.deputy_of(peers(4)) == 3


def test_a_beat_survives_the_wire():
    sent = waits(3, 1.5, calls={"world": 7, "data": 2})
    assert Beat.from_dict(json.loads(json.dumps(asdict(sent)))) == sent
    with pytest.raises((ValueError, KeyError, TypeError)):
        Beat.from_dict(asdict(sent) | {"phase": 99})


def test_what_is_marked():
    activity = Activity()
    activity.enter(Phase.DATA, step=4)
    activity.enter(Phase.BATCH, batch=2)
    assert (activity.at, activity.progress) == ((4, Phase.BATCH, 2), 2)
    activity.wrote()
    assert activity.progress == 2
    activity.enter(Phase.SAVE)
    activity.wrote()
    assert (activity.at, activity.progress) == ((4, Phase.SAVE, 0), 4)


class Standing:
    """A thread in `function(block)`, which calls `block`, and so stands there until the test is over."""

    def __init__(self, function):
        self._there, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: function(self._block))

    def _block(self, *_):
        self._there.set()
        self._over.wait()

    def __enter__(self):
        self._thread.start()
        assert self._there.wait(600)
        return place_of(self._thread.ident)

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def test_a_thread_in_a_collective(monkeypatch):
    import torch.distributed as dist

    class Group:
        def __init__(self, block):
            self.allreduce = block

    def call(block):
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: Group(block))
        Mesh(World(0, 2, 0), torch.device("cpu")).sum([1.0])

    with Standing(call) as place:
        assert (place.collective, place.waits) == ("all_reduce", True)
        assert place.caller.startswith("lumina/parallel/mesh.py:")
        assert place.caller.endswith(" in sum")


def test_a_thread_in_the_inside_of_a_collective():
    """It goes by its public name."""
    source = "def gather_object(block):\n    return _sizes(block)\n\ndef _sizes(block):\n    block()\n"
    names = {}
    types.FunctionType(compile(source, "/x/torch/distributed/distributed_c10d.py", "exec"), names)()

    def call(block):
        return names["gather_object"](block)

    with Standing(call) as place:
        assert (place.collective, place.waits) == ("gather_object", True)
        assert place.caller.endswith(" in call")


def test_a_thread_in_work_of_its_own(monkeypatch):
    def call(block):
        mesh = Mesh(World(0, 1, 0), torch.device("cpu"))
        monkeypatch.setattr(Mesh, "any", lambda self, flag: flag)
        first_then_others(mesh, block)

    with Standing(call) as place:
        assert (place.collective, place.waits) == (None, False)
        assert place.caller.startswith("lumina/parallel/mesh.py:")
        assert place.caller.endswith(" in first_then_others")


@pytest.mark.parametrize(
    ("line", "collective", "waits_"),
    [
        ("work.wait()", "wait for a message", True),
        ("total.tolist()", None, True),
        ("float(share)", None, True),
        ("x.float()", None, False),
        ("time.sleep(1)", None, False),
    ],
)
def test_waiting_that_the_stack_does_not_show(tmp_path, line, collective, waits_):
    """A call into C has no frame: its line tells."""
    file = tmp_path / "deepspeed" / "x.py"
    file.parent.mkdir()
    file.write_text(f"def f():\n    there.set(); lock.acquire()  # {line}\n")
    there, lock = threading.Event(), threading.Lock()
    lock.acquire()
    names = {"there": there, "lock": lock}
    run = compile(file.read_text(), str(file), "exec")
    types.FunctionType(run, names)()
    thread = threading.Thread(target=names["f"])
    thread.start()
    there.wait()
    while sys._current_frames()[thread.ident].f_code.co_name != "f":  # it is in `set` yet
        time.sleep(0.005)
    place = place_of(thread.ident)
    lock.release()
    thread.join()
    assert (place.collective, place.waits) == (collective, waits_)


def test_a_thread_that_has_ended():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert not place_of(thread.ident).waits


def test_noise_from_elsewhere_is_let_pass(tmp_path, monkeypatch):
    """Datagrams of another run, or of nobody, change nothing; heartbeats of this one are heard."""
    watch = object.__new__(watchdog.Watchdog)
    watch._token, watch._addresses, watch._hangs = "right", {}, tmp_path
    watch._monitor = Monitor(peers(2), TIMEOUT)
    monkeypatch.setattr(watch, "_end", lambda *_: pytest.fail("ended by a stranger"))
    good = {"token": "right", "beat": asdict(beat(1))}
    for noise in (
        b"",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'"right"',
        json.dumps({"token": "wrong", "end": "x"}).encode(),
        json.dumps(good | {"token": "wrong"}).encode(),
        json.dumps({"token": "right", "beat": {"rank": 1}}).encode(),
        json.dumps({"token": "right", "beat": good["beat"] | {"calls": 3}}).encode(),
    ):
        watch._take(noise, ("127.0.0.1", 5), 100.0)
    assert watch._monitor.unheard() == [0, 1]
    watch._take(json.dumps(good).encode(), ("10.0.0.9", 5), 100.0)
    assert (watch._monitor.unheard(), watch._addresses) == ([0], {1: ("10.0.0.9", 5)})


def test_a_rank_that_is_told_to_end_does_so_on_a_disk_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_LAST_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "_write_stacks", lambda *_: threading.Event().wait())
    watch = object.__new__(watchdog.Watchdog)
    watch._mesh = Mesh(World(0, 2, 0), torch.device("cpu"))
    order = (tmp_path, ("127.0.0.1", 5))
    rank = multiprocessing.get_context("fork").Process(target=watch._end, args=order, daemon=True)
    rank.start()
    rank.join(600)
    assert rank.exitcode == HANG


def test_an_order_names_no_folder_elsewhere(tmp_path, monkeypatch):
    watch = object.__new__(watchdog.Watchdog)
    watch._token, watch._monitor, watch._hangs = "right", None, tmp_path
    folders = []
    monkeypatch.setattr(watch, "_end", lambda folder, sender: folders.append(folder))
    watch._take(b'{"token": "right", "end": "../../etc"}', ("127.0.0.1", 5), 0.0)
    assert folders == [tmp_path / "etc"]
