"""Attention over a pack whose tokens are spread over ranks: keys and values travel round a ring (arXiv 2310.01889).

Rank r of R holds the queries, keys and values of tokens [T·r/R, T·(r+1)/R). At distance d it works on the keys of rank
r - d. `schedule` says which distances there are.

What a rank does is written once, as generators that yield where they need what is being received. A process group
drives one of them (`GroupRing`); a loopback drives those of all ranks in lock step in one process (`LoopbackRing`).

Shape suffixes: t token, h head (kv heads for keys and values), e element of a head.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from lumina.kernels import AttentionPlan, merge_attention
from lumina.kernels.attention_lse import LseBackend, sum_dtype
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.parallel.cuts import bounds
from lumina.parallel.mesh import Axis
from lumina.parallel.schedule import Schedule, schedule
from lumina.parallel.ulysses import join_heads, split_heads


@runtime_checkable
class Arrival(Protocol):
    """A message under way: `wait` returns when this rank's part of it has been sent and received."""

    def wait(self) -> None: ...


Exchange = Callable[[Tensor, Tensor, int], Arrival]
"""`exchange(sent, received, shift)` starts sending to rank + shift and receiving from rank - shift. Neither tensor may
be touched until the arrival has been waited for."""


class _Rotation:
    """The keys and values that a rank holds, in one buffer (2, t, h, e), and those on their way to it."""

    def __init__(self, k: Tensor, v: Tensor, plan: Schedule, rank: int, exchange: Exchange):
        self.plan, self.rank, self.exchange = plan, rank, exchange
        self.held = torch.stack((k, v)) if len(plan.distances) > 1 else (k, v)
        self.step = 0

    def send_on(self) -> Arrival | None:
        """Start the move to the next step; None at the last."""
        following = self.step + 1
        if following == len(self.plan.distances):
            return None
        _, _, heads, head_dim = self.held.shape
        self.incoming = self.held.new_empty(2, self.plan.rows(self.rank, following), heads, head_dim)
        return self.exchange(self.held, self.incoming, self.plan.shift(following))

    def arrived(self) -> None:
        self.held, self.incoming = self.incoming, None
        self.step += 1


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Schedule, rank: int, backend: LseBackend, exchange: Exchange
) -> Generator[Arrival, None, tuple[Tensor, Tensor]]:
    """What `rank` does for ``softmax(q·kᵀ / sqrt(e))·v`` over all ranks' keys.

    Returns out in the dtype of q and lse (t, h) in fp32 (float64 for float64). Two blocks of keys and one sum of
    outputs are held, whatever the number of ranks.
    """
    keys = _Rotation(k, v, plan, rank, exchange)
    for step, work in enumerate(plan.work(rank)):
        arrival = keys.send_on()
        if work is not None:
            held_k, held_v = keys.held
            block = backend.forward(q[work.q_rows], held_k[work.k_rows], held_v[work.k_rows], work.meetings)
            if step == 0:
                out, lse = block[0].to(sum_dtype(q.dtype)), block[1]
            else:
                merge_attention(out[work.q_rows], lse[work.q_rows], *block)
            del block, held_k, held_v
        if arrival is not None:
            yield arrival
            keys.arrived()
    return out.to(q.dtype), lse


