"""DeepSpeed's own launcher as it is, by pdsh over a hostfile: layouts that span hosts train as one process does.

Nobody says which network to take; the names of the hosts are loopback at home, as on Debian.
"""

import sys

import pytest
import yaml

from tests.parallel.runs import TINY_MODEL, metrics_of, tiny_config, train_on

pytestmark = [pytest.mark.slow, pytest.mark.multinode]
STEPS = 20
# (hosts, ranks of each, layout, changes to the model); the axis that spans hosts is the outermost.
CASES = {
    "pipeline": (2, 2, {"tensor": 2, "pipeline": 2}, {}),
    "ring": (2, 2, {"ulysses": 2, "ring": 2}, {}),
    "tensor": (3, 1, {"tensor": 3}, {"dim": 24, "n_heads": 3, "multiple_of": 48}),
}


@pytest.mark.parametrize("spanning", CASES)
def test_the_losses_of_one_process(cluster_of, digits, tmp_path, spanning):
    count, slots, layout, changes = CASES[spanning]
    cluster = cluster_of([f"node-{number}" for number in range(count)], own_name="127.0.1.1")
    changes = {"train__steps": STEPS, "model": TINY_MODEL | changes | {"cap_feat_dim": 16}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", digits, **changes)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", cluster.hostfile(slots), "--module"]
    # What is to reach all ranks; without it those of a host each take all of its few cores.
    (tmp_path / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    environment = cluster.environment | {"DS_ENV_FILE": str(tmp_path / "deepspeed_env")}
    sizes = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    command += ["--no_local_rank", "lumina", "train", config, *sizes]
    done = cluster.run("node-0", command, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    cluster.wait_until_empty()
    train_on(1, tiny_config(tmp_path / "one", digits, **changes))
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    # All have learnt, and from the same samples.
    assert sum(line["loss"] for line in ours[-5:]) < sum(line["loss"] for line in ours[:5])
