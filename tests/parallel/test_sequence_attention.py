"""Attention of one pack over many ranks, ring and Ulysses, against float64; and what the ring does not send or hold."""

import itertools
import random

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lumina.kernels import AttentionPlan, attention
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.parallel.cuts import bounds, kv_head_counts
from lumina.parallel.mesh import Axis
from lumina.parallel.ring import (
    LoopbackRing,
    SavedAttention,
    SequenceParallelCore,
    ring_backward,
    ring_forward,
)
from lumina.parallel.schedule import schedule
from tests.parallel.attention_ranks import Case, allowed, errors, exact, in_process, run_layouts, through_loopback
from tests.parallel.workers import run_ranks

PACKS = {
    "one long sample": (251,),
    "packed": (37, 100, 3, 61, 7, 1, 90),
    "two short samples": (3, 2),
    "fewer tokens than ranks": (5,),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def one_thread():
    """As on ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4)])
@pytest.mark.parametrize("head_dim", [48, 96, 128])
@DTYPES
def test_ring_errs_as_one_call_does(size, lengths, heads, kv_heads, head_dim, dtype):
    case = Case(lengths, heads, kv_heads, head_dim, dtype)
    found = through_loopback(case, size)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    error = errors(found, exact(case))
    assert all(error[name] <= most for name, most in allowed(case).items()), (error, allowed(case))


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_ring_in_float64(size, lengths):
    case = Case(lengths, 4, 2, 48, torch.float64)
    for backend in ("reference", "cpu_flash"):
        error = errors(through_loopback(case, size, backend=backend), exact(case))
        assert max(error.values()) < 1e-14, error


def test_one_rank_is_the_plain_core():
    case = Case(PACKS["packed"], 4, 2, 48, torch.float32)
    q, k, v, _ = case.inputs()
    plan = AttentionPlan(case.lengths, case.lengths, torch.device("cpu"))
    out = SequenceParallelCore(Axis(), Axis())(q, k, v, plan)
    torch.testing.assert_close(out, attention(q, k, v, plan), rtol=1e-5, atol=1e-6)


# Processes.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layouts"), [(2, [(2, 1), (1, 2)]), (4, [(4, 1), (1, 4), (2, 2)]), (8, [(8, 1), (2, 4), (4, 2)])]
)
def test_processes(world, layouts):
    """Rings, Ulysses and both, with heads that no size divides; rings to the bit as in one process."""
    packs = [PACKS["packed"], PACKS["one long sample"], PACKS["two short samples"], PACKS["fewer tokens than ranks"]]
    cases = [
        Case(lengths, repeats * 5, 5, head_dim, dtype)
        for lengths, (repeats, head_dim) in itertools.product(packs, [(1, 48), (3, 96)])
        for dtype in (torch.float32, torch.bfloat16)
    ]
    ranks = run_ranks(world, run_layouts, layouts, cases)
    assert all(all(rank["same"]) and len(rank["same"]) == 2 * len(layouts) for rank in ranks)
    for layout, case in itertools.product(layouts, cases):
        pieces = [rank["results"][layout, case] for rank in ranks]
        out, dq, dk, dv = (torch.cat([torch.from_numpy(x) for x in of]) for of in zip(*pieces, strict=True))
        lse = exact(case)[1]  # not returned by the core: the gradients depend on it
        error = errors((out, lse, dq, dk, dv), exact(case))
        assert all(error[name] <= most for name, most in allowed(case).items()), (layout, case, error, allowed(case))
        if layout[1] == 1:
            for found, expected in zip((out, dq, dk, dv), in_process(case, world), strict=True):
                assert torch.equal(found, expected.float()), (layout, case)


def test_too_few_heads_for_ulysses():
    assert kv_head_counts(5, 4) == (1, 1, 1, 2)
    with pytest.raises(
        ValueError, match=r"parallel.ulysses=4 .* set parallel.ulysses to 3 or less .* 4 key-value heads"
    ):
        kv_head_counts(3, 4)


# What is left out.


def test_every_pair_of_a_sample_meets_once():
    """By enumeration, for random packs; and no step is there for nothing."""
    chance = random.Random(0)
    for _ in range(60):
        lengths = tuple(chance.choice([0, 1, 2, 5, 17]) for _ in range(chance.randrange(1, 7)))
        size = chance.randrange(1, 9)
        plan = schedule(lengths, size)
        starts = bounds(sum(lengths), size)
        sample = [i for i, length in enumerate(lengths) for _ in range(length)]
        met = []
        for rank, (step, distance) in itertools.product(range(size), enumerate(plan.distances)):
            work = plan.work(rank)[step]
            if work is None:
                continue
            q0 = starts[rank] + work.q_rows.start
            k0 = starts[(rank - distance) % size] + work.k_rows.start
            for m in work.meetings:
                queries, keys = range(q0 + m.q_start, q0 + m.q_stop), range(k0 + m.k_start, k0 + m.k_stop)
                met += itertools.product(queries, keys)
                assert m.q_stop <= work.q_rows.stop - work.q_rows.start
                assert m.k_stop <= work.k_rows.stop - work.k_rows.start
        tokens = range(sum(lengths))
        assert sorted(met) == [(q, k) for q in tokens for k in tokens if sample[q] == sample[k]]
        for step in range(1, len(plan.distances)):
            assert any(plan.work(rank)[step] for rank in range(size))


def count_messages(lengths, size):
    case = Case(lengths, 2, 1, 48, torch.float32)
    q, k, v, grad_out = case.inputs()
    ring = LoopbackRing(schedule(lengths, size), lse_backend(q))
    out, lse = ring.forward(q, k, v)
    forward = ring.messages, ring.elements
    ring.backward(grad_out, q, k, v, out, lse)
    return ring.plan.distances, forward, (ring.messages - forward[0], ring.elements - forward[1])


def test_short_samples_take_three_steps():
    """Keys and values go to the next rank, and on to the one before the owner; so do their gradients, and then home."""
    assert count_messages((16,) * 25, 8) == ((0, 1, 7), (2 * 8, 2 * 2 * 400 * 48), (5 * 8, 5 * 2 * 400 * 48))
    assert count_messages((400,), 8) == (tuple(range(8)), (7 * 8, 7 * 2 * 400 * 48), (15 * 8, 15 * 2 * 400 * 48))


def test_samples_that_end_with_ranks_take_one_step():
    assert count_messages((20, 30, 50, 50, 25, 25), 4) == ((0,), (0, 0), (0, 0))


def test_ranks_without_tokens_send_nothing():
    """Three tokens on ranks 1, 3 and 5 of 6: of the 5 moves of 6 blocks, 3 blocks are there."""
    distances, forward, backward = count_messages((3,), 6)
    assert distances == (0, 2, 4)
    assert forward == (2 * 3, 2 * 2 * 3 * 48)
    assert backward == (5 * 3, 5 * 2 * 3 * 48)


class Recorded(type(lse_backend(torch.zeros(1, 1, 48)))):
    """A backend that notes when it runs."""

    def __init__(self, events):
        self.events = events

    def forward(self, *arguments):
        self.events.append("compute")
        return super().forward(*arguments)

    def backward(self, *arguments):
        self.events.append("compute")
        return super().backward(*arguments)


class Landed:
    def __init__(self, events):
        self.events = events

    def wait(self):
        self.events.append("wait")


def run_alone(part, tensors, plan, rank, backend, events):
    """One rank's generator; zeros come in."""

    def exchange(sent, received, shift):
        events.append("post")
        received.zero_()
        return Landed(events)

    for arrival in part(*tensors, plan, rank, backend, exchange):
        arrival.wait()


def test_messages_travel_while_a_block_is_computed():
    plan, events = schedule((12,), 3), []
    q, k, v, grad_out = (torch.ones(4, 1, 48) for _ in range(4))
    run_alone(ring_forward, (q, k, v), plan, 1, Recorded(events), events)
    assert events == ["post", "compute", "wait"] * 2 + ["compute"]
    events.clear()
    run_alone(ring_backward, (grad_out, q, k, v, q, torch.zeros(4, 1)), plan, 1, Recorded(events), events)
    first = ["post", "compute", "post", "wait"]  # keys on their way, then the sums too
    later = ["post", "compute", "wait", "post", "wait"]
    assert events == [*first, *later, "compute", "wait", "post", "wait"]


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once, of tensors made since it was entered."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.float32, 4, 8), (torch.bfloat16, 5.5, 10.5)])
def test_memory_does_not_grow_with_the_ring(dtype, forward, backward):
    """One rank's 32 tokens of a sample over 4 and over 16 ranks.

    `forward`, `backward`: the most, in units of the keys and values of one rank. In fp32 two of these and three
    outputs (half a unit each: the sum, a block's, one on the way between them) are there in any case.
    """
    q, k, v, grad_out = (torch.randn(32, 4, 48).to(dtype) for _ in range(4))
    most = {}
    for size in (4, 16):
        plan, backend = schedule((32 * size,), size), lse_backend(q)
        with torch.no_grad(), PeakBytes() as ahead:
            run_alone(ring_forward, (q, k, v), plan, 1, backend, [])
        with torch.no_grad(), PeakBytes() as back:
            run_alone(ring_backward, (grad_out, q, k, v, q, torch.ones(32, 4)), plan, 1, backend, [])
        most[size] = ahead.most, back.most
    assert most[4] == most[16]
    assert most[4][0] <= forward * 2 * k.nbytes
    assert most[4][1] <= backward * 2 * k.nbytes


# Selective recomputation.


class Doubled(torch.nn.Module):
    """A block with two attention calls of one core, and something to recompute."""

    def __init__(self):
        super().__init__()
        self.core = SequenceParallelCore(Axis(), Axis())

    def forward(self, q, k, v, plan):
        first = self.core(q * 2, k.sin(), v, plan)
        return self.core(first, k, v.cos(), plan).exp()


@pytest.mark.parametrize("runs", [1, 2])
def test_replay_does_not_run_attention_again(monkeypatch, runs):
    """`runs`: forward passes before the first backward pass."""
    case = Case(PACKS["packed"], 4, 2, 48, torch.float32)
    kernel = type(lse_backend(torch.zeros(1, 1, 48)))
    calls = {"forward": 0, "backward": 0}

    def counted(name, original):
        def call(self, *arguments):
            calls[name] += 1
            return original(self, *arguments)

        return call

    for name in calls:
        monkeypatch.setattr(kernel, name, counted(name, getattr(kernel, name)))
    block, plan = Doubled(), AttentionPlan(case.lengths, case.lengths, torch.device("cpu"))
    *leaves, grad_out = case.inputs()
    leaves = [x.requires_grad_() for x in leaves]
    inputs = [[(x * (1 + i)).detach().requires_grad_() for x in leaves] for i in range(runs)]
    plain = [torch.autograd.grad(block(*x, plan), x, grad_out) for x in inputs]
    calls.update(forward=0, backward=0)
    outputs = []
    for x in inputs:
        saved = SavedAttention()
        contexts = lambda saved=saved: (saved.record(block.core), saved.replay(block.core))  # noqa: E731
        outputs.append(checkpoint(block, *x, plan, use_reentrant=False, context_fn=contexts))
    assert block.core.saved is None
    assert calls == {"forward": 2 * runs, "backward": 0}
    for repetition in (1, 2):  # a second backward pass runs the block a third time
        for out, x, expected in zip(outputs, inputs, plain, strict=True):
            found = torch.autograd.grad(out, x, grad_out, retain_graph=True)
            assert all(map(torch.equal, found, expected))
        assert calls == {"forward": 2 * runs, "backward": 2 * runs * repetition}
    assert block.core.saved is None
