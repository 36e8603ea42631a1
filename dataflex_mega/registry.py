"""(kind, name) -> algorithm. A file `algorithms/mixers/odm.py` is the mixer `odm`; `package.module:Class` names a
plug-in, and so does a name that `dataflex_mega.plugins` knows.

A spec is what the configuration says: `odm`, `{name: odm, alpha: 0.8}` or `{name: odm, params: {alpha: 0.8}}`.
Parameters are the fields of the algorithm's dataclass; a field whose name a method of the contract has taken is spelt
in the configuration as its metadata says: `field(default=None, metadata={"name": "proportions"})`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from dataflex_mega import plugins
from dataflex_mega.algorithms.base import Algorithm, Mixer, Reorder, Selector, Weighter
from dataflex_mega.errors import ConfigError, did_you_mean

CONTRACTS: dict[str, type[Algorithm]] = {"selector": Selector, "mixer": Mixer, "reorder": Reorder, "weighter": Weighter}

Spec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an algorithm, for checks and for documentation."""

    name: str  # in the configuration
    attribute: str  # in the dataclass
    hint: Any  # the resolved annotation
    default: Any  # dataclasses.MISSING when it has to be given

    @property
    def type_text(self) -> str:
        """`float`, `list[float] | None`, `'low' | 'high'`."""
        return _text(self.hint)


def available(kind: str) -> list[str]:
    """The names of the algorithms that come with the package, sorted."""
    package = importlib.import_module(_package(kind))
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def all_names(kind: str) -> list[str]:
    """The names of `available`, and those that plug-ins have registered, sorted. Raises ConfigError for a taken name."""
    own, others = available(kind), plugins.registered(kind)
    for name in set(own) & set(others):
        raise ConfigError(
            f"{kind}: {name!r}, registered by {others[name].__module__}, comes with the package; rename it"
        )
    return sorted([*own, *others])


def load_class(kind: str, name: str) -> type[Algorithm]:
    """The class a name stands for. Raises ConfigError when there is none or it breaks the contract of its kind."""
    if ":" in name:
        found: type = _plug_in(kind, name)
    elif name in available(kind):
        found = _only_class(kind, name)
    elif name in all_names(kind):
        found = plugins.registered(kind)[name]
    else:
        names = all_names(kind)
        near = did_you_mean(name, names)
        hint = f"{near}; available: {', '.join(names)}, or a plug-in as package.module:Class"
        raise ConfigError(f"{kind}: no {kind} is called {name!r}{hint}")
    return _checked(kind, name, found)


def parameters(kind: str, name: str) -> dict[str, Parameter]:
    """The parameters of an algorithm by their name in the configuration."""
    cls = load_class(kind, name)
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise ConfigError(f"{kind}: an annotation of {name} cannot be resolved at run time: {error}") from error
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default_factory() if callable(field.default_factory) else field.default
            spelt = field.metadata.get("name", field.name)
            found[spelt] = Parameter(spelt, field.name, hints[field.name], default)
    return found


def build(kind: str, spec: Spec) -> Algorithm:
    """The algorithm of a spec, with its parameters checked.

    Raises:
        ConfigError: the name or a parameter is unknown, a value has the wrong type or is out of range. The message
            names the key, such as `mixer.odm.alpha`.
    """
    name, given = _read(kind, spec)
    known = parameters(kind, name)
    values = {}
    for key, value in given.items():
        where = f"{kind}.{name}.{key}"
        if key not in known:
            hint = f"{did_you_mean(str(key), known)}; {name} has: {', '.join(known) or 'no parameters'}"
            raise ConfigError(f"{where}: unknown parameter{hint}")
        try:
            values[known[key].attribute] = _fit(value, known[key].hint)
        except _MismatchError:
            raise ConfigError(
                f"{where}: expected {known[key].type_text}, found {value!r} ({type(value).__name__})"
            ) from None
    missing = [key for key, p in known.items() if p.default is dataclasses.MISSING and p.attribute not in values]
    if missing:
        raise ConfigError(f"{kind}.{name}: missing parameter {', '.join(missing)}")
    try:
        return load_class(kind, name)(**values)
    except (TypeError, ValueError) as error:  # a plug-in's own checks
        raise ConfigError(f"{kind}.{name}: {error}") from error


