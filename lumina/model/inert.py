"""Reading pickles of others without running anything of them.

torch's weights-only unpickler makes tensors, containers, numbers and text, and calls nothing that it was not told of.
The few classes that checkpoints of others name beside those are told of here, and stand-ins that do nothing are made
in their place; whatever else a file names is refused.
"""

import argparse
import re
import zipfile
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
_ALLOWED = [argparse.Namespace, *((StandIn, name) for name in _STOOD_IN_FOR)]


def load_inert(path: Path, *, mapped: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU; objects of DeepSpeed's classes as `StandIn`.

    Args:
        path: the file.
        mapped: tensors are pages of the file, which are read when they are touched and stay in memory as long as any
            tensor of the file does.

    Raises:
        ValueError: for a damaged file, and for one that names anything else than weights and settings are made of.
    """
    try:
        # A file from before torch 1.6 is no zip archive and cannot be mapped.
        mapped = mapped and zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f"it names {named.group(1)}" if named else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: refused, it is damaged or holds more than weights and settings ({reason})"
        ) from error
