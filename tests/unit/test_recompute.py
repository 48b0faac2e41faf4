"""What a block keeps for its backward pass, where, and how often its attention is run."""

import gc
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lumina.kernels.attention_lse_backends import BACKENDS
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import layout_of
from lumina.parallel.mesh import Mesh, World
from lumina.parallel.recompute import run_block
from lumina.parallel.sequence import stretch_of
from lumina.parallel.stage import Stage

MESH = Mesh(World(0, 1, 0), torch.device("cpu"))
SIZES = FlagDiTConfig(dim=32, n_layers=2, n_heads=4, multiple_of=16, in_channels=1, num_classes=3)


@pytest.fixture
def run():
    """A function that makes a `Stage` with random weights, and rows and conditions of a pack for it."""

    def run(mode, offload=False):
        torch.manual_seed(0)
        model = FlagDiT(SIZES)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        stage = Stage(model, range(2), MESH, recompute=mode, offload=offload)

        class Pack:
            t, captions, labels = torch.tensor([0.3, 0.9]), None, torch.tensor([0, 2])
            layout = layout_of([(1, 1, 8, 8), (1, 1, 4, 6)], 2, False, "cpu")
            stretch = stretch_of(layout, MESH)

        return stage, torch.randn(len(Pack.layout.kind_t), 4), Pack()

    return run


def kept_bytes(function):
    """What autograd keeps while `function` runs, storages counted once; and its result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result


def test_gradients_do_not_depend_on_what_is_kept(run):
    gradients = {}
    for mode in (("none", False), ("selective", False), ("full", False), ("full", True)):
        stage, x, pack = run(*mode)
        stage(x, pack).square().sum().backward()
        gradients[mode] = {name: p.grad for name, p in stage.named_parameters()}
    for mode, found in gradients.items():
        for name, gradient in gradients[("none", False)].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=f"{mode} {name}")


def test_full_keeps_a_block_input_and_none_keeps_far_more(run):
    kept = {}
    for mode in ("none", "selective", "full"):
        stage, x, pack = run(mode)
        c, x_td = (tensor.detach().requires_grad_() for tensor in stage.embed(x, pack))
        kept[mode], _ = kept_bytes(lambda stage=stage, c=c, x_td=x_td, pack=pack: stage.run_blocks(c, x_td, pack))
    tokens, width = x_td.shape
    # x of each of two blocks, beside c and the sample ids; attention's results are not kept by autograd.
    assert kept["full"] <= 2 * tokens * width * 4 + c.numel() * 4 + tokens * 8 + 1024
    assert kept["selective"] == kept["full"]
    assert kept["none"] > 10 * kept["full"]


@pytest.mark.parametrize(("mode", "again"), [("selective", 0), ("full", 2)])
def test_attention_is_run_again_only_by_full(run, mode, again):
    stage, x, pack = run(mode)
    calls = []
    if mode == "selective":
        backend = next(b for b in BACKENDS if b.name == "cpu_flash")
        target, name = type(backend), "forward"
    else:
        target, name = type(stage.model.layers["0"].attention.core), "forward"
    original = getattr(target, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with mock.patch.object(target, name, counted):
        loss = stage(x, pack).square().sum()
        forward = len(calls)
        loss.backward()
    assert forward == 2
    assert len(calls) - forward == again


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_inputs_leave_the_device(run, offload):
    """The tensor between two blocks lives on for the backward pass, or is let go for its copy."""
    # From a CPU to a CPU torch copies nothing.
    copied = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy)
    where = ("full", offload, lambda pin_memory: copied)
    stage, x, pack = run("full", offload)
    c, x_td = (tensor.detach().requires_grad_() for tensor in stage.embed(x, pack))
    inputs = stage.model.attention_inputs(pack.layout, None)
    first, second = stage.model.layers.values()
    between = run_block(first, x_td, c, pack.layout.sample_id_t, inputs, *where)
    storage = StorageWeakRef(between.untyped_storage())
    out = run_block(second, between, c, pack.layout.sample_id_t, inputs, *where)
    del between
    gc.collect()
    assert storage.expired() is offload
    out.sum().backward()
    assert x_td.grad is not None
