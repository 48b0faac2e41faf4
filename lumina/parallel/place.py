"""Where a main thread stands, read off its Python stack by another thread: in which collective, called from where."""

import linecache
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

_HERE = str(Path(__file__).parents[1]) + "/"  # …/lumina/
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
_COMMUNICATES = ("/lumina/parallel/", "/deepspeed/", "/megatron/", "/torch/distributed/")
# Waiting that is a call into C, of which the stack shows the line alone: for a message under way, …
_MESSAGE = re.compile(r"\.wait\(")
# … or for the device, on which NCCL's collectives run after the call has returned.
_DEVICE = re.compile(r"\.(item|tolist|cpu|synchronize)\(|(?<![.\w])float\(")


@dataclass(frozen=True)
class Place:
    """Where a thread stands.

    collective: function of torch.distributed that it is in, or None.
    caller: "file:line in function" that called the collective; without one, the innermost line of Lumina.
    waits: for other ranks or for the device; false in what a rank does by itself.
    """

    collective: str | None
    caller: str
    waits: bool


def place_of(thread: int, frames: dict[int, FrameType] | None = None) -> Place:
    """Where the thread of identity `thread` stands at this moment; `frames` as of `sys._current_frames`."""
    frames = sys._current_frames() if frames is None else frames
    if thread not in frames:
        return Place(None, "a thread that has ended", False)
    place, in_backward = _read(frames[thread])
    if place.collective is None and in_backward:
        # On a GPU the backward pass, with the collectives in it, runs in threads of autograd's own, which no Python
        # function started.
        for other, frame in frames.items():
            if other != thread and not _is_python_thread(frame):
                elsewhere, _ = _read(frame)
                if elsewhere.collective is not None:
                    return elsewhere
    return place


def _read(innermost: FrameType) -> tuple[Place, bool]:
    """The place, and whether the stack is within a backward pass."""
    collective = private = caller = ours = None
    in_backward = False
    frame: FrameType | None = innermost
    while frame is not None:
        kind = _kind(frame.f_code)
        if kind == "collective":
            name = frame.f_code.co_name
            if collective is None and not name.startswith("_"):
                collective = name
            private = private or name
            caller = None
        elif private and caller is None and kind not in ("torch", "relay"):
            caller = frame
        if kind == "ours" and ours is None:
            ours = frame
        in_backward = in_backward or frame.f_code.co_name == "_engine_run_backward"
        frame = frame.f_back
    collective = collective or private
    if collective is not None:
        called = _described(caller or innermost)
        if ours is not None and ours is not caller:
            called += f", from {_described(ours)}"
        return Place(collective, called, True), in_backward
    file = innermost.f_code.co_filename
    if any(part in file for part in _COMMUNICATES):
        line = linecache.getline(file, innermost.f_lineno)
        if _MESSAGE.search(line):
            return Place("wait for a message", _described(innermost), True), in_backward
        if _DEVICE.search(line):
            return Place(None, _described(innermost), True), in_backward
    return Place(None, _described(ours or innermost), False), in_backward


@cache
def _kind(code: CodeType) -> str:
    file = code.co_filename
    if file.endswith(_COLLECTIVES):
        return "collective"
    if "/torch/" in file:
        return "torch"
    if "/deepspeed/comm/" in file or file.endswith("/typing_extensions.py"):  # which wrap what they hand on
        return "relay"
    return "ours" if file.startswith(_HERE) else "other"


def _is_python_thread(frame: FrameType) -> bool:
    while frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename.endswith("threading.py") or frame.f_code.co_name == "<module>"


def _described(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    for root in ("/site-packages/", "/dist-packages/"):
        file = file.rpartition(root)[2]
    file = f"lumina/{file.removeprefix(_HERE)}" if file.startswith(_HERE) else file
    return f"{'/'.join(file.split('/')[-4:])}:{frame.f_lineno} in {frame.f_code.co_name}"
