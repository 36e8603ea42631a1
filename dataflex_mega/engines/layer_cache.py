"""A byte-limited cache of gathered per-layer tensors, from one batch to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CACHE_BYTES = 4 << 30  # bytes per rank for gradient scores, half for directions and half for moments


@dataclass
class LayerCache:
    """Entries by name, up to a number of bytes.

    Every rank has the same entries, since all ask in one order for tensors of one size.
    """

    budget: int
    entries: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, gather: Callable[[str], Any], size: int) -> Any:
        """`gather(name)`, or what it gave before. `size`: its bytes."""
        if name in self.entries:
            return self.entries[name]
        entry = gather(name)
        if size <= self.budget:
            self.budget -= size
            self.entries[name] = entry
        return entry
