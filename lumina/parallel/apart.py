"""Ranks that work apart: each does its share of a list on its own, and they meet only before and after.

No process groups are made, for nothing is computed together: a store, by which ranks find each other anyway, says who
has come how far. So a rank may be behind by any time, and one that fails is known to the others at once.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lumina.config.exits import BAD_INPUT, FAILED
from lumina.parallel.mesh import World

_TIMEOUT = timedelta(minutes=30)
_LOOK_EVERY = 0.1  # seconds
_LEAVE_SECONDS = 60.0  # in which ranks notice that one has failed: they look after every step of the solver

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another rank was the first to fail; it says why.

    code: the exit code of its failure.
    """

    def __init__(self, code: int):
        super().__init__("another rank failed; it says why")
        self.code = code


class Apart:
    """This rank among those that work apart, from `apart`. All ranks call `first` and `meet` in the same order."""

    def __init__(self, world: World, store: dist.Store):
        self.world = world
        self._store, self._points, self._looked = store, 0, 0.0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that shows how far the work is."""
        return self.world.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Of `items`, this rank's: every one is some rank's."""
        return list(items[self.world.rank :: self.world.size])

    def first(self, work: Callable[[], object]) -> None:
        """`work()` on the first rank; all go on once it is done.

        Raises:
            FailedElsewhere: where another rank has failed.
        """
        point = self._next_point()
        if self.is_first:
            work()
            self._store.set(point, "done")
        self._wait(lambda: self._store.check([point]))

    def meet(self) -> None:
        """Go on once all ranks are here.

        Raises:
            FailedElsewhere: where another rank has failed.
        """
        point = self._next_point()
        self._store.add(point, 1)
        self._wait(lambda: self._store.add(point, 0) == self.world.size)

    def look(self) -> None:
        """Raises FailedElsewhere where another rank has failed; asks at most every tenth of a second."""
        if self.world.size > 1 and time.monotonic() > self._looked + _LOOK_EVERY:
            self._looked = time.monotonic()
            if self._store.check(["failure"]):
                raise FailedElsewhere(int(self._store.get("failure")))

    def _next_point(self) -> str:
        self._points += 1
        return f"point {self._points}"

    def _wait(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.look()
            time.sleep(_LOOK_EVERY)

    def _fail(self, error: BaseException) -> bool:
        """Tell the others; returns whether this rank is the first that does."""
        first = self._store.add("failures", 1) == 1
        if first:
            self._store.set("failure", str(BAD_INPUT if isinstance(error, ValueError) else FAILED))
        return first

    def _leave(self) -> None:
        # The store may live in the first rank, and what it has made for all goes only when nobody uses it any more.
        self._store.add("left", 1)
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.is_first and self._store.add("left", 0) < self.world.size and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)


@contextmanager
def apart() -> Iterator[Apart]:
    """The ranks of the launcher that has started this process, or this process alone.

    Where the work within raises, it ends on all ranks, and one of them raises why.

    Raises:
        FailedElsewhere: on all other ranks.
        ValueError: where the launcher says only a part of what is needed.
        RuntimeError: where the first rank, or its host, cannot be reached any more.
    """
    world = World.from_environment()
    ranks = Apart(world, _store(world))
    try:
        yield ranks
    except dist.DistNetworkError as error:
        raise RuntimeError("the rank or launcher that keeps the ranks together cannot be reached any more") from error
    except FailedElsewhere:
        ranks._leave()
        raise
    except BaseException as error:
        first = ranks._fail(error)
        ranks._leave()
        if not first and isinstance(error, Exception):
            raise FailedElsewhere(int(ranks._store.get("failure"))) from error
        raise
    ranks._leave()


def _store(world: World) -> dist.Store:
    if world.size == 1:  # no port is opened
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=_TIMEOUT))
    # Of this start of the ranks: a launcher may keep its store when it starts them again.
    if world.rank == 0:
        store.set("lumina: apart", uuid.uuid4().hex)
    return dist.PrefixStore(store.get("lumina: apart").decode(), store)
