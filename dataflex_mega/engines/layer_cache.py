"""What has been gathered of layers and is kept from one batch to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CACHE_BYTES = 4 << 30  # bytes a rank keeps for gradient scores, half for directions and half for moments


@dataclass
class LayerCache:
    """Things by name, kept up to a number of bytes.

    Every rank keeps the same ones, since all ask in one order for tensors of one size.
    """

    budget: int
    entries: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, gather: Callable[[str], Any], size: int) -> Any:
        """`gather(name)`, or what it gave before. `size`: its bytes."""
        if name in self.entries:
            return self.entries[name]
        found = gather(name)
        if size <= self.budget:
            self.budget -= size
            self.entries[name] = found
        return found