def ring_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Schedule,
    rank: int,
    backend: LseBackend,
    exchange: Exchange,
) -> Generator[Arrival, None, tuple[Tensor, Tensor, Tensor]]:
    """What `rank` does for (dq, dk, dv), given what `ring_forward` returned.

    The sums of dk and dv follow their keys round the ring, one step behind so that they travel while the next block is
    computed, and from the last step straight to their owner. All sums are in fp32 (float64 for float64).
    """
    sums = sum_dtype(q.dtype)
    dq = q.new_zeros(q.shape, dtype=sums)
    dkv = k.new_zeros((2, *k.shape), dtype=sums)
    incoming, dkv_arrival = None, None
    keys = _Rotation(k, v, plan, rank, exchange)
    for step, work in enumerate(plan.work(rank)):
        arrival = keys.send_on()
        block = None
        if work is not None:
            held_k, held_v = (x[work.k_rows] for x in keys.held)
            mine = (grad_out[work.q_rows], q[work.q_rows])
            whole = (out[work.q_rows], lse[work.q_rows])
            block = backend.backward(*mine, held_k, held_v, *whole, work.meetings)
            dq[work.q_rows] += block[0]
            del held_k, held_v
        if dkv_arrival is not None:
            yield dkv_arrival
            dkv = incoming
        if block is not None:
            for total, part in zip(dkv, block[1:], strict=True):
                total[work.k_rows] += part
            del block
        if arrival is not None:
            incoming = dkv.new_empty(2, plan.rows(rank, step + 1), *k.shape[1:])
            dkv_arrival = exchange(dkv, incoming, plan.shift(step + 1))
            yield arrival
            keys.arrived()
    if len(plan.distances) > 1:
        home = dkv.new_empty(2, *k.shape)
        yield exchange(dkv, home, -plan.distances[-1])
        dkv = home
    dk, dv = dkv.to(k.dtype)
    return dq.to(q.dtype), dk, dv


@runtime_checkable
class Ring(Protocol):
    """Attention over a ring, whoever drives it: with and without what the backward pass needs of the forward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class GroupRing:
    """One rank's part, the others being further processes. All take part in every pass, also one without tokens."""

    plan: Schedule
    axis: Axis
    backend: LseBackend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _drive(ring_forward(q, k, v, self.plan, self.axis.rank, self.backend, self._exchange))

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved = (grad_out, q, k, v, out, lse)
        return _drive(ring_backward(*saved, self.plan, self.axis.rank, self.backend, self._exchange))

    def _exchange(self, sent: Tensor, received: Tensor, shift: int) -> "_Works":
        peers = [self.axis.ranks[(self.axis.rank + sign * shift) % self.axis.size] for sign in (1, -1)]
        operations = [
            dist.P2POp(operation, tensor, peer, self.axis.group)
            for operation, tensor, peer in zip((dist.isend, dist.irecv), (sent, received), peers, strict=True)
            if tensor.numel()
        ]
        return _Works(dist.batch_isend_irecv(operations) if operations else [])


@dataclass(frozen=True)
class _Works:
    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _drive(part: Generator[Arrival, None, Any]) -> Any:
    while True:
        try:
            arrival = next(part)
        except StopIteration as stop:
            return stop.value
        arrival.wait()


class LoopbackRing:
    """All ranks' parts in one process, on tensors of the whole pack: for tests, and to time a ring on one GPU.

    A message is delivered at the last moment, when its receiver waits for it: whoever touches a tensor on its way gets
    wrong numbers. `messages` and `elements` count what was sent.
    """

    def __init__(self, plan: Schedule, backend: LseBackend):
        self.plan, self.backend = plan, backend
        self.messages, self.elements = 0, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._drive_all(ring_forward, q, k, v)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._drive_all(ring_backward, grad_out, q, k, v, out, lse)

    def _drive_all(self, part: Callable[..., Generator], *whole: Tensor) -> tuple[Tensor, ...]:
        size, starts = self.plan.size, self.plan.starts
        parts = [
            part(*(x[starts[rank] : starts[rank + 1]] for x in whole), self.plan, rank, self.backend, _Letter)
            for rank in range(size)
        ]
        results = {}
        while len(results) < size:
            letters = []
            for rank in range(size):
                try:
                    letters.append(next(parts[rank]))
                except StopIteration as stop:
                    results[rank] = stop.value
            for rank, letter in enumerate(letters):
                sent = letters[(rank - letter.shift) % size].sent
                assert sent.shape == letter.received.shape
                letter.received.copy_(sent)
                self.messages += sent.numel() > 0
                self.elements += sent.numel()
        return tuple(torch.cat(pieces) for pieces in zip(*(results[rank] for rank in range(size)), strict=True))


@dataclass(frozen=True)
class _Letter:
    sent: Tensor
    received: Tensor
    shift: int

    def wait(self) -> None:
        raise RuntimeError("a letter is delivered by the loopback that carries it")


