"""Asking a run to stop: SIGTERM, Ctrl-C, and the file RUN/stop. Imports nothing heavy, so that it is there first."""

import signal
from pathlib import Path

STOP = "stop"


class StopSignals:
    """SIGTERM and Ctrl-C, while it is entered: they are noted, and the step at hand is finished and saved."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.asked = True


class StopFile:
    """RUN/stop, which anyone may create; one process looks."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / STOP

    def asked(self) -> bool:
        """Whether it is there."""
        return self.path.exists()

    def remove(self) -> str:
        """Take it away, if it is there; in words, why it could not be, or nothing."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            return f"{self.path} cannot be removed ({error.strerror or error}): remove it before the next start"
        return ""
