"""Where the bytes of a shard come from: a local file, a URL, or a command that the user allows by name."""

import io
import os
import random
import re
import shlex
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHELL_WORDS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1"}
PIPE_SILENCE = 600.0
"""Seconds for which a command may give nothing before it is ended."""


@dataclass(frozen=True)
class Retry:
    """How often a failed request is sent again.

    The pause before attempt n+1 is `first_pause`·2ⁿ⁻¹ seconds, at most `longest_pause`, times a random number from
    0.5 to 1, so that a thousand readers that failed together do not come back together.

    Attributes:
        attempts: requests in all.
        seconds: time for all of them with their pauses; a request that is running then is given up.
        silence: seconds for which a server may send nothing.
    """

    attempts: int = 6
    seconds: float = 120.0
    first_pause: float = 0.5
    longest_pause: float = 20.0
    silence: float = 30.0

    def pause(self, attempt: int) -> float:
        """Seconds to wait after `attempt` (1, 2, …) failed."""
        # Not the global generator: training draws from that.
        jitter = random.SystemRandom().uniform(0.5, 1.0)
        return min(self.longest_pause, self.first_pause * 2 ** (attempt - 1)) * jitter


class MissingSourceError(ValueError):
    """The file or object is not there, or may not be read."""


class Source(ABC):
    """The bytes of one shard, or of an index. It may be sent to another process, where it opens what it needs.

    Attributes:
        location: the path, URL or `pipe:COMMAND`; `str(source)` is the same without passwords and signatures.
        remote: whether reading it goes over a network, so that a cache pays.
        ranged: whether reading from the middle costs no more than from the start.
    """

    location: str
    remote = True
    ranged = True

    @property
    def name(self) -> str:
        """File name, of which a shard's place among the others and the identity of the data are made."""
        return str(self).rstrip("/").rpartition("/")[2].partition("?")[0]

    def __str__(self) -> str:
        return self.location

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self!s})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.location == self.location

    def __hash__(self) -> int:
        return hash(self.location)

    @abstractmethod
    def size(self) -> int:
        """Bytes. `MissingSourceError` if it is not there."""

    @abstractmethod
    def identity(self) -> str:
        """Changes with the content as far as can be told without reading it: size and time of change, or ETag."""

    @abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from byte `offset`; `ValueError` if there are fewer or they cannot be read."""

    @abstractmethod
    def stream(self) -> io.BufferedReader:
        """All the bytes from the start, for one pass; its reads raise `ValueError` as `read` does."""

    def beside(self, name: str) -> "Source | None":
        """The source called `name` in the same folder, None where there is no such thing."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back descriptors, while no other thread reads; a later read opens them again."""


class LocalSource(Source):
    """A file."""

    remote = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.location = str(path)
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return LocalSource, (self.path,)

    def __del__(self) -> None:
        self.close()

    @property
    def name(self) -> str:
        return self.path.name

    def stat(self) -> os.stat_result:
        """Size and times; `MissingSourceError` if it is not there."""
        try:
            return self.path.stat()
        except OSError as error:
            raise self._failure(error) from error

    def size(self) -> int:
        return self.stat().st_size

    def identity(self) -> str:
        stat = self.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = self._pread(offset, size)
        except OSError as error:
            raise self._failure(error) from error
        if len(data) != size:
            raise ValueError(
                f"{self} ends at byte {self.size()}, before byte {offset + size}; was it cut or written over?"
            )
        return data

    def _pread(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._descriptor, size, offset)
        # One call gives at most 2 GiB, and network file systems sometimes less than is there.
        while data and len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def stream(self) -> io.BufferedReader:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise self._failure(error) from error

    def beside(self, name: str) -> "LocalSource":
        return LocalSource(self.path.with_name(name))

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _failure(self, error: OSError) -> ValueError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return MissingSourceError(f"{self} is missing")
        if isinstance(error, PermissionError):
            return MissingSourceError(f"{self} may not be read (permission denied)")
        return ValueError(f"{self} cannot be read ({error.strerror})")


