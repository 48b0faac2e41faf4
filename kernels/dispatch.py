"""One dispatcher for all operations: the plain reference, and faster implementations where they can run.

``LUMINA_KERNELS=reference`` makes every operation run its reference, for debugging. It is read once, here.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


def _reference_forced(setting: str) -> bool:
    if setting not in ("", "reference"):
        raise ValueError(f"LUMINA_KERNELS is {setting!r}; it is 'reference' or not set")
    return setting == "reference"


REFERENCE_FORCED = _reference_forced(os.environ.get("LUMINA_KERNELS", ""))


_GPU_ASSUMED = ContextVar("lumina.kernels: GPU assumed", default=False)


@contextmanager
def gpu_assumed() -> Iterator[None]:
    """While entered, implementations are chosen as on an A100 with torch's own kernels, wherever tensors are.

    For tensors that have shapes and no values: others could not run there.
    """
    before = _GPU_ASSUMED.set(True)
    try:
        yield
    finally:
        _GPU_ASSUMED.reset(before)


def gpu_is_assumed() -> bool:
    return _GPU_ASSUMED.get()


def on_gpu(x: Tensor) -> bool:
    """Whether `x` is on a GPU, or is to be taken for such."""
    return x.is_cuda or _GPU_ASSUMED.get()


class Operation:
    """A function of tensors with a reference implementation and, in order of preference, faster ones.

    The first positional argument decides: an implementation is taken when its `usable` says yes to it.
    """

    def __init__(self, reference: Callable, check: Callable | None = None):
        self.name = reference.__name__
        self.reference = reference
        self._check = check
        self._implementations: list[tuple[str, Callable[[Tensor], bool], Callable]] = []
        functools.update_wrapper(self, reference)

    @staticmethod
    def checked(check: Callable) -> Callable[[Callable], "Operation"]:
        """An operation of whose arguments `check` raises ValueError unless they fit together."""
        return lambda reference: Operation(reference, check)

    def implementation(self, name: str, usable: Callable[[Tensor], bool]) -> Callable[[Callable], Callable]:
        """Register a faster implementation under `name`; those registered first are preferred."""

        def register(function: Callable) -> Callable:
            self._implementations.append((name, usable, function))
            return function

        return register

    def named(self, name: str) -> Callable:
        """The implementation of this name, whether or not it can run here."""
        implementations = {name: function for name, _, function in self._implementations}
        return {**implementations, "reference": self.reference}[name]

    def chosen(self, tensor: Tensor) -> str:
        """Name of the implementation that a call with `tensor` as first argument runs."""
        return self._choice(tensor)[0]

    def __call__(self, tensor: Tensor, *args, **kwargs):
        if self._check is not None:
            self._check(tensor, *args, **kwargs)
        return self._choice(tensor)[1](tensor, *args, **kwargs)

    def _choice(self, tensor: Tensor) -> tuple[str, Callable]:
        if not REFERENCE_FORCED:
            for name, usable, function in self._implementations:
                if usable(tensor):
                    return name, function
        return "reference", self.reference
