"""Every layout of a plan; and, where settings that are held fixed leave none of a layout, which exclude each other."""

from lumina.config.schema import ParallelConfig
from lumina.parallel.layout import check_layout
from lumina.planner.search import Candidate, Refused, Work, axes_of, search

_AXES = ("tensor", "pipeline", "ring", "ulysses")
_OFFLOADS = ("offload_optimizer", "offload_activations")


def layouts_of(work: Work) -> tuple[list[Candidate], list[Refused]]:
    """As `search`; refused are also layouts of which what is held fixed leaves no variant, before all others."""
    candidates, refused = search(work)
    if not work.fixed:
        return candidates, refused
    seen = {one.axes for one in (*candidates, *refused)}
    excluded = []
    for axes in axes_of(work.world, work.sizes.n_layers):
        parallel = _completed(work, dict(zip(_AXES, axes, strict=True)))
        if axes not in seen and work.allows(parallel, _AXES):
            excluded.append(Refused(axes, _excluding(work, parallel)))
    return candidates, [*excluded, *refused]


def why_none(work: Work, refused: list[Refused]) -> str:
    """A sentence for a plan without any layout; `refused` as of `layouts_of`."""
    held = " ".join(
        f"parallel.{name}={str(getattr(work.config.parallel, name)).lower()}" for name in sorted(work.fixed)
    )
    said = f"no layout of these devices can run{f' with {held}' if held else ''}"
    if not refused:
        return f"{said}: {_excluding(work, _completed(work, {}))}"
    first = refused[0].reason
    alike = sum(kind_of(one.reason) == kind_of(first) for one in refused)
    return f"{said}: {first}" if alike == len(refused) else f"{said}; {alike} of {len(refused)} because {first}"


def kind_of(reason: str) -> str:
    """The same for reasons that differ in their numbers only."""
    return "".join(character for character in reason if not character.isdigit())[:40]


def _completed(work: Work, axes: dict[str, int]) -> ParallelConfig:
    """What is held fixed and these axes, with all else such that it excludes nothing."""
    parallel, open_to = work.config.parallel, {}
    if parallel.offload_activations and "recompute" not in work.fixed:
        open_to["recompute"] = "full"
    if not axes and "tensor" not in work.fixed:
        open_to["sequence"] = False
    return parallel.model_copy(update=axes | open_to)


def _excluding(work: Work, parallel: ParallelConfig) -> str:
    """Why a layout of this kind has no variant."""
    try:
        check_layout(work.config.model_copy(update={"parallel": parallel}), work.sizes, work.world)
    except ValueError as error:
        return str(error)
    offloads = [f"parallel.{name}=true" for name in _OFFLOADS if getattr(parallel, name)]
    if work.speeds.cores is not None and offloads:
        return f"{' and '.join(offloads)} would move to a CPU what is on it: leave that out, or plan for a GPU"
    raise AssertionError(f"no variant of {parallel} was looked at")
