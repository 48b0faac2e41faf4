"""Any layout computes what one process computes: three steps, compared loss by loss and parameter by parameter."""

import os
import random

import pytest

from tests.parallel.faults import FAULTS
from tests.parallel.parity import TOLERANCE, Case, Run, differences, report, run_all

pytestmark = pytest.mark.slow

CASES = [
    Case(1, {"zero_stage": 3, "recompute": "full", "offload_activations": True}, at_once=2),
    Case(1, {"zero_stage": 1, "offload_optimizer": True, "recompute": "selective"}, kind="label"),
    # Each axis alone.
    Case(2, {"tensor": 2}),
    Case(2, {"tensor": 2, "sequence": True}),
    Case(2, {"ring": 2, "recompute": "selective"}),
    Case(2, {"ulysses": 2, "zero_stage": 3}),
    Case(2, {"pipeline": 2}, kind="label", at_once=2),
    Case(2, {"pipeline": 2, "zero_stage": 1, "offload_optimizer": True, "recompute": "full"}),
    Case(2, {"zero_stage": 2}),
    Case(2, {"tensor": 2, "sequence": True, "zero_stage": 3, "offload_optimizer": True}, kind="label"),
    # Every pair.
    Case(4, {"tensor": 2, "pipeline": 2}),
    Case(4, {"tensor": 2, "ring": 2, "sequence": True}),
    Case(4, {"tensor": 2, "ulysses": 2, "zero_stage": 2}),
    Case(4, {"tensor": 2, "zero_stage": 3}, at_once=2),
    Case(4, {"pipeline": 2, "ring": 2, "zero_stage": 1}),
    Case(4, {"pipeline": 2, "ulysses": 2, "recompute": "full"}, kind="label"),
    Case(4, {"pipeline": 2, "zero_stage": 1, "recompute": "selective"}),
    Case(4, {"ring": 2, "ulysses": 2, "zero_stage": 3}),
    Case(4, {"ring": 2, "zero_stage": 0}, kind="label"),
    Case(4, {"ulysses": 4}),
    Case(4, {"tensor": 4, "sequence": True, "zero_stage": 1}),
    Case(4, {"pipeline": 4}),
    # Three and more, and eight ranks on one axis, of which some hold no token of a pack.
    Case(8, {"tensor": 2, "pipeline": 2, "ring": 2}),
    Case(8, {"tensor": 2, "pipeline": 2, "ulysses": 2, "sequence": True, "zero_stage": 1, "recompute": "full"}),
    Case(8, {"tensor": 2, "ring": 2, "ulysses": 2, "sequence": True, "zero_stage": 2, "recompute": "selective"}),
    Case(8, {"ring": 2, "ulysses": 2, "zero_stage": 1}),
    Case(8, {"ring": 8}, kind="label"),
    Case(8, {"zero_stage": 3}),
]

FAULTY = [
    Case(2, {"ring": 2}, fault="per-rank noise"),
    Case(2, {"tensor": 2}, fault="local KQ-norm"),
    Case(2, {"tensor": 2, "sequence": True}, fault="unsummed replicated gradients"),
    Case(2, {"tensor": 2}, fault="wrong clip norm"),
    Case(2, {"tensor": 2, "zero_stage": 1}, fault="wrong clip norm"),
]


def drawn(seed: int) -> list[Case]:
    """Layouts that nobody chose: two of four ranks on two axes, two of six, one axis of which has three."""
    draw, cases = random.Random(seed), []
    for world, factors in ((4, (2, 2)), (4, (2, 2)), (6, (3, 2)), (6, (3, 2))):
        axes = draw.sample(("pipeline", "ring", "ulysses", "tensor"), 2)
        if "tensor" in axes:  # which three ranks cannot share here, having four key-value heads
            axes.sort(key=lambda axis: axis == "tensor")
        layout = dict(zip(axes, factors, strict=True))
        layout["zero_stage"] = draw.randint(0, 1 if "pipeline" in axes else 3)
        layout["recompute"] = draw.choice(("none", "selective", "full"))
        if "tensor" in axes and draw.random() < 0.5:
            layout["sequence"] = True
        if layout.get("tensor", 1) * layout.get("ulysses", 1) > 4:
            layout["ulysses"], layout["ring"] = 1, layout["ulysses"]
        cases.append(Case(world, layout, kind=draw.choice(("text", "label")), at_once=draw.choice((1, 2))))
    return cases


DRAWN = drawn(int(os.environ.get("LUMINA_TEST_SEED", "0")))


@pytest.fixture(scope="module")
def result_of():
    """What came of a case. All of a world size run in the same processes, whose start costs more than they do."""
    results: dict[str, Run] = {}

    def find(case: Case) -> Run:
        if str(case) not in results:
            together = [c for c in (*REFERENCES.values(), *CASES, *DRAWN, *FAULTY) if c.world == case.world]
            results.update(zip(map(str, together), run_all(together), strict=True))
        return results[str(case)]

    return find


REFERENCES = {kind: Case(1, kind=kind) for kind in ("text", "label")}


@pytest.mark.parametrize("case", [*CASES, *DRAWN], ids=str)
def test_a_layout_computes_what_one_process_computes(case, result_of):
    apart = differences(result_of(case), result_of(REFERENCES[case.kind]))
    print(f"{case}: {report(apart)}")
    wrong = {name: value for name, value in apart.items() if not value <= TOLERANCE}
    assert not wrong, f"{report(apart)}\n{wrong}"


@pytest.mark.parametrize("case", FAULTY, ids=str)
def test_a_classic_fault_is_caught(case, result_of):
    """Far beyond the tolerance, so that no fault of the kind hides below it."""
    assert case.fault in FAULTS
    apart = differences(result_of(case), result_of(REFERENCES[case.kind]))
    assert max(apart.values()) > 100 * TOLERANCE, report(apart)
