"""A YAML or JSON file plus `key=value` overrides -> one plain mapping. What its keys mean is decided in parse.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.redaction import learn

SUFFIXES = (".yaml", ".yml", ".json")
ROLE_KEYS = ("selector", "mixer", "reorder", "pipeline", "weighter")


def load(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run, with interpolations (`${key}`, `${oc.env:NAME}`) resolved.

    Args:
        path: a .yaml, .yml or .json file.
        overrides: `key=value`; dots go into mappings, and `mixer.alpha=0.8` works on a plain `mixer: odm` too. The
            value is read as YAML: `1e-3` is a number, `[0.5, 0.5]` a list, nothing is null.

    Raises:
        ConfigError: no such file, a syntax error (with its line), a key given twice, something else than a mapping, an
            override that is not `key=value`. One line.
    """
    data = with_overrides(read_mapping(path), overrides)
    learn(data)  # before what is wrong with it is reported
    plain = resolve(data, path)
    learn(plain)
    for key, value in plain.items():
        if isinstance(key, str) and key.endswith("_strategy") and value is False:
            plain[key] = "no"  # YAML reads `no` as false
    return plain


def with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` itself, each `key=value` set in it. Raises ConfigError as `load`."""
    for override in overrides:
        _apply(data, override)
    return data


def read_mapping(path: str | Path, key: str = "config") -> dict[str, Any]:
    """A file's mapping, interpolations left as they are. `key` says in errors who named the file."""
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{key}: {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} not found{_neighbour(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise ConfigError(f"{key}: {path} cannot be read: {reason}") from error
    return _parse_json(text, path) if file.suffix == ".json" else _parse_yaml(text, path)


def resolve(data: dict[Any, Any], where: str | Path) -> dict[Any, Any]:
    """Interpolations replaced by what they stand for. Raises ConfigError naming the key that has none."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(data), resolve=True, throw_on_missing=True)
    except GrammarParseError as error:
        raise ConfigError(f"{where}: broken ${{...}}: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        place = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{where}: {place}{_first_line(error)}") from error
    assert isinstance(plain, dict)
    return plain


def _neighbour(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (there is no folder {file.parent})"
    return did_you_mean(file.name, [other.name for other in file.parent.iterdir() if other.suffix in SUFFIXES])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# -- files -------------------------------------------------------------------------------------------------------------


def _parse_yaml(text: str, path: str | Path) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found a {root.id} at the top")
        _refuse_doubles(root, path)
        # Through OmegaConf, as LLaMA-Factory does: there 1e-3 is a number, in plain YAML 1.1 it is text.
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(loaded, dict)
    return loaded  # type: ignore[return-value]


def _refuse_doubles(node: yaml.Node, path: str | Path) -> None:
    """Raises ConfigError for a key that a mapping has twice, where YAML would keep the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in lines and isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}, line {line}: {key.value!r} is given twice, first on line {lines[key.value]}")
        if isinstance(key, yaml.ScalarNode):
            lines[key.value] = line
        _refuse_doubles(value, path)


def _parse_json(text: str, path: str | Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: {key!r} is given twice")
        return dict(items)

    try:
        loaded = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(loaded).__name__}")
    return loaded


# -- overrides ---------------------------------------------------------------------------------------------------------


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one `key=value` in `data`."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or dotted.startswith("-") or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, such as learning_rate=1e-4 or mixer.alpha=0.8")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {_first_line(error)}") from error
    node: dict[str, Any] = data
    for depth, part in enumerate(parts[:-1]):
        inner: Any = node.get(part)
        if inner is None:
            inner = {}
        elif depth == 0 and part in ROLE_KEYS and isinstance(inner, str):
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: depth + 1])} is {inner!r}, not a mapping")
        node[part] = inner
        node = inner
    if parts[0] in ROLE_KEYS and len(parts) == 2 and parts[1] != "params" and isinstance(node.get("params"), dict):
        node = node if parts[1] == "name" else node["params"]
    node[parts[-1]] = value
