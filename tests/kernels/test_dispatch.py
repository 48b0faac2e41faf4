"""Who is chosen to run an operation, and what no implementation is given."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from lumina.kernels import (
    attention,
    attention_lse_backends,
    gated_residual,
    gated_residual_norm,
    layer_norm_modulate,
    merge_attention,
    optional,
    qk_norm_rope,
    rms_norm,
    rms_norm_modulate,
    swiglu,
)
from lumina.kernels.attention_lse_backends import lse_backend
from lumina.kernels.dispatch import Operation
from tests.kernels.plain import (
    assert_close_to_exact,
    numbers,
    plain_rms_norm,
)


def test_the_first_usable_implementation_runs():
    @Operation
    def doubled(x):
        """Twice x."""
        return "reference"

    @doubled.implementation("for rows", usable=lambda x: x.dim() == 1)
    def _rows(x):
        return "for rows"

    @doubled.implementation("for floats", usable=lambda x: x.is_floating_point())
    def _floats(x):
        return "for floats"

    cases = {
        "for rows": torch.ones(2),  # both can; the first registered is preferred
        "for floats": torch.ones(2, 2),
        "reference": torch.ones(2, 2, dtype=torch.int64),
    }
    for name, tensor in cases.items():
        assert doubled.chosen(tensor) == doubled(tensor) == name
    assert (doubled.name, doubled.__name__, doubled.__doc__) == ("doubled", "doubled", "Twice x.")
    assert _rows(torch.ones(2, 2)) == "for rows"


def test_other_arguments_are_passed_on():
    @Operation
    def scaled(x, factor, *, offset=0):
        return x * factor + offset

    assert scaled(torch.tensor(3), 2, offset=1) == 7
    scaled.implementation("wrong", usable=lambda x: True)(lambda x, factor, *, offset=0: factor - offset)
    assert scaled(torch.tensor(3), 2, offset=1) == 1


def test_what_runs_on_a_cpu():
    x = torch.ones(2, 3)
    assert attention.chosen(x) == "sdpa"
    for operation in (rms_norm, rms_norm_modulate, layer_norm_modulate, gated_residual, swiglu, qk_norm_rope):
        assert operation.chosen(x) == "reference"


class OnGpu(torch.Tensor):
    """As much of a CUDA tensor as a choice looks at."""

    is_cuda = True


def on_gpu(dtype, width=8):
    return torch.ones(width, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """write(name, source) puts a module of that name where it can be imported; found afresh, forgotten afterwards."""
    found = (optional.flash_attn, optional.apex_layer_norm)
    names = ("flash_attn", "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for function in found:
        function.cache_clear()

    def write(name, source=""):
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()

    yield write
    for function in found:
        function.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def test_apex_of_pypi_is_not_taken_for_nvidias(packages):
    packages("apex.__init__", "class Toolkit: ...")
    assert optional.apex_layer_norm() is None
    assert rms_norm.chosen(on_gpu(torch.bfloat16)) == "reference"
    optional.apex_layer_norm.cache_clear()
    packages("fused_layer_norm_cuda")  # the extension alone does not make it NVIDIA's either
    assert optional.apex_layer_norm() is None


def test_apex_without_its_extension_is_not_used(packages):
    packages("apex.__init__")
    packages("apex.normalization.__init__")
    packages("apex.normalization.fused_layer_norm", "def fused_rms_norm_affine(*a): ...")
    assert optional.apex_layer_norm() is None


def test_apex_with_fused_norms_is_used(packages):
    packages("apex.__init__")
    packages("apex.normalization.__init__")
    packages(
        "apex.normalization.fused_layer_norm",
        "import torch\n"
        "def fused_rms_norm_affine(x, weight, normalized_shape, eps):\n"
        "    return torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)\n",
    )
    packages("fused_layer_norm_cuda")
    assert optional.apex_layer_norm().__name__ == "apex.normalization.fused_layer_norm"
    assert rms_norm.chosen(on_gpu(torch.bfloat16)) == "apex"
    assert rms_norm.chosen(torch.ones(2)) == "reference"
    fused = importlib.import_module("lumina.kernels.rms_norm_modulate")._apex_rms_norm
    x, weight = numbers(16, 24, seed=0), numbers(24, seed=1)
    assert_close_to_exact(lambda *a: fused(*a, 1e-5), plain_rms_norm, [x, weight], torch.float32)


@pytest.mark.parametrize("source", ["", "raise ImportError('undefined symbol')"], ids=["version 1", "other build"])
def test_a_flash_attn_that_cannot_be_used_is_passed_over(packages, monkeypatch, source):
    packages("flash_attn", source)
    assert optional.flash_attn() is None
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: False)
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: True)
    assert attention.chosen(on_gpu(torch.bfloat16)) == "flash"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "cudnn", "name"),
    [
        (torch.bfloat16, 96, True, "cudnn"),
        (torch.bfloat16, 96, False, "flash"),
        (torch.float16, 48, False, "flash"),
        (torch.float32, 96, True, "sdpa"),
        (torch.bfloat16, 12, True, "sdpa"),
    ],
)
def test_attention_runs_on_what_the_ring_runs_on(monkeypatch, dtype, head_dim, cudnn, name):
    """... on CUDA, where samples of any lengths take one call."""
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: cudnn)
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: True)
    x = on_gpu(dtype, head_dim)
    assert attention.chosen(x) == name
    if name != "sdpa":
        assert lse_backend(x).name == name


def test_the_ring_runs_the_reference_where_that_is_forced(monkeypatch):
    q = torch.zeros(2, 1, 8)
    assert lse_backend(q).name == "cpu_flash"
    monkeypatch.setattr(attention_lse_backends, "REFERENCE_FORCED", True)
    assert lse_backend(q).name == "reference"
    assert lse_backend(q, "cpu_flash").name == "cpu_flash"


def test_cards_before_ampere_keep_to_sdpa(monkeypatch):
    monkeypatch.setattr(attention_lse_backends, "_since_ampere", lambda device: False)
    monkeypatch.setattr(attention_lse_backends, "_cudnn_takes", lambda *_: True)
    assert attention.chosen(on_gpu(torch.float16)) == "sdpa"


# Arguments


def pack_arguments(**changes):
    """Of gated_residual_norm, by name."""
    named = {
        "x": torch.zeros(4, 6),
        "gate": torch.zeros(2, 6),
        "y": torch.zeros(4, 6),
        "weight": torch.zeros(6),
        "scale": torch.zeros(2, 6),
        "shift": torch.zeros(2, 6),
        "sample_id": torch.tensor([0, 0, 1, 1]),
    }
    return [*(named | changes).values(), 1e-5]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("gate", (1, 6), (2, 6)),
        ("gate", (2, 1), (2, 6)),
        ("y", (4, 8), (4, 6)),
        ("y", (2, 6), (4, 6)),
        ("weight", (1,), (6,)),
        ("shift", (2, 1), (2, 6)),
        ("sample_id", (2,), (4,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, wanted):
    """... by name, whatever runs: a kernel would read what is not there."""
    value = torch.zeros(shape, dtype=torch.long if name == "sample_id" else torch.float32)
    with pytest.raises(ValueError, match="has the shape") as caught:
        gated_residual_norm(*pack_arguments(**{name: value}))
    if name == "gate" and shape[0] == 1:
        assert "scale has the shape (2, 6), not (1, 6)" in str(caught.value)
    else:
        assert str(caught.value) == f"{name} has the shape {shape}, not {wanted}"


def test_other_operations_refuse_them_too():
    x, row, ids = torch.zeros(4, 6), torch.zeros(2, 6), torch.tensor([0, 0, 1, 1])
    narrow = torch.zeros(2, 5)
    for operation, arguments in (
        (rms_norm_modulate, (x, torch.zeros(6), narrow, narrow, ids, 1e-5)),
        (layer_norm_modulate, (x, row, narrow, ids, 1e-5)),
        (gated_residual, (x, narrow, x, ids)),
        (merge_attention, (torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2, 4), torch.zeros(4, 2))),
        (merge_attention, (torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2, 3), torch.zeros(2, 4))),
    ):
        with pytest.raises(ValueError, match="has the shape"):
            operation(*arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": (3, 8)}, r"k has the shape \(3, 8\), not \(4, 8\)"),
        ({"cos": (1, 2)}, r"cos has the shape \(1, 2\), not \(4, 2\)"),
        ({"k": (4, 6)}, "q is 8 and k 6 wide; heads of 4 elements must divide both"),
        ({"k_weight": None, "k_bias": None}, "norms q and k or neither; .* q_weight, q_bias is given alone"),
        ({"q_bias": None}, "norms q and k or neither"),
        ({"k_bias": (1,)}, r"k_bias has the shape \(1,\), not \(8,\)"),
    ],
)
def test_what_qk_norm_rope_refuses(change, sentence):
    shapes = {"q": (4, 8), "k": (4, 8)} | dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), (8,))
    shapes |= {"cos": (4, 2), "sin": (4, 2)} | change
    with pytest.raises(ValueError, match=sentence):
        qk_norm_rope(*(None if shape is None else torch.zeros(shape) for shape in shapes.values()))


def test_ids_are_looked_at_for_debugging():
    code = (
        "import sys, torch\nfrom lumina.kernels import gated_residual\n"
        "x, gate = torch.zeros(4, 6), torch.zeros(2, 6)\n"
        "for ids in ([1, 0, 1, 0], [0, 0, 1, 2]):\n"
        "    try:\n        gated_residual(x, gate, x, torch.tensor(ids))\n"
        "    except ValueError as error:\n        print(error)"
    )
    environment = os.environ | {"LUMINA_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "sample_id is not sorted: samples of a pack lie one after another",
        "sample_id goes from 0 to 2 for 2 samples",
    ]
