"""Which algorithms are active: from `train_type` and a components file as in DataFlex, from our own keys, or from both.

The functions return a specification as a flat mapping, `{"name": "odm", "alpha": 0.8}`, however it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dataflex_mega.config.component_parameters import Spec, drop_unused, move_to_run_keys
from dataflex_mega.config.load import read_mapping, resolve
from dataflex_mega.errors import ConfigError, did_you_mean

SECTIONS = {"selector": "selectors", "mixer": "mixers", "reorder": "reorders", "weighter": "weighters"}
OLD_SECTIONS = {"reorderers": "reorders"}
PIPELINES = "pipelines"
ROLE_OF_TYPE = {
    "dynamic_select": "selector", "dynamic_mix": "mixer", "dynamic_reorder": "reorder", "dynamic_weight": "weighter",
}  # fmt: skip


def packaged_file() -> Path:
    """The components file that comes with the package."""
    return Path(str(resources.files("dataflex_mega.config") / "components.yaml"))


DATAFLEX_FILE = "dataflex/configs/components.yaml"  # the end of the path of the file in DataFlex's source tree


def stands_for_packaged(path: str | None) -> bool:
    """Whether a path names DataFlex's own file, which is not available: the packaged one has its entries and more."""
    return path is not None and Path(path).as_posix().endswith(DATAFLEX_FILE) and not Path(path).expanduser().is_file()


def read_components(path: str | None) -> dict[str, Any]:
    """A components file's mapping, interpolations unresolved; None is the packaged one.

    Raises ConfigError when the file or its layout is wrong: a section that is nearly the name of one, entries that are
    no mappings.
    """
    data = _read_packaged() if path is None else _read_file(path)
    for old, new in OLD_SECTIONS.items():
        if old in data:
            both = {**(data.get(old) or {}), **(data.get(new) or {})}
            data = {**{key: value for key, value in data.items() if key != old}, new: both}
    known = [*SECTIONS.values(), PIPELINES]
    for section, entries in data.items():
        near = did_you_mean(str(section), known)
        if section not in known and near and isinstance(entries, Mapping):
            raise ConfigError(f"components_cfg_file: {path}: unknown section {section!r}{near}")
        if section in known and not isinstance(entries or {}, Mapping):
            raise ConfigError(f"components_cfg_file: {path}: {section} must hold entries by name, found {entries!r}")
    return data


def _read_file(path: str) -> dict[str, Any]:
    if not Path(path).expanduser().is_file():
        raise ConfigError(
            f"components_cfg_file: {path} not found (relative to {Path.cwd()}); leave the key out for the packaged one"
        )
    return read_mapping(path, "components_cfg_file")


@cache
def _read_packaged() -> dict[str, Any]:
    return read_mapping(packaged_file(), "components_cfg_file")


def entries(path: str | None, role: str) -> list[str]:
    """The names that `component_name` may have for a role, in the order of the file."""
    return [str(name) for name in read_components(path).get(SECTIONS[role]) or {}]


@dataclass(frozen=True)
class Component:
    """An entry of a components file, resolved."""

    spec: Spec
    run_keys: dict[str, Any]  # keys of the run that the entry carries as parameters
    notes: tuple[str, ...]  # on parameters without an effect


def read_component(path: str | None, role: str, name: str) -> Component:
    """One entry, divided into parameters of the algorithm, keys of the run and notes. Raises ConfigError as `raw_entry`."""
    spec, run_keys = move_to_run_keys(role, raw_entry(path, role, name))
    spec, notes = drop_unused(role, spec, f"{role} {name}")
    return Component(spec, run_keys, tuple(notes))


def raw_entry(path: str | None, role: str, name: str) -> Spec:
    """One entry as written. Raises ConfigError when there is none, with the nearest name and all names."""
    data, section = read_components(path), SECTIONS[role]
    names = entries(path, role)
    where = path or "the packaged components file"
    if name not in names:
        elsewhere = [s for s, inner in data.items() if s != section and isinstance(inner, Mapping) and name in inner]
        hint = did_you_mean(name, names) or (f" (it is one of {elsewhere[0]})" if elsewhere else "")
        raise ConfigError(f"component_name: no {role} {name!r} in {where}{hint}; there is {', '.join(names) or 'none'}")
    written = resolve(data, where)[section][name]
    if not isinstance(written, Mapping) or not isinstance(written.get("name"), str):
        raise ConfigError(f"{where}: {section}.{name} must be a mapping with `name` and `params`, found {written!r}")
    rest = sorted(set(written) - {"name", "params"})
    if rest:
        raise ConfigError(f"{where}: {section}.{name} has {', '.join(rest)} beside name and params")
    return flatten_spec(role, written)


def flatten_spec(role: str, spec: str | Mapping[str, Any]) -> Spec:
    """`odm`, `{name, params: {...}}` or `{name, ...}` -> `{name, ...}`. Raises ConfigError for a mixture of forms."""
    if isinstance(spec, str):
        return {"name": spec}
    rest = {key: value for key, value in spec.items() if key != "params"}
    if "params" not in spec:
        return rest
    inner = spec["params"] or {}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{role}.params: expected a mapping of parameters, found {inner!r}")
    if set(rest) - {"name"}:
        stray = ", ".join(sorted(set(rest) - {"name"}))
        raise ConfigError(f"{role}: {stray} must stand under params like the others")
    return {**rest, **inner}


def merge_spec(
    role: str, own: str | Mapping[str, Any] | None, component: Spec | None, entry: str | None
) -> Spec | None:
    """Merge our key for a role with the picked component.

    A mapping without `name` in our key changes parameters of the component, so `mixer.alpha=0.8` on a command line
    works there too. Raises ConfigError when the two name different things, or nothing is named.
    """
    if own is None:
        return component
    spec = flatten_spec(role, own)
    if component is None:
        if "name" not in spec:
            raise ConfigError(f"{role}.name: missing; expected the name of a {role}, found only {', '.join(spec)}")
        return spec
    if "name" not in spec:
        return {**component, **spec}
    if spec != component:
        raise ConfigError(
            f"{role}: {_written(spec)} differs from component_name {entry!r}, which is {_written(component)}; drop one"
        )
    return spec


def _written(spec: Spec) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in spec.items())
    return f"{{{inner}}}" if len(spec) > 1 else str(spec["name"])
