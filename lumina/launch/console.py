"""What of the output of many ranks is shown: all of rank 0's, and the first error of any, once."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from signal import Signals

from lumina.launch.messages import Ended

# Of one that lost another, whose own error is the one to show, though it may be written a moment later.
_FOLLOWS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|TCPStore|the first process refused")


@dataclass(frozen=True)
class Said:
    """A sentence with which a rank ended."""

    host: str
    rank: int
    text: str


class Console:
    """Of one attempt."""

    def __init__(self) -> None:
        self.errors: list[Said] = []

    def show(self, line: str) -> None:
        """A line of rank 0's, unless something has gone wrong: the rest is in the files alone."""
        if not self.errors:
            _write(line)

    def tell_cause(self, failed: Sequence[tuple[str, Ended]]) -> None:
        """The one error from which the others follow; of a rank that wrote none, how it ended.

        Args:
            failed: hosts and ranks in the order in which they ended, as far as it is known.
        """
        own = [error for error in self.errors if not _FOLLOWS.search(error.text)]
        killed = [entry for entry in failed if entry[1].code < 0]
        if own or (self.errors and not killed):
            error = (own or self.errors)[0]
            say(f"rank {error.rank} on {error.host}: {error.text}")
        elif failed:
            tell_end(*(killed or failed)[0])


def tell_end(host: str, ended: Ended) -> None:
    """How a rank ended, and the last that it wrote."""
    how = f"was ended by {Signals(-ended.code).name}" if ended.code < 0 else f"ended with exit code {ended.code}"
    said = f'; its last words: "{ended.last}"' if ended.last else ""
    say(f"rank {ended.rank} on {host} (pid {ended.pid}) {how}{said}")


def say(text: str) -> None:
    """A sentence of the supervisor's own."""
    _write(f"lumina launch: {text}")


def _write(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        # Nobody reads it any more: the terminal is closed, or Ctrl-C has ended the `tee` it went to, while ranks save.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as this process lives
