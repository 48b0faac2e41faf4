"""Hosts for tests: network namespaces on one switch, each with a name of its own and a real sshd.

They share files, processes and the clock with this one. What is started on one is found again by `Cluster.left`, and
ended with it.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

_PROGRAMS = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh")
_SBIN = ("/usr/sbin", "/sbin")
PATIENCE = 900.0
"""Seconds after which something hangs."""
_ROUND_SECONDS = 0.25
_NETWORK = "10.77.0"


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [name for name in _PROGRAMS if _program(name) is None]:
        return f"not installed: {', '.join(absent)}"
    _sweep()
    name = f"lumina-{os.getpid()}-probe"
    if subprocess.run([_program("ip"), "netns", "add", name], capture_output=True).returncode:
        return "`ip netns add` is not allowed here"
    _ip("netns", "del", name)
    return ""


class Rounds:
    """A clock for what is to happen within some seconds: a round of whoever waits counts as a quarter of one at most.

    So a time in which nothing ran here, neither those who wait nor those who are waited for, does not count.
    """

    def __init__(self):
        self.seconds, self._last = 0.0, time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait, and count the round that ends so."""
        time.sleep(seconds)
        now = time.monotonic()
        self.seconds, self._last = self.seconds + min(now - self._last, _ROUND_SECONDS), now


