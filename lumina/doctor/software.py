"""What is installed on a host: versions, Lumina's own code, and what each operation runs on."""

import hashlib
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lumina import __version__, kernels
from lumina.benchmark import record
from lumina.doctor.check import FAIL, OK, WARNING, Check
from lumina.doctor.devices import driver_version
from lumina.kernels import optional, triton_support
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.kernels.dispatch import REFERENCE_FORCED, Operation

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIM = 128
_DISTRIBUTION = "lumina-t2x"
_ROOMS = ("lumina", "lumina.kernels", "lumina.megatron_patches")
_GIT_SECONDS = 10


def findings() -> dict[str, Any]:
    """Versions, devices, and what every operation runs on; `facts` are what must be the same on all hosts."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    packages = record.versions()
    digest, files = code_hash()
    return {
        "lumina": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "optional": {
            "flash-attn": optional.flash_attn() is not None,
            "flash-attn 3": optional.flash_attn_3() is not None,
            "apex": optional.apex_layer_norm() is not None,
        },
        "devices": [record.hardware(device) for device in devices],
        "kernels": {name: _chosen(devices[0], dtype) for name, dtype in DTYPES.items()},
        "why": why(devices[0]),
        "host": socket.gethostname(),
        "facts": {
            "code": digest,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "driver": driver_version(),
            "NCCL": _nccl(),
            **{name: version for name, version in packages.items() if name not in ("torch", "liger-kernel", "numpy")},
        },
        "code": {"sha256": digest, "files": files, "commit": _commit()},
    }


def check_software(found: dict[str, Any]) -> Iterator[Check]:
    """Of `findings`: what a host has to have, whatever the others have."""
    facts, code = found["facts"], found["code"]
    wanted = _required_python()
    if wanted and not wanted[0] <= sys.version_info[:2] < wanted[1]:
        asked = ", ".join(f"{major}.{minor}" for major, minor in wanted)
        yield Check(
            "Python",
            FAIL,
            f"{facts['Python']} at {sys.executable}",
            f"install Lumina for a Python from the first of {asked} to below the second",
        )
    else:
        yield Check("Python", OK, f"{facts['Python']} at {sys.executable}")
    yield _packages(found["packages"])
    commit = f", commit {code['commit']}" if code["commit"] else ""
    yield Check("code", OK, f"Lumina {found['lumina']}, {code['sha256'][:12]} over {code['files']} files{commit}")
    yield _cuda(facts)
    gpu = torch.cuda.is_available()
    slow = gpu and not found["why"].endswith("their Triton kernels")
    chosen = found["kernels"]["bf16"]
    finding = (
        f"{found['why']}; attention in bf16: {chosen['attention']}, in a ring: {chosen['attention with lse (ring)']}"
    )
    yield Check(
        "kernels",
        WARNING if slow or REFERENCE_FORCED else OK,
        finding,
        "unset LUMINA_KERNELS" if REFERENCE_FORCED else "install what is missing; training is slower without" * slow,
    )


def code_hash() -> tuple[str, int]:
    """SHA-256 over names and contents of Lumina's Python files, wherever they are installed, and how many there are."""
    files: dict[str, Path] = {}
    for room in _ROOMS:
        for folder in find_spec(room).submodule_search_locations:
            files |= {
                f"{room.replace('.', '/')}/{path.relative_to(folder).as_posix()}": path
                for path in Path(folder).rglob("*.py")
            }
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest(), len(files)


def newest_file() -> float:
    """When a file of Lumina was last written, in seconds since 1970."""
    folder = Path(find_spec("lumina").submodule_search_locations[0])
    return max(path.stat().st_mtime for path in folder.rglob("*.py"))


def why(device: torch.device) -> str:
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


def _chosen(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What every operation runs on, at a model's sizes."""
    x = torch.empty(1, 1, HEAD_DIM, device=device, dtype=dtype)
    operations = [operation for name in kernels.__all__ if isinstance(operation := getattr(kernels, name), Operation)]
    chosen = {operation.name: operation.chosen(x) for operation in operations}
    return chosen | {"attention with lse (ring)": lse_backend(x).name}


def _nccl() -> str | None:
    if torch.version.cuda is None:
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _commit() -> str | None:
    """Of the working tree that Lumina is installed from, if it is one; with a + where files differ from it."""
    folder = find_spec("lumina").submodule_search_locations[0]
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):  # no git, or no working tree
        return None
    return head + ("+" if changed else "")


def _git(folder: str, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
    )
    return done.stdout.strip()


def _required_python() -> list[tuple[int, int]]:
    """The first version that does, and the first that does not any more; empty where nothing says so."""
    try:
        text = metadata.metadata(_DISTRIBUTION)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return []
    least, below = re.search(r">=(\d+)\.(\d+)", text), re.search(r"<(\d+)\.(\d+)", text)
    return [(int(one[1]), int(one[2])) for one in (least, below)] if least and below else []


def _packages(versions: dict[str, str]) -> Check:
    finding = ", ".join(f"{name} {version}" for name, version in versions.items())
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Check("packages", WARNING, f"{finding}; Lumina runs from its sources", "pip install -e . in its folder")
    missing = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        if "extra" in marker or ("platform_system" in marker and platform.system() not in marker):
            continue
        name = re.match(r"[\w.-]+", requirement).group()
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        mend = f"{sys.executable} -m pip install {' '.join(missing)}"
        return Check("packages", FAIL, f"not installed: {', '.join(missing)}; {finding}", mend)
    return Check("packages", OK, finding)


def _cuda(facts: dict[str, Any]) -> Check:
    driver, built = facts["driver"], facts["CUDA"]
    if driver is None and not torch.cuda.is_available():
        return Check("CUDA", OK, f"no NVIDIA driver; torch {facts['torch']} computes on the CPU")
    if built is None:
        return Check(
            "CUDA",
            FAIL,
            f"driver {driver}, but torch {facts['torch']} is built without CUDA",
            "install a CUDA build of torch (pytorch.org/get-started names the command)",
        )
    if not torch.cuda.is_available():
        return Check(
            "CUDA",
            FAIL,
            f"driver {driver} and torch for CUDA {built}, but torch finds no device",
            f"look at what `nvidia-smi` says; update a driver older than CUDA {built}, or take torch for an older CUDA",
        )
    return Check("CUDA", OK, f"torch for CUDA {built}, NCCL {facts['NCCL']}, driver {driver}")
