"""What the memory of a rank holds in training, by category, as it is."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from lumina.parallel.engine import Engine
from lumina.parallel.peak_memory import peak_resident_bytes
from lumina.train.ema import EMA


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank.

    buffers: other tensors that are there between steps.
    activations: the rest of the peak: what waits for the backward pass, and what is there for a moment.
    peak: of the device; on a CPU of the process, beyond what it was before there was a model.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    ema: int
    buffers: int
    activations: int
    peak: int


class Watch:
    """Call `gradients_are_there` between backward pass and update once, and `footprint` between steps."""

    def __init__(self, device: torch.device):
        self._device = device
        self._base = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # DeepSpeed imports torch's compiler with its first engine: more than 100 MiB that are no model's.
            import_module("torch._inductor.compile_fx")
            self._base = _resident_bytes()
        self._at_update: dict[int, int] = {}

    def gradients_are_there(self, engine: Engine) -> None:
        """Look at what lives now."""
        self._at_update = _living(engine)

    def footprint(self, engine: Engine, ema: EMA) -> Footprint:
        """Of all steps so far."""
        counted: set[int] = set()

        def take(tensors: Iterable[Tensor]) -> int:
            total = 0
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in counted:
                    counted.add(storage.data_ptr())
                    total += storage.nbytes()
            return total

        weights = take(engine.weights())
        masters = take(fragment.master for fragment in engine.fragments)
        moments = take(values for fragment in engine.fragments for values in engine.moments(fragment).values())
        averages = take(ema.values)
        at_rest = _living(engine)
        buffers = sum(size for place, size in at_rest.items() if place not in counted)
        gradients = sum(size for place, size in self._at_update.items() if place not in at_rest)
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = peak_resident_bytes() - self._base
        held = weights + gradients + masters + moments + averages + buffers
        return Footprint(weights, gradients, masters, moments, averages, buffers, max(0, peak - held), peak)


def _living(engine: Engine) -> dict[int, int]:
    """Storages on the device that trains, by address: their bytes."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.layout == torch.strided]
    found += [weight.grad for weight in engine.weights() if weight.grad is not None]
    sizes = {}
    for tensor in found:
        if tensor.device == engine.mesh.device and type(tensor).__name__ != "FakeTensor":
            storage = tensor.untyped_storage()
            if storage.data_ptr():
                sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
