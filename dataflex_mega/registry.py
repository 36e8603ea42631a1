"""(kind, name) -> algorithm. A file `algorithms/mixers/odm.py` is the mixer `odm`; `package.module:Class` names a
plug-in, and so does a name that `dataflex_mega.plugins` knows.

A spec is what the configuration says: `odm`, `{name: odm, alpha: 0.8}` or `{name: odm, params: {alpha: 0.8}}`.
Parameters are the fields of the algorithm's dataclass, with the ranges that their annotations declare. Where a method of the
contract has a parameter's name, the field has another one and its metadata says the parameter's:
`field(default=None, metadata={"name": "proportions"})`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dataflex_mega.plugins as plugins
from dataflex_mega.algorithms.base import Algorithm, Mixer, Reorder, Selector, Weighter
from dataflex_mega.errors import ConfigError, UserCode, did_you_mean
from dataflex_mega.schema.coercion import coerce, type_text
from dataflex_mega.schema.constraints import constraints_of, field_hints

CONTRACTS: dict[str, type[Algorithm]] = {"selector": Selector, "mixer": Mixer, "reorder": Reorder, "weighter": Weighter}

Spec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an algorithm, for checks and for documentation."""

    name: str  # in the configuration
    attribute: str  # in the dataclass
    hint: Any  # the resolved annotation, with its constraints
    default: Any  # dataclasses.MISSING when it has to be given

    @property
    def type_text(self) -> str:
        """`float`, `list[float] | None`, `'low' | 'high'`."""
        return type_text(self.hint)

    @property
    def range_text(self) -> str:
        """`> 0 and <= 1`; empty without a declared range."""
        return ", ".join(str(constraint) for constraint in constraints_of(self.hint))


def list_builtin_names(kind: str) -> list[str]:
    """The names of the algorithms that come with the package, sorted."""
    package = importlib.import_module(_package_of(kind))
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def list_names(kind: str) -> list[str]:
    """The names of `available`, and those that plug-ins have registered, sorted. Raises ConfigError for a taken name."""
    builtin, registered = list_builtin_names(kind), plugins.get_registered_classes(kind)
    for name in set(builtin) & set(registered):
        raise ConfigError(
            f"{kind}: {name!r}, registered by {registered[name].__module__}, comes with the package; rename it"
        )
    return sorted([*builtin, *registered])


def load_class(kind: str, name: str) -> type[Algorithm]:
    """The class a name stands for. Raises ConfigError when there is none or it breaks the contract of its kind."""
    if ":" in name:
        cls: type = _load_plug_in_class(kind, name)
    elif name in list_builtin_names(kind) and name not in plugins.get_registered_classes(kind):
        cls = _load_builtin_class(kind, name)
    elif name in list_names(kind):
        cls = plugins.get_registered_classes(kind)[name]
    else:
        names = list_names(kind)
        hint = f"{did_you_mean(name, names)}; available: {', '.join(names)}, or a plug-in as package.module:Class"
        if not plugins.get_registered_classes(kind):
            hint += "; plugins: [module] imports one that registers a name"
        raise ConfigError(f"{kind}: no {kind} is called {name!r}{hint}")
    return _check_class(kind, name, cls)


def get_parameters(kind: str, name: str) -> dict[str, Parameter]:
    """The parameters of an algorithm by their name in the configuration."""
    cls = load_class(kind, name)
    try:
        hints = field_hints(cls)
    except NameError as error:
        raise ConfigError(f"{kind}: an annotation of {name} cannot be resolved at run time: {error}") from error
    known = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default_factory() if callable(field.default_factory) else field.default
            spelt = field.metadata.get("name", field.name)
            known[spelt] = Parameter(spelt, field.name, hints[field.name], default)
    return known


def build(kind: str, spec: Spec) -> Algorithm:
    """The algorithm of a spec, with its parameters checked.

    Raises:
        ConfigError: the name or a parameter is unknown, a value has the wrong type or is out of range. The message
            names the key, such as `mixer.odm.alpha`.
    """
    name, given = _parse_spec(kind, spec)
    known = get_parameters(kind, name)
    given, _ = _with_new_names(kind, name, given)
    values = {}
    for key, value in given.items():
        where = f"{kind}.{name}.{key}"
        if key not in known:
            hint = f"{did_you_mean(str(key), known)}; {name} has: {', '.join(known) or 'no parameters'}"
            raise ConfigError(f"{where}: unknown parameter{hint}")
        values[known[key].attribute] = coerce(where, value, known[key].hint)
    missing = [key for key, p in known.items() if p.default is dataclasses.MISSING and p.attribute not in values]
    if missing:
        raise ConfigError(f"{kind}.{name}: missing parameter {', '.join(missing)}")
    cls = load_class(kind, name)
    with UserCode(f"{kind}.{name}"):
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:  # a plug-in's own checks
            raise ConfigError(f"{kind}.{name}: {error}") from error
    raise AssertionError("UserCode lets nothing pass")


