"""`lumina benchmark kernels` and `attention`, and `lumina doctor`: what is compared is the same, and counted right."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lumina import kernels
from lumina.benchmark import attention, contenders, record, timing
from lumina.benchmark import kernels as benchmark
from lumina.cli import main
from lumina.kernels import optional
from lumina.kernels.dispatch import Operation

CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("name", benchmark.WORKLOADS)


def workload(name, monkeypatch, tokens=24, dtype=torch.float32, device=CPU):
    """Three samples."""
    monkeypatch.setattr(benchmark, "SAMPLE", tokens // 3)
    torch.manual_seed(0)
    size = benchmark.Size(192, tokens, dtype, device)
    assert size.samples == 3
    return benchmark.WORKLOADS[name](size)


def results(function, made):
    """Outputs and gradients; of what works in place, the inputs afterwards."""
    inputs = [x.detach().clone() for x in made.inputs]
    if made.backward_bytes is None:
        function(*inputs)
        return inputs
    inputs = [x.requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.randn_like(out) for out in outputs])]


def assert_same(name, made, contender, tolerance):
    expected, found = results(made.contenders["lumina"], made), results(made.contenders[contender], made)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.shape == y.shape, f"{name}, result {i}"
        difference = float((x.float() - y.float()).norm() / y.float().norm())
        assert difference < tolerance, f"{name}, result {i}: {difference:.1e}"


@EACH
def test_eager_torch_does_the_same(name, monkeypatch):
    assert_same(name, workload(name, monkeypatch), "torch", 1e-5)


COMPILED = """
import torch
from lumina.benchmark.kernels import Size, WORKLOADS

for name in ("gated_residual_norm", "qk_norm_rope"):
    torch.manual_seed(0)
    made = WORKLOADS[name](Size(192, 24, torch.float32, torch.device("cpu")))
    pairs = zip(made.contenders["compile"](*made.inputs), made.contenders["torch"](*made.inputs), strict=True)
    print(name, max(float((x - y).abs().max()) for x, y in pairs))
