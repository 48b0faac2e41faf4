"""What of the output of many ranks is shown: all of rank 0's, and the first error of any, once."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import Signals

from lumina.launch.ranks import Rank

_ERROR = re.compile(r"lumina train: (?:rank \d+: )?")
# Of one that lost another, whose own error is the one to show, though it may be written a moment later.
_FOLLOWS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|TCPStore|the first process refused")


class Console:
    """Follows the log files of one attempt."""

    def __init__(self, host: str, ranks: Iterable[Rank]):
        self._host = host
        self._tails = {rank.number: Tail(rank.log) for rank in ranks}
        self.errors: list[tuple[int, str]] = []
        """Rank and sentence of each that was written so far."""

    def follow(self) -> None:
        """Show what rank 0 has written since the last call, up to the first error; the rest is in the files alone."""
        for number, tail in self._tails.items():
            for line in tail.lines():
                if found := _ERROR.match(line):
                    self.errors.append((number, line[found.end() :]))
                elif number == 0 and not self.errors:
                    print(line, file=sys.stderr, flush=True)

    def tell_cause(self, failed: Sequence[Rank]) -> None:
        """The one error from which the others follow; of a rank that wrote none, how it ended.

        Args:
            failed: ranks in the order in which they ended, as far as it is known.
        """
        own = [error for error in self.errors if not _FOLLOWS.search(error[1])]
        killed = [rank for rank in failed if rank.code < 0]
        if own or (self.errors and not killed):
            number, text = (own or self.errors)[0]
            say(f"rank {number} on {self._host}: {text}")
        elif failed:
            self.tell_end((killed or failed)[0])

    def tell_end(self, rank: Rank) -> None:
        """How a rank ended, and the last that it wrote."""
        how = f"was ended by {Signals(-rank.code).name}" if rank.code < 0 else f"ended with exit code {rank.code}"
        last = self._tails[rank.number].last
        said = f'; its last words: "{last}"' if last else ""
        say(f"rank {rank.number} on {self._host} (pid {rank.process.pid}) {how}{said}")


class Tail:
    """Lines as they are added to a file."""

    def __init__(self, path: Path):
        self._path, self._offset, self._partial = path, 0, b""
        self.last = ""

    def lines(self) -> list[str]:
        """Those that have been completed since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        self._offset += len(added)
        *whole, self._partial = (self._partial + added).split(b"\n")
        lines = [line.decode(errors="replace").rstrip("\r") for line in whole]
        self.last = next((line.strip() for line in reversed(lines) if line.strip()), self.last)
        return lines


def say(text: str) -> None:
    """A sentence of the supervisor's own."""
    print(f"lumina launch: {text}", file=sys.stderr, flush=True)
