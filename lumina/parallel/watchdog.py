"""The watchdog: every rank sends heartbeats, two of them listen, and a run in which a rank has stopped is ended.

Heartbeats are UDP datagrams of JSON, sent by a thread: nothing waits for them, and one that is lost does no harm. Rank
0 listens, and a deputy on another host (or the last rank), for either may be the one that stops. When a run is ended,
all ranks that still answer write their stacks into RUN/hangs.
"""

import faulthandler
import json
import os
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from typing import Any

import psutil

from lumina.config.exits import HANG
from lumina.config.schema import Config
from lumina.parallel.activity import Phase
from lumina.parallel.mesh import Mesh, groups_of
from lumina.parallel.monitor import Beat, Monitor, Peer, Verdict
from lumina.parallel.place import place_of

_TICK = 0.1  # seconds between looks at the main thread
_BEAT_SECONDS = 2.0  # at most: a thousand ranks must not keep those that listen busy
_JUDGE_SECONDS = 0.25
_COMPARE_SECONDS = 2.0
_FADE_SECONDS = 60.0  # of what is known of a rank's pace
_DEPUTY_SECONDS = 0.75  # that the deputy leaves rank 0 to judge first, so that one of them speaks
_ANSWER_SECONDS = 1.0  # for ranks to say that they have written their stacks
_LAST_SECONDS = 5.0  # in which a process ends that was told to, even where the disk hangs too
_LARGEST = 60_000  # bytes of a datagram


@contextmanager
def watch(config: Config, mesh: Mesh) -> Iterator[None]:
    """Watch the main thread, from which this is called, and, on two of the ranks, all ranks.

    Where a rank stops, no exception is raised: the process ends, with exit code `exits.HANG`. A single process is not
    watched, for nobody waits for it.
    """
    if mesh.world.size == 1 or not config.watchdog.enabled:
        yield
        return
    watchdog = Watchdog(config, mesh)
    watchdog.start()
    error = ""
    try:
        yield
    except BaseException as raised:
        error = " ".join(f"{type(raised).__name__}: {raised}".split())[:500]
        raise
    finally:
        watchdog.stop(error)


