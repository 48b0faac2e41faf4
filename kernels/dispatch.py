"""One dispatcher for all operations: the plain reference, and faster implementations where they can run."""

import functools
from collections.abc import Callable

from torch import Tensor


class Operation:
    """A function of tensors with a reference implementation and, in order of preference, faster ones.

    The first positional argument decides: an implementation is taken when its `usable` says yes to it.
    """

    def __init__(self, reference: Callable):
        self.name = reference.__name__
        self.reference = reference
        self._implementations: list[tuple[str, Callable[[Tensor], bool], Callable]] = []
        functools.update_wrapper(self, reference)

    def implementation(self, name: str, usable: Callable[[Tensor], bool]) -> Callable[[Callable], Callable]:
        """Register a faster implementation under `name`; those registered first are preferred."""

        def register(function: Callable) -> Callable:
            self._implementations.append((name, usable, function))
            return function

        return register

    def chosen(self, tensor: Tensor) -> str:
        """Name of the implementation that a call with `tensor` as first argument runs."""
        return next((name for name, usable, _ in self._implementations if usable(tensor)), "reference")

    def __call__(self, tensor: Tensor, *args, **kwargs):
        for _, usable, function in self._implementations:
            if usable(tensor):
                return function(tensor, *args, **kwargs)
        return self.reference(tensor, *args, **kwargs)
