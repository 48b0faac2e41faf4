"""The GPUs of a host: whether they are there, free, and in their right mind."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import psutil
import torch

from lumina.doctor.check import FAIL, OK, WARNING, Check

_SECONDS = 20
_GIB = 2**30
_FREE_SHARE = 0.9
_SIZE = 1024  # of the product that each GPU makes
# Field of nvidia-smi, what a value other than 0 or No means, and whether the GPU must not be used then.
_HEALTH = {
    "ecc.errors.uncorrected.volatile.total": ("memory errors that ECC could not correct", True),
    "retired_pages.pending": ("memory pages that wait for a restart to be retired", False),
    "remapped_rows.pending": ("memory rows that wait for a reset to be remapped", False),
    "remapped_rows.failure": ("memory rows that could not be remapped", True),
    "clocks_throttle_reasons.hw_thermal_slowdown": ("it is slowed down for its heat", False),
    "clocks_throttle_reasons.hw_power_brake_slowdown": ("it is slowed down for want of power", False),
}
_FINE = {"0", "no", "not active", "[n/a]", "n/a", "[not supported]", ""}


def nvidia_smi(fields: Sequence[str]) -> list[list[str]]:
    """Values of `fields` for each GPU; empty without nvidia-smi, and where it knows not all of the fields."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode:
        return []
    return [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def driver_version() -> str | None:
    """Of NVIDIA, or None."""
    found = nvidia_smi(["driver_version"])
    return found[0][0] if found else None


def check_devices(slots: Sequence[int] | None) -> Iterator[Check]:
    """Number, memory and health of the GPUs.

    Args:
        slots: which are to be used; None: all.
    """
    count = torch.cuda.device_count()
    if not count:
        ranks, cores = len(slots or [0]), len(psutil.Process().cpu_affinity()) if psutil.LINUX else psutil.cpu_count()
        crowded = ranks > cores
        yield Check(
            "devices",
            WARNING if crowded else OK,
            f"no GPU: {ranks} rank{'s' * (ranks > 1)} on {cores} core{'s' * (cores > 1)}",
            "ranks that share cores wait for each other: give the host fewer slots" * crowded,
        )
        return
    name = torch.cuda.get_device_name(0)
    if slots is not None and max(slots) >= count:
        yield Check(
            "devices",
            FAIL,
            f"GPUs: {count} ({name}), and slots {_ranges(slots)} of the hostfile",
            f"give it slots={count}; if it has more GPUs, look at CUDA_VISIBLE_DEVICES and `nvidia-smi`",
        )
        slots = [slot for slot in slots if slot < count]
    else:
        unused = f", of which {len(slots)} are used" if slots is not None and len(slots) < count else ""
        yield Check("devices", OK, f"GPUs: {count} ({name}){unused}")
    used = list(range(count)) if slots is None else list(slots)
    yield _memory(used)
    yield _health(used)


def _memory(used: Sequence[int]) -> Check:
    room = {number: torch.cuda.mem_get_info(number) for number in used}
    total = max((total for _, total in room.values()), default=0)
    taken = [number for number, (free, of) in room.items() if free < _FREE_SHARE * of]
    if taken:
        told = ", ".join(
            f"GPU {number}: {room[number][0] / _GIB:.1f} of {room[number][1] / _GIB:.1f}" for number in taken
        )
        mend = "end what else runs there; `nvidia-smi` lists it"
        return Check("device memory", WARNING, f"GiB that are free: {told}", mend)
    return Check("device memory", OK, f"{total / _GIB:.1f} GiB each, free")


def _health(used: Sequence[int]) -> Check:
    broken, worn = [], []
    for field, (what, fatal) in _HEALTH.items():
        rows = nvidia_smi(["index", field])  # one by one: an older nvidia-smi refuses all for one that it does not know
        for index, value in rows:
            if int(index) in used and value.lower() not in _FINE:
                (broken if fatal else worn).append(f"GPU {index}: {what} ({value})")
    broken += [f"GPU {number}: {wrong}" for number in used if (wrong := _computes_wrongly(number))]
    worn += [f"the kernel log has {found}" for found in xids(_kernel_log())]
    if broken or worn:
        return Check(
            "device health",
            FAIL if broken else WARNING,
            "; ".join([*broken, *worn]),
            "leave the GPU out (--exclude HOST:SLOT) and have it looked at; a reset (`nvidia-smi -r`) or a restart "
            "clears what is pending",
        )
    return Check("device health", OK, "no uncorrected errors; each multiplies rightly")


def _computes_wrongly(number: int) -> str:
    """What is wrong with a product of whole numbers, which fp32 has without rounding; empty where nothing is."""
    generator = torch.Generator().manual_seed(number)
    a, b = (torch.randint(-8, 9, (_SIZE, _SIZE), generator=generator, dtype=torch.float32) for _ in "ab")
    try:
        device = torch.device("cuda", number)
        product = (a.to(device) @ b.to(device)).cpu()
    except RuntimeError as error:
        return f"it does not compute ({str(error).splitlines()[0]})"
    wrong = int((product != a @ b).sum())
    return f"{wrong} of {_SIZE**2} elements of a product are wrong" if wrong else ""


def xids(log: str) -> list[str]:
    """Errors of NVIDIA's driver in a kernel log: "Xid 79 of 0000:3b:00", each once."""
    found = re.findall(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)", log)
    return list(dict.fromkeys(f"Xid {number} of {place}" for place, number in found))


def _kernel_log() -> str:
    """Empty where it may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _ranges(slots: Sequence[int]) -> str:
    return f"{min(slots)}–{max(slots)}" if len(slots) > 1 else str(slots[0])