class Watchdog:
    """The thread of one rank. All ranks make one, start it and stop it."""

    def __init__(self, config: Config, mesh: Mesh):
        """Ranks tell each other where they listen."""
        self._mesh, self._activity = mesh, mesh.activity
        self._hangs = Path(config.run.dir) / "hangs"
        self._timeout = config.watchdog.timeout
        self._period = min(_BEAT_SECONDS, self._timeout / 8)
        self._groups = groups_of(mesh)
        self._main = threading.get_ident()
        way = mesh.way
        self._socket = socket.socket(way.family, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind(("", 0))
        self._socket.setblocking(False)
        port = self._socket.getsockname()[1]
        mine = Peer(mesh.world.rank, socket.gethostname(), os.getpid(), mesh.pipeline.rank, mesh.leads_replica)
        gathered = mesh.gather((mine, (way.own, port)))
        self._token, told = mesh.from_first((secrets.token_hex(8), gathered))
        peers = [peer for peer, _ in told]
        self._addresses = dict(enumerate(address for _, address in told))
        # Its own name for itself may mean another host elsewhere, as 127.0.1.1 does.
        self._addresses[0] = (way.first, self._addresses[0][1])
        self._monitors = [0, deputy_of(peers)]
        rank = mesh.world.rank
        patience = self._timeout + (_DEPUTY_SECONDS if rank else 0.0)
        self._monitor = Monitor(peers, patience) if rank in self._monitors else None
        self._number, self._own, self._samples = 0, 0.0, 0.0
        self._said_unheard = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """The first heartbeat goes out before this returns."""
        self._progress, self._progressed = self._activity.progress, time.monotonic()
        self._beat(time.monotonic())
        self._thread.start()

    def stop(self, error: str) -> None:
        """Take leave; `error` says why, where something went wrong."""
        self._ended.set()
        self._thread.join()
        for _ in range(2):  # one may be lost
            self._send({"left": self._mesh.world.rank, "error": error}, self._monitors)
        self._socket.close()
        self._groups.clear()  # a connection is closed once nobody holds its group

    def _run(self) -> None:
        started = last = time.monotonic()
        next_beat, next_judgement, next_comparison = last + self._period, last + _JUDGE_SECONDS, last
        # Not evenly: a look at the same point of every step would tell nothing of the others.
        while not self._ended.wait(_TICK * random.uniform(0.5, 1.5)):
            now = time.monotonic()
            if now - last > 1.0:
                # Stopped, or kept from running: that was no idleness of ours, nor silence of others.
                self._progressed += now - last
                if self._monitor is not None:
                    self._monitor.slept(now - last)
            self._look(now - last, now)
            last = now
            self._receive(now)
            if now >= next_beat:
                next_beat = now + self._period
                self._beat(now)
            if self._monitor is not None and now >= next_judgement:
                next_judgement = now + _JUDGE_SECONDS
                self._judge(now, started)
            if self._mesh.is_first and now >= next_comparison:
                next_comparison = now + _COMPARE_SECONDS
                self._activity.straggler = self._monitor.straggler()

    def _look(self, seconds: float, now: float) -> None:
        """At the main thread: has it marked anything, and is it at work of its own."""
        if self._activity.progress != self._progress:
            self._progress, self._progressed = self._activity.progress, now
        if Phase.DATA <= self._activity.at[1] <= Phase.OPTIMIZER:
            fade = exp(-seconds / _FADE_SECONDS)
            self._samples = self._samples * fade + 1.0
            self._own = self._own * fade + (not place_of(self._main).waits)

    def _beat(self, now: float) -> None:
        self._number += 1
        step, phase, batch = self._activity.at
        place = place_of(self._main)
        beat = Beat(
            rank=self._mesh.world.rank,
            number=self._number,
            step=step,
            phase=int(phase),
            batch=batch,
            idle=round(now - self._progressed, 3),
            progress=self._progress,
            collective=place.collective,
            place=place.caller,
            waits=place.waits,
            calls=self._calls(),
            own=round(self._own, 2),
            samples=round(self._samples, 2),
        )
        if self._monitor is not None:
            self._monitor.hear(beat, now)
        self._send({"beat": asdict(beat)}, [rank for rank in self._monitors if rank != beat.rank])

    def _calls(self) -> dict[str, int]:
        calls = {}
        for name, group in self._groups.items():
            try:
                calls[name] = group._get_sequence_number_for_group()
            except RuntimeError:  # of a group that has not been used, or has been closed
                continue
        return calls

    def _send(self, message: dict[str, Any], ranks: list[int]) -> None:
        data = json.dumps({"token": self._token} | message, separators=(",", ":")).encode()
        assert len(data) < _LARGEST
        for rank in ranks:
            try:
                self._socket.sendto(data, self._addresses[rank])
            except OSError:  # no route, a full buffer, a port that is closed: as if it were lost on the way
                continue

    def _receive(self, now: float) -> None:
        while True:
            try:
                data, sender = self._socket.recvfrom(65_536)
            except BlockingIOError:
                return
            except ConnectionError:  # an answer to what was sent to one that has left
                continue
            self._take(data, sender, now)

    def _take(self, data: bytes, sender: tuple, now: float) -> None:
        try:
            message = json.loads(data)
            if message["token"] != self._token:
                return
            if "beat" in message and self._monitor is not None:
                beat = Beat.from_dict(message["beat"])
                self._monitor.hear(beat, now)
                self._addresses[beat.rank] = sender  # by which it is reached from here, whatever it calls itself
            elif "left" in message and self._monitor is not None:
                self._monitor.left(int(message["left"]), str(message["error"]), now)
            elif "end" in message:
                self._end(self._hangs / Path(message["end"]).name, sender)
            elif "written" in message:
                self._answered.add(int(message["written"]))
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            return  # not of this run

    def _judge(self, now: float, started: float) -> None:
        if not self._said_unheard and now - started > self._timeout and (unheard := self._monitor.unheard()):
            self._said_unheard = True
            _say(
                f"no heartbeat of ranks {unheard} reaches rank {self._mesh.world.rank}: they are not watched; "
                "let UDP pass between the hosts"
            )
        verdict = self._monitor.judge(now)
        if verdict is not None:
            self._end_all(verdict, now)

    def _end_all(self, verdict: Verdict, now: float) -> None:
        """Say what is wrong, have every rank write its stacks, and end them all."""
        _end_soon()
        moment = datetime.now(UTC)
        folder = self._hangs / moment.strftime("%Y%m%dT%H%M%SZ")
        _say(f"{verdict.text}; stacks of the ranks that answer, and the last heartbeats: {folder}")
        self._answered: set[int] = set()
        others = [rank for rank in self._addresses if rank != self._mesh.world.rank]
        deadline = time.monotonic() + _ANSWER_SECONDS
        self._send({"end": folder.name}, others)
        if _write_stacks(folder, self._mesh.world.rank):
            self._answered.add(self._mesh.world.rank)
        while others and time.monotonic() < deadline:
            time.sleep(0.1)
            self._receive(now)
            others = [rank for rank in others if rank not in self._answered]
            self._send({"end": folder.name}, others)
        report = {
            "time": moment.isoformat(timespec="milliseconds"),
            "text": verdict.text,
            "kind": verdict.kind,
            "ranks": verdict.ranks,
            "timeout": self._timeout,
            "answered": sorted(self._answered),
            "heartbeats": self._monitor.beats(now),
        }
        try:
            (folder / "report.json").write_text(json.dumps(report, indent=1))
        except OSError as error:
            _say(f"{folder / 'report.json'} cannot be written: {error.strerror or error}")
        _end_now()

    def _end(self, folder: Path, sender: tuple) -> None:
        """As another rank asks."""
        _end_soon()
        if _write_stacks(folder, self._mesh.world.rank):
            data = json.dumps({"token": self._token, "written": self._mesh.world.rank}).encode()
            self._socket.sendto(data, sender)
            time.sleep(_ANSWER_SECONDS)  # or others, which lose their connections to this rank, end before they write
        _end_now()


def deputy_of(peers: list[Peer]) -> int:
    """The lowest rank on another host than rank 0's; without one, the last rank."""
    return next((peer.rank for peer in peers if peer.host != peers[0].host), peers[-1].rank)


def _write_stacks(folder: Path, rank: int) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank_{rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        _say(f"rank {rank} cannot write its stacks into {folder}: {error.strerror or error}")
        return False
    return True


def _say(text: str) -> None:
    # Not by print: the main thread, which has stopped, may hold the lock of stderr.
    os.write(sys.__stderr__.fileno(), f"lumina train: {text}\n".encode())


def _end_soon() -> None:
    """Whatever hangs from here on, the process ends."""
    timer = threading.Timer(_LAST_SECONDS, os._exit, (HANG,))
    timer.daemon = True
    timer.start()


def _end_now() -> None:
    """With all that this process has started; the main thread, which may stand in C code, is not asked."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(HANG)
