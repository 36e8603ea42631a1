"""One vector a sample from its hidden states, and the mean vector of target samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.types import Batch, HiddenSpec


def position_weights(batch: Batch, pooling: str) -> Tensor:
    """[b, S] float32: what each position counts in its sample's vector; 1 in all over a sample, 0 on padding."""
    there = batch.segment >= 0
    if pooling == "last":
        after = torch.nn.functional.pad(batch.segment, (0, 1), value=-1)[:, 1:]
        return (there & (after != batch.segment)).float()
    counted = batch.position_ids + 1 if pooling == "late" else torch.ones_like(batch.segment)
    weights = torch.where(there, counted, 0).float()
    if not batch.packed:
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    totals = (weights.unsqueeze(1) * _members(batch)).sum(dim=(0, 2))  # [n]
    return weights / totals[batch.segment.clamp(min=0)].clamp(min=1)


def _members(batch: Batch) -> Tensor:
    """[b, n, S] float32: 1 where a position belongs to a sample."""
    index = torch.arange(len(batch.sample_id), device=batch.segment.device)
    return (batch.segment.unsqueeze(1) == index.view(1, -1, 1)).float()


def pool(hidden: Tensor, batch: Batch, pooling: str, places: Tensor | None = None) -> Tensor:
    """[b, s, h] hidden states of the [s] positions `places`, or of all -> [n, h] float32, their part of each sample's sum.

    Parts of a sequence that lies on several ranks add up. A matrix product, since adding by index has no fixed order on a
    GPU.
    """
    here = slice(None) if places is None else places
    weights = position_weights(batch, pooling)[:, here]
    if not batch.packed and len(weights) == len(batch.sample_id):  # not so where a pipeline has cut or filled the rows
        return torch.einsum("bs,bsh->bh", weights, hidden.float())
    shares = weights.unsqueeze(1) * _members(batch)[:, :, here]  # [b, n, s]
    return torch.einsum("bns,bsh->nh", shares, hidden.float())


def vectors(hidden: Tensor, batch: Batch, spec: HiddenSpec, places: Tensor | None = None) -> Tensor:
    """`pool`, with what the spec wants before and after it."""
    pooled = pool(torch.tanh(hidden.float()) if spec.squash else hidden, batch, spec.pooling, places)
    return unit(pooled) if spec.unit else pooled


def unit(vectors: Tensor) -> Tensor:
    """[n, h] -> each divided by its length; a zero vector stays zero."""
    length = vectors.norm(dim=1, keepdim=True)
    return torch.where(length > 0, vectors / length, 0.0)


@dataclass
class TargetMean:
    """The mean vector of target samples, the work divided over ranks by whole batches."""

    groups: Sequence[Pool]  # evaluation sets
    collate: Callable[[Sequence[Sample]], Batch]
    embed: Callable[..., Tensor]  # Engine.embed
    batch_size: int
    rank: int
    ranks: int
    total: Callable[[Tensor], Tensor]  # sums a tensor over ranks

    def __call__(self, spec: HiddenSpec, count: int) -> Tensor:
        """[h] float64 of `count` samples, spread evenly over all of them; 0: of all. Every rank must call it."""
        batches = self._batches(count)
        found: list[Tensor] = []
        for start in range(0, len(batches), self.ranks):
            mine = start + self.rank
            # Sharded layers are called together: a rank without a batch repeats the first and drops the result.
            vectors = self.embed(self.collate(self._fetch(batches[mine if mine < len(batches) else 0])), spec)
            found.append(vectors.double().sum(0) * (mine < len(batches)))
        return self.total(torch.stack(found).sum(0)) / sum(len(batch) for batch in batches)

    def _batches(self, count: int) -> list[np.ndarray]:
        everything = sum(len(group) for group in self.groups)
        count = min(count, everything) if count > 0 else everything
        chosen = np.arange(count) * everything // count
        return [chosen[start : start + self.batch_size] for start in range(0, count, self.batch_size)]

    def _fetch(self, places: np.ndarray) -> list[Sample]:
        ends = np.cumsum([len(group) for group in self.groups])
        samples: list[Sample] = []
        for number, end in enumerate(ends):
            first = end - len(self.groups[number])
            inside = places[(places >= first) & (places < end)] - first
            samples += self.groups[number].fetch(inside) if len(inside) else []
        return samples
