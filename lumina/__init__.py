"""Lumina: training and sampling of Flag-DiT, a flow-matching diffusion transformer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumina.inference.pipeline import LuminaPipeline
    from lumina.model.flag_dit import FlagDiT, FlagDiTConfig

__version__ = "0.1.0"
__all__ = ["FlagDiT", "FlagDiTConfig", "LuminaPipeline", "__version__"]

_HOMES = {
    "FlagDiT": "lumina.model.flag_dit",
    "FlagDiTConfig": "lumina.model.flag_dit",
    "LuminaPipeline": "lumina.inference.pipeline",
}


def __getattr__(name: str):
    # Imported on first use: `lumina --help` must not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lumina' has no attribute {name!r}")
