"""Where the time of a step goes, by the torch profiler: every moment of the main thread belongs to one category.

On a CPU that is all there is: gloo's own threads work beside it, and what of a collective shows is how long the main
thread waits. On a GPU the same is done with the device's streams: a collective is exposed while no other kernel runs.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from lumina.parallel.mesh import Mesh
from lumina.parallel.named_collectives import AXIS, named_collectives

STEP = "lumina: step"
DATA, OPTIMIZER = "lumina: data", "lumina: optimizer"
_NAMED = {DATA: "data", OPTIMIZER: "optimizer"}
GEMM, ATTENTION, ELEMENTWISE, HOST = "matrix products", "attention", "elementwise", "Python and launching"


@dataclass(frozen=True)
class Span:
    """Of a trace: microseconds."""

    name: str
    start: float
    stop: float
    annotation: bool


def seconds_by_category(step: Callable[[], object], steps: int, mesh: Mesh, trace: Path) -> dict[str, float]:
    """Run `step`, which marks its stretches, so many times, and share out its seconds; means of a step.

    Args:
        trace: where the trace is written, for Perfetto and chrome://tracing.
    """
    cuda = mesh.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with named_collectives(mesh), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    shared = on_device(events) if cuda else on_host(events)
    return {category: seconds / steps for category, seconds in shared.items()}


def on_host(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the thread that runs the steps, by category; together those of the steps."""
    whole = [event for event in events if event.get("name") == STEP and event.get("cat") == "user_annotation"]
    thread = whole[0]["tid"]
    kinds = ("cpu_op", "user_annotation")
    spans = [_span(event) for event in events if event.get("tid") == thread and event.get("cat") in kinds]
    spans.sort(key=lambda span: (span.start, -span.stop))
    seconds: dict[str, float] = defaultdict(float)
    open_spans: list[tuple[Span, str]] = []
    at = 0.0

    def pass_to(moment: float) -> None:
        nonlocal at
        while open_spans and open_spans[-1][0].stop <= moment:
            seconds[open_spans[-1][1]] += (open_spans[-1][0].stop - at) / 1e6
            at = open_spans.pop()[0].stop
        if open_spans:
            seconds[open_spans[-1][1]] += (moment - at) / 1e6
        at = moment

    for span in spans:
        pass_to(span.start)
        if open_spans or span.name == STEP:
            open_spans.append((span, _category(span, open_spans[-1][1] if open_spans else HOST)))
    pass_to(max(span.stop for span in spans))
    return dict(seconds)


def on_device(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the device from the first to the last step, by category: of kernels, then of collectives that run
    beside none, then of none."""
    whole = [_span(event) for event in events if event.get("name") == STEP and event.get("cat") == "user_annotation"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    marks = [_span(event) for event in events if event.get("cat") == "gpu_user_annotation"]
    start = min(span.start for span in whole)
    stop = max([span.stop for span in whole] + [_span(kernel).stop for kernel in kernels])
    edges: list[tuple[float, int, str]] = []
    for kernel in map(_span, kernels):
        category = _category_of_kernel(kernel, marks)
        edges += [(kernel.start, 1, category), (kernel.stop, -1, category)]
    seconds: dict[str, float] = defaultdict(float)
    running: dict[str, int] = defaultdict(int)
    at = start
    for moment, change, category in [*sorted(edges), (stop, 0, HOST)]:
        names = [name for name, count in running.items() if count]
        computing = [name for name in names if not name.startswith("communication")]
        if moment > at:
            seconds[(computing or names or [HOST])[0]] += (moment - at) / 1e6
            if computing:
                for name in names:
                    if name.startswith("communication"):
                        seconds[f"{name}, hidden"] += (moment - at) / 1e6
        running[category] += change
        at = max(at, moment)
    return dict(seconds)


def hidden(category: str) -> bool:
    """Whether a category's seconds are not of the step's, for something else goes on meanwhile."""
    return category.endswith(", hidden")


def _span(event: Mapping[str, Any]) -> Span:
    start = float(event["ts"])
    return Span(event["name"], start, start + float(event.get("dur", 0)), event.get("cat", "").endswith("annotation"))


def _category(span: Span, around: str) -> str:
    if span.name.startswith(AXIS):
        return f"communication: {span.name.removeprefix(AXIS)}"
    if around.startswith("communication"):
        return around
    if span.name in _NAMED:
        return _NAMED[span.name]
    if around in _NAMED.values():
        return around
    if span.annotation:
        return HOST
    return _category_of_operation(span.name)


def _category_of_operation(name: str) -> str:
    if "attention" in name and not name.startswith("lumina::merge"):
        return ATTENTION
    if name.split("::")[-1] in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_addmm_activation", "mv"):
        return GEMM
    return ELEMENTWISE


def _category_of_kernel(kernel: Span, marks: Sequence[Span]) -> str:
    name = kernel.name.lower()
    around = [mark for mark in marks if mark.start <= kernel.start and kernel.stop <= mark.stop]
    if "nccl" in name:
        axis = next((mark.name.removeprefix(AXIS) for mark in around if mark.name.startswith(AXIS)), "world")
        return f"communication: {axis}"
    if named := [_NAMED[mark.name] for mark in around if mark.name in _NAMED]:
        return named[-1]
    if any(part in name for part in ("flash", "fmha", "sdpa", "attention")):
        return ATTENTION
    if any(part in name for part in ("gemm", "cutlass", "nvjet", "xmma", "cublas")):
        return GEMM
    return ELEMENTWISE
