"""What the supervisor and its hosts say to each other: orders one way, events the other, a line of JSON each."""

import json
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import ClassVar, get_args, get_origin, get_type_hints

_LINE_LIMIT = 1 << 22  # bytes


@dataclass(frozen=True)
class Message:
    """A line on the wire."""

    kinds: ClassVar[dict[str, type["Message"]]] = {}

    def __init_subclass__(cls) -> None:
        Message.kinds[cls.__name__] = cls


@dataclass(frozen=True)
class Beat(Message):
    """Nothing new: whoever sends it is there."""


# Orders.


@dataclass(frozen=True)
class Prepare(Message):
    """To the host of rank 0: a new folder for the logs of an attempt, and a port."""

    run_dir: str


@dataclass(frozen=True)
class Start(Message):
    """Start the ranks of this host.

    arguments: of the Python that the host has for Lumina.
    first, count, world: its ranks among all.
    slots: devices that they may use, one each; None: those of the host as they are.
    environment: on top of the host's own.
    shared: whether the run's folder must be the one in which the first host has made the attempt's.
    """

    arguments: list[str]
    run_dir: str
    attempt: int
    first: int
    count: int
    world: int
    master_address: str
    master_port: int
    slots: list[int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    shared: bool = False


@dataclass(frozen=True)
class Signal(Message):
    """Pass a signal on to the ranks."""

    number: int


@dataclass(frozen=True)
class End(Message):
    """SIGTERM to what is left of the ranks, and after `grace` seconds SIGKILL."""

    grace: float


@dataclass(frozen=True)
class Forget(Message):
    """After bad input nothing is left behind: remove an attempt's logs, which say no more than was shown."""

    run_dir: str
    attempt: int


# Events.


@dataclass(frozen=True)
class Hello(Message):
    """The first of a connection.

    token: which the supervisor gave with the command.
    pid: of the agent, and `born` when it was started, in seconds, by which it is told from a later process.
    """

    token: str
    pid: int
    born: float
    addresses: list[str]
    version: str


@dataclass(frozen=True)
class Prepared(Message):
    """How far the run has come so far: the last step that it trained, and the newest that it saved."""

    attempt: int
    logs: str
    port: int
    furthest: int
    saved: int
    fresh: bool


@dataclass(frozen=True)
class Line(Message):
    """What rank 0 has written."""

    text: str


@dataclass(frozen=True)
class Error(Message):
    """A sentence with which a rank ended."""

    rank: int
    text: str


@dataclass(frozen=True)
class Ended(Message):
    """A rank has ended, by exit code `code` or, negative, by a signal; the last that it wrote."""

    rank: int
    pid: int
    code: int
    last: str


@dataclass(frozen=True)
class Over(Message):
    """All ranks of this host have ended, and nothing that they had started is left."""

    furthest: int
    saved: int


@dataclass(frozen=True)
class Refused(Message):
    """An order cannot be carried out.

    bad_input: whether the user can mend it.
    """

    text: str
    bad_input: bool


def encode(message: Message) -> bytes:
    """The line, with its end."""
    return json.dumps({"kind": type(message).__name__} | asdict(message)).encode() + b"\n"


def decode(line: bytes) -> Message:
    """
    Raises:
        ValueError: for a line that is no message.
    """
    try:
        fields = json.loads(line)
        message = Message.kinds[fields.pop("kind")](**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"no message: {line[:80]!r}") from error
    # Anybody can connect to the port and send something of the right form.
    if wrong := [name for name, kind in get_type_hints(type(message)).items() if not _is(getattr(message, name), kind)]:
        raise ValueError(f"no message, by its {wrong[0]}: {line[:80]!r}")
    return message


def _is(value: object, kind: object) -> bool:
    if get_origin(kind) is ClassVar:
        return True
    kinds = get_args(kind) if isinstance(kind, UnionType) else (int, float) if kind is float else (kind,)
    return any(isinstance(value, get_origin(one) or one) for one in kinds)


class Channel:
    """Messages over a TCP connection, sent by any thread and received by one. Beats are counted, and not returned."""

    def __init__(self, connection: socket.socket):
        """
        Raises:
            OSError: where the other side has ended it already.
        """
        self._socket, self._sending = connection, threading.Lock()
        self.peer, self.here = connection.getpeername()[0], connection.getsockname()[0]
        """Addresses of the two ends."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(0.0)
        self._partial = b""
        self._unsent = bytearray()
        self.closed = False
        """Whether the other side, or this one, has ended it, or it failed."""
        self.heard = time.monotonic()
        """When something was last received."""

    def send(self, message: Message) -> None:
        """Never waits: what the other side does not take yet is sent with the next."""
        with self._sending:
            self._unsent += encode(message)
            try:
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                self.closed = self.closed or len(self._unsent) > 16 * _LINE_LIMIT
            except OSError:
                self.closed = True

    def receive(self) -> list[Message]:
        """What has arrived; empty where nothing has."""
        try:
            while len(self._partial) < _LINE_LIMIT:
                data = self._socket.recv(1 << 16)
                if not data:
                    self.closed = True
                    break
                self._partial += data
                self.heard = time.monotonic()
        except OSError as error:
            self.closed = self.closed or not isinstance(error, BlockingIOError)  # nothing more for now
        *lines, self._partial = self._partial.split(b"\n")
        self.closed = self.closed or len(self._partial) >= _LINE_LIMIT
        try:
            messages = [decode(line) for line in lines]
        except ValueError:  # something else talks to this port
            self.closed = True
            return []
        return [message for message in messages if not isinstance(message, Beat)]

    def close(self) -> None:
        self.closed = True
        self._socket.close()
