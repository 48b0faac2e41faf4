"""Reading pickles of others without running anything of them.

torch's weights-only unpickler makes tensors, containers, numbers and text, and calls nothing that it was not told of.
The few classes that checkpoints of others name beside those are told of here, and stand-ins that do nothing are made
in their place; whatever else a file names is refused.
"""

import argparse
import functools
import io
import re
from pathlib import Path
from typing import Any

import torch


class StandIn:
    """In place of an object of another's class: `arguments` of its making, and its attributes."""

    def __new__(cls, *arguments: Any) -> "StandIn":
        made = super().__new__(cls)
        made.arguments = arguments
        return made


# What DeepSpeed writes into its checkpoints.
_STOOD_IN_FOR = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def _member(of: Any, name: Any) -> StandIn:
    """In place of `getattr`, which some versions of Python 3.11 write for members of enumerations: a name alone."""
    return StandIn(name)


_ALLOWED = [argparse.Namespace, (_member, "builtins.getattr"), *((StandIn, name) for name in _STOOD_IN_FOR)]


def load_inert(path: Path, *, skeleton: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU; objects of DeepSpeed's classes as `StandIn`.

    Args:
        path: the file.
        skeleton: tensors are on "meta", without values. Their storages know where in the file the values are. A torch
            that does not tell this maps the file into memory instead.

    Raises:
        ValueError: for a damaged file, and for one that names anything else than weights and settings are made of.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            where = "meta" if skeleton and torch_tells_places() else "cpu"
            return torch.load(path, map_location=where, weights_only=True, mmap=skeleton and where == "cpu")
    except Exception as error:
        # What torch says first is how to load the file without this protection.
        text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        named = re.search(r"\bGLOBAL (\S+)", text)
        lines = [line.strip() for line in text.splitlines() if line.strip() and "weights_only" not in line]
        reason = f"it names {named.group(1)}" if named else (lines or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: refused, it is damaged or holds more than weights and settings ({reason})"
        ) from error


@functools.cache
def torch_tells_places() -> bool:
    """Whether a tensor that is loaded without its values knows where they are, which older torch does not tell."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(1), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="meta", weights_only=True)
    return loaded.untyped_storage()._checkpoint_offset is not None