class PipeSource(Source):
    """What a command writes to its standard output.

    The command is started without a shell. It gives bytes from the start only: a read before the last one's end
    starts it again, and `size` runs it to its end. Its identity is that of the command, so that a change of what
    it gives is noticed by the CRCs alone.

    Raises:
        ValueError: the program is not among `programs`, or the command asks for a shell.
    """

    ranged = False

    def __init__(self, command: str, programs: Sequence[str] = ()) -> None:
        self.location = f"pipe:{command}"
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{self} is no command ({error})") from error
        if not self._words:
            raise ValueError(f"{self} names no program; write pipe:PROGRAM ARGUMENT…")
        if self._words[0] not in programs:
            allowed = ", ".join(programs) or "none is"
            raise ValueError(
                f"{self} would run {self._words[0]}, which data.pipe_programs does not allow (allowed: {allowed}); "
                f"add {self._words[0]} to it if you trust the list of shards"
            )
        if shell := next((word for word in self._words if word in _SHELL_WORDS or word.endswith(";")), None):
            raise ValueError(f"{self} uses {shell!r}, but no shell runs it; put the commands into a script")
        self._programs = tuple(programs)
        self._size: int | None = None
        self._running: _Command | None = None
        self._at = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return PipeSource, (self.location.removeprefix("pipe:"), self._programs), {"_size": self._size}

    def __del__(self) -> None:
        if getattr(self, "_running", None) is not None:
            self.close()

    @property
    def name(self) -> str:
        """Last part of the last word that ends in .tar; without one, the command."""
        tars = [word for word in self._words if word.partition("?")[0].endswith(".tar")]
        return tars[-1].partition("?")[0].rpartition("/")[2] if tars else self.location

    def size(self) -> int:
        if self._size is None:
            with self.stream() as stream:
                self._size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
        return self._size

    def identity(self) -> str:
        return self.location

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._running is None or offset < self._at:
                self._stop()
                self._running, self._at = _Command(self._words, str(self)), 0
            buffered = io.BytesIO()
            while self._at < offset + size:
                wanted = (offset if self._at < offset else offset + size) - self._at
                block = self._running.read(min(wanted, 1 << 20))
                if not block:
                    end, self._at = self._at, 0
                    self._stop()
                    raise ValueError(f"{self} ends at byte {end}, before byte {offset + size}")
                if self._at >= offset:
                    buffered.write(block)
                self._at += len(block)
            return buffered.getvalue()

    def stream(self) -> io.BufferedReader:
        return io.BufferedReader(_Command(self._words, str(self)), 1 << 20)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


class _Command(io.RawIOBase):
    """Output of a command; the end of it is an error where the command failed."""

    def __init__(self, words: Sequence[str], said: str) -> None:
        self._said = said
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the command
        self._process: subprocess.Popen | None = None
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
            )
        except OSError as error:
            raise ValueError(f"{said} cannot be started ({error.strerror})") from error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:
        if not wait([self._process.stdout], timeout=PIPE_SILENCE):
            raise ValueError(f"{self._said} gave nothing for {PIPE_SILENCE:.0f} s")
        count = self._process.stdout.readinto(buffer)
        if not count and len(buffer) and (code := self._process.wait()):
            self._errors.seek(max(0, self._errors.seek(0, io.SEEK_END) - 1000))
            lines = self._errors.read().decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise ValueError(f"{self._said} ended with code {code} ({last})")
        return count

    def close(self) -> None:
        if not self.closed:
            if self._process is not None:
                self._process.kill()
                self._process.stdout.close()
                self._process.wait()
            self._errors.close()
        super().close()


def is_url(text: str) -> bool:
    """Whether `text` is a URL other than file://."""
    match = _URL.match(text)
    return bool(match) and match[1].lower() != "file"


def source_of(
    location: str | Path | Source, *, pipe_programs: Sequence[str] = (), retry: Retry | None = None
) -> Source:
    """The source that a path, URL or `pipe:COMMAND` names; nothing is opened yet.

    Args:
        location: one shard; a `Source` is given back as it is.
        pipe_programs: programs that `pipe:` may run.
        retry: for URLs; the defaults of `Retry` if None.

    Raises:
        ValueError: a program that is not allowed, or a file system for which a package is missing.
    """
    if isinstance(location, Source):
        return location
    if isinstance(location, Path):
        return LocalSource(location)
    if location.startswith("pipe:"):
        return PipeSource(location.removeprefix("pipe:").strip(), pipe_programs)
    if not is_url(location):
        return LocalSource(location.removeprefix("file://"))
    from lumina.data.remote import HttpSource, ObjectSource

    kind = HttpSource if location.lower().startswith(("http://", "https://")) else ObjectSource
    return kind(location, retry or Retry())
