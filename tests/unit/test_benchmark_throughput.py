"""`lumina benchmark throughput`: how a trace is shared out, and the verb whole on models that take no time."""

import json

import pytest

from lumina.benchmark.breakdown import on_device, on_host
from lumina.benchmark.throughput import latent_shape, layout_settings
from lumina.cli import main
from lumina.config.exits import BAD_INPUT
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.tokens import token_count
from tests.parallel.workers import run_ranks

SMALL = ["model.dim=48", "model.n_layers=2", "model.n_heads=4", "model.cap_feat_dim=8", "model.multiple_of=16"]
WORDS = ["benchmark", "throughput", "--tokens", "72", "--text-tokens", "6", "--dtype", "fp32", "--steps", "2"]


def event(name, start, length, category="cpu_op", thread=1):
    return {"name": name, "ts": start, "dur": length, "cat": category, "tid": thread, "ph": "X"}


def test_every_moment_of_a_thread_has_one_category():
    """Microseconds; a step of 100, with 3 between operations that are in none."""
    marks = "user_annotation"
    events = [
        event("before", 0, 5),
        event("lumina: step", 10, 100, marks),
        event("lumina: data", 10, 10, marks),
        event("aten::randn", 12, 6),
        event("aten::linear", 21, 20),
        event("aten::addmm", 22, 18),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 41, 9),
        event("lumina: communication of ring", 50, 8, marks),
        event("aten::copy_", 52, 2),
        event("autograd::engine: MulBackward0", 60, 20),
        event("aten::mul", 62, 10),
        event("lumina: optimizer", 80, 28, marks),
        event("lumina: communication of gradient", 81, 4, marks),
        event("aten::mm", 90, 5),
        event("aten::mm", 20, 50, thread=2),
        event("aten::mm", 120, 9),
    ]
    found = {name: round(seconds * 1e6, 6) for name, seconds in on_host(events).items() if seconds}
    assert found == {
        "data": 10,
        "matrix products": 20,
        "attention": 9,
        "elementwise": 20,
        "optimizer": 24,
        "communication: ring": 8,
        "communication: gradient": 4,
        "Python and launching": 5,
    }
    assert sum(found.values()) == 100


def test_collectives_beside_kernels_are_hidden():
    marks, kernel = "gpu_user_annotation", "kernel"
    events = [
        event("lumina: step", 0, 100, "user_annotation"),
        event("lumina: communication of ring", 18, 44, marks, thread=7),
        event("sm90_xmma_gemm_bf16", 10, 20, kernel, 7),
        event("ncclDevKernel_SendRecv", 20, 40, kernel, 8),
        event("fmha_cutlass_kernel", 40, 10, kernel, 7),
        event("lumina: optimizer", 69, 21, marks, thread=7),
        event("multi_tensor_apply_kernel", 70, 20, kernel, 7),
    ]
    found = {name: round(seconds * 1e6, 6) for name, seconds in on_device(events).items() if seconds}
    assert found == {
        "matrix products": 20,
        "attention": 10,
        "communication: ring": 20,  # 30 to 40 and 50 to 60
        "communication: ring, hidden": 20,
        "optimizer": 20,
        "Python and launching": 30,
    }


def measured(tmp_path, *words):
    out = tmp_path / "row.json"
    assert main([*WORDS, "--out", str(out), *words, *SMALL]) == 0
    return json.loads(out.read_text())["rows"][0]


