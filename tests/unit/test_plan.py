"""`lumina plan`: what it lists, and what it reckons."""

import dataclasses
import itertools
import subprocess
import sys

import pytest

from lumina.benchmark import rates
from lumina.config.devices import DEVICES
from lumina.model.flops import forward_flops
from lumina.parallel.gloo_speed import GlooSpeed, gloo_speed
from lumina.parallel.layout import check_layout
from lumina.planner.cost import Network, Part, Speeds, pass_time, step_time
from lumina.planner.memory import fullest_stage, largest, place_of, plan_memory
from lumina.planner.messages import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, SEND
from lumina.planner.search import axes_of, best_of_each, memory_of, search, time_of, variants
from lumina.planner.traffic import Load, Place, gradient_messages, pass_messages
from tests.unit.plans import planned


def test_every_layout_that_can_run_is_there_once():
    """By trying all products of sizes up to the number of devices."""
    work = planned(gpus=12)
    candidates, refused = search(work)
    legal = set()
    for sizes in itertools.product(range(1, 13), repeat=4):
        names = ("tensor", "pipeline", "ring", "ulysses")
        parallel = work.config.parallel.model_copy(update=dict(zip(names, sizes, strict=True)))
        try:
            check_layout(work.config.model_copy(update={"parallel": parallel}), work.sizes, 12)
        except ValueError:
            continue
        legal.add(sizes)
    assert [one.axes for one in best_of_each(candidates)] == list(dict.fromkeys(one.axes for one in candidates))
    assert {one.axes for one in candidates} == legal
    assert {one.axes for one in refused}.isdisjoint(legal)
    assert len(refused) + len(legal) == len(list(axes_of(12, 4)))
    seen = [tuple(one.parallel.model_dump().items()) for one in candidates]
    assert len(seen) == len(set(seen))
    for one in candidates:  # every variant, too, is one that a run would not refuse
        check_layout(work.config.model_copy(update={"parallel": one.parallel}), work.sizes, 12)


def test_the_fastest_that_fits_is_first():
    work = dataclasses.replace(planned("model.dim=2048", "model.n_layers=16"), memory=6.0 * 2**30)
    candidates, _ = search(work)
    flags = [one.fits for one in candidates]
    assert flags == sorted(flags, reverse=True)
    assert 0 < sum(flags) < len(flags)
    fitting = [one.time.total for one in candidates if one.fits]
    assert fitting == sorted(fitting)
    assert all(one.fits == (one.memory.on_device <= 6 * 2**30) for one in candidates)


def test_the_fullest_stage_is_found_among_few():
    work = planned("model.n_layers=13", gpus=8, packs=32)
    for parallel in variants(work, (1, 8, 1, 1)):
        config = work.config.model_copy(update={"parallel": parallel})
        arguments = config, work.sizes, 8, work.load
        assert fullest_stage(*arguments) == largest(plan_memory(*arguments))


def test_what_is_set_is_held_fixed():
    candidates, _ = search(planned("parallel.tensor=2", "parallel.recompute=full"))
    assert {one.parallel.tensor for one in candidates} == {2}
    assert {one.parallel.recompute for one in candidates} == {"full"}
    assert len({one.parallel.ring for one in candidates}) > 1


@pytest.mark.parametrize(("tokens", "expected"), [(4096, 1415), (32768, 2825), (131072, 7657)])
def test_products_and_attention_take_the_time_of_their_flops(tokens, expected):
    """On a device that does a FLOP a second: the published megaflops of a layer and token of the 7B."""
    work = planned("model.dim=4096", "model.n_layers=32", "model.n_heads=32", "model.n_kv_heads=32", tokens=tokens)
    speeds = Speeds(1.0, 1.0, 2.5 / 2, 1e30, 1e30, 1e30, 1e30, 0.0, 0.0, 8)  # flash's 2.5 passes back, as if 2
    load = Load((tokens,), (1,))
    place = place_of(work.config.parallel, work.sizes, 1, 0)
    part = pass_time(work.sizes, work.config.parallel, "bf16", load, place, 1, speeds)
    megaflops = (part.gemm + part.attention) / 32 / tokens / 1e6
    assert megaflops == pytest.approx(expected, rel=0.01)
    flops = forward_flops(work.sizes, load.lengths, load.captions)
    assert part.gemm == pytest.approx(3 * flops.in_blocks, rel=1e-6)
    assert part.attention == pytest.approx(3 * flops.attention, rel=1e-6)


