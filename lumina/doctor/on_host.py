"""Everything that is looked at on one host; run on this one, or by another doctor over ssh."""

import json
import secrets
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lumina.config.files import PROBE
from lumina.doctor.check import FAIL, OK, Check

LIMIT_SECONDS = 90
CLOCK, FOUND, TOKEN = "clock", "found", "token"
_KEY = "lumina doctor"


@dataclass(frozen=True)
class Request:
    """What a host is asked.

    slots: devices that are used; None: all.
    world: ranks of all hosts; None where nothing tells.
    port: to be free; None: not looked at. asked_port: whether the user named it.
    config, overrides: of a run, or None.
    token: a file of another host's beside or above the run's folder, to be seen here.
    """

    slots: tuple[int, ...] | None = None
    world: int | None = None
    port: int | None = None
    asked_port: bool = False
    config: str | None = None
    overrides: tuple[str, ...] = ()
    token: str | None = None

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> "Request":
        fields = json.loads(text)
        for name in ("slots", "overrides"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return Request(**fields)


def examine_host(request: Request) -> tuple[dict[str, Any], list[Check]]:
    """`findings`, and every check of this host."""
    from lumina.doctor.devices import check_devices
    from lumina.doctor.run import check_run, open_run
    from lumina.doctor.software import check_software, findings
    from lumina.doctor.surroundings import check_clock, check_disk, check_folder, check_port, check_shared_memory

    found = findings()
    checks = [*check_software(found), check_clock(), *check_devices(request.slots)]
    run = open_run(request.config, request.overrides) if request.config is not None else None
    folder, needed, kept = Path.cwd(), None, 0
    if run is not None:
        checks += run.checks
    if run is not None and run.config is not None:
        folder, needed = Path(run.config.run.dir), run.checkpoint_bytes
        kept = needed * (run.config.checkpoint.keep + 1)
        checks += check_folder(folder)
    if request.token is not None:
        checks.append(_shared(request.token))
    checks.append(check_disk(folder, needed, kept))
    gpus = sum(device.find("CUDA") >= 0 for device in found["devices"])
    checks.append(check_shared_memory(len(request.slots) if request.slots is not None and gpus else gpus))
    if request.port is not None:
        checks.append(check_port(request.port, request.asked_port))
    if run is not None and run.config is not None:
        checks += check_run(run, request.world, request.slots)
    return found, checks


def _shared(token: str) -> Check:
    if Path(token).is_file():
        return Check("shared folder", OK, "a file that the first host wrote for the run is seen")
    return Check(
        "shared folder",
        FAIL,
        f"{token}, which the first host wrote, is not seen: the run's folder is another one here",
        "name a run.dir on a file system that all hosts share: every rank writes its part of a checkpoint there",
    )


def answer(text: str) -> None:
    """Do what another doctor asks, in JSON, and print lines for it to read."""
    # If it does not hear the end any more, this one ends by itself.
    signal.alarm(LIMIT_SECONDS + 30)
    _say(CLOCK, time.time())
    asked = json.loads(text)
    if "leave" in asked:
        _say(TOKEN, _left(Path(asked["leave"])))
    elif "remove" in asked:
        _remove(Path(asked["remove"]))
    else:
        found, checks = examine_host(Request.decode(text))
        _say(FOUND, found | {"checks": [asdict(check) for check in checks]})
        _say(CLOCK, time.time())


def _left(run_dir: Path) -> str:
    """A file that is left where the run's folder is, or is to be made: its path, relative if that of the run is."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    token = there / f"{PROBE}{secrets.token_hex(8)}"
    token.touch()
    return str(token)


def _remove(token: Path) -> None:
    if token.name.startswith(PROBE):
        token.unlink(missing_ok=True)


def _say(kind: str, content: Any) -> None:
    print(json.dumps({_KEY: kind, "content": content}), flush=True)


def read(line: str) -> tuple[str, Any] | None:
    """Kind and content of a line of `answer`; None for what something else has written."""
    start = line.find(f'{{"{_KEY}"')
    if start < 0:
        return None
    try:
        fields = json.loads(line[start:])
        return fields[_KEY], fields["content"]
    except (ValueError, KeyError):
        return None


def checks_of(found: dict[str, Any], host: str) -> list[Check]:
    """Those of an answer."""
    return [Check(**(fields | {"host": host})) for fields in found["checks"]]