@pytest.mark.slow
def test_numbers_add_up(tmp_path, capsys):
    row = measured(tmp_path, "--samples", "2", "--packs", "3", "--peak", "0.5", "parallel.zero_stage=0")
    sizes = FlagDiTConfig.from_dict({w.split(".")[1].split("=")[0]: int(w.split("=")[1]) for w in SMALL})
    model = FlagDiT(sizes)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (row["parameters"], row["samples"], row["tokens"]) == (numbers, 6, 6 * 72)
    assert row["samples_per_pack"] == 2
    assert row["tokens_per_second"] == pytest.approx(432 / row["seconds"])
    # Torch's own count of one forward pass over two samples, by its math attention, three times for backward too.
    assert row["model_tflops"] * row["seconds"] * 1e12 == pytest.approx(3 * 3 * torch_flops(model))
    assert row["mfu"] == pytest.approx(row["model_tflops"] / 0.5)
    memory = row["memory"]
    assert memory["weights"] == 4 * numbers
    assert (memory["masters"], memory["moments"], memory["ema"]) == (0, 8 * trained, 4 * trained)
    assert memory["gradients"] >= 4 * trained
    # The categories are of the very steps that were timed.
    assert sum(row["by_category"].values()) == pytest.approx(row["profiled_seconds"], rel=0.05)
    assert {"matrix products", "attention", "elementwise", "optimizer", "data"} <= row["by_category"].keys()
    assert "| tokens/s " in capsys.readouterr().out


def torch_flops(model):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    _, _, height, width = latent_shape(72, model.config)
    x = torch.randn(2, 4, height, width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.rand(2), torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
    return counter.get_total_flops()


@pytest.mark.slow
def test_recomputation_is_no_work_of_the_model(tmp_path):
    row = measured(tmp_path, "parallel.recompute=full", "--profile-steps", "0", "--trace", str(tmp_path / "no.json"))
    assert row["hardware_tflops"] / row["model_tflops"] == pytest.approx(4 / 3, rel=0.02)  # all but the ends
    assert row["by_category"] == {}
    assert not (tmp_path / "no.json").exists()


def of_rank(rank, out, trace):
    words = ["--layout", "ring=2,zero=1", "--trace", trace, "--out", out]
    return main([*WORDS, *words, *SMALL])


@pytest.mark.slow
def test_axes_by_name(tmp_path):
    out, trace = tmp_path / "row.json", tmp_path / "trace.json"
    assert run_ranks(2, of_rank, str(out), str(trace)) == [0, 0]
    row = json.loads(out.read_text())["rows"][0]
    assert row["layout"] == "2 (ring 2), ZeRO 1"
    assert {"communication: ring", "communication: gradient"} <= row["by_category"].keys()
    assert sum(row["by_category"].values()) == pytest.approx(row["profiled_seconds"], rel=0.05)
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("tokens", [1, 7, 64, 72, 4096, 131072])
@pytest.mark.parametrize("text", [True, False])
def test_a_sample_is_as_long_as_asked(tokens, text):
    sizes = FlagDiTConfig(cap_feat_dim=8) if text else FlagDiTConfig(num_classes=10)
    frames, _, height, width = latent_shape(tokens, sizes)
    assert 0.97 * tokens - 2 <= token_count(frames, height, width, 2, text) <= max(tokens, 1 + text)


def test_layouts_in_words():
    words = ["parallel.tensor=2", "parallel.pipeline=3", "parallel.ring=4", "parallel.zero_stage=1"]
    assert layout_settings("tp=2,pp=3,ring=4,zero=1") == words
    assert layout_settings("") == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layout", "tp"], "--layout tp: 'tp' is not of the form axis=size"),
        (["--layout", "rings=2"], "unknown key parallel.rings; did you mean parallel.ring?"),
        (["--layout", "ring=2"], "a world of 1 processes cannot be laid out as parallel.ring=2"),
        (["--model", "70b"], "model.preset is '70b'; the presets are 600m, 3b, 5b, 7b"),
        (["--steps", "0"], "--steps 0 is too few"),
        (["--peak", "fast"], "--peak fast is no number of TFLOP/s, and not `measured`"),
        (["--text-tokens", "0", "model.num_classes=null"], "--text-tokens 0 measures a label-conditional model"),
    ],
)
def test_what_is_refused(capsys, words, sentence):
    extra = [word for word in SMALL if "--model" not in words]
    assert main([*WORDS, *words, *extra]) == BAD_INPUT
    assert sentence in capsys.readouterr().err
