"""Algorithms of other packages, by name.

A decorator, as in DataFlex, registers a class when its module is imported:

    @register_mixer("curriculum")
    @dataclass
    class Curriculum(Mixer): ...

A module is imported when an installed package names it in the entry-point group `dataflex_mega.plugins`, or when the
configuration lists it under `plugins`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dataflex_mega.errors import ConfigError, UserCode

ENTRY_POINT_GROUP = "dataflex_mega.plugins"
ClassType = TypeVar("ClassType", bound=type)

_registered: dict[tuple[str, str], type] = {}  # decorators fill it while modules are imported


def register(kind: str, name: str) -> Callable[[ClassType], ClassType]:
    """A decorator that makes a class the algorithm `name` of a kind, such as `mixer`.

    Raises ConfigError when another class has that name; a module may be imported twice.
    """

    def decorate(cls: ClassType) -> ClassType:
        other = _registered.setdefault((kind, name), cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"{kind}: {name!r} is registered by {other.__module__}.{other.__qualname__} and by "
                f"{cls.__module__}.{cls.__qualname__}; give one of them another name"
            )
        _registered[kind, name] = cls
        return cls

    return decorate


def register_class(kind: str, cls: type) -> str:
    """Register a class of this program -> its name in specifications. A class that is defined again replaces the former
    one of its name, as notebooks do."""
    name = f"python_{cls.__name__.lower()}"
    _registered[kind, name] = cls
    return name


def register_selector(name: str) -> Callable[[ClassType], ClassType]:
    """`@register_selector("mine")`: the class is `selector: mine`."""
    return register("selector", name)


def register_mixer(name: str) -> Callable[[ClassType], ClassType]:
    """`@register_mixer("mine")`: the class is `mixer: mine`."""
    return register("mixer", name)


def register_reorder(name: str) -> Callable[[ClassType], ClassType]:
    """`@register_reorder("mine")`: the class is `reorder: mine`."""
    return register("reorder", name)


def register_weighter(name: str) -> Callable[[ClassType], ClassType]:
    """`@register_weighter("mine")`: the class is `weighter: mine`."""
    return register("weighter", name)


def get_registered_classes(kind: str) -> dict[str, type]:
    """Name -> class of a kind, as registered by installed packages and by modules that `load_modules` has imported."""
    _load_installed_plugins()
    return {name: cls for (its_kind, name), cls in _registered.items() if its_kind == kind}


def load_modules(modules: Iterable[str]) -> None:
    """Import modules that register algorithms. Raises ConfigError for one that cannot be imported."""
    for module in modules:
        _import_module(module, "plugins")


@cache
def _load_installed_plugins() -> None:
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        package = f" of {entry.dist.name}" if entry.dist else ""
        _import_module(entry.module, f"plug-in {entry.name}{package}")


def _import_module(module: str, origin: str) -> None:
    import_code(module, f"{origin}: cannot import {module!r}")


def import_code(module: str, where: str) -> ModuleType:
    """Import a module that the configuration names. Raises ConfigError `<where>: cause` for what is no name of a module, is
    not found, or raises whatever it raises while it is imported."""
    if not all(part.isidentifier() for part in module.split(".")):
        hint = " (without .py)" if module.endswith(".py") else ""
        raise ConfigError(
            f"{where}: expected the name of a module, such as package.module{hint}; folders belong on PYTHONPATH"
        )
    with UserCode(where):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = _import_hint(module, error.name or "")
            if not hint and not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports one that is not
            raise ConfigError(f"{where}: {error}{hint}") from error
    raise AssertionError("UserCode lets nothing pass")


def _import_hint(module: str, missing: str) -> str:
    """What to do about a module that is not found."""
    if missing.partition(".")[0] == "dataflex":
        return "; docs/coming-from.md shows how a plug-in of DataFlex is moved over"
    if module.endswith(".py"):
        return f"; write {module.removesuffix('.py')}, without .py"
    file = Path(*module.split(".")).with_suffix(".py")
    if missing == module.partition(".")[0] and file.is_file():
        return f"; {file} is in the current folder: set PYTHONPATH=."
    return ""
