"""Compiling every kernel without a GPU: launches are recorded on meta tensors, compiled, and their cost is read."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lumina.kernels import triton_support

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    """A kernel with the types, constants and divisibilities that Triton would specialise it for."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    warps: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel takes of a multiprocessor, and the widest access to global memory in bits."""

    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int


@contextmanager
def recorded(monkeypatch):
    """A list of what is launched meanwhile, in place of launching it."""
    launches: list[Launch] = []
    monkeypatch.setattr(triton_support, "launch", lambda *args, **kwargs: launches.append(_describe(*args, **kwargs)))
    yield launches
    monkeypatch.undo()


def _describe(kernel, grid, *args, warps, **constants):
    assert all(0 < extent < 2**31 for extent in grid[:1])
    assert all(0 < extent < 2**16 for extent in grid[1:])
    names = list(kernel.arg_names)
    assert names[len(args) :] == list(constants), f"{kernel.__name__} takes {names}"
    signature, constant, divisible = {}, dict(constants), []
    for i, (name, value) in enumerate(zip(names, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constant[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(i)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(i)
    signature |= dict.fromkeys(constants, "constexpr")
    return Launch(kernel, tuple(signature.items()), tuple(constant.items()), tuple(divisible), warps)


def compiled(launch: Launch, capability: int) -> Cost:
    """Compile for a compute capability (80, 90, 100) and read the binary."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    return Cost(*_usage(kernel), _widest("ld", kernel.asm["ptx"]), _widest("st", kernel.asm["ptx"]))


def _usage(kernel) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack (where spilled registers go), and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing.stdout + listing.stderr))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), kernel.metadata.shared


def _widest(kind: str, ptx: str) -> int:
    """The bits that the widest access of a thread moves; copies past the registers to shared memory count as loads."""
    widths = [0]
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[bufs](\d+)", ptx):
        widths.append(int(vector or 1) * int(bits))
    if kind == "ld":
        widths += [
            8 * int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)
        ]
    return max(widths)
