"""Who has stopped, by the heartbeats of all ranks: no sockets, threads or clocks here, times are given."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import median
from typing import Any

from lumina.parallel.activity import Phase, Straggler, in_words

FAILED_SECONDS = 5.0
"""After which the others are ended, where a rank has failed and they have not noticed by themselves."""
_SLOWER = 1.2
_SAMPLES = 100.0


@dataclass(frozen=True)
class Peer:
    """A rank as all know it from the start."""

    rank: int
    host: str
    pid: int
    stage: int
    leads: bool
    """Whether it leads a replica, and so reads its data."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid}, pipeline stage {self.stage})"


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    number: counts its heartbeats.
    idle: seconds for which its main thread has marked nothing.
    waits: for others or the device, at `place`; `collective` is the function of torch.distributed, where it is one.
    calls: of collectives so far, by the group.
    own, samples: looks at the main thread that found it in work of its own, and all; both fade with time.
    """

    rank: int
    number: int
    step: int
    phase: int
    batch: int
    idle: float
    progress: int
    collective: str | None
    place: str
    waits: bool
    calls: dict[str, int]
    own: float
    samples: float

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Beat":
        """
        Raises:
            TypeError, ValueError, KeyError: where `values` are not those of a heartbeat.
        """
        return Beat(
            rank=int(values["rank"]),
            number=int(values["number"]),
            step=int(values["step"]),
            phase=Phase(values["phase"]),
            batch=int(values["batch"]),
            idle=float(values["idle"]),
            progress=int(values["progress"]),
            collective=None if values["collective"] is None else str(values["collective"]),
            place=str(values["place"]),
            waits=bool(values["waits"]),
            calls=dict(values["calls"]),
            own=float(values["own"]),
            samples=float(values["samples"]),
        )

    @property
    def position(self) -> tuple[int, int]:
        """How far it has come; micro-batches do not count, for stages of a pipeline take them at other times."""
        return (self.step, self.phase)

    @property
    def doing(self) -> str:
        """In words."""
        return f"at step {self.step}, {in_words(Phase(self.phase), self.batch)}"

    @property
    def stands(self) -> str:
        """In words, where it stands."""
        return f"{self.collective} (called at {self.place})" if self.collective else self.place


@dataclass(frozen=True)
class Verdict:
    """Why a run must end. `ranks` are those that are to blame, as far as it can be known; `text` is a sentence."""

    kind: str  # silent, failed, stuck, mismatch
    ranks: list[int]
    text: str


@dataclass
class _Heard:
    """The last of a rank."""

    beat: Beat
    at: float


@dataclass
class Monitor:
    """Judges a world by its heartbeats.

    Args:
        peers: all ranks, in their order.
        timeout: seconds without a heartbeat, or without progress of a rank that others wait for, that are a stop.
    """

    peers: Sequence[Peer]
    timeout: float
    _heard: dict[int, _Heard] = field(default_factory=dict)
    _left: dict[int, tuple[str, float]] = field(default_factory=dict)

    def hear(self, beat: Beat, now: float) -> None:
        """A heartbeat; one that comes after a later one changes nothing."""
        last = self._heard.get(beat.rank)
        if 0 <= beat.rank < len(self.peers) and (last is None or beat.number > last.beat.number):
            self._heard[beat.rank] = _Heard(beat, now)

    def left(self, rank: int, error: str, now: float) -> None:
        """A rank has ended by itself; `error` is empty where all was well."""
        if 0 <= rank < len(self.peers):
            self._left.setdefault(rank, (error, now))

    def slept(self, seconds: float) -> None:
        """This process did not run for so long (SIGSTOP, a busy host): what others sent meanwhile was not heard."""
        for heard in self._heard.values():
            heard.at += seconds
        self._left = {rank: (error, at + seconds) for rank, (error, at) in self._left.items()}

    def unheard(self) -> list[int]:
        """Ranks of which nothing was ever heard: they cannot be watched, and are not blamed."""
        return [peer.rank for peer in self.peers if peer.rank not in self._heard and peer.rank not in self._left]

    def beats(self, now: float) -> list[dict[str, Any]]:
        """Of every rank what is known, for a report."""
        return [self._entry(peer, now) for peer in self.peers]

    def judge(self, now: float) -> Verdict | None:
        """What is wrong; None where nothing is, or nothing yet."""
        present = {rank: heard for rank, heard in self._heard.items() if rank not in self._left}
        silent = [rank for rank, heard in present.items() if now - heard.at > self.timeout]
        if silent:
            told = self._told(silent, lambda r: f"has not been heard of for {now - present[r].at:.1f} s; it was")
            return Verdict(
                "silent", sorted(silent), told + self._waiting({r: h.beat for r, h in present.items()}, silent)
            )
        failed = {r: e for r, (e, at) in self._left.items() if e and now - at > FAILED_SECONDS}
        if failed and present:
            first = min(failed, key=lambda rank: self._left[rank][1])
            others = f"; {_ranks(present)} had not noticed {FAILED_SECONDS:.0f} s later"
            return Verdict("failed", sorted(failed), f"{self.peers[first]} failed: {failed[first]}{others}")
        return self._stuck({r: heard.beat for r, heard in present.items()}, {r: now - h.at for r, h in present.items()})

    def _stuck(self, beats: dict[int, Beat], age: dict[int, float]) -> Verdict | None:
        idle = {rank: beat.idle + age[rank] for rank, beat in beats.items()}
        stuck = [r for r, b in beats.items() if idle[r] > self.timeout and Phase.OPENING < b.phase < Phase.CLOSING]
        if not stuck or any(age[rank] > self.timeout / 2 for rank in stuck):
            # Of one that is not heard of, that is what is to be said, as soon as it is sure.
            return None
        waiters = [beat for beat in beats.values() if beat.waits]
        if not waiters:  # a slow file system, say, may hold up all of them: they go on when it does
            return None
        behind = min(beat.position for beat in waiters)
        # A rank that is ahead of one that waits is not what that one waits for.
        alone = [r for r in stuck if not beats[r].waits and beats[r].position <= behind]
        if alone:
            behind = min(beats[rank].position for rank in alone)
        elif len(stuck) == len(beats):
            behind = min(beat.position for beat in beats.values())
            if all(beat.position == behind for beat in beats.values()) or any(b.collective for b in beats.values()):
                return self._mismatch(beats, idle)
        else:
            return None
        blamed = [r for r in (alone or stuck) if beats[r].position == behind]
        told = self._told(blamed, lambda r: f"has made no progress for {idle[r]:.1f} s; it is")
        return Verdict("stuck", sorted(blamed), told + self._waiting(beats, blamed))

    def _mismatch(self, beats: dict[int, Beat], idle: dict[int, float]) -> Verdict:
        places: dict[tuple, list[int]] = {}
        for rank, beat in sorted(beats.items()):
            places.setdefault((beat.step, beat.stands), []).append(rank)
        by_size = sorted(places.values(), key=len)
        outvoted = len(by_size) > 1 and 2 * len(by_size[-1]) > len(beats)
        blamed = sorted(rank for ranks in by_size[:-1] for rank in ranks) if outvoted else sorted(beats)
        where = "; ".join(f"{_ranks(ranks)} {_in(beats[ranks[0]])}" for ranks in places.values())
        seconds = min(idle.values())
        if len(places) == 1:
            text = f"no rank has made progress for {seconds:.1f} s, and all stand at the same place: {where}"
            return Verdict("mismatch", blamed, text + "; look at the network and the devices between them")
        text = f"no rank has made progress for {seconds:.1f} s, and they stand in calls that do not match: {where}"
        return Verdict("mismatch", blamed, text)

    def _told(self, ranks: Sequence[int], what) -> str:
        """Who has stopped, and at what; the first few in full."""
        ranks = sorted(ranks)
        parts = [self._one(rank, what(rank)) for rank in ranks[:4]]
        more = [f"and so {_ranks(ranks[4:])}"] if len(ranks) > 4 else []
        return "; ".join(parts + more)

    def _one(self, rank: int, what: str) -> str:
        beat = self._heard[rank].beat
        where = f"in {beat.stands}" if beat.waits else f"at {beat.place}"
        return f"{self.peers[rank]} {what} {beat.doing}, {where}"

    def _waiting(self, beats: dict[int, Beat], blamed: Sequence[int]) -> str:
        """Where those stand that wait, most of them first."""
        groups = Counter((b.step, b.stands) for r, b in beats.items() if r not in blamed and b.waits)
        if not groups:
            return ""
        parts = []
        for step, stands in [key for key, _ in groups.most_common(4)]:
            ranks = [r for r, b in beats.items() if (b.step, b.stands) == (step, stands) and r not in blamed]
            parts.append(f"{_ranks(ranks)} in {stands} of step {step}")
        return "; waiting: " + ", ".join(parts)

    def straggler(self) -> Straggler | None:
        """The rank that is slower than its peers, beyond chance, in what it does alone.

        Peers are the ranks of the same pipeline stage that read data as it does, or like it do not.
        """
        roles: dict[tuple, dict[int, Beat]] = {}
        for rank, heard in self._heard.items():
            if rank not in self._left and heard.beat.samples >= _SAMPLES:
                peer = self.peers[rank]
                roles.setdefault((peer.stage, peer.leads), {})[rank] = heard.beat
        found = [self._slowest(beats) for beats in roles.values() if len(beats) > 1]
        return max((one for one in found if one is not None), key=lambda one: one.ratio, default=None)

    def _slowest(self, beats: dict[int, Beat]) -> Straggler | None:
        share = {rank: beat.own / beat.samples for rank, beat in beats.items()}
        rank = max(share, key=share.get)
        usual = max(median(value for other, value in share.items() if other != rank), 0.01)
        noise = 3 * sqrt(share[rank] * (1 - share[rank]) / beats[rank].samples)
        return Straggler(rank, share[rank] / usual) if share[rank] - noise > _SLOWER * usual else None

    def _entry(self, peer: Peer, now: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"rank": peer.rank, "host": peer.host, "pid": peer.pid, "stage": peer.stage}
        if peer.rank in self._left:
            entry["ended"] = self._left[peer.rank][0] or "well"
        heard = self._heard.get(peer.rank)
        if heard is None:
            return entry | {"heard_seconds_ago": None}
        beat = heard.beat
        return entry | {
            "heard_seconds_ago": round(now - heard.at, 2),
            "idle_seconds": round(beat.idle + now - heard.at, 2),
            "step": beat.step,
            "doing": in_words(Phase(beat.phase), beat.batch),
            "collective": beat.collective,
            "place": beat.place,
            "waits": beat.waits,
            "progress": beat.progress,
            "calls": beat.calls,
        }


def _in(beat: Beat) -> str:
    return f"in {beat.stands} of step {beat.step}, {in_words(Phase(beat.phase), beat.batch)}"


def _ranks(ranks: Iterable[int]) -> str:
    """As "rank 3" or "ranks 0–2, 5"."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {said}"