"""


@pytest.mark.slow
@pytest.mark.skipif(not contenders.compiles(CPU), reason="torch.compile needs a C++ compiler")
def test_torch_compile_does_the_same():
    """In a process without the tests' checks of shapes, which it cannot trace."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=True)
    differences = dict(line.split() for line in done.stdout.splitlines())
    assert differences.keys() == {"gated_residual_norm", "qk_norm_rope"}
    assert all(float(difference) < 1e-5 for difference in differences.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH
@pytest.mark.parametrize("contender", ["torch", "compile", "liger", "apex"])
def test_all_do_the_same_on_a_gpu(name, contender, monkeypatch):
    made = workload(name, monkeypatch, tokens=384, dtype=torch.bfloat16, device=torch.device("cuda"))
    if made.contenders.get(contender) is None:
        pytest.skip(f"{contender} has none, or is not installed")
    if (name, contender) == ("qk_norm_rope", "liger"):  # it rotates other pairs: as many bytes, other numbers
        ours, its = made.contenders["lumina"](*made.inputs), made.contenders["liger"](*made.inputs)
        assert [x.shape for x in ours] == [x.shape for x in its]
        return
    assert_same(name, made, contender, 0.05)


@EACH
def test_bytes_are_those_of_the_tensors(name, monkeypatch):
    """All that is as long as the pack is read or written once."""
    made = workload(name, monkeypatch)
    if name == "ema":
        averages = made.inputs[: len(made.inputs) // 2]
        assert made.forward_bytes == sum(3 * x.nbytes for x in averages)  # both read, the average written
        return
    streams = [x.nbytes for x in made.inputs if len(x) == 24]
    tables = 2 * 24 * (192 // 32 // 2) * 4 if name == "qk_norm_rope" else 0
    if made.backward_bytes is None:  # merge_attention: out and lse are written too
        assert made.forward_bytes == sum(streams) + sum(x.nbytes for x in made.inputs[:2])
        return
    leaves = [x.requires_grad_() for x in made.inputs]
    outputs = made.contenders["lumina"](*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    written = [out.nbytes for out in outputs]
    assert made.forward_bytes == sum(streams) + sum(written) + tables
    # Gradients of outputs and what was kept are read, gradients of inputs written: one each for an input.
    backward = sum(written) + 2 * sum(streams) + tables
    if name == "gated_residual":
        backward -= 2 * written[0]  # x is not kept, and its gradient is the one that came
    assert made.backward_bytes == backward


def test_samples_of_a_pack():
    assert benchmark.Size(1536, 131072, torch.float32, CPU).samples == 32
    assert benchmark.Size(1536, 5000, torch.float32, CPU).samples == 1
    assert benchmark.Size(4096, 4096, torch.float32, CPU).ffn == 11008


def test_the_median_of_a_call(monkeypatch):
    """Warm-up is left out; repetitions end when they have taken 0.3 s, but there are five at least."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "_BUDGET", 0.3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def taking(durations):
        now[0], left = 0.0, iter(durations)
        calls.clear()

        def call():
            calls.append(None)
            now[0] += next(left)

        return call

    assert timing.seconds(taking([9.0, 9.0, 9.0, 0.1, 0.3, 0.1, 0.5, 0.7]), CPU) == pytest.approx(0.3)
    assert len(calls) == timing._WARM_UP + 5
    assert timing.seconds(taking([9.0] * 3 + [0.02] * 100), CPU) == pytest.approx(0.02)
    assert len(calls) == timing._WARM_UP + 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_show_in_a_devices_time():
    device, x = torch.device("cuda"), torch.zeros(8, device="cuda")

    def slow_to_start():
        timing.time.sleep(0.01)
        x.add_(1)

    assert timing.seconds(slow_to_start, device) < 1e-3
    assert timing.seconds(lambda: torch.cuda._sleep(10_000_000), device) > 1e-3
    assert timing.copy_bandwidth(device) > 1e11


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "_BUDGET", 0.0)
    monkeypatch.setitem(timing.COPIED, "cpu", 2**16)


def run(capsys, *arguments):
    code = main(["benchmark", *map(str, arguments)])
    return code, capsys.readouterr()


def test_rows_of_a_run(tmp_path, capsys):
    out = tmp_path / "found.json"
    sizes = ["--hidden", 128, "--tokens", 16, 32, "--dtype", "fp32"]
    names = ["--only", "swiglu", "ema", "--against", "lumina", "torch"]
    code, said = run(capsys, "kernels", *sizes, *names, "--out", out)
    assert code == 0, said.err
    assert "On a CPU `lumina` is the torch references" in said.out
    found = json.loads(out.read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["copy_bandwidth"] > 0
    seen = {(row["operation"], row["direction"], row["tokens"], row["contender"]): row for row in found["rows"]}
    both = {(d, t, c) for d in ("forward", "backward") for t in (16, 32) for c in ("lumina", "torch")}
    assert seen.keys() == {("swiglu", *key) for key in both} | {
        ("ema", "forward", None, c) for c in ("lumina", "torch")
    }
    for row in seen.values():
        assert row["fraction_of_copy"] == pytest.approx(row["bytes"] / row["seconds"] / found["copy_bandwidth"])
    row = seen["swiglu", "backward", 32, "lumina"]
    assert (row["bytes"], row["runs"], row["dtype"]) == (5 * 32 * 512 * 4, "reference", "float32")
    lines = [line for line in said.out.splitlines() if line.startswith("| swiglu") and "| 32 " in line]
    assert len(lines) == 2
    assert f"{row['seconds'] * 1e6:,.1f} ({row['fraction_of_copy']:.0%})" in lines[1]


def test_attention_rows(tmp_path, capsys):
    out = tmp_path / "found.json"
    sizes = ["--head-dim", 16, "--heads", 2, "--tokens", 96, "--dtype", "fp32"]
    code, said = run(capsys, "attention", *sizes, "--out", out)
    assert code == 0, said.err
    rows = json.loads(out.read_text())["rows"]
    assert [(row["backend"], row["ring"]) for row in rows] == [
        ("sdpa", None),
        ("cpu_flash", None),
        ("reference", None),
        ("cpu_flash", 2),
        ("cpu_flash", 4),
        ("cpu_flash", 8),
    ]
    for row in rows:
        assert row["errors"].keys() == {"out", "dq", "dk", "dv"}
        assert 0 < max(row["errors"].values()) < 1e-5
        assert row["forward_tflops"] == pytest.approx(4 * 96 * 96 * 2 * 16 / row["forward_seconds"] / 1e12)
        assert row["backward_tflops"] == pytest.approx(10 * 96 * 96 * 2 * 16 / row["backward_seconds"] / 1e12)
    assert [row["default"] for row in rows] == [False, True, False, True, True, True]
    eight = next(line for line in said.out.splitlines() if "ring of 8" in line)
    taken = [sum(row[f"{way}_seconds"] for way in ("forward", "backward")) for row in (rows[-1], rows[1])]
    assert f"{taken[0] / taken[1] - 1:+.1%}" in eight


def test_the_exact_attention_is_that_of_autograd(monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES_AT_ONCE", 7)
    torch.manual_seed(0)
    q, k, v, grad_out = torch.randn(4, 20, 6, dtype=torch.float64)
    found = attention.exact(q, k, v, grad_out)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*(x[None, None] for x in leaves))[0, 0]
    expected = (out, *torch.autograd.grad(out, leaves, grad_out))
    for name, value in zip(("out", "dq", "dk", "dv"), expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_errors_show_what_is_wrong():
    inputs = attention._inputs(32, 2, 16, torch.float32, CPU)
    truth = attention.exact(*(x[:, -1] for x in inputs))

    def right(q, k, v):
        return kernels.attention.reference(q, k, v, kernels.AttentionPlan((32,), (32,), CPU))

    assert max(attention._errors(right, inputs, truth).values()) < 1e-5
    off = attention._errors(lambda q, k, v: right(q, k, v) * 1.01, inputs, truth)
    assert all(error == pytest.approx(0.01, rel=0.01) for error in off.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["kernels", "--only", "swigul"], "--only swigul is unknown; did you mean swiglu?"),
        (["kernels", "--against", "pytorch"], "--against pytorch is unknown; did you mean torch?"),
        (["kernels", "--hidden", "100"], "--hidden 100 is not a multiple of 64: 32 heads, rotated in pairs"),
        (["kernels", "--tokens", "0"], "--tokens 0: a pack has one token at least"),
        (["kernels", "--device", "cuda:7"], "--device cuda:7 cannot be used here"),
        (["kernels", "--device", "meta"], "--device is meta; measured is on cuda or cpu"),
        (["attention", "--tokens", "8", "-3"], "--tokens -3 is not positive"),
        (["attention", "--head-dim", "0"], "--head-dim 0 is not positive"),
        (["attention", "--heads", "0"], "--heads 0 is not positive"),
        (
            ["kernels", "--hidden", "64", "--tokens", "8", "--only", "swiglu", "--against", "liger", "apex"],
            "there is nothing to measure: of liger, apex none can run on cpu here",
        ),
        (["attention", "--out", "nowhere/x.json"], "--out nowhere/x.json: there is no folder"),
    ],
)
def test_bad_input(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *arguments)
    assert code == 2
    assert sentence in said.err
    assert len([line for line in said.err.splitlines() if not line.endswith("…")]) == 1


def test_one_that_fails_leaves_the_others(capsys, tmp_path, monkeypatch):
    """... and what was measured before, in the file at once."""
    out = tmp_path / "x.json"
    kept = []

    def failing(a, b):
        kept.append(json.loads(out.read_text())["rows"])
        raise RuntimeError("out of resources\nand more")

    monkeypatch.setattr(contenders, "swiglu", failing)
    sizes = ["--hidden", 64, "--tokens", 8, "--only", "swiglu", "--against", "lumina", "lumina", "torch"]
    code, said = run(capsys, "kernels", *sizes, "--out", out)
    assert code == 0
    assert [row["direction"] for row in kept[0]] == ["forward", "backward"]
    missing = "swiglu, 8 tokens of 64, torch: RuntimeError: out of resources"
    found = json.loads(out.read_text())
    assert found["missing"] == [missing]
    assert len(found["rows"]) == 2, "a contender named twice is measured once"
    assert f"Not measured: {missing}" in said.out


def test_a_single_token(capsys):
    """Attention to oneself has no error to divide by."""
    code, said = run(capsys, "attention", "--tokens", 1, "--heads", 1, "--head-dim", 8, "--dtype", "fp32")
    assert code == 0
    assert "cpu_flash" in said.out


def test_results_are_not_overwritten(capsys, tmp_path):
    out = tmp_path / "x.json"
    out.write_text("kept")
    code, said = run(capsys, "kernels", "--out", out)
    assert (code, out.read_text()) == (2, "kept")
    assert "exists; name a file that does not" in said.err


def test_a_record_says_where_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "benchmark", "kernels", "--out", "a b.json"])
    facts = record.surroundings(CPU)
    assert facts["command"] == "lumina benchmark kernels --out 'a b.json'"
    assert f"{torch.get_num_threads()} threads" in facts["device"]
    assert f"torch {torch.__version__}" in record.heading(facts)


def doctor(capsys, *arguments):
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_doctor_names_what_every_operation_runs_on(capsys):
    found = json.loads(doctor(capsys, "--json"))
    operations = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Operation)}
    for dtype, chosen in found["kernels"].items():
        assert chosen.keys() == operations | {"attention with lse (ring)"}, dtype
    if not torch.cuda.is_available():
        assert found["kernels"]["fp32"]["swiglu"] == "reference"
        assert found["kernels"]["bf16"]["attention"] == "sdpa"
        assert found["kernels"]["bf16"]["attention with lse (ring)"] == "cpu_flash"
        assert "no CUDA device" in found["why"]
    assert found["optional"]["apex"] == (optional.apex_layer_norm() is not None)
    table = doctor(capsys)
    for name, chosen in found["kernels"]["bf16"].items():
        assert any(line.startswith(f"| {name} ") and f" {chosen} " in line for line in table.splitlines())


def test_doctor_says_when_references_are_forced():
    code = "import sys; from lumina.cli import main; sys.exit(main(['doctor']))"
    environment = os.environ | {"LUMINA_KERNELS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "LUMINA_KERNELS=reference: every operation runs its torch reference" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("| attention  ")]
    assert line.split()[3] == line.split()[5] == "reference"
