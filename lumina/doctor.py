"""`lumina doctor`: what is installed, which devices there are, and what each operation runs on here."""

import argparse
import json
import platform
import shutil
from typing import Any

import torch

from lumina import __version__, kernels
from lumina.benchmark import record
from lumina.kernels import optional, triton_support
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.kernels.dispatch import REFERENCE_FORCED, Operation

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIM = 128


def findings() -> dict[str, Any]:
    """As `--json` prints them."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    return {
        "lumina": __version__,
        "python": platform.python_version(),
        "packages": record.versions(),
        "optional": {
            "flash-attn": optional.flash_attn() is not None,
            "flash-attn 3": optional.flash_attn_3() is not None,
            "apex": optional.apex_layer_norm() is not None,
        },
        "devices": [record.hardware(device) for device in devices],
        "kernels": {name: _chosen(devices[0], dtype) for name, dtype in DTYPES.items()},
        "why": _why(devices[0]),
    }


def _chosen(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What every operation runs on, at a model's sizes."""
    x = torch.empty(1, 1, HEAD_DIM, device=device, dtype=dtype)
    operations = [operation for name in kernels.__all__ if isinstance(operation := getattr(kernels, name), Operation)]
    chosen = {operation.name: operation.chosen(x) for operation in operations}
    return chosen | {"attention with lse (ring)": lse_backend(x).name}


def _why(device: torch.device) -> str:
    """Why the Triton kernels run here, or do not."""
    if REFERENCE_FORCED:
        return "LUMINA_KERNELS=reference: every operation runs its torch reference"
    if device.type == "cpu":
        return "no CUDA device: the fused operations run their torch references, which are right and slower"
    if triton_support.triton is None:
        return "Triton is not installed: the fused operations run their torch references (pip install triton)"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "a CUDA device and Triton, but no C compiler, without which Triton starts no kernel: install gcc"
    return "a CUDA device and Triton: the fused operations run their Triton kernels"


def examine(arguments: argparse.Namespace) -> None:
    """The verb: prints `findings`."""
    found = findings()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    print(f"lumina {found['lumina']}, Python {found['python']}")
    print("installed: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    absent = [name for name, there in found["optional"].items() if not there]
    if absent:
        print(f"not installed, and not needed: {', '.join(absent)}")
    for i, device in enumerate(found["devices"]):
        print(f"device {i}: {device}")
    print(f"kernels: {found['why']}\n")
    rows = [(name, *(of[name] for of in found["kernels"].values())) for name in next(iter(found["kernels"].values()))]
    print(record.table(["operation", *found["kernels"]], rows))