def validate(kind: str, spec: Spec) -> None:
    """Everything `build` checks. Constructing an algorithm has no effects: what needs the pool happens in `setup`."""
    build(kind, spec)


# -- specs -------------------------------------------------------------------------------------------------------------


def _read(kind: str, spec: Spec) -> tuple[str, dict[str, Any]]:
    """Spec -> (name, parameters)."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{kind}: expected a name or a mapping with `name`, found {spec!r} ({type(spec).__name__})")
    rest = dict(spec)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}.name: expected one of {', '.join(all_names(kind))}, found {name!r}")
    if "params" not in rest:
        return name, rest
    inner = rest.pop("params")
    if rest:
        raise ConfigError(f"{kind}.{name}: {', '.join(map(str, rest))} must stand under `params` like the others")
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"{kind}.{name}.params: expected a mapping, found {inner!r} ({type(inner).__name__})")
    return name, dict(inner or {})


# -- classes -----------------------------------------------------------------------------------------------------------


def _package(kind: str) -> str:
    if kind not in CONTRACTS:
        raise ValueError(f"kind must be one of {', '.join(CONTRACTS)}, found {kind!r}")
    return f"dataflex_mega.algorithms.{kind}s"


def _only_class(kind: str, name: str) -> type[Algorithm]:
    module = importlib.import_module(f"{_package(kind)}.{name}")
    found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    found = [c for c in found if issubclass(c, CONTRACTS[kind])]
    if len(found) != 1:
        names = ", ".join(c.__name__ for c in found) or "none"
        raise ConfigError(f"{kind}: {module.__name__} must hold one {CONTRACTS[kind].__name__} class, found {names}")
    return found[0]


def _plug_in(kind: str, name: str) -> type:
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ConfigError(f"{kind}: a plug-in is named package.module:Class, found {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{kind}: cannot import {module_name!r} of {name!r}: {error}") from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"{kind}: {module_name} has no class {class_name!r}{did_you_mean(class_name, classes)}")
    return found


def _checked(kind: str, name: str, cls: type) -> type[Algorithm]:
    contract = CONTRACTS[kind]
    if not issubclass(cls, contract):
        moved = "; docs/coming-from.md shows how a class written for DataFlex is moved over"
        raise ConfigError(f"{kind}: {name} must be a subclass of {contract.__module__}.{contract.__name__}{moved}")
    if "__dataclass_fields__" not in vars(cls):
        raise ConfigError(f"{kind}: {name} must be decorated with @dataclass; its fields are its parameters")
    if inspect.isabstract(cls):
        raise ConfigError(f"{kind}: {name} lacks {', '.join(sorted(cls.__abstractmethods__))}")
    return cls


# -- values ------------------------------------------------------------------------------------------------------------


class _MismatchError(Exception):
    """A value does not fit its annotation."""


def _fit(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it (int to float, list to tuple), or _MismatchError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_any(value, arguments)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise _MismatchError
        return value
    if (origin or hint) in (list, tuple):
        return _fit_items(value, origin or hint, arguments)
    if (origin or hint) is dict:
        key_hint, value_hint = arguments or (Any, Any)
        if not isinstance(value, Mapping):
            raise _MismatchError
        return {_fit(k, key_hint): _fit(v, value_hint) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise _MismatchError
    return value


def _fit_any(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _fit(value, hint)
        except _MismatchError:
            continue
    raise _MismatchError


def _fit_items(value: Any, container: type, hints: tuple[Any, ...]) -> Any:
    """`list[T]`, `tuple[T, ...]` and `tuple[A, B]`, from any list or tuple."""
    if not isinstance(value, list | tuple):
        raise _MismatchError
    if container is tuple and hints and hints[-1] is not Ellipsis:
        if len(value) != len(hints):
            raise _MismatchError
        return tuple(_fit(item, hint) for item, hint in zip(value, hints, strict=True))
    item_hint = hints[0] if hints else Any
    return container(_fit(item, item_hint) for item in value)


def _text(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(_text(a) for a in arguments)
    if origin is Literal:
        return " | ".join(repr(a) for a in arguments)
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    inner = f"[{', '.join(_text(a) for a in arguments)}]" if arguments else ""
    return f"{getattr(origin or hint, '__name__', str(hint))}{inner}"
