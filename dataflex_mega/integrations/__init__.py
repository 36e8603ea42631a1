"""Adapters for training loops of other libraries, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataflex_mega.integrations.hf import DomainLossCallback, MixtureTrainer

__all__ = ["DomainLossCallback", "MixtureTrainer"]


def __getattr__(name: str) -> Any:
    """Import an adapter, and the library that it is for, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'dataflex_mega.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module("dataflex_mega.integrations.hf"), name)
