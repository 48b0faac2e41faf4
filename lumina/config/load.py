"""Reading a configuration: YAML file, then ``key=value`` from the command line, then the schema."""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lumina.config.schema import Config


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads `1e-4` as a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """`where` names the text in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        hint = "; a value with { } in it, as of shards, stands in quotes" if "{" in text else ""
        raise ValueError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)}{hint})") from error


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in `path` with ``section.key=value`` overrides laid over it.

    Raises:
        ValueError: for a missing file, broken YAML, an unknown key or a wrong type, in one sentence that names
            the key and, for unknown keys, the nearest valid one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    tree = parse_yaml(path.read_text(), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a configuration is a mapping of sections (run, model, data, train, …)")
    return with_overrides(tree, overrides, str(path))


def with_overrides(tree: dict[str, Any], overrides: Iterable[str], where: str) -> Config:
    """`tree`, which is changed, with ``section.key=value`` laid over it.

    Raises:
        ValueError: as `load_config`; `where` names the tree.
    """
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree, where)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: overrides are written section.key=value, as train.steps=100")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{override!r}: {section} is a value, not a section with keys of its own")
        node = child
    node[leaf] = parse_yaml(value, override)


def validate(tree: dict[str, Any], where: str) -> Config:
    """`tree` as a `Config`; `where` names its source in the error.

    Raises:
        ValueError: in one sentence naming the first key that is wrong and what would be right.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    # An unknown key is named first: a misspelt required key raises two errors, and this is the useful one.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    match problem["type"]:
        case "extra_forbidden":
            known = list(_keys_of(_section_at(location[:-1])))
            close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
            prefix = "".join(f"{part}." for part in location[:-1])
            hint = f"did you mean {prefix}{close[0]}?" if close else f"the keys here are {', '.join(sorted(known))}"
            return f"unknown key {key}; {hint}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        case _:
            return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _section_at(location: list[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for name in location:
        for field_name, field in section.model_fields.items():
            if name in (field_name, field.alias):
                options = [field.annotation, *get_args(field.annotation)]
                section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return section


def _keys_of(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield field.alias or name


def dump_config(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(by_alias=True, mode="json"), sort_keys=False, allow_unicode=True)
