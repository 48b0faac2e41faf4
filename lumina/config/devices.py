"""Devices by their data sheets."""

from dataclasses import dataclass

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """Of one accelerator.

    memory: bytes that CUDA finds on it, which may be less than its name says.
    tflops: dense bf16, without sparsity.
    tflops_fp32: of fp32 products as torch runs them by default, without TF32.
    bandwidth: bytes a second of its own memory.
    link: bytes a second that it sends to others of its host, each way (NVLink; PCIe where there is none).
    network: bytes a second that it sends to other hosts, where each device has a port of its own.
    host: bytes a second to and from the memory of its host.
    """

    name: str
    memory: int
    tflops: float
    tflops_fp32: float
    bandwidth: float
    link: float
    network: float
    host: float


_SHEETS = (
    # NVIDIA's data sheets; NVLink's total counts both ways. Network: one 200 Gb/s port for each A100, one of 400 for
    # the others, as in NVIDIA's own DGX systems. An H200 was seen to have 139 GiB; how far the B200 and, with ECC, the
    # L40S fall short of their names is not looked up.
    Device("a100-40g", 40 * GIB, 312.0, 19.5, 1.555e12, 300 * GB, 25 * GB, 25 * GB),
    Device("a100-80g", 80 * GIB, 312.0, 19.5, 2.039e12, 300 * GB, 25 * GB, 25 * GB),
    Device("h100-80g", 80 * GIB, 989.0, 67.0, 3.35e12, 450 * GB, 50 * GB, 55 * GB),
    Device("h200-141g", 139 * GIB, 989.0, 67.0, 4.8e12, 450 * GB, 50 * GB, 55 * GB),
    Device("b200-180g", 178 * GIB, 2250.0, 75.0, 7.7e12, 900 * GB, 50 * GB, 55 * GB),
    Device("l40s-48g", 44 * GIB, 362.0, 91.6, 0.864e12, 25 * GB, 25 * GB, 25 * GB),
)
DEVICES = {sheet.name: sheet for sheet in _SHEETS}

# By a part of torch's device name: the more special first.
_NAMES = {
    "H200": DEVICES["h200-141g"].tflops,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": DEVICES["h100-80g"].tflops,
    "B200": DEVICES["b200-180g"].tflops,
    "A100": DEVICES["a100-80g"].tflops,
    "L40S": DEVICES["l40s-48g"].tflops,
    "4090": 165.0,
}


def known_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by torch's name of it; None for one that is not in the table."""
    return next((peak for part, peak in _NAMES.items() if part in name), None)
