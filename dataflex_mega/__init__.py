"""Data-centric training on torch.distributed: select samples, mix domains and weight losses while a model trains.

    import dataflex_mega as dm

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dataflex_mega.integrations as integrations
    from dataflex_mega.algorithms.base import Mixer, Reorder, Selector, Weighter
    from dataflex_mega.algorithms.requests import Request
    from dataflex_mega.api import TrainResult, less_scores, tokenize, train
    from dataflex_mega.engines.capabilities import Capability
    from dataflex_mega.errors import ConfigError, DataError, TrainingFault, UserError
    from dataflex_mega.mixture_sampler import MixtureBatchSampler
    from dataflex_mega.plugins import register_mixer, register_reorder, register_selector, register_weighter
    from dataflex_mega.providers.registry import Provider, provides

__version__ = "0.2.0"

_MODULES = {
    "algorithms.base": ("Mixer", "Reorder", "Selector", "Weighter"),
    "algorithms.requests": ("Request",),
    "api": ("TrainResult", "less_scores", "tokenize"),
    "engines.capabilities": ("Capability",),
    "errors": ("ConfigError", "DataError", "TrainingFault", "UserError"),
    "mixture_sampler": ("MixtureBatchSampler",),
    "plugins": ("register_mixer", "register_reorder", "register_selector", "register_weighter"),
    "providers.registry": ("Provider", "provides"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Capability",
    "ConfigError",
    "DataError",
    "Mixer",
    "MixtureBatchSampler",
    "Provider",
    "Reorder",
    "Request",
    "Selector",
    "TrainResult",
    "TrainingFault",
    "UserError",
    "Weighter",
    "__version__",
    "integrations",
    "less_scores",
    "provides",
    "register_mixer",
    "register_reorder",
    "register_selector",
    "register_weighter",
    "tokenize",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "integrations":
        return importlib.import_module("dataflex_mega.integrations")
    if name not in _HOMES:
        raise AttributeError(f"module 'dataflex_mega' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dataflex_mega.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """`dm.train` is the function also after the module `dataflex_mega.train`, the program, was imported: importing a
    submodule sets an attribute of the package, which this one does not take."""

    @property
    def train(self) -> Any:
        return importlib.import_module("dataflex_mega.api").train

    @train.setter
    def train(self, module: types.ModuleType) -> None:
        """`module`: dataflex_mega.train, which stays in sys.modules."""


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
