"""Scoring a store: every rank multiplies its rows with the target directions and returns one number per candidate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.store.gradients import GradientStore

CHUNK = 1 << 16  # scores that are sorted at a time


def rank_counts(store: GradientStore, dp_size: int) -> list[int]:
    """Number of samples whose rows each rank reads."""
    layout = store.layout
    return [
        sum(len(layout.ids_of_block(block)) for block in layout.blocks_of_rank(dp_rank, dp_size))
        for dp_rank in range(dp_size)
    ]


def dot_products(store: GradientStore, directions: Tensor, dp_rank: int, dp_size: int) -> tuple[Tensor, Tensor]:
    """Directions [S, width] -> (dot products [n, S] float32, squared norms [n] float32) of this rank's samples.

    One block is in memory at a time.
    """
    count = rank_counts(store, dp_size)[dp_rank]
    dot, norm2 = torch.zeros(count, len(directions)), torch.zeros(count)
    columns, start = directions.float().t().contiguous(), 0
    for ids, rows in store.iter_blocks(dp_rank, dp_size):
        block = slice(start, start + len(ids))
        values = rows.float()
        dot[block] = values @ columns
        norm2[block] = values.square().sum(dim=1)
        start += len(ids)
    return dot, norm2


def dot_products_of(store: GradientStore, directions: Tensor, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """`dot_products` of the samples with these global ids, from whichever shards: ([n, S], [n]) float32."""
    dot, norm2 = torch.zeros(len(ids), len(directions)), torch.zeros(len(ids))
    columns = directions.float().t().contiguous()
    for first in range(0, len(ids), store.layout.block_size):
        chunk = slice(first, first + store.layout.block_size)
        values = store.fetch(ids[chunk])
        dot[chunk] = values @ columns
        norm2[chunk] = values.square().sum(dim=1)
    return dot, norm2


def cosine_matrix(dot: Tensor, norm2: Tensor) -> Tensor:
    """[n, S], [n] -> [n, S] cosines with unit directions; 0 for a row of length 0."""
    norm = norm2.sqrt().unsqueeze(1)
    return torch.where(norm > 0, dot / norm, torch.zeros_like(dot))


def max_cosine(dot: Tensor, norm2: Tensor) -> Tensor:
    """[n, S], [n] -> [n] the largest cosine over directions."""
    return cosine_matrix(dot, norm2).max(dim=1).values


def streamed_max_cosine(store: GradientStore, directions: Tensor, dp_rank: int, dp_size: int) -> Tensor:
    """`max_cosine` of `dot_products`, [n] float32; of each block only the scores stay in memory."""
    columns, start = directions.float().t().contiguous(), 0
    scores = torch.zeros(rank_counts(store, dp_size)[dp_rank])
    for ids, rows in store.iter_blocks(dp_rank, dp_size):
        values = rows.float()
        scores[start : start + len(ids)] = max_cosine(values @ columns, values.square().sum(dim=1))
        start += len(ids)
    return scores


def top_k(scores: Tensor, dp_rank: int, counts: list[int], k: int, collectives: Collectives) -> tuple[Tensor, Tensor]:
    """Scores of this rank's candidates -> ([k] ids, [k] scores) of the best of all ranks.

    `counts`: candidates of each rank, whose ids are consecutive in rank order. Highest score first, the lower id where
    scores are equal; the same on every rank. Each rank sends its own best `k`, or all when it has fewer, 16 bytes each.
    Returns fewer when there are fewer candidates. A score that is not finite comes last.
    """
    best = torch.zeros(0, 2, dtype=torch.float64)  # (score, id) of the candidates seen so far
    for first in range(0, len(scores), CHUNK):
        values = scores[first : first + CHUNK].double()
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        ids = torch.arange(first, first + len(values)).double() + sum(counts[:dp_rank])  # exact below 2**53
        best = torch.cat([best, torch.stack([values, ids], dim=1)])
        best = best[torch.sort(best[:, 0], descending=True, stable=True).indices[:k]]
    gathered = collectives.all_gather_uneven(best, [min(k, count) for count in counts])
    gathered = gathered[torch.sort(gathered[:, 1], stable=True).indices]
    best = gathered[torch.sort(gathered[:, 0], descending=True, stable=True).indices][:k]
    return best[:, 1].long(), best[:, 0].float()
