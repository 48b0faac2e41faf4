"""The same looks on many hosts at once, and what they have in common."""

import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lumina.doctor.check import FAIL, OK, WARNING, Check, listed
from lumina.doctor.on_host import CLOCK, LIMIT_SECONDS, read
from lumina.launch import transport
from lumina.launch.hostfile import Host

_AT_ONCE = 128
_CLOCK_SECONDS = 2.0
_SAYING_NOTHING = re.compile(r"^(pdsh@|Connection to .* closed|mpirun|srun: error: .*task 0: Exited|-+$|$)")
# What a host or ssh says of why it cannot be reached, and what helps.
_MENDS = (
    (r"Permission denied", "let this user in without a password: `ssh-copy-id {host}`"),
    (
        r"Could not resolve|Name or service not known",
        "correct the name in the hostfile, or add it to /etc/hosts or DNS",
    ),
    (r"Connection refused", "start sshd on {host}"),
    (
        r"No route to host|timed out|unreachable",
        "see that {host} runs, and that no firewall or cable cuts it off (ping {host})",
    ),
    (
        r"Host key verification failed|IDENTIFICATION HAS CHANGED",
        "look whether it is the right host; then `ssh {host}` once and accept its key",
    ),
    (
        r"No module named|unrecognized arguments|unknown option|invalid choice",
        "install this version of Lumina for the Python that is used there, or name another by python= in the hostfile",
    ),
    (r"not found|No such file", "install Lumina at the same path there, or give python= and dir= in the hostfile"),
)
_ANY_MEND = "try `ssh {host} true`; leave it out with --exclude {host} until it answers"
# Facts that may differ between hosts that train together, with a warning.
_MAY_DIFFER = ("driver", "flash-attn", "apex")
_MENDS_OF = {
    "code": "install the same commit of Lumina on all hosts, or one on a file system that they share",
    "Python": "give python= in the hostfile, the same version on all hosts",
    "driver": "update the driver where it is older",
}


@dataclass
class Answer:
    """Of one host.

    found: `findings` and checks; None where they did not come, for `why`.
    ahead: seconds by which its clock is before this one's, as far as the fastest of its lines tells.
    """

    found: dict[str, Any] | None = None
    said: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    ahead: float | None = None


def ask(
    hosts: Sequence[Host], launcher: str, asked: Mapping[str, str], limit: float = LIMIT_SECONDS
) -> dict[str, Answer]:
    """The doctor on each of `hosts`, at once.

    Args:
        asked: what each is asked, by name.
        limit: seconds after which one has not answered.
    """
    with ThreadPoolExecutor(min(_AT_ONCE, len(hosts))) as pool:
        answers = pool.map(lambda host: _ask(host, launcher, asked[host.name], limit), hosts)
        return {host.name: answer for host, answer in zip(hosts, answers, strict=True)}


def _ask(host: Host, launcher: str, asked: str, limit: float) -> Answer:
    here, answer, errors = transport.is_here(host.name), Answer(), []
    process = subprocess.Popen(
        transport.command_on(host, launcher, ["-m", "lumina", "doctor", "--on-host", asked]),
        env=None if here else transport.environment_of(launcher),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit, end)
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    timer.start()
    reader.start()
    try:
        for line in process.stdout:
            arrived, content = time.time(), read(line)
            if content is None:
                errors.append(line)
            else:
                _note(answer, *content, arrived)
        process.wait()
        reader.join(1.0)
    finally:
        timer.cancel()
        process.stderr.close() if not reader.is_alive() else None
        process.stdout.close()
    if answer.found is None:
        said = [line.strip() for line in errors if not _SAYING_NOTHING.match(line.strip())]
        last = said[-1] if said else f"{launcher} ended with exit code {process.returncode}"
        answer.why = (
            f"no answer in {limit:.0f} s" + (f'; it said: "{said[-1]}"' if said else "") if late.is_set() else last
        )
    return answer


def _note(answer: Answer, kind: str, content: Any, arrived: float) -> None:
    answer.said[kind] = content
    if kind == "found":
        answer.found = content
    elif kind == CLOCK:
        # A line is under way for a while: the one that was fastest is nearest the truth.
        ahead = content - arrived
        answer.ahead = ahead if answer.ahead is None else max(answer.ahead, ahead)


def check_reached(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Which hosts have answered, and why others have not."""
    reached = [name for name, answer in answers.items() if answer.found is not None]
    for name, answer in answers.items():
        if answer.found is None:
            mends = (mend for pattern, mend in _MENDS if re.search(pattern, answer.why))
            what = "cannot be reached" if answer.ahead is None else "did not finish"
            yield Check("hosts", FAIL, f"{what}: {answer.why}", next(mends, _ANY_MEND).format(host=name), name)
    if reached:
        yield Check("hosts", OK, f"{len(reached)} of {len(answers)} answer")


def check_same(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Versions and code: the odd ones out against what most hosts have (where as many differ, the first of them)."""
    facts = {name: answer.found["facts"] for name, answer in answers.items() if answer.found is not None}
    if len(facts) < 2:
        return
    same = []
    for fact in dict.fromkeys(key for of_host in facts.values() for key in of_host):
        values = {name: of_host.get(fact) for name, of_host in facts.items()}
        usual, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            same.append(f"{fact} {_value(fact, usual)}")
            continue
        for odd in dict.fromkeys(value for value in values.values() if value != usual):
            where = [name for name, value in values.items() if value == odd]
            others = listed([name for name, value in values.items() if value == usual])
            minor = fact == "Python" and _minor(odd) == _minor(usual)
            mend = _MENDS_OF.get(
                fact, f"install {fact} {usual} there" if usual else f"install {fact} on all hosts or none"
            )
            for name in where:
                yield Check(
                    f"same {fact}",
                    WARNING if minor or fact in _MAY_DIFFER else FAIL,
                    f"{_value(fact, odd)}, and {_value(fact, usual)} on {others}",
                    mend,
                    name,
                )
    if same:
        yield Check("same on all", OK, ", ".join(same))


def _value(fact: str, value: str | None) -> str:
    if value is None:
        return "none"
    return value[:12] if fact == "code" else value


def _minor(version: str | None) -> str:
    return ".".join((version or "").split(".")[:2])


def check_clocks(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Against this host's."""
    ahead = {name: answer.ahead for name, answer in answers.items() if answer.ahead is not None}
    off = {name: seconds for name, seconds in ahead.items() if abs(seconds) > _CLOCK_SECONDS}
    for name, seconds in off.items():
        yield Check(
            "clocks",
            WARNING,
            f"{abs(seconds):,.1f} s {'ahead of' if seconds > 0 else 'behind'} this host",
            "keep it with chrony or systemd-timesyncd: logs do not match, and indexes look older than their shards",
            name,
        )
    if ahead and not off:
        worst = max(abs(seconds) for seconds in ahead.values())
        yield Check("clocks", OK, f"within {worst:.1f} s of this host's")
