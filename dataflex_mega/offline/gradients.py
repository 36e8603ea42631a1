"""A gradient store in place of embeddings: neighbours and TSDS in the space of projected gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.store.gradients import GradientStore

FAR = 10.0  # the first coordinate of a row without a direction


class GradientRows:
    """The rows of a finished store, each divided by its length: [N, D] float32, read on access.

    Distances between such rows are sqrt(2 - 2 cos), at most 2. A row of zeros (a sample without a target token) has no
    direction; it is FAR from all others, so that it is a neighbour only where no other candidate is left.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a folder without a finished store."""
        self.store = GradientStore(folder)
        self.shape = (self.store.layout.num_samples, self.store.layout.width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """[n, D] rows of a slice, or of [n] row numbers. Raises CheckpointError for a damaged block."""
        ids = np.arange(self.shape[0])[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        values = self.store.fetch(ids).numpy()
        length = np.linalg.norm(values, axis=1, keepdims=True)
        values /= np.where(length > 0, length, 1)
        values[length[:, 0] == 0, 0] = FAR
        return values

    @property
    def identity(self) -> dict[str, Any]:
        """With the keys of an embeddings manifest. Stores of Adam updates and of plain gradients have different hashes of
        one model, so the hash has a key of its own for each kind."""
        stored = dict(self.store.identity)
        projection = stored.get("projection", {})
        return {
            f"model of {stored.get('gradient')} gradients": stored.get("model"),
            "encoder": ", ".join(["gradients", *(f"{name} {value}" for name, value in projection.items())]),
            "normalize": True,
            "data": {"pool": stored.get("data")},
            "samples": self.shape[0],
            "size": self.shape[1],
        }
