"""The hosts of a run as its supervisor has them: this one alone, or several, each with an agent."""

import hmac
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from lumina.launch import transport
from lumina.launch.agent import BEAT_SECONDS, CONNECT_SECONDS, LOST_SECONDS, VERSION
from lumina.launch.crew import Crew
from lumina.launch.hostfile import Host
from lumina.launch.messages import Beat, Channel, Hello, Message

_HELLO_SECONDS = 10.0
_OPEN_SECONDS = CONNECT_SECONDS + 40.0  # and a slow start of Python from a network file system
_RETRY_SECONDS = 4.0
_STEADY_SECONDS = 5.0
_STEADY_LIMIT = 3600.0


@dataclass(frozen=True)
class Lost(Message):
    """A host is not there any more; why."""

    why: str


class LocalHost:
    """This host alone, its ranks started by this process."""

    def __init__(self, count: int):
        self.all = [Host(socket.gethostname(), tuple(range(count)))]
        self._crew, self._events = Crew(), []

    def open(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Nothing to connect to."""

    @property
    def there(self) -> list[Host]:
        return self.all

    def address(self, host: Host) -> str:
        return "127.0.0.1"

    def send(self, host: Host, order: Message) -> None:
        self._events += self._crew.handle(order)

    def put_off(self, host: Host, why: str) -> None:
        """There is no other host to go on with.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(why)

    def poll(self) -> list[tuple[Host, Message]]:
        events, self._events = self._events + self._crew.poll(), []
        return [(self.all[0], event) for event in events]

    def close(self) -> None:
        self._crew.close()


@dataclass(eq=False)
class _Link:
    """To a host's agent: being made, there, or lost."""

    host: Host
    token: str = ""
    process: subprocess.Popen | None = None
    channel: Channel | None = None
    hello: Hello | None = None
    words: Path | None = None
    """What the program that connects, and the agent, have written."""
    started: float = 0.0
    since: float = 0.0
    """When it became what it is."""
    losses: int = 0
    state: str = field(default="new")
    """new, connecting, there, or lost."""


class Fleet:
    """Hosts of a hostfile. A thread sends the heartbeats: the other one may wait for a terminal that shows nothing."""

    def __init__(self, hosts: Sequence[Host], launcher: str):
        """`launcher`: of `transport.LAUNCHERS`."""
        self.all = list(hosts)
        self._launcher = launcher
        self._links = {host.name: _Link(host) for host in hosts}
        self._listener = socket.create_server(("", 0), backlog=len(hosts) + 8)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._unknown: list[tuple[Channel, float]] = []
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beats", daemon=True)
        self._folder = TemporaryDirectory(prefix="lumina-launch-")

    def open(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Connect to every host, unless `stopped()` comes true before.

        Raises:
            RuntimeError: naming each host that is not reached, and why.
        """
        self._beating.start()
        for link in self._links.values():
            self._connect(link)
        problems: dict[str, str] = {}
        while not stopped() and any(link.state == "connecting" for link in self._links.values()):
            problems |= {host.name: event.why for host, event in self.poll() if isinstance(event, Lost)}
            time.sleep(0.05)
        if problems and not stopped():
            told = "; ".join(f"host {name}: {why}" for name, why in problems.items())
            raise RuntimeError(f"{told}. Look with `lumina doctor --hostfile`, or leave hosts out with --exclude")

    @property
    def there(self) -> list[Host]:
        """Those whose agents answer, and, of hosts that were lost once, have done so for a while."""
        now = time.monotonic()
        return [
            link.host
            for link in self._links.values()
            if link.state == "there"
            and (not link.losses or now - link.since > min(_STEADY_LIMIT, _STEADY_SECONDS * 2 ** (link.losses - 1)))
        ]

    def address(self, host: Host) -> str:
        """Of a host, for the others."""
        channel = self._links[host.name].channel
        if not channel.peer.startswith("127.") and not transport.is_here(channel.peer):
            return channel.peer
        # This host: by the address at which another one has reached it.
        reached = (link.channel.here for link in self._links.values() if link.state == "there")
        elsewhere = [here for here in reached if not here.startswith("127.")]
        own = self._links[host.name].hello.addresses
        return next(iter(elsewhere), own[0] if own else "127.0.0.1")

    def send(self, host: Host, order: Message) -> None:
        link = self._links[host.name]
        if link.state == "there":
            link.channel.send(order)

    def put_off(self, host: Host, why: str) -> None:
        """Take a host for lost, for a while that is longer each time.

        Raises:
            RuntimeError: where it is the only one.
        """
        if len(self.all) == 1:
            raise RuntimeError(f"host {host.name}: {why}")
        link = self._links[host.name]
        if link.state == "there":
            link.losses += 1
            self._lose(link, why)

    def poll(self) -> list[tuple[Host, Message]]:
        """What hosts have told since the last call, and which are `Lost`; tries those that are, again and again."""
        self._accept()
        now = time.monotonic()
        events: list[tuple[Host, Message]] = []
        for link in self._links.values():
            if link.state == "there":
                events += [(link.host, event) for event in link.channel.receive()]
                if why := self._lost(link, now):
                    link.losses += 1
                    events.append((link.host, self._lose(link, why)))
            elif link.state == "connecting":
                if why := self._unreachable(link, now):
                    events.append((link.host, self._lose(link, why)))
            elif link.state == "lost" and now - link.since > _RETRY_SECONDS:
                self._connect(link)
        return events

    def close(self) -> None:
        """End all agents, and with them whatever is left of their ranks."""
        self._closing.set()
        for link in self._links.values():
            if link.channel is not None:
                link.channel.close()
        deadline = time.monotonic() + 5.0
        for link in self._links.values():
            if link.process is not None:
                try:
                    link.process.wait(max(0.0, deadline - time.monotonic()) if link.state == "there" else 0.0)
                except subprocess.TimeoutExpired:
                    kill_whole(link.process)
        for channel, _ in self._unknown:
            channel.close()
        self._listener.close()
        self._folder.cleanup()

    def _beat(self) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            for link in self._links.values():
                if (channel := link.channel) is not None:
                    channel.send(Beat())

    def _connect(self, link: _Link) -> None:
        link.token, link.words = secrets.token_hex(16), Path(self._folder.name) / link.host.name.replace("/", "_")
        here = transport.is_here(link.host.name)
        ours = [address for _, address in transport.addresses()]
        reached = ["127.0.0.1"] if here or not ours else _towards(link.host.name, ours)
        arguments = ["-m", "lumina.launch.agent", "--supervisor", ",".join(reached), "--port", str(self._port)]
        arguments += ["--token", link.token]
        if link.hello is not None:
            arguments += ["--replaces", f"{link.hello.pid}@{link.hello.born}"]
        with link.words.open("wb") as words:
            link.process = subprocess.Popen(
                transport.command_on(link.host, self._launcher, arguments),
                env=dict(os.environ) if here else transport.environment_of(self._launcher),
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process to pass on
            )
        link.state, link.started = "connecting", time.monotonic()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody knocks, or no file is left to open: the next call tries again
                break
            try:
                self._unknown.append((Channel(connection), time.monotonic()))
            except OSError:  # whoever it was has gone
                connection.close()
        for entry in list(self._unknown):
            channel, since = entry
            found = channel.receive()
            if found or channel.closed or time.monotonic() - since > _HELLO_SECONDS:
                self._unknown.remove(entry)
                if not (found and self._welcome(channel, found[0])):
                    channel.close()

    def _welcome(self, channel: Channel, first: Message) -> bool:
        if not isinstance(first, Hello) or not first.token.isascii():
            return False
        for link in self._links.values():
            if link.state == "connecting" and hmac.compare_digest(link.token, first.token):
                if first.version != VERSION:
                    link.words.write_text(f"it has Lumina {first.version}, and this host {VERSION}\n")
                    return False
                link.channel, link.hello, link.state, link.since = channel, first, "there", time.monotonic()
                return True
        return False

    def _lost(self, link: _Link, now: float) -> str:
        if link.channel.closed:
            said = _last_line(link.words)
            return "its agent has ended" + (f': "{said}"' if said else ": it was killed, or the host went down")
        silent = now - link.channel.heard
        return f"not heard of for {silent:.0f} s: it stopped, or the network to it is cut" * (silent > LOST_SECONDS)

    def _unreachable(self, link: _Link, now: float) -> str:
        code = link.process.poll()
        if code is not None:
            said = _last_line(link.words) or f"{self._launcher} ended with exit code {code}"
            return f"cannot be reached: {said}"
        late = now - link.started > _OPEN_SECONDS
        return f"cannot be reached: no answer for {_OPEN_SECONDS:.0f} s" * late

    def _lose(self, link: _Link, why: str) -> Lost:
        if link.channel is not None:
            link.channel.close()
        kill_whole(link.process)
        link.channel, link.state, link.since = None, "lost", time.monotonic()
        return Lost(why)


def kill_whole(process: subprocess.Popen) -> None:
    """A program that connects, and the ssh that it may have started: on the other host sshd then ends the agent."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


def _towards(name: str, ours: list[str]) -> list[str]:
    """Our addresses, the one that packets to a host leave from first."""

    def routed() -> Iterator[str]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((name, 9))  # sends nothing
                yield probe.getsockname()[0]
            except OSError:  # a name that ssh alone knows
                return

    first = list(routed())
    return sorted(ours, key=lambda address: address not in first)


def _last_line(words: Path) -> str:
    """What ssh or the agent wrote, without what the program that calls ssh says of it."""
    lines = [line.strip() for line in words.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("pdsh@")]
    # mpirun explains itself between lines of dashes, at length.
    rules = [number for number, line in enumerate(lines) if not line.strip("-")]
    if rules:
        lines = lines[: rules[0]] or [line for line in lines if line.strip("-")][:1]
    return lines[-1] if lines else ""
