"""A YAML or JSON file plus `key=value` overrides -> one plain mapping. What its keys mean is decided in parse.py."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

import dataflex_mega.json_text as json_text
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.redaction import learn

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST_FILE = 1 << 24  # bytes of a configuration
LARGEST_CONTENT = 200_000  # values of a configuration, those that aliases repeat counted each time
DEEPEST = 50  # levels of a configuration
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
    if str(path).startswith("-") or (key == "config" and "=" in str(path) and not file.exists()):
        raise ConfigError(f"{key}: expected a .yaml or .json file first, then key=value; found {str(path)!r}")
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{key}: {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{key}: {path} has {file.stat().st_size} bytes, which is no configuration")
        text = file.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
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
        _refuse_depth(text, path)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ConfigError(f"{path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found a {root.id} at the top")
        _count_content(root, path, {}, [])
        _refuse_doubles(root, path, set())
        # Through OmegaConf, as LLaMA-Factory does: there 1e-3 is a number, in plain YAML 1.1 it is text.
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a date that is none
        raise ConfigError(f"{path}: {_first_line(error).partition(';')[0]}") from error
    assert isinstance(loaded, dict)
    return loaded  # type: ignore[return-value]


def _refuse_depth(text: str, path: str | Path) -> None:
    """Raises ConfigError for brackets or indents in one another that no parser of YAML here survives."""
    depth = 0
    for found in re.finditer(r"[\[{\]}\n]", text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if depth > 4 * DEEPEST:  # some of them stand in quotes or comments
            line = text.count("\n", 0, found.start()) + 1
            raise ConfigError(f"{path}, line {line}: nested too deeply; a configuration has at most {DEEPEST} levels")
    items = max((len(m.group()) // 2 for m in re.finditer(r"^ *(?:- )*", text, re.MULTILINE)), default=0)
    if items > 4 * DEEPEST:
        raise ConfigError(f"{path}: nested too deeply; a configuration has at most {DEEPEST} levels")


def _count_content(node: yaml.Node, path: str | Path, counted: dict[int, int], above: list[int]) -> int:
    """How many values a node stands for, aliases written out. Raises ConfigError for one that contains itself, and for more
    values or levels than a configuration can have."""
    if id(node) in above:
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: a value that contains itself (an alias inside its own anchor)")
    if len(above) > DEEPEST:
        raise ConfigError(
            f"{path}, line {node.start_mark.line + 1}: nested too deeply; a configuration has at most {DEEPEST} levels"
        )
    if id(node) not in counted:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count_content(part, path, counted, [*above, id(node)]) for part in inner)
        if counted[id(node)] > LARGEST_CONTENT:
            line = node.start_mark.line + 1
            raise ConfigError(f"{path}, line {line}: aliases repeat more than {LARGEST_CONTENT} values")
    return counted[id(node)]


def _refuse_doubles(node: yaml.Node, path: str | Path, seen: set[int]) -> None:
    """Raises ConfigError for a key that a mapping has twice, where YAML would keep the last one, and for one that is no
    text."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(item, path, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}, line {line}: a key must be text, found a {key.id}")
        if key.value in lines:
            raise ConfigError(f"{path}, line {line}: {key.value!r} is given twice, first on line {lines[key.value]}")
        lines[key.value] = line
        _refuse_doubles(value, path, seen)


def _parse_json(text: str, path: str | Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: {key!r} is given twice")
        return dict(items)

    if not text.strip():
        raise ConfigError(f"{path}: the file is empty")
    try:
        loaded = json_text.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(loaded).__name__}")
    return loaded


# -- overrides ---------------------------------------------------------------------------------------------------------


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one `key=value` in `data`."""
    dotted, equals, text = override.partition("=")
    shown = override if len(override) <= 80 else override[:77] + "..."
    parts = dotted.strip().split(".")
    if not equals or dotted.startswith("-") or not all(parts):
        raise ConfigError(f"override {shown!r}: expected key=value, such as learning_rate=1e-4 or mixer.alpha=0.8")
    try:
        _refuse_depth(text, f"override {shown!r}")
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"override {shown!r}: the value is not YAML: {_first_line(error)}") from error
    node: dict[str, Any] = data
    for depth, part in enumerate(parts[:-1]):
        inner: Any = node.get(part)
        if inner is None:
            inner = {}
        elif depth == 0 and part in ROLE_KEYS and isinstance(inner, str):
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            raise ConfigError(f"override {shown!r}: {'.'.join(parts[: depth + 1])} is {inner!r}, not a mapping")
        node[part] = inner
        node = inner
    if parts[0] in ROLE_KEYS and len(parts) == 2 and parts[1] != "params" and isinstance(node.get("params"), dict):
        node = node if parts[1] == "name" else node["params"]
    node[parts[-1]] = value
