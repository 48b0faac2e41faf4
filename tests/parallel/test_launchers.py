"""The README's way to several processes: the command under torchrun and under deepspeed."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.parallel.runs import metrics_of, tiny_config, train_on
from tests.parallel.workers import PATIENCE, free_port

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "{port}", "-m"],
    "deepspeed": [
        BIN / "deepspeed",
        "--module",
        "--no_local_rank",
        "--num_accelerators",
        "2",
        "--master_port",
        "{port}",
    ],
}


def launch(launcher, config, *overrides):
    """The command under a launcher; its exit code and what it wrote."""
    command = [str(word).format(port=free_port()) for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [*command, "lumina", "train", str(config), *overrides], capture_output=True, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "layout"),
    [("torchrun", ["parallel.tensor=2", "parallel.sequence=true"]), ("deepspeed", ["parallel.pipeline=2"])],
)
def test_launchers(digits, tmp_path, launcher, layout):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", digits, train__steps=2)))
    train_on(1, tiny_config(tmp_path / "one", digits, train__steps=2))
    code, said = launch(launcher, config, *layout)
    assert code == 0, said[-3000:]
    assert layout[0].removeprefix("parallel.").replace("=", " ") in said  # the layout is told, once
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"])


@pytest.mark.slow
def test_a_refused_layout_under_a_launcher(digits, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", digits)))
    code, said = launch("torchrun", config, "parallel.tensor=4")
    assert code != 0
    assert "parallel.tensor=4 does not divide model.n_heads=2; the nearest that does is 2" in said
    assert "lumina/cli.py" not in said  # a sentence, and no traceback but the launcher's own
    assert not (tmp_path / "run").exists()
