"""The neighbours of some query samples, the nearest of each query first, as DataFlex's offline tool wrote them.

Its file holds a row of neighbours for each of M queries, the nearest first. They are taken column by column: every query's
nearest, then every query's second, each sample once, until there are enough. There is no paper.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Selector
from dataflex_mega.algorithms.selectors._npy import read_npy
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import SignalTable, UpdateContext

INDEX_DTYPES = {"<i8": torch.int64, "<i4": torch.int32}
PADDING = -1  # in place of a neighbour that the search did not find


def neighbour_ranks(indices: Tensor, num_samples: int) -> Tensor:
    """[M, K] neighbours, each in -1..num_samples-1 -> [num_samples] int64: a sample's rank, -1 for one never named."""
    order = indices.t().reshape(-1)
    is_named = order != PADDING
    positions = torch.arange(len(order))[is_named]
    first = torch.full((num_samples,), len(order)).scatter_reduce_(0, order[is_named], positions, "amin")
    named_ids = (first < len(order)).nonzero().squeeze(1)
    ranks = torch.full((num_samples,), -1)
    ranks[named_ids[first[named_ids].argsort()]] = torch.arange(len(named_ids))
    return ranks


@dataclass
class Near(Selector):
    """The nearest neighbours of the queries; the same ones at every update.

    Args:
        indices_path: the .npy file of the offline tool: [M, K] int64 or int32, global ids of the pool, nearest first; -1
            where the search found no more.
    """

    indices_path: str = "top_indices.npy"
    _ranks: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] int64

    def setup(self, domains: DomainInfo) -> None:
        """Read the file.

        Raises:
            ConfigError: there is no such file.
            DataError: its content is of another type or shape, or names a sample that the pool does not have.
        """
        path, num_samples = Path(self.indices_path).expanduser(), sum(domains.num_samples)
        if not path.is_file():
            raise ConfigError(f"selector.near.indices_path: {path} not found (relative to {Path.cwd()})")
        indices = read_npy(path, INDEX_DTYPES, ("M", "K"), "whole numbers").long()
        wrong = ((indices < PADDING) | (indices >= num_samples)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            found = f"found {int(indices[row, column])} in row {row}, column {column} of {list(indices.shape)}"
            raise DataError(f"{path}: ids must be -1 or in 0..{num_samples - 1}, those of the pool; {found}")
        self._ranks = neighbour_ranks(indices, num_samples)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: minus a sample's rank, -inf for a sample that no query names.

        Ranks above 2**24 are rounded in float32: samples there may tie, and then go by their ids.
        """
        assert self._ranks is not None, "setup was not called"
        ranks = self._ranks[table.sample_ids.cpu()]
        return torch.where(ranks >= 0, -ranks.float(), -math.inf)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions, lowest rank first. Raises DataError when the file names fewer candidates."""
        named = int(torch.isfinite(scores).sum())
        if count > named:
            found = f"{count} samples wanted, {self.indices_path} names {named} of the {len(scores)} candidates"
            raise DataError(f"selector.near: {found}; shorten update_step or search for more neighbours")
        return scores.sort(descending=True, stable=True).indices[:count]

    def state_dict(self) -> dict[str, Any]:
        """A hash of the ranks, so that a resumed run cannot continue with others."""
        assert self._ranks is not None, "setup was not called"
        return {"ranks": hashlib.sha256(self._ranks.numpy().tobytes()).hexdigest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the file has changed."""
        if state != self.state_dict():
            raise CheckpointError(f"{self.indices_path} gives another order than when the checkpoint was written")
