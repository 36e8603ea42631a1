"""Scoring a store: the target directions go to the shards, one number a candidate comes back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dataflex_mega.store.gradients import GradientStore


class Ranks(Protocol):
    """What is needed of distributed.Collectives."""

    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor: ...


def products(store: GradientStore, directions: Tensor, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Directions [S, width] -> (inner products [n, S] float32, squared lengths [n] float32) of this rank's share.

    One block is in memory at a time.
    """
    count = sum(len(store.layout.samples_of(block)) for block in store.layout.share(rank, ranks))
    dot, norm2 = torch.zeros(count, len(directions)), torch.zeros(count)
    wanted, place = directions.float().t().contiguous(), 0
    for ids, rows in store.share(rank, ranks):
        here = slice(place, place + len(ids))
        values = rows.float()
        dot[here] = values @ wanted
        norm2[here] = values.square().sum(dim=1)
        place += len(ids)
    return dot, norm2


def shares(store: GradientStore, ranks: int) -> list[int]:
    """Samples of each rank's share."""
    layout = store.layout
    return [sum(len(layout.samples_of(b)) for b in layout.share(rank, ranks)) for rank in range(ranks)]


def cosines(dot: Tensor, norm2: Tensor) -> Tensor:
    """[n, S], [n] -> [n] the largest cosine over directions; 0 for a row without length."""
    norm = norm2.sqrt().unsqueeze(1)
    return torch.where(norm > 0, dot / norm, torch.zeros_like(dot)).max(dim=1).values


def top_k(scores: Tensor, first: int, count: int, ranks: Ranks, world: int) -> tuple[Tensor, Tensor]:
    """Scores of this rank's candidates, ids from `first` on -> ([count] ids, [count] scores) of the best of all ranks.

    Highest score first, the lower id where scores are equal; the same on every rank. Each rank sends its own best `count`,
    16 bytes each. Returns fewer when there are fewer candidates. A score that is not finite comes last.
    """
    scores = torch.where(torch.isfinite(scores), scores.double(), -torch.inf)
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    mine = torch.full((count, 2), float("nan"), dtype=torch.float64)
    mine[: len(order), 0] = scores[order]
    mine[: len(order), 1] = (order + first).double()  # exact below 2**53
    both = ranks.gather_uneven(mine, [count] * world)
    both = both[~both[:, 1].isnan()]
    both = both[torch.sort(both[:, 1], stable=True).indices]
    best = both[torch.sort(both[:, 0], descending=True, stable=True).indices][:count]
    return best[:, 1].long(), best[:, 0].float()