@pytest.mark.parametrize("axis", ["tensor", "ring", "ulysses", "pipeline"])
def test_ranks_share_the_work(axis):
    """Together as much as one alone; what is not shared (captions by a ring, times by all but tensor) is little."""
    work, tokens = planned(), 4096
    load = Load((tokens,), (16,))

    def computed(size):
        parallel = work.config.parallel.model_copy(update={axis: size})
        parts = [
            pass_time(work.sizes, parallel, "bf16", load, place_of(parallel, work.sizes, size, rank), size, work.speeds)
            for rank in range(size)
        ]
        return sum(part.gemm + part.attention for part in parts)

    assert computed(4) == pytest.approx(computed(1), rel=0.02)


def test_of_each_layout_the_fastest_variant_that_fits_is_found():
    """Of all variants, reckoned one by one; some do not fit."""
    work = planned(gpus=8, tokens=65536, memory=4.0)
    found = {one.axes: one for one in best_of_each(search(work)[0])}
    kept = set()
    for axes, best in found.items():
        fitting = [v for v in variants(work, axes) if work.holds(memory_of(work, v))]
        assert bool(fitting) == best.fits
        if fitting:
            assert best.time.total == pytest.approx(min(time_of(work, v).total for v in fitting))
            kept.add(best.parallel.recompute)
    assert len(kept) > 1
    assert {one.fits for one in found.values()} == {True, False}


def test_messages_take_the_way_of_their_axis():
    """8 ranks on hosts of 4: neighbours within a host, data parallel across."""
    speeds = dataclasses.replace(Speeds.of(DEVICES["h100-80g"], "bf16", 4), link=100.0, network=10.0, latency=0.0)
    parallel = planned("parallel.tensor=2", "parallel.ring=2").config.parallel
    network = Network(parallel, 8, speeds)
    assert network.seconds("tensor", ALL_REDUCE, 100) == pytest.approx(2 * 0.5 * 100 / 100)
    assert network.seconds("ring", SEND, 100) == pytest.approx(1.0)
    assert network.seconds("data", ALL_GATHER, 100) == pytest.approx(0.5 * 100 / 10)  # one rank of it on each host
    # Ring × data: two ranks of it on each host, which have a port each.
    assert network.seconds("gradient", ALL_GATHER, 100) == pytest.approx(0.75 * 100 / 20)
    slow = planned("parallel.ring=8").config.parallel
    assert Network(slow, 8, speeds).seconds("ring", SEND, 100) == pytest.approx(10.0)
    # Half of what a rank has for others goes through its own port, whatever the ports of its neighbours.
    spread = planned("parallel.ulysses=4", "model.n_kv_heads=8").config.parallel.model_copy(update={"ulysses": 8})
    assert Network(spread, 8, speeds).seconds("ulysses", ALL_TO_ALL, 100) == pytest.approx(0.5 * 100 / 10)
    # On hosts of 6, the second four ranks are on two of them.
    six = dataclasses.replace(speeds, per_host=6)
    four = planned("parallel.tensor=4").config.parallel
    assert Network(four, 12, six).seconds("tensor", ALL_GATHER, 100) == pytest.approx(0.75 * 100 / 40)
    assert Network(four, 12, speeds).seconds("tensor", ALL_GATHER, 100) == pytest.approx(0.75 * 100 / 100)
    # A message to a neighbour waits once, a collective as often as it doubles.
    late = dataclasses.replace(speeds, latency=1.0, link=1e30, network=1e30)
    assert Network(slow, 8, late).seconds("ring", SEND, 100) == pytest.approx(1.0)
    assert Network(spread, 8, late).seconds("ulysses", ALL_TO_ALL, 100) == pytest.approx(3.0)
    # gloo's go from rank to rank, and what it reduces goes round twice.
    shared = dataclasses.replace(late, cores=2)
    expected = {SEND: 1.0, ALL_GATHER: 7.0, ALL_TO_ALL: 7.0, ALL_REDUCE: 14.0, REDUCE_SCATTER: 14.0}
    assert {name: round(Network(spread, 8, shared).seconds("ulysses", name, 100)) for name in expected} == expected


