"""The fused operations as torch custom ops: on the CPU they run their references, and torch.compile takes them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lumina import kernels
from lumina.kernels import triton_support
from lumina.kernels.registration import FUSED, TRITON
from tests.kernels.cases import PACKED, PACKS, cases
from tests.kernels.plain import assert_close_to_exact, evaluated, numbers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EACH = pytest.mark.parametrize("name", cases((1,), 2))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps how each of our custom ops is called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lumina":
            self.calls.setdefault(function._schema.name.removeprefix("lumina::"), (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def called(lengths):
    """The arguments of every custom op, backward ones too, as the operations call them."""
    with Calls() as mode:
        for case in cases(lengths, 96).values():
            evaluated(case.fused, case.inputs)
        tokens = sum(lengths)
        out, block = numbers(2, tokens, 4, 24, seed=0)
        kernels.merge_attention.named("triton")(out, out[..., 0].clone(), block, block[..., 0].clone())
    return mode.calls


def test_every_op_is_called_by_an_operation(of_a_pack):
    assert of_a_pack.keys() == FUSED.keys()


@pytest.fixture(scope="module")
def of_a_pack():
    return called((5, 3))


@pytest.fixture(scope="module")
def of_an_empty_pack():
    return called((0, 0))


@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name, of_a_pack):
    opcheck(name, *of_a_pack[name])


@pytest.mark.parametrize("name", FUSED)
def test_opcheck_of_an_empty_pack(name, of_an_empty_pack):
    opcheck(name, *of_an_empty_pack[name], test_utils=("test_schema", "test_faketensor"))


def opcheck(name, args, kwargs, **options):
    differentiable = not name.endswith(("_backward", "_moments", "_attention"))
    args = [
        x.detach().clone().requires_grad_(differentiable)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in args
    ]
    torch.library.opcheck(FUSED[name]._opoverload, tuple(args), kwargs, **options)


@DTYPES
@EACH
def test_the_references_behind_the_ops(name, dtype):
    """Forward, and the backward formulas, which are written out there."""
    case = cases(PACKS["ragged"], 96)[name]
    assert_close_to_exact(case.fused, case.plain, case.inputs, dtype)


@EACH
def test_an_op_gives_what_its_reference_gives(name):
    case = cases(PACKS["with empty samples"], 96)[name]
    ours = evaluated(case.fused, case.inputs)
    theirs = evaluated(lambda *a: case.call(case.operation.reference, *a), case.inputs)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in cases((1,), 2) if "shared" not in name])
def test_compiled_without_a_break(name):
    case = cases(PACKS["ragged"], 96)[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.fused, backend="aot_eager", fullgraph=True)
    for found, expected in zip(evaluated(compiled, case.inputs), evaluated(case.fused, case.inputs), strict=True):
        assert torch.equal(found, expected)


def test_compiled_with_a_length_that_changes():
    torch._dynamo.reset()
    compiled = torch.compile(
        kernels.rms_norm_modulate.named("triton"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for lengths in ((5, 3), (7, 9, 2)):
        case = PACKED["rms_norm_modulate"](lengths, 96)
        found = evaluated(lambda *a, case=case: case.call(compiled, *a), case.inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, evaluated(case.fused, case.inputs), strict=True))


def python(code, **environment):
    import os

    run = [sys.executable, "-c", code]
    return subprocess.run(run, env=os.environ | environment, capture_output=True, text=True, timeout=900)


CHOICES = """
import torch
from lumina import kernels
class OnGpu(torch.Tensor):
    is_cuda = True
torch.cuda.get_device_capability = lambda device: (9, 0)
x = torch.ones(2, 96, dtype=torch.bfloat16)
for x in (x, x.as_subclass(OnGpu)):
    print(kernels.rms_norm_modulate.chosen(x), kernels.attention.chosen(x))
"""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("", "reference sdpa\ntriton flash"), ("reference", "reference reference\nreference reference")],
)
def test_the_setting_that_forces_references(setting, expected):
    assert python(CHOICES, LUMINA_KERNELS=setting).stdout.strip() == expected


def test_a_setting_that_does_not_exist():
    run = python("import lumina.kernels", LUMINA_KERNELS="tritn")
    assert run.stderr.splitlines()[-1] == "ValueError: LUMINA_KERNELS is 'tritn'; it is 'reference' or not set"


def test_the_package_has_one_name():
    """From the top of a clone it can be found as `kernels`, and transformers looks for a package of that name."""
    code = (
        "import torch\nfrom lumina import kernels\nimport kernels as other\n"
        "from transformers.utils import is_kernels_available\n"
        "print(hasattr(other, 'swiglu'), is_kernels_available())\n"
        "print(tuple(torch.ops.lumina.swiglu_packed(torch.ones(2, 8)).shape))"
    )
    run = python(code, PYTHONPATH=str(Path(__file__).parents[2]))
    assert run.stdout.splitlines() == ["False False", "(2, 4)"], run.stderr


def test_without_triton():
    """As on macOS and Windows: everything imports, and the references run."""
    hidden = "import sys; sys.modules['triton'] = None\n"
    run = python(hidden + CHOICES)
    assert run.stdout.split() == ["reference", "sdpa", "reference", "flash"], run.stderr


@EACH
def test_recomputation(name):
    """An op may be run again for its backward pass, which may look at what was saved but once."""
    case = cases((5, 3), 96)[name]
    kept = evaluated(case.fused, case.inputs)
    again = evaluated(lambda *a: checkpoint(case.fused, *a, use_reentrant=False), case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_cuda_has_an_implementation(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"lumina::{name}", "CUDA")
    assert registered == (triton_support.triton is not None)


def laid_out(x, how):
    """`x` with other strides."""
    if not isinstance(x, torch.Tensor) or x.ndim < 2 or not x.is_floating_point():
        return x
    if how == "columns first":
        return x.mT.contiguous().mT
    return torch.cat((x, x), -1)[..., : x.shape[-1]] if how == "rows of a wider one" else x


@pytest.mark.parametrize("how", ["contiguous", "columns first", "rows of a wider one"])
@pytest.mark.parametrize("name", FUSED)
def test_triton_returns_what_a_traced_graph_expects(name, how, of_a_pack, monkeypatch):
    """Shapes, dtypes and strides: those of the reference on fake tensors. No kernel is run."""
    monkeypatch.setattr(triton_support, "launch", lambda *_, **__: None)
    args, kwargs = of_a_pack[name]
    if name == "merge_attention" and how == "columns first":
        return  # refused: it works in place on rows
    args = [laid_out(x, how) for x in args]

    def described(outputs):
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [None if out is None else (out.shape, out.dtype, out.stride()) for out in outputs]

    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        expected = described(FUSED[name]._opoverload(*fakes, **kwargs))
    assert described(TRITON[name](*args, **kwargs)) == expected
