"""What was looked at, how it was found, and what mends it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

OK, WARNING, FAIL = "ok", "warning", "FAIL"
_WORST_FIRST = (FAIL, WARNING, OK)
_WIDTH = 100
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Check:
    """One line of the table.

    state: ok; warning: a run can start, but slowly or not for long; FAIL: it cannot.
    mend: what to do, in plain words; empty where nothing is to be done.
    host: where, or empty on this host alone.
    """

    name: str
    state: str
    finding: str
    mend: str = ""
    host: str = ""


def worst(checks: Sequence[Check]) -> str:
    """State of all together."""
    found = {check.state for check in checks}
    return next((state for state in _WORST_FIRST if state in found), OK)


def folded(checks: Sequence[Check], hosts: Sequence[str]) -> list[Check]:
    """Lines that say the same of several hosts as one, in the order of the names of checks."""
    groups: dict[Check, list[str]] = {}
    for check in checks:
        groups.setdefault(replace(check, host=""), []).append(check.host)
    names = list(dict.fromkeys(check.name for check in checks))
    found = [replace(check, host=_together(where, hosts)) for check, where in groups.items()]
    return sorted(found, key=lambda check: (names.index(check.name), _WORST_FIRST.index(check.state)))


def _together(where: Sequence[str], hosts: Sequence[str]) -> str:
    if "" in where:
        return ""
    if len(hosts) > 1 and set(where) == set(hosts):
        return "all"
    return listed(where)


def listed(names: Sequence[str]) -> str:
    """The first of many."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def as_table(checks: Sequence[Check]) -> str:
    """A line or more for each, the mend below it, and a last line that sums up."""
    wide = [len(check.name) for check in checks]
    name_width = max([5, *wide])
    host_width = min(40, max(len(check.host) for check in checks))
    lines = []
    for check in checks:
        start = f"{check.state:7}  {check.name:{name_width}}  "
        if host_width:
            start += f"{check.host:{host_width}}  "
        lines += _wrapped(start, check.finding)
        if check.mend:
            lines += _wrapped(f"{'mend':>7}".ljust(len(start)), check.mend)
    counts = {state: sum(check.state == state for check in checks) for state in _WORST_FIRST}
    lines.append(f"\nfailed: {counts[FAIL]}, warnings: {counts[WARNING]}, ok: {counts[OK]}")
    return "\n".join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    return [(start if number == 0 else " " * len(start)) + line for number, line in enumerate(lines)]
