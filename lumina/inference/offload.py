"""Weights that wait on the CPU: of several networks, one at a time is where it computes."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class Offload:
    """Brings the weights of a part when it, or a child of it, is called, and lets go of those of the others.

    What is let go of is not copied back, for nobody changes it: the weights on the CPU stay, so that they take their
    memory there all the time.
    """

    def __init__(self, parts: Sequence[nn.Module], bring: Callable[[Tensor], Tensor]):
        """
        Args:
            parts: modules that share no weights, all on the CPU.
            bring: a copy of a tensor where it is computed.
        """
        self._bring, self._here = bring, None
        self._waiting = {part: list(_tensors(part)) for part in parts}
        self._values = {part: [tensor.data for tensor in tensors] for part, tensors in self._waiting.items()}
        for part in parts:
            for module in (part, *part.children()):
                module.register_forward_pre_hook(lambda *_, part=part: self._call(part))

    def release(self) -> None:
        """Let go of what is there: all weights are on the CPU."""
        if self._here is not None:
            for tensor, value in zip(self._waiting[self._here], self._values[self._here], strict=True):
                tensor.data = value
            self._here = None

    def _call(self, part: nn.Module) -> None:
        if part is self._here:
            return
        self.release()
        for tensor, value in zip(self._waiting[part], self._values[part], strict=True):
            tensor.data = self._bring(value)
        self._here = part


def _tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]
