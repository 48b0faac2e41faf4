"""One stage of a pipeline, as DeepSpeed's pipeline engine runs it.

Between stages travel c, from which all modulation is made, and x. Both are differentiated, so the embedders, on the
first stage, get their gradient from every stage's modulation. What needs no gradient (lengths, positions, captions)
does not travel: every stage has the packs.
"""

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lumina.parallel.activity import Activity, Phase
from lumina.parallel.stage import Conditions, Stage


class PipelineStage(nn.Module):
    """A stage that takes what the stage before it sent: (c, x), or a number that means nothing to the first."""

    def __init__(self, stage: Stage, activity: Activity):
        super().__init__()
        self.stage, self._activity = stage, activity
        self._upcoming: deque[Conditions] = deque()

    def load(self, packs: Sequence[Conditions], noised: Callable[[Conditions], Tensor]) -> None:
        """The micro-batches to come, in the order in which every schedule runs them forward."""
        self._upcoming, self._count = deque(packs), len(packs)
        self._noised = noised

    def forward(self, received: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        self._activity.enter(Phase.BATCH, batch=self._count - len(self._upcoming))
        conditions, stage = self._upcoming.popleft(), self.stage
        c_nw, x_td = stage.embed(self._noised(conditions), conditions) if stage.has_first else received
        x_td = stage.run_blocks(c_nw, x_td, conditions)
        if stage.has_last:
            return stage.head(c_nw, x_td, conditions).float()
        # c first: DeepSpeed runs a backward pass for each, keeping the graph for all but the last.
        return c_nw, x_td