class Cluster:
    """`names` as hosts at 10.77.0.1, 10.77.0.2, … Close it."""

    def __init__(self, names: list[str], folder: Path, own_name: str = ""):
        """
        Args:
            names: of the hosts.
            folder: an empty one, for keys and settings.
            own_name: an address, such as 127.0.1.1, that the name of each host stands for on that host alone; its own
                in the network unless given.
        """
        self.names, self.folder = list(names), folder
        self._sshd: dict[str, subprocess.Popen] = {}
        self._started: list[subprocess.Popen] = []
        self._prefix = f"lumina-{os.getpid()}-{id(self):x}"
        self._switch = f"{self._prefix}-switch"
        self.address = {name: f"{_NETWORK}.{number}" for number, name in enumerate(names, 1)}
        try:
            self._build(own_name)
        except BaseException:
            self.close()
            raise

    def _build(self, own_name: str) -> None:
        self._write_ssh()
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for number, name in enumerate(self.names, 1):
            space = self._space(name)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
            ends = ("eth0", "netns", space, "type", "veth", "peer", "name", f"port{number}", "netns", self._switch)
            _ip("link", "add", *ends)
            _ip("-n", space, "address", "add", f"{self.address[name]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", self._switch, "link", "set", f"port{number}", "master", "switch", "up")
            hosts = self.folder / f"hosts.{name}"
            own = {name: own_name} if own_name else {}
            lines = [f"{address} {host}" for host, address in (self.address | own).items()]
            hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            # sshd wants a folder below /run, which is that of the whole machine otherwise.
            inside = (
                f"hostname {name} && mount --bind {hosts} /etc/hosts && mount -t tmpfs none /run && mkdir /run/sshd && "
                f"exec {_program('sshd')} -D -e -f {self.folder}/sshd_config"
            )
            with (self.folder / f"sshd.{name}").open("wb") as log:
                self._sshd[name] = subprocess.Popen(
                    [_program("ip"), "netns", "exec", space, "unshare", "--uts", "--mount", "sh", "-c", inside],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for name in self.names:
            self._wait_for_sshd(name)

    def _write_ssh(self) -> None:
        for key in ("host_key", "user_key"):
            path = self.folder / key
            subprocess.run([_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\n"
            "PidFile none\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPrintMotd no\nMaxStartups 100\n"
        )
        (self.folder / "ssh_config").write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            "  UserKnownHostsFile /dev/null\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n"
            "  LogLevel ERROR\n  ConnectTimeout 10\n"
        )
        (self.folder / "bin").mkdir()
        wrapper = self.folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {_program("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _wait_for_sshd(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while "Server listening on 0.0.0.0" not in (said := (self.folder / f"sshd.{name}").read_text()):
            assert self._sshd[name].poll() is None, f"sshd of {name}: {said}"
            assert time.monotonic() < deadline, f"sshd of {name}: {said}"
            time.sleep(0.05)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the hosts' own ssh, and nothing that names a network or a launcher's ranks."""
        kept = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
        return kept | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def on(self, name: str, command: list[str]) -> list[str]:
        """What to run here so that `command` runs on a host, in this folder, as the process that is started."""
        space = ["nsenter", "--target", str(self._sshd[name].pid), "--net", "--uts", "--mount"]
        return [*space, "env", "-C", os.getcwd(), *map(str, command)]

    def run(self, name: str, command: list[str], **options) -> subprocess.CompletedProcess:
        """On a host, to its end."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": PATIENCE} | options
        return subprocess.run(self.on(name, command), **options)

    def start(self, name: str, command: list[str], **options) -> subprocess.Popen:
        """On a host; ended with the cluster at the latest."""
        process = subprocess.Popen(self.on(name, command), **({"env": self.environment} | options))
        self._started.append(process)
        return process

    def hostfile(self, slots: int) -> Path:
        """One that names all hosts."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def cut(self, name: str) -> None:
        """Pull a host's cable out of the switch."""
        self._port(name, "down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        self._port(name, "up")

    def _port(self, name: str, state: str) -> None:
        _ip("-n", self._switch, "link", "set", f"port{self.names.index(name) + 1}", state)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those that live on a host, without its sshd and the sessions of that."""
        space = os.stat(f"/proc/{self._sshd[name].pid}/ns/net").st_ino
        return [process for process in _in_spaces({space}) if not _name(process).startswith("sshd")]

    def left(self) -> list[str]:
        """What still runs on any host, but for sshd."""
        found = [process for name in self.names for process in self.processes(name)]
        return [told for told in map(_told, found) if told]

    def wait_until_empty(self, seconds: float = 5.0, but: str = "nothing") -> None:
        """
        Args:
            seconds: in rounds; by default less than an agent that is forgotten takes to end by itself.
            but: words of a command that may run on.

        Raises:
            AssertionError: with what still runs after so many seconds.
        """
        rounds = Rounds()
        while left := [told for told in self.left() if but not in told]:
            assert rounds.seconds < seconds, left
            rounds.sleep(0.1)

    def close(self) -> None:
        """End whatever still runs on the hosts, and take them down."""
        spaces = set()
        for process in self._sshd.values():
            try:
                spaces.add(os.stat(f"/proc/{process.pid}/ns/net").st_ino)
            except FileNotFoundError:  # it has ended by itself
                continue
        spaces.discard(os.stat("/proc/self/ns/net").st_ino)
        deadline = time.monotonic() + PATIENCE
        while (alive := _in_spaces(spaces)) and time.monotonic() < deadline:
            for process in alive:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(alive, timeout=1.0)
        for process in (*self._sshd.values(), *self._started):
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for name in _spaces():
            if name.startswith(self._prefix):
                _ip("netns", "del", name)
        assert not alive, alive


def _sweep() -> None:
    """Hosts of a test process that was killed."""
    for name in _spaces():
        found = re.match(r"lumina-(\d+)-", name)
        if found and not psutil.pid_exists(int(found.group(1))):
            try:
                for process in _in_spaces({os.stat(f"/run/netns/{name}").st_ino}):
                    process.kill()
                _ip("netns", "del", name)
            except (FileNotFoundError, psutil.NoSuchProcess, AssertionError):
                continue  # another test process sweeps too


def _spaces() -> list[str]:
    listed = subprocess.run([_program("ip"), "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _in_spaces(spaces: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.stat(f"/proc/{process.pid}/ns/net").st_ino in spaces and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.NoSuchProcess):  # it has ended meanwhile
            continue
    return found


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:  # it is as good as one of those that do not count
        return "sshd"


def _told(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        return ""


def _ip(*arguments: str) -> None:
    done = subprocess.run([_program("ip"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ["PATH"], *_SBIN)))
