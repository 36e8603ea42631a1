"""One embedding per sample from its hidden states, and the mean embedding of target samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.types import Batch, EmbeddingSpec


def position_weights(batch: Batch, pooling: str, tokens: str = "all") -> Tensor:
    """[b, S] float32: each position's weight in its sample's mean; a sample's weights sum to 1, padding has 0."""
    in_sample = batch.segment_ids >= 0
    if tokens != "all":
        is_media = torch.zeros_like(in_sample) if batch.is_media is None else batch.is_media
        in_sample = in_sample & (is_media if tokens == "media" else ~is_media)
    if pooling == "last":
        following = torch.nn.functional.pad(batch.segment_ids, (0, 1), value=-1)[:, 1:]
        return (in_sample & (following != batch.segment_ids)).float()
    counts = batch.position_ids + 1 if pooling == "position_weighted" else torch.ones_like(batch.segment_ids)
    weights = torch.where(in_sample, counts, 0).float()
    if not batch.is_packed:
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    totals = (weights.unsqueeze(1) * _membership(batch)).sum(dim=(0, 2))  # [n]
    return weights / totals[batch.segment_ids.clamp(min=0)].clamp(min=1)


def _membership(batch: Batch) -> Tensor:
    """[b, n, S] float32: 1 where a position belongs to a sample."""
    index = torch.arange(len(batch.sample_ids), device=batch.segment_ids.device)
    return (batch.segment_ids.unsqueeze(1) == index.view(1, -1, 1)).float()


def pool_hidden_states(
    hidden: Tensor, batch: Batch, pooling: str, positions: Tensor | None = None, tokens: str = "all"
) -> Tensor:
    """[b, s, h] hidden states of the [s] `positions`, or of all -> [n, h] float32, their part of each sample's sum.

    Parts of a sequence that lies on several ranks add up. A matrix product, since adding by index has no fixed order on a
    GPU.
    """
    columns = slice(None) if positions is None else positions
    weights = position_weights(batch, pooling, tokens)[:, columns]
    # Unpacked rows are the samples, unless a pipeline has split or padded the batch.
    if not batch.is_packed and len(weights) == len(batch.sample_ids):
        return torch.einsum("bs,bsh->bh", weights, hidden.float())
    by_sample = weights.unsqueeze(1) * _membership(batch)[:, :, columns]  # [b, n, s]
    return torch.einsum("bns,bsh->nh", by_sample, hidden.float())


def sample_embeddings(hidden: Tensor, batch: Batch, spec: EmbeddingSpec, positions: Tensor | None = None) -> Tensor:
    """As `pool_hidden_states`, with the spec's tanh before it and its normalization after it."""
    states = torch.tanh(hidden.float()) if spec.tanh else hidden
    pooled = pool_hidden_states(states, batch, spec.pooling, positions, spec.tokens)
    return l2_normalize(pooled) if spec.normalize else pooled


def l2_normalize(vectors: Tensor) -> Tensor:
    """[n, h] -> each divided by its length; a zero vector stays zero."""
    length = vectors.norm(dim=1, keepdim=True)
    return torch.where(length > 0, vectors / length, 0.0)


@dataclass
class MeanTargetEmbedding:
    """The mean embedding of target samples, the work divided over ranks by whole batches."""

    groups: Sequence[SamplePool]  # evaluation sets
    collate: Callable[[Sequence[Sample]], Batch]
    embed: Callable[..., Tensor]  # Engine.embed
    batch_size: int
    dp_rank: int
    dp_size: int
    all_reduce_sum: Callable[[Tensor], Tensor]

    def __call__(self, spec: EmbeddingSpec, count: int) -> Tensor:
        """[h] float64 mean over `count` samples, spread evenly over all of them; 0: over all. Every rank must call it."""
        batches = self._batches(count)
        local_batches, turns = batches[self.dp_rank :: self.dp_size], -(-len(batches) // self.dp_size)
        sums: list[Tensor] = []
        for turn, is_local in lockstep_batches(local_batches, 1, turns, filler=batches[:1]):
            embeddings = self.embed(self.collate(self._fetch(turn[0])), spec)
            sums.append(embeddings.double().sum(0) * is_local)
        return self.all_reduce_sum(torch.stack(sums).sum(0)) / sum(len(batch) for batch in batches)

    def _batches(self, count: int) -> list[np.ndarray]:
        """Positions in the groups, one after the other, by batch."""
        total = sum(len(group) for group in self.groups)
        count = min(count, total) if count > 0 else total
        positions = np.arange(count) * total // count
        return [positions[start : start + self.batch_size] for start in range(0, count, self.batch_size)]

    def _fetch(self, positions: np.ndarray) -> list[Sample]:
        ends = np.cumsum([len(group) for group in self.groups])
        samples: list[Sample] = []
        for group, end in zip(self.groups, ends, strict=True):
            first = end - len(group)
            inside = positions[(positions >= first) & (positions < end)] - first
            samples += group.fetch(inside) if len(inside) else []
        return samples
