"""Packages that make Lumina faster where they are installed, and are never needed."""

import functools
import importlib
import importlib.util
from types import ModuleType


@functools.cache
def flash_attn() -> ModuleType | None:
    """The flash-attn package (2.x), or None."""
    return _import_if_present("flash_attn", "flash_attn_varlen_func")


@functools.cache
def flash_attn_3() -> ModuleType | None:
    """FlashAttention-3's interface module (for Hopper), or None."""
    return _import_if_present("flash_attn_interface", "_flash_attn_forward")


@functools.cache
def apex_layer_norm() -> ModuleType | None:
    """NVIDIA apex's fused norms, or None.

    The `apex` of PyPI is another project (a web toolkit): the package counts only if it carries the fused
    norms and the CUDA extension that they call.
    """
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return None
    return _import_if_present("apex.normalization.fused_layer_norm", "fused_rms_norm_affine")


def _import_if_present(module: str, attribute: str) -> ModuleType | None:
    try:
        found = importlib.import_module(module)
    except ImportError:  # absent, or built for another torch or CUDA
        return None
    return found if hasattr(found, attribute) else None
