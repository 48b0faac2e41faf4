"""The proof finds what is wrong, a failure leaves nothing, and memory holds a block at most."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lumina.checkpoint import convert as conversion
from lumina.checkpoint import folder as folders
from lumina.checkpoint.prove import ConversionError
from lumina.checkpoint.sources import CheckpointSource, InferenceSource
from lumina.checkpoint.tensor_file import TensorFile
from lumina.cli import main
from lumina.model.config import FlagDiTConfig
from tests.unit.converting import random_state, to, write_public, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proof") / "run"
    write_run(folder)
    return folder


def spoil_writes(monkeypatch, key, change):
    """What is written of one tensor is `change` of what was to be."""
    write = TensorFile.write
    monkeypatch.setattr(TensorFile, "write", lambda self, k, v: write(self, k, change(v) if k.endswith(key) else v))


def one_bit(values):
    flat = values.clone().contiguous().view(-1)
    flat.view({4: torch.int32, 2: torch.int16}[flat.element_size()])[-1] ^= 1
    return flat.view(values.shape)


@pytest.mark.parametrize("key", ["eol_token", "pad_token", "layers.1.attention.wq.weight", "final_layer.linear.bias"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_bit_of_a_tensor(tmp_path, run, monkeypatch, key, dtype):
    spoil_writes(monkeypatch, key, one_bit)
    with pytest.raises(ConversionError, match=f"the proof failed: ema/{key} of the result is not ema/{key} of"):
        to(run, tmp_path / "out", "inference", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["master", "ema", "exp_avg", "exp_avg_sq"])
def test_one_bit_of_a_kind(tmp_path, run, monkeypatch, kind):
    spoil_writes(monkeypatch, f"{kind}/layers.0.feed_forward.w2.weight", one_bit)
    with pytest.raises(ConversionError, match=f"{kind}/layers.0.feed_forward.w2.weight of the result is not {kind}/"):
        to(run, tmp_path / "out", "training")
    assert list(tmp_path.iterdir()) == []


def test_tensors_in_each_others_places(tmp_path, run, monkeypatch):
    read = CheckpointSource.read
    swapped = {"layers.0.attention.wq.weight": "layers.0.attention.wk.weight"}
    in_writing = {"on": True}

    def reading(self, kind, name):
        return read(self, kind, swapped.get(name, name) if in_writing["on"] else name)

    prove = conversion._prove

    def proving(*arguments):
        in_writing["on"] = False
        return prove(*arguments)

    monkeypatch.setattr(CheckpointSource, "read", reading)
    monkeypatch.setattr(conversion, "_prove", proving)
    with pytest.raises(ConversionError, match=r"wq.weight of the result is not"):
        to(run, tmp_path / "out", "inference")


@pytest.mark.parametrize(("size", "value"), [("norm_eps", 1e-4), ("n_heads", 1)])
def test_other_sizes_than_the_sources(tmp_path, run, monkeypatch, size, value):
    """Not a tensor differs: the model that is made of them does."""
    opened = InferenceSource.__init__

    def opening(self, path):
        opened(self, path)
        self.model = replace(self.model, **{size: value})

    monkeypatch.setattr(InferenceSource, "__init__", opening)
    with pytest.raises(ConversionError, match="the proof failed: the result tells the sizes"):
        to(run, tmp_path / "out", "inference")
    assert list(tmp_path.iterdir()) == []


def test_the_outputs_are_compared_and_not_the_tensors_alone(tmp_path, run):
    """The same tensors with another norm_eps: the tensors agree, the outputs of the first block do not."""
    from lumina.checkpoint.prove import prove_weights
    from lumina.checkpoint.sources import open_source

    source, other = open_source(run), open_source(run)
    assert prove_weights(source, "ema", other, "ema", lambda _: None).worst == 0
    other.model = replace(other.model, norm_eps=1e-3)
    with pytest.raises(ConversionError, match=r"outputs of layers.0 of source and result differ by .*must be equal"):
        prove_weights(source, "ema", other, "ema", lambda _: None)


def test_a_failed_proof_is_exit_1_and_a_sentence(tmp_path, run, monkeypatch, capsys):
    spoil_writes(monkeypatch, "eol_token", one_bit)
    assert main(["convert", str(run), str(tmp_path / "a" / "b" / "out"), "--to", "inference"]) == 1
    assert capsys.readouterr().err.startswith("lumina convert: the proof failed: ema/eol_token of the result")
    assert list(tmp_path.iterdir()) == []
    # What nobody asks to be proven is written as it comes.
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "inference", "--no-verify"]) == 0
    assert "not compared with the source" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"] is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("target", ["inference", "upstream", "training"])
def test_a_failure_on_the_way_leaves_nothing(tmp_path, run, monkeypatch, error, target):
    def failing(self, key, values):
        raise error

    monkeypatch.setattr(TensorFile, "write", failing)
    with pytest.raises(type(error)):
        to(run, tmp_path / "new" / "out", target)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_one_left_is_swept(tmp_path, run):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    to(run, tmp_path / "out", "inference")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, run, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 0.0 GB, and the disk has 0.0 GB left"):
        to(run, tmp_path / "out", "inference")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import re, sys
from pathlib import Path
from lumina.checkpoint.convert import Request, convert
import lumina.checkpoint.deepspeed_folder

def peak():  # of this program: what getrusage tells is also of the process that it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

small, source, destination, to, *options = sys.argv[1:]
convert(Request(Path(small), Path(small + "-" + to), to))  # imports what is imported on the way
before = peak()
convert(Request(Path(source), Path(destination), to, **dict(option.split("=") for option in options)))
print(peak() - before)
"""


def growth(small: Path, source: Path, destination: Path, to: str, *options: str) -> int:
    """Bytes by which the peak memory of a conversion is above what that of a small model takes."""
    command = [sys.executable, "-c", MEASURE, str(small), str(source), str(destination), to, *options]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_holds_a_block_and_not_the_model(tmp_path):
    """A model of 7 blocks and more than 300 MB: what a conversion and its proof take stays below 3 blocks."""
    sizes = FlagDiTConfig(dim=768, n_layers=7, n_heads=12, in_channels=1, cap_feat_dim=16)
    small = write_public(tmp_path / "small", random_state(replace(sizes, dim=24, n_layers=1), 0))
    state = random_state(sizes, 0)
    whole = sum(value.nbytes for value in state.values())
    block = sum(value.nbytes for name, value in state.items() if name.startswith("layers.0."))
    write_public(tmp_path / "public", state, suffix="safetensors")
    del state
    assert whole > 300e6
    assert whole > 7 * block
    # The proof holds a block, and its largest tensors stand beside it while they are read.
    allowed = range(block // 2, 3 * block)
    assert growth(small, tmp_path / "public", tmp_path / "pth", "upstream", "format=pth") in allowed
    assert growth(small, tmp_path / "pth", tmp_path / "training", "training") in allowed
