"""The most memory that a process has held."""

from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU since this process started or the count was reset; on a CPU all that the process
    held, None where this is not Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes() if Path("/proc/self/status").exists() else None


def peak_resident_bytes(process: int | None = None) -> int:
    """The most memory that a process (None: this one) held so far, without its descendants; 0 of one that has ended.

    Raises:
        ValueError: not on Linux.
    """
    # Not getrusage: what it says of a new process begins with the peak of the one that started it.
    try:
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
    except OSError as error:
        if process is not None and Path("/proc/self/status").exists():
            return 0
        raise ValueError("peak memory is read from /proc/self/status, which Linux alone has") from error
    return int(next((line.split()[1] for line in lines if line.startswith("VmHWM")), 0)) * 1024
