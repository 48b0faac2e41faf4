"""What a run finds on a host beside its devices: the clock, disks, shared memory, a port."""

import errno
import fcntl
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil

from lumina.config.files import PROBE
from lumina.doctor.check import FAIL, OK, WARNING, Check
from lumina.doctor.software import newest_file
from lumina.train.assemble import LOCK, holds_no_run

SHARED_MEMORY = Path("/dev/shm")
DEFAULT_PORT = 29500
"""Of torchrun and DeepSpeed."""
_MB, _GB = 10**6, 10**9
_DISK_FAILS, _DISK_WARNS = 100 * _MB, 5 * _GB  # where nothing tells how much a run will write
_SHARED_FAILS, _SHARED_WARNS = 64 * _MB, 512 * _MB
_DAY = 86_400
_OTHER_PORT = "torchrun --master-port, deepspeed --master_port"


def check_clock() -> Check:
    """Whether it is behind what is installed, which was written earlier."""
    now = time.time()
    told = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if newest_file() > now + _DAY:
        return Check(
            "clock",
            WARNING,
            f"{told}: earlier than the files of Lumina were written",
            "set it, and keep it with chrony or systemd-timesyncd: indexes older than their shards are built anew",
        )
    return Check("clock", OK, told)


def check_folder(run_dir: Path) -> Iterator[Check]:
    """Whether a run can be started there."""
    there = existing(run_dir)
    if wrong := unwritable(there):
        yield Check(
            "run folder",
            FAIL,
            f"{run_dir} cannot be written: {wrong}",
            f"give {_user()} the right to write in {there}, free it if it is full, or name another run.dir",
        )
    elif holds_no_run(run_dir):
        yield Check(
            "run folder", FAIL, f"{run_dir} is not empty and holds no run of Lumina", "name a new folder as run.dir"
        )
    elif _is_locked(run_dir):
        mend = "wait for it, end it, or name another run.dir"
        yield Check("run folder", WARNING, f"{run_dir}: another process trains there", mend)
    else:
        yield Check("run folder", OK, f"{run_dir} can be written" + ("" if there == run_dir else " (it is new)"))


def existing(path: Path) -> Path:
    """The folder, or the one in which it would be made."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def unwritable(folder: Path) -> str:
    """Why a file cannot be made in a folder; empty where one can."""
    path = folder / f"{PROBE}{secrets.token_hex(8)}"
    try:
        path.write_bytes(b"lumina")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return error.strerror or str(error)
        why = "No space left on device"
    else:
        why = ""
    path.unlink(missing_ok=True)
    return why


def check_disk(folder: Path, needed: int | None, kept: int = 0) -> Check:
    """
    Args:
        needed: bytes of a checkpoint; None where it is not known.
        kept: bytes of all that a run will keep.
    """
    free = psutil.disk_usage(str(existing(folder))).free
    least = _DISK_FAILS if needed is None else needed
    enough = _DISK_WARNS if needed is None else max(needed, kept)
    said = f"{_bytes(free)} free at {folder}"
    if needed is not None:
        said += f"; a checkpoint takes {_bytes(needed)}, all that are kept {_bytes(kept)}"
    if free < enough:
        mend = "free the disk, or name a run.dir on another" + "; checkpoint.keep says how many are kept" * bool(needed)
        return Check("disk", FAIL if free < least else WARNING, said, mend)
    return Check("disk", OK, said)


def check_shared_memory(gpus: int) -> Check:
    """/dev/shm, through which NCCL joins the GPUs of a host, and torch's worker processes hand over tensors."""
    mend = (
        "in a container: `docker run --ipc=host` or --shm-size=1g; in Kubernetes an emptyDir with medium: Memory there"
    )
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", OK, "none (not Linux)")
    free = psutil.disk_usage(str(SHARED_MEMORY)).free
    said = f"{_bytes(free)} free at {SHARED_MEMORY}"
    if wrong := unwritable(SHARED_MEMORY):
        return Check("shared memory", FAIL, f"{SHARED_MEMORY} cannot be written: {wrong}", mend)
    if free < _SHARED_WARNS:
        return Check("shared memory", FAIL if gpus > 1 and free < _SHARED_FAILS else WARNING, said, mend)
    return Check("shared memory", OK, said)


def check_port(port: int, asked: bool) -> Check:
    """Whether rank 0 could listen there.

    Args:
        asked: whether the user named it: then a run is to use it, which `lumina launch` does of no fixed port.
    """
    probe = socket.socket()
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return Check(
                "port",
                FAIL if asked else WARNING,
                f"{port} cannot be used: {error.strerror}{_listener(port)}",
                f"end what listens there, or take another ({_OTHER_PORT}); `lumina launch` finds a free one by itself",
            )
    return Check("port", OK, f"{port} is free")


def _listener(port: int) -> str:
    """Who listens there, as far as this user may know."""
    try:
        listening = [
            c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        ]
        pid = next((connection.pid for connection in listening if connection.pid is not None), None)
        return f"; {psutil.Process(pid).name()} (pid {pid}) listens there" if pid is not None else ""
    except (psutil.Error, OSError):  # of others' processes it may not be told
        return ""


def _is_locked(run_dir: Path) -> bool:
    path = run_dir / LOCK
    if not path.is_file():
        return False
    with path.open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _user() -> str:
    return psutil.Process().username()


def _bytes(count: int) -> str:
    unit, name = (_GB, "GB") if count >= _GB else (_MB, "MB")
    return f"{count / unit:,.1f} {name}"
