"""A `lumina launch` over the hosts of a `Cluster`, as a test watches it."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

from tests.launch.cluster import PATIENCE, Cluster, Rounds


class Launched:
    """Started on the cluster's first host or `host`, its configuration and what it says in `folder`."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        tree: dict,
        launcher: str,
        slots: int = 2,
        host: str = "",
        options: Sequence[str] = (),
    ):
        self.cluster, self.run_dir = cluster, Path(tree["run"]["dir"])
        self._config, self._words = folder / "run.yaml", folder / "said"
        self._config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "lumina", "launch", "--hostfile", cluster.hostfile(slots)]
        command += ["--launcher", launcher, *options, self._config]
        with self._words.open("wb") as words:
            self.process = cluster.start(host or cluster.names[0], command, stdout=words, stderr=words)

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self._words.read_text()

    @property
    def told(self) -> list[str]:
        """Its own sentences."""
        start = "lumina launch: "
        return [line.removeprefix(start) for line in self.said.splitlines() if line.startswith(start)]

    @property
    def step(self) -> int:
        """The last of metrics.jsonl; 0 before the first."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait(self, until, what: str) -> float:
        """Seconds that it took until `until()`, in rounds."""
        started, rounds = time.monotonic(), Rounds()
        while not until():
            assert time.monotonic() - started < PATIENCE, f"{what}: not within {PATIENCE} s\n{self.said}"
            assert self.process.poll() is None, f"{what}: it has ended\n{self.said}"
            rounds.sleep(0.05)
        return rounds.seconds

    def wait_for_step(self, step: int) -> float:
        return self.wait(lambda: self.step >= step, f"step {step}")

    def wait_for_attempt(self, number: int = 0) -> float:
        """Until it is begun: all hosts have been connected to."""
        return self.wait((self.run_dir / "logs" / f"attempt_{number}").is_dir, f"attempt {number}")

    def ranks_of(self, number: int) -> list[int]:
        """Those that an attempt has started, whether they still run or not."""
        logs = (self.run_dir / "logs" / f"attempt_{number}").glob("rank_*.log")
        return sorted(int(path.stem.removeprefix("rank_")) for path in logs)

    def wait_for_more(self, steps: int = 10) -> float:
        """So many steps beyond those that have been trained by now."""
        return self.wait_for_step(self.step + steps)

    def wait_for(self, words: str) -> float:
        """Until its own sentences hold `words`."""
        return self.wait(lambda: any(words in line for line in self.told), repr(words))

    def ranks(self, host: str) -> dict[int, psutil.Process]:
        """Of this run on a host, by their numbers."""
        found = {}
        for process in self.cluster.processes(host):
            try:
                if str(self._config) in process.cmdline() and "train" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def agent(self, host: str) -> psutil.Process:
        """That of this run, which has started its ranks."""
        return next(iter(self.ranks(host).values())).parent()

    def end(self) -> int:
        return self.process.wait(PATIENCE)