def validate(kind: str, spec: Spec) -> list[str]:
    """Everything `build` checks -> a note for each parameter that has its former name.

    Constructing an algorithm has no effects: what needs the pool happens in `setup`.
    """
    build(kind, spec)
    return _with_new_names(kind, *_parse_spec(kind, spec))[1]


# -- specs -------------------------------------------------------------------------------------------------------------


def _parse_spec(kind: str, spec: Spec) -> tuple[str, dict[str, Any]]:
    """Spec -> (name, parameters)."""
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{kind}: expected a name or a mapping with `name`, found {spec!r} ({type(spec).__name__})")
    rest = dict(spec)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}.name: expected one of {', '.join(list_names(kind))}, found {name!r}")
    if "params" not in rest:
        return name, rest
    inner = rest.pop("params")
    if rest:
        raise ConfigError(f"{kind}.{name}: {', '.join(map(str, rest))} must stand under `params` like the others")
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"{kind}.{name}.params: expected a mapping, found {inner!r} ({type(inner).__name__})")
    return name, dict(inner or {})


def _with_new_names(kind: str, name: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the parameters under today's names, a note for each former one). Raises ConfigError where both are given."""
    renamed = load_class(kind, name).renamed
    result, notes = dict(given), []
    for old in [key for key in given if key in renamed]:
        if renamed[old] in given:
            raise ConfigError(
                f"{kind}.{name}.{old}: is the former name of {renamed[old]}, which is set too; drop {old}"
            )
        result[renamed[old]] = result.pop(old)
        notes.append(f"{kind}.{name}.{old} is now {renamed[old]}: {given[old]}")
    return result, notes


# -- classes -----------------------------------------------------------------------------------------------------------


def _package_of(kind: str) -> str:
    if kind not in CONTRACTS:
        raise ValueError(f"kind must be one of {', '.join(CONTRACTS)}, found {kind!r}")
    return f"dataflex_mega.algorithms.{kind}s"


def _load_builtin_class(kind: str, name: str) -> type[Algorithm]:
    module = importlib.import_module(f"{_package_of(kind)}.{name}")
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    classes = [c for c in classes if issubclass(c, CONTRACTS[kind])]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise ConfigError(f"{kind}: {module.__name__} must hold one {CONTRACTS[kind].__name__} class, found {names}")
    return classes[0]


def _load_plug_in_class(kind: str, name: str) -> type:
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), class_name]):
        raise ConfigError(f"{kind}: a plug-in is named package.module:Class, found {name!r}")
    module = plugins.import_code(module_name, f"{kind}: cannot import {module_name!r} of {name!r}")
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"{kind}: {module_name} has no class {class_name!r}{did_you_mean(class_name, classes)}")
    return cls


# What classes of earlier versions define -> what has its place; by kind of algorithm, "" for all kinds.
FORMER_METHODS = {
    "": {"needs": "requests", "signals": "requests", "state": "state_dict", "restore": "load_state_dict"},
    "selector": {"choose": "select", "accumulate": "combine_updates"},
    "reorder": {"ranks": "rank_order", "reads_scores": "uses_scores"},
}


def _refuse_former_contract(kind: str, name: str, cls: type[Algorithm]) -> None:
    """Raises ConfigError for a class with methods of the former contract, which nobody would call. A parameter may have any
    name."""
    former = {**FORMER_METHODS[""], **FORMER_METHODS.get(kind, {})}
    parameters = {field.name for field in dataclasses.fields(cls)}
    own_classes = [c for c in cls.__mro__ if c not in CONTRACTS[kind].__mro__]
    defined = [old for old in former if old not in parameters and any(old in vars(c) for c in own_classes)]
    if defined:
        pairs = ", ".join(f"{old} is now {former[old]}" for old in defined)
        raise ConfigError(f"{kind}: {name} is written for an earlier version: {pairs}; see docs/add-an-algorithm.md")


def _check_class(kind: str, name: str, cls: type) -> type[Algorithm]:
    contract = CONTRACTS[kind]
    if not issubclass(cls, contract):
        moved = "; docs/coming-from.md shows how a class written for DataFlex is moved over"
        raise ConfigError(f"{kind}: {name} must be a subclass of {contract.__module__}.{contract.__name__}{moved}")
    _refuse_former_contract(kind, name, cls)
    if "__dataclass_fields__" not in vars(cls):
        raise ConfigError(f"{kind}: {name} must be decorated with @dataclass; its fields are its parameters")
    if inspect.isabstract(cls):
        raise ConfigError(f"{kind}: {name} lacks {', '.join(sorted(cls.__abstractmethods__))}")
    return cls
