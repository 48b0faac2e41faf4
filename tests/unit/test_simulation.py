"""Simulated ranks: memory against the profiler and by hand, messages against formulas, axes against Megatron."""

import gc
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from lumina.benchmark.live_bytes import CUDA_UNIT, LiveBytes
from lumina.benchmark.simulation import Simulated, described, simulate
from lumina.config.schema import ParallelConfig
from lumina.kernels.attention_lse_backends import lse_backend, offsets
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import Captions, layout_of
from lumina.parallel.mesh import Axis, Mesh
from lumina.parallel.simulated_mesh import simulated_mesh
from lumina.planner.memory import plan_memory
from lumina.planner.messages import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, RECEIVE, REDUCE_SCATTER, SEND, Message, Messages
from tests.parallel.simulations import CAPTIONS, LABEL, ONE, SHAPES, TEXT, TWO, config_of, simulated
from tests.parallel.test_traffic import DIM, FP32, ring_of_ulysses, tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Memory


def allocated(model: dict, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes kept after a forward pass of a plain model and at most until the end of backward, as the allocator says."""
    sizes = FlagDiTConfig.from_dict(model)
    network = FlagDiT(sizes).to(dtype)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    layout = layout_of(SHAPES, 2, True, "cpu")
    x, target = torch.randn(2, len(layout.kind_t), 16)
    captions = Captions.of(torch.randn(sum(CAPTIONS), sizes.cap_feat_dim), tuple(CAPTIONS))

    def loss() -> torch.Tensor:
        out = network.forward_packed(x * 1, torch.rand(2), layout, captions)
        return (out - target).square().where(layout.is_patch_t[:, None], 0.0).mean(1).sum()

    loss().backward()  # what is made once and cached is made
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = loss()
        with record_function("forward is over"):
            pass
        made.backward()
    events = profiler.profiler.kineto_results.events()
    over = next(event.start_ns() for event in events if event.name() == "forward is over")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = kept = peak = 0
    for when, change in changes:
        live += change
        kept = live if when < over else kept
        peak = max(peak, live)
    return kept, peak


@pytest.mark.parametrize("precision", DTYPES)
def test_a_cpu_allocates_what_was_simulated(precision):
    model = TEXT | TWO | {"dim": 128}
    kept, peak = allocated(model, DTYPES[precision])
    result = simulated(config_of(model, {}, precision), 1, 0)
    assert result.kept == pytest.approx(kept, rel=0.01)
    assert result.peak == pytest.approx(peak, rel=0.01)


# Of a label-conditional model on a GPU, 256 tokens of 128 in 8 heads, feed-forward 512 wide, condition 128 wide, bf16:
# every tensor is a multiple of 512 bytes.
HAND = LABEL | {"dim": 128, "n_kv_heads": 8, "multiple_of": 512, "ffn_dim_multiplier": 1.0}
T, D, F, N, HEADS = 256, 128, 512, 2, 8
PACK = [(1, 4, 16, 32), (1, 4, 32, 16)]


def kept(layers: int, **layout) -> int:
    config = config_of(HAND | {"n_layers": layers}, layout, "bf16")
    sizes = FlagDiTConfig.from_dict(config.model)
    assert (sizes.ffn_dim, sizes.condition_width) == (F, D)
    return simulate(config, sizes, 1, 0, PACK).kept


def test_what_a_block_keeps_by_hand():
    row = T * D * 2  # bytes
    lse, x = T * HEADS * 4, row
    attention = 7 * row + lse  # what q, k, v are made of; q and k before and after norm and rotation, v, out
    moments = 6 * T * 4  # of q and k two each; of two norms the inverse
    feed_forward = 1 * row + 3 * T * F * 2  # what w1 and w3 are given; what they give, and w2 is given
    branches = 2 * row  # what wo and w2 give, for the gradients of the gates
    modulation = N * D * 2 + N * 6 * D * 2  # SiLU of the condition, and what is made of it
    between = 1 * row  # x after attention
    none = x + attention + moments + feed_forward + branches + between + modulation
    assert kept(2) - kept(1) == none
    full = kept(2, recompute="full")
    assert full - kept(1, recompute="full") == x
    assert kept(2, recompute="selective") - full == 2 * (row + lse)  # what attention gave
    assert full - kept(2, recompute="full", offload_activations=True) == 2 * x


def test_every_micro_batch_under_way_is_kept():
    """One forward, one backward: the first of four stages is three forwards ahead."""

    def first_of(pipeline: int, packs: int) -> Simulated:
        config = config_of(TEXT | {"n_layers": 4}, {"pipeline": pipeline}, "bf16", packs=packs)
        return simulated(config, pipeline, 0, "cuda")

    one, two, five = (first_of(4, packs) for packs in (1, 2, 5))
    assert five.peak - two.peak == 2 * (two.peak - one.peak)
    # Beside it what is made once and cached, where samples start.
    assert two.peak - one.peak == pytest.approx(one.kept, abs=4 * CUDA_UNIT)
    assert five.kept == one.kept


def test_live_bytes_are_of_storages():
    with LiveBytes(512) as live:
        x = torch.zeros(100)  # 400 bytes
        y = x.view(10, 10)[2:]
        assert live.live == 512
        del x
        assert live.live == 512
        z = y + 1  # 320
        assert live.live == live.peak == 1024
        del y, z
        assert (live.live, live.peak) == (0, 1024)


# Messages


def sent(messages: Messages, ranks: dict[str, int]) -> float:
    """Bytes that the algorithms that move least send, as tests/parallel/traffic.py counts them."""
    total = 0.0
    for message, count in messages.items():
        n = ranks[message.axis]
        share = {SEND: 1, RECEIVE: 0, ALL_REDUCE: 2 * (n - 1) / n}.get(message.operation, (n - 1) / n)
        assert message.operation in (SEND, RECEIVE, ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER)
        total += message.bytes * count * share
    return total


@pytest.mark.parametrize(
    ("world", "layout", "formula"),
    [
        (512, {"tensor": 4, "sequence": True}, tensor(4)),
        (4096, {"ring": 8, "ulysses": 2}, ring_of_ulysses(8, 2)),
    ],
)
def test_bytes_of_large_worlds(world, layout, formula):
    """For each token and layer as docs/parallel.md says."""
    model = LABEL | {"in_channels": 1}
    totals = []
    for layers in (1, 2):
        config = config_of(model | {"n_layers": layers}, layout, packs=world)
        shapes = [(1, 1, 16, 32)]  # 128 tokens, which all of these axes divide
        sizes = FlagDiTConfig.from_dict(config.model)
        result = simulate(config, sizes, world, world - 1, shapes, device="cuda")
        assert result.rank == world - 1
        assert result.weights == plan_memory(config, sizes, world)[0].weights
        totals.append(sent(result.messages, layout | {"sequence": 0}))
    measured = totals[1] - totals[0]
    if "tensor" in layout:  # whatever the length: modulation, and gradients of it and of two norms
        measured -= 6 * DIM * FP32 * 3 / 4 + 2 * (DIM + 6 * DIM + 2 * DIM) * FP32 * 3 / 4
    tokens = 128
    assert measured / tokens == pytest.approx(formula, rel=1e-9)


# The mesh


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "pipeline": 2, "ring": 2},
        {"ring": 2, "ulysses": 4},
        {"tensor": 2, "ulysses": 2, "pipeline": 2, "ring": 2},
        {"pipeline": 4},
    ],
)
def test_axes_are_those_of_megatron(layout):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lumina.parallel.mesh import World, _with_groups, close_mesh

    parallel, world = ParallelConfig(**layout), 16
    for rank in (0, 6, 15):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            mesh = _with_groups(parallel, World(rank, world, 0), torch.device("cpu"), None)
            real = {name: (axis.size, axis.rank, axis.ranks) for name, axis in axes_of(mesh)}
            close_mesh(mesh)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        with simulated_mesh(parallel, world, rank, torch.device("cpu")) as fake:
            assert {name: (axis.size, axis.rank, axis.ranks) for name, axis in axes_of(fake)} == real
            for name, axis in axes_of(fake):
                assert axis.group is None or tuple(dist.get_process_group_ranks(axis.group)) == axis.ranks, name


def axes_of(mesh: Mesh) -> list[tuple[str, Axis]]:
    return [(field.name, getattr(mesh, field.name)) for field in fields(Mesh) if field.type is Axis]


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 4}, "rank 4 is none of 4 ranks"),
        ({"text_tokens": [5]}, "2 samples and 1 captions"),
        ({"shapes": [], "text_tokens": []}, "at least one sample"),
        ({"device": "tpu"}, "cpu or cuda, not tpu"),
        ({"shapes": [(1, 4, 9, 12), (1, 4, 6, 10)]}, "9 × 12 cannot be cut into patches"),
        ({"world": 3}, "the nearest is"),
    ],
)
def test_what_cannot_be_simulated_is_refused(change, said):
    config = config_of(TEXT | ONE, {"tensor": 2})
    given = {"world": 4, "rank": 0, "shapes": SHAPES, "text_tokens": CAPTIONS} | change
    with pytest.raises(ValueError, match=said):
        simulate(config, FlagDiTConfig.from_dict(TEXT | ONE), **given)


def test_captions_of_a_label_conditional_model_are_refused():
    with pytest.raises(ValueError, match="no captions"):
        simulate(config_of(LABEL | ONE, {}), FlagDiTConfig.from_dict(LABEL | ONE), 1, 0, SHAPES, CAPTIONS)


def test_a_run_and_a_simulation_keep_apart():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="close its run's before"):
            simulated(config_of(TEXT | ONE, {}), 1, 0)
    finally:
        dist.destroy_process_group()


def test_nothing_is_left_behind():
    """Not the process groups, not the kernels of a GPU, not fake tensors where real ones are cached."""
    config = config_of(TEXT | ONE, {"ring": 2}, "bf16")
    for _ in range(2):
        assert type(offsets((26,), torch.device("cpu"))) is torch.Tensor  # of this rank's tokens
        simulated(config, 2, 0, "cuda")
        assert not dist.is_initialized()
        assert lse_backend(torch.zeros(1, 1, 8)).name == "cpu_flash"


def test_the_table_has_all_of_it():
    messages = Messages({Message("ring", RECEIVE, 1024): 3})
    told = described(Simulated(1, 0, 27_000, 2**20, 2**21, 2**22, messages))
    assert [line.split("|")[1:-1] for line in told.replace(" ", "").splitlines() if "--" not in line] == [
        ["rank1,stage0,27,000tokens", "MiB"],
        ["weights", "1.0"],
        ["kept", "2.0"],
        ["peak", "4.0"],
        [],
        ["axis", "operation", "bytes", "messagesofamicro-batch"],
        ["ring", "receive", "1,024", "3"],
    ]
