"""Scoring a store: the target directions go to the shards, one number a candidate comes back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.store.gradients import GradientStore

CHUNK = 1 << 16  # scores that are ranked at a time


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


def products_of(store: GradientStore, directions: Tensor, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """`products` of the samples with these global ids, whichever shards they are in: ([n, S], [n]) float32."""
    dot, norm2 = torch.zeros(len(ids), len(directions)), torch.zeros(len(ids))
    wanted = directions.float().t().contiguous()
    for first in range(0, len(ids), store.layout.block):
        here = slice(first, first + store.layout.block)
        values = store.fetch(ids[here])
        dot[here] = values @ wanted
        norm2[here] = values.square().sum(dim=1)
    return dot, norm2


def shares(store: GradientStore, ranks: int) -> list[int]:
    """Samples of each rank's share."""
    layout = store.layout
    return [sum(len(layout.samples_of(b)) for b in layout.share(rank, ranks)) for rank in range(ranks)]


def each_cosine(dot: Tensor, norm2: Tensor) -> Tensor:
    """[n, S], [n] -> [n, S] cosines; 0 for a row without length."""
    norm = norm2.sqrt().unsqueeze(1)
    return torch.where(norm > 0, dot / norm, torch.zeros_like(dot))


def cosines(dot: Tensor, norm2: Tensor) -> Tensor:
    """[n, S], [n] -> [n] the largest cosine over directions."""
    return each_cosine(dot, norm2).max(dim=1).values


def best_cosines(store: GradientStore, directions: Tensor, rank: int, ranks: int) -> Tensor:
    """`cosines` of `products`, [n] float32, with one block in memory and nothing kept of it but its scores."""
    wanted, found, place = directions.float().t().contiguous(), torch.zeros(shares(store, ranks)[rank]), 0
    for ids, rows in store.share(rank, ranks):
        values = rows.float()
        found[place : place + len(ids)] = cosines(values @ wanted, values.square().sum(dim=1))
        place += len(ids)
    return found


def top_k(scores: Tensor, rank: int, counts: list[int], count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Scores of this rank's candidates -> ([count] ids, [count] scores) of the best of all ranks.

    `counts`: candidates of each rank, whose ids follow on each other in rank order. Highest score first, the lower id where
    scores are equal; the same on every rank. Each rank sends its own best `count`, or all it has where that is fewer, 16
    bytes each. Returns fewer when there are fewer candidates. A score that is not finite comes last.
    """
    best = torch.zeros(0, 2, dtype=torch.float64)  # of what was looked at so far: score, id
    for first in range(0, len(scores), CHUNK):
        values = scores[first : first + CHUNK].double()
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        ids = torch.arange(first, first + len(values)).double() + sum(counts[:rank])  # exact below 2**53
        best = torch.cat([best, torch.stack([values, ids], dim=1)])
        best = best[torch.sort(best[:, 0], descending=True, stable=True).indices[:count]]
    both = ranks.gather_uneven(best, [min(count, each) for each in counts])
    both = both[torch.sort(both[:, 1], stable=True).indices]
    best = both[torch.sort(both[:, 0], descending=True, stable=True).indices][:count]
    return best[:, 1].long(), best[:, 0].float()