class SavedAttention:
    """What attention gave in one run of a block, so that running the block again does not run attention again.

    For torch's checkpoint: ``context_fn=lambda: (saved.record(core), saved.replay(core))``, a new one for each run.
    """

    def __init__(self):
        self._results: list[tuple[Tensor, Tensor]] = []
        self._taken: int | None = None  # None while recording

    def record(self, core: "SequenceParallelCore") -> "_Mode":
        """While entered, `core` keeps its results here."""
        return _Mode(self, core, replays=False)

    def replay(self, core: "SequenceParallelCore") -> "_Mode":
        """While entered, `core` takes its results from here, in order, and computes and sends nothing for them."""
        return _Mode(self, core, replays=True)

    def begin(self, replays: bool) -> None:
        self._taken = 0 if replays else None

    def take(self) -> tuple[Tensor, Tensor] | None:
        """(out, lse) of the next call; None while recording."""
        if self._taken is None:
            return None
        self._taken += 1
        # Aliases: autograd ties what a function returns to that call.
        return tuple(x.detach() for x in self._results[self._taken - 1])

    def keep(self, out: Tensor, lse: Tensor) -> None:
        self._results.append((out.detach(), lse))


class _Mode:
    """A context that may be entered again, as a backward pass may be."""

    def __init__(self, saved: SavedAttention, core: "SequenceParallelCore", replays: bool):
        self.saved, self.core, self.replays = saved, core, replays

    def __enter__(self) -> None:
        self.previous, self.core.saved = self.core.saved, self.saved
        self.saved.begin(self.replays)

    def __exit__(self, *error: object) -> None:
        self.core.saved = self.previous


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, saved: SavedAttention | None) -> Tensor:
        result = None if saved is None else saved.take()
        if result is None:
            result = ring.forward(q, k, v)
            if saved is not None:
                saved.keep(*result)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, *result)
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.ring.backward(grad_out, *ctx.saved_tensors), None, None


class SequenceParallelCore(nn.Module):
    """Attention of a pack spread over `ring` × `ulysses` ranks: in place of `lumina.model.attention.AttentionCore`.

    Rank ring.rank · ulysses.size + ulysses.rank holds its stretch of `bounds(T, ranks)`.
    """

    def __init__(self, ring: Axis, ulysses: Axis, backend: str | None = None):
        super().__init__()
        self.ring, self.ulysses, self.backend = ring, ulysses, backend
        self.saved: SavedAttention | None = None

    def forward(
        self,
        q_the: Float[Tensor, "t h e"],
        k_the: Float[Tensor, "t kv e"],
        v_the: Float[Tensor, "t kv e"],
        plan: AttentionPlan,
    ) -> Float[Tensor, "t h e"]:
        """`plan.key_lengths`: the tokens of the pack's samples, on all ranks together."""
        steps = schedule(plan.key_lengths, self.ring.size)
        ring = GroupRing(steps, self.ring, lse_backend(q_the, self.backend))
        if self.ulysses.size == 1:
            return _RingAttention.apply(q_the, k_the, v_the, ring, self.saved)
        ranks = self.ring.size * self.ulysses.size
        starts = bounds(sum(plan.key_lengths), ranks)[self.ring.rank * self.ulysses.size :]
        tokens = tuple(starts[i + 1] - starts[i] for i in range(self.ulysses.size))
        q, k, v = split_heads(q_the, k_the, v_the, tokens, self.ulysses)
        out = _RingAttention.apply(q, k, v, ring, self.saved)
        return join_heads(out, tokens, k_the.shape[1], q_the.shape[1], self.ulysses)


def in_process_ring(
    q_the: Float[Tensor, "t h e"],
    k_the: Float[Tensor, "t kv e"],
    v_the: Float[Tensor, "t kv e"],
    lengths: tuple[int, ...],
    ring_size: int,
    backend: str | None = None,
) -> Float[Tensor, "t h e"]:
    """A whole pack through a ring of `ring_size` ranks that all are this process. Differentiable."""
    ring = LoopbackRing(schedule(lengths, ring_size), lse_backend(q_the, backend))
    return _RingAttention.apply(q_the, k_the, v_the, ring, None)
