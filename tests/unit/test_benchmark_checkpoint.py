"""`lumina benchmark checkpoint`, whole, on a model that takes no time."""

import json

import pytest

from lumina.benchmark import checkpoint as bench
from lumina.cli import main
from lumina.model.config import FlagDiTConfig
from lumina.model.flag_dit import FlagDiT
from lumina.model.presets import PRESETS


@pytest.mark.slow
def test_every_row_of_a_training_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "600m", {"dim": 32, "n_layers": 1, "n_heads": 2})
    monkeypatch.setattr(bench, "PASS_SECONDS", 0.05)
    out = tmp_path / "rows.json"
    assert main(["benchmark", "checkpoint", "--repeats", "1", "--dir", str(tmp_path), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["missing"] == []
    model = FlagDiT(FlagDiTConfig.from_dict({"preset": "600m", "in_channels": 4, "num_classes": 1000}))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    whole, of_ema = 4 * 4 * numbers, 4 * numbers  # masters, average and two moments in fp32; the average alone
    assert {row["what"]: row["bytes"] for row in record["rows"]} == {
        "save": whole,
        "cp + fsync": whole,
        "load": whole,
        "resume": whole,
        "cat": whole,
        "convert": of_ema,
        "convert with proof": of_ema,
        "torch.save + fsync": whole,
        "torch.load": whole,
        "asynchronous save: training waits": whole,
        "asynchronous save: until it is whole": whole,
    }
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert "| asynchronous save: training waits" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
