"""What the selectors by gradients share: cosines with the targets, and the candidates with the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from dataflex_mega.errors import DataError
from dataflex_mega.types import SignalTable


def cosines(table: SignalTable) -> Tensor:
    """[n, S] cosines of each candidate's gradient with the S target directions; 0 for a candidate without a gradient."""
    norm = table["norm2"].sqrt().unsqueeze(1)
    return torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"]))


def max_cosines(table: SignalTable) -> Tensor:
    """[n] the largest of each candidate's `cosines`."""
    return cosines(table).max(dim=1).values


def select_highest(scores: Tensor, count: int, where: str) -> Tensor:
    """[N] scores -> [count] positions, highest score first, the lower position where scores are equal.

    A score that is not finite comes last. Raises DataError, which names `where`, when there are fewer candidates.
    """
    if count > len(scores):
        raise DataError(f"{where}: {count} samples wanted, {len(scores)} candidates are there")
    ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
    return torch.sort(ranked, descending=True, stable=True).indices[:count]
