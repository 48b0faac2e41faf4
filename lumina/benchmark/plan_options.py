"""Options and settings of `lumina plan`: each is heeded, or refused with the one that says it."""

import argparse
import json
from collections.abc import Iterable
from typing import Any

from lumina.config.load import parse_yaml

DEFAULTS = {
    "model": "7b",
    "tokens": 4096,
    "samples": 1,
    "text_tokens": 128,
    "gpus": 8,
    "device": "h100-80g",
    "host_memory": 128.0,
    "dtype": "bf16",
    "top": 10,
}
"""Of options that were not given: the parser leaves None, so that it is known which were."""
HERE = "here"
_RANGES = {
    "tokens": (1, 2**27),
    "samples": (1, 2**12),
    "text_tokens": (0, 2**20),
    "packs": (1, 2**30),
    "gpus": (1, 2**14),
    "nodes": (1, 2**14),
    "memory": (0.001, 1_000_000),
    "host_memory": (0.001, 1_000_000),
    "interconnect": (0.001, 1_000_000),
    "top": (1, 2**20),
    "simulate": (0, 2**20),
}
_MODES = ("measured", "scaling", "fit")
_OF_TIME, _OF_ROOM = "it asks what fits, and not how fast", "it asks how fast, and not what fits"
# Of each mode what it cannot heed, and why.
_UNHEEDED = {
    "measured": dict.fromkeys(("model", "tokens", "text_tokens", "dtype", "packs", "gpus"), "each row says it")
    | dict.fromkeys(("memory", "host_memory"), _OF_ROOM),
    "fit tokens": dict.fromkeys(("tokens", "samples"), "it finds the tokens of one sample a pack"),
    "fit model": {"model": "it finds the model"},
    "fit devices": dict.fromkeys(("gpus", "nodes"), "it finds them, on hosts of 8"),
}
_SAID_BY = {
    "model.preset": "--model",
    "train.tokens_per_pack": "--tokens and --samples",
    "train.packs_per_forward": "--samples",
    "text.max_tokens": "--text-tokens",
}
_SAID_ALSO_BY = {"train.global_batch_packs": "packs", "precision": "dtype"}
_SECTIONS = ("model", "parallel")
_FOUND_BY_FIT = ("model.dim", "model.n_heads")


def check_options(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for modes that exclude each other, options or settings that a mode cannot heed, and what
            `check_numbers` does.
    """
    modes = [name for name in _MODES if getattr(arguments, name) is not None]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} ask for different things: give one of them")
    if modes:
        _check_mode(arguments, modes[0])
    if arguments.json and (arguments.simulate or arguments.top is not None):
        option = "--simulate" if arguments.simulate else "--top"
        raise ValueError(f"{option} is of tables, and --json prints all layouts without any: leave one of them out")
    check_numbers(arguments)


def check_numbers(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: for a number that is too small, too large or none, naming the option.
    """
    for name, (least, most) in _RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{option_of(name)} must be a number from {least:,} to {most:,}, not {value}")


def _check_mode(arguments: argparse.Namespace, mode: str) -> None:
    if arguments.simulate or arguments.json or arguments.out is not None or arguments.top is not None:
        raise ValueError(f"--{mode} prints one answer: it goes with none of --simulate, --json, --out and --top")
    named = f"fit {arguments.fit}" if mode == "fit" else mode
    unheeded = dict(_UNHEEDED.get(named, {}))
    if mode == "fit":
        unheeded |= dict.fromkeys(("interconnect", "network"), _OF_TIME)
        if arguments.device != HERE:  # where ranks share a host's memory, their number on it counts
            unheeded.setdefault("nodes", _OF_TIME)
    for name, why in unheeded.items():
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{named} does not take {option_of(name)}: {why}")
    for key in map(key_of, leaves(arguments.overrides)):
        if mode == "measured" and not key.startswith("model."):
            raise ValueError(f"--measured does not take {key}: each row says it; settings of the model are taken")
        if named == "fit model" and key in _FOUND_BY_FIT:
            raise ValueError(
                f"--fit model does not take {key}: it finds the width, with heads of 128; model.n_layers and "
                "model.n_kv_heads can be held fixed"
            )


def resolved(arguments: argparse.Namespace) -> argparse.Namespace:
    """With defaults for what was not given."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return argparse.Namespace(**vars(arguments) | DEFAULTS | given)


def leaves(overrides: Iterable[str]) -> list[str]:
    """As ``section.key=value`` also what is written ``section={key: value}``: laid over the section like the others."""
    found = []
    for word in overrides:
        key, _, text = word.partition("=")
        value: Any = parse_yaml(text, word) if key and "." not in key else None
        if isinstance(value, dict):
            found += [f"{key}.{name}={json.dumps(inner, default=str)}" for name, inner in value.items()]
        else:
            found.append(word)
    return found


def key_of(word: str) -> str:
    """Of ``section.key=value``."""
    return word.partition("=")[0]


def option_of(name: str) -> str:
    """As it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_settings(arguments: argparse.Namespace, words: Iterable[str]) -> None:
    """`arguments` as they were given, without defaults.

    Raises:
        ValueError: for a setting that an option says, naming it, or that a plan does not depend on.
    """
    for key in map(key_of, words):
        if key in _SAID_BY:
            raise ValueError(f"{key} is said by {_SAID_BY[key]} in a plan: leave the setting out")
        if key in _SAID_ALSO_BY:
            option = _SAID_ALSO_BY[key]
            if getattr(arguments, option) is not None:
                raise ValueError(f"{option_of(option)} and {key}= say the same: leave one of them out")
        elif key.partition(".")[0] not in _SECTIONS:
            raise ValueError(
                f"a plan does not depend on {key}: leave it out; what counts are settings of the sections model and "
                "parallel, precision and train.global_batch_packs"
            )