def test_messages_of_gradients_beyond_what_deepspeed_holds_at_once():
    """3 × 10⁹ elements in bf16: two of three are gathered again to go back, whatever is computed again."""
    elements, of_block = 3 * 10**9, 250_000_000

    def sent(**settings):
        parallel = planned().config.parallel.model_copy(update=settings)
        messages = gradient_messages(parallel, "bf16", elements, of_block, passes=2, shards=4)
        return {(m.operation, m.bytes): count for m, count in messages.items()}

    bucket = 4 * 100_000_000
    assert sent(zero_stage=1) == {(ALL_REDUCE, bucket): 30, (ALL_GATHER, 2 * elements): 1}
    assert sent(zero_stage=2) == {(ALL_REDUCE, bucket): 60, (ALL_GATHER, 2 * elements): 1}
    again = {(ALL_GATHER, 2 * of_block): 2 * 20, (REDUCE_SCATTER, bucket): 60}
    assert sent(zero_stage=3) == sent(zero_stage=3, recompute="full") == again
    assert not gradient_messages(planned().config.parallel, "bf16", elements, of_block, passes=2, shards=1)


def test_messages_between_processes_of_this_machine():
    found = gloo_speed(2)
    assert 1e-6 < found.hop < 10
    assert 1e5 < found.bandwidth < 1e12


def test_plans_of_shared_cores_use_measured_messages(monkeypatch):
    """Four ranks on two cores: a rank alone would have its messages through in half the time."""
    monkeypatch.setattr(rates, "gloo_speed", lambda ranks: GlooSpeed(hop=0.01 * ranks, bandwidth=1e9))
    monkeypatch.setattr(rates.os, "cpu_count", lambda: 2)
    rates.here.cache_clear()
    _, speeds = rates.here("fp32", 4)
    rates.here.cache_clear()
    assert (speeds.latency, speeds.link, speeds.cores) == pytest.approx((0.02, 2e9, 2))


def test_nothing_hides_behind_a_ring_on_shared_cores():
    work = planned("parallel.ring=4", gpus=4)
    parallel = work.config.parallel
    speeds = dataclasses.replace(work.speeds, attention_forward=1.0, attention_backward=1.0)
    place = Place(range(work.sizes.n_layers))
    alone, shared = (
        pass_time(work.sizes, parallel, "bf16", work.load, place, 4, dataclasses.replace(speeds, cores=cores))
        for cores in (None, 2)
    )
    assert alone.ring == 0
    messages = pass_messages(work.sizes, parallel, "bf16", work.load, place)
    sent = sum(m.bytes * count for m, count in messages.items() if m.operation == SEND)
    assert shared.ring > sent / speeds.link > 0


def test_a_step_of_a_pipeline():
    """Four passes through stages of 2, 3 and 1 seconds: the slowest four times, and the others once, in and out."""
    parts = [Part(seconds, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0) for seconds in (2.0, 3.0, 1.0)]
    time = step_time(parts, 4, gradients=0.5, optimizer=0.25)
    assert (time.gemm, time.bubble, time.total) == pytest.approx((12.0, 3.0, 15.75))
    # On cores that three ranks take turns on, a stage that waits costs nothing: 4 × 6 seconds of work.
    assert step_time(parts, 4, 0.0, 0.0, shared=3.0).total == pytest.approx(24.0)


def test_the_slowest_rank_has_what_does_not_divide():
    """Four key-value heads over three ranks: the last has two of them, and as many tokens as any."""
    work = planned(gpus=3, tokens=4097)
    parallel = work.config.parallel.model_copy(update={"ulysses": 3})
    load = Load((4097,), (16,))
    first, last = (
        pass_time(work.sizes, parallel, "bf16", load, place_of(parallel, work.sizes, 3, rank), 3, work.speeds)
        for rank in (0, 2)
    )
    assert last.attention > 1.9 * first.attention
    assert time_of(dataclasses.replace(work, load=load, packs=1), parallel).attention == pytest.approx(last.attention)


@pytest.mark.slow
def test_a_plan_starts_no_processes_and_loads_no_engine():
    script = (
        "import sys; from lumina.cli import main; code = main(['plan', '--gpus', '16']);"
        "import torch.distributed as dist; assert not dist.is_initialized();"
        "sys.exit(code or ('deepspeed' in sys.modules) or ('megatron' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
