"""Algorithms of other packages, under names of their own.

A class is registered by a decorator, as DataFlex users know it, when its module is imported:

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
from typing import TypeVar

from dataflex_mega.errors import ConfigError

GROUP = "dataflex_mega.plugins"
T = TypeVar("T", bound=type)

_registered: dict[tuple[str, str], type] = {}  # decorators fill it while modules are imported


def register(kind: str, name: str) -> Callable[[T], T]:
    """A decorator that makes a class the algorithm `name` of a kind, such as `mixer`.

    Raises ConfigError when another class has the name; the same class of a module that is imported again has not.
    """

    def decorate(cls: T) -> T:
        other = _registered.setdefault((kind, name), cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"{kind}: {name!r} is registered by {other.__module__}.{other.__qualname__} and by "
                f"{cls.__module__}.{cls.__qualname__}; give one of them another name"
            )
        _registered[kind, name] = cls
        return cls

    return decorate


def register_selector(name: str) -> Callable[[T], T]:
    """`@register_selector("mine")`: the class is `selector: mine`."""
    return register("selector", name)


def register_mixer(name: str) -> Callable[[T], T]:
    """`@register_mixer("mine")`: the class is `mixer: mine`."""
    return register("mixer", name)


def register_reorder(name: str) -> Callable[[T], T]:
    """`@register_reorder("mine")`: the class is `reorder: mine`."""
    return register("reorder", name)


def register_weighter(name: str) -> Callable[[T], T]:
    """`@register_weighter("mine")`: the class is `weighter: mine`."""
    return register("weighter", name)


def registered(kind: str) -> dict[str, type]:
    """Name -> class of what installed packages, and modules loaded by `load`, have registered for a kind."""
    _load_installed()
    return {name: cls for (of, name), cls in _registered.items() if of == kind}


def load(modules: Iterable[str]) -> None:
    """Import these modules for what they register. Raises ConfigError naming one that cannot be imported."""
    for module in modules:
        _import(module, "plugins")


@cache
def _load_installed() -> None:
    for entry in metadata.entry_points(group=GROUP):
        package = f" of {entry.dist.name}" if entry.dist else ""
        _import(entry.module, f"plug-in {entry.name}{package}")


def _import(module: str, where: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {module!r}: {error}") from error
