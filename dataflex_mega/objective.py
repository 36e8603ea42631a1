"""From logits to the number that is differentiated: token loss -> sample loss -> weights -> weighted sum.

loss = sum_i w_i * L_i / count, where L_i sums the token losses of sample i. With token normalisation `count` is the
number of target tokens of the whole optimizer step, over all ranks and micro-batches; with sample normalisation L_i is
divided by the sample's own tokens and `count` is the number of samples that have any. Both are known before the forward
pass, and because the weights have mean 1 neither depends on them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex_mega.types import IGNORED, Batch, SampleObs

Normalization = Literal["token", "sample"]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[b, S, V] logits, [b, S] shifted labels -> [b, S] float32 cross-entropy, 0 where there is no target."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(labels)


def sample_sums(values: Tensor, batch: Batch) -> Tensor:
    """[b, S] values -> [n] sums over each sample's positions. Differentiable and free of atomic adds."""
    if not batch.packed:
        return values.sum(dim=1)
    index = torch.arange(len(batch.sample_id), device=values.device)
    mine = batch.segment.unsqueeze(0) == index.view(-1, 1, 1)  # [n, b, S]
    return torch.where(mine, values.unsqueeze(0), values.new_zeros(())).sum(dim=(1, 2))


def observe(loss_sum: Tensor, batch: Batch) -> SampleObs:
    """[n] loss sums -> what algorithms may see of the samples."""
    tokens = sample_sums((batch.labels != IGNORED).long(), batch)
    return SampleObs(batch.sample_id, batch.domain, loss_sum.detach(), tokens)


def weighted_loss(
    loss_sum: Tensor, tokens: Tensor, weights: Tensor | None, count: Tensor | float, normalization: Normalization
) -> Tensor:
    """[n] differentiable loss sums of one micro-batch -> its scalar share of the step's loss."""
    per_sample = loss_sum if normalization == "token" else loss_sum / tokens.clamp(min=1)
    if weights is not None:
        per_sample = per_sample * weights.to(per_sample)
    return per_sample.sum() / count


def local_count(batch: Batch, normalization: Normalization) -> Tensor:
    """What one micro-batch adds to the step's denominator: target tokens, or samples with at least one. Scalar int64."""
    targets = batch.labels != IGNORED
    if normalization == "token":
        return targets.sum()
    return (sample_sums(targets.long(), batch) > 0).sum()
