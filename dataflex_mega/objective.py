"""From logits to the number that is differentiated: token loss -> sample loss -> weights -> weighted sum.

loss = sum_i w_i * L_i / count, where L_i sums the token losses of sample i. With token normalisation `count` is the
number of target tokens of the whole optimizer step, over all ranks and micro-batches; with sample normalisation L_i is
divided by the sample's own tokens and `count` is the number of samples that have any. Both are known before the forward
pass, and because the weights have mean 1 neither depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import IGNORED, Batch, SampleObs, TokenWeigh, Weigh

Normalization = Literal["token", "sample"]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[b, S, V] logits, [b, S] shifted labels -> [b, S] cross-entropy, 0 where there is no target; float32, or float64 as
    the logits are."""
    flat = logits.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)


def mean_weights(weights: Tensor, batch: Batch) -> Tensor:
    """[n] weights of samples -> [b, S] weights of tokens: with them, the sum of the token losses is the weighted sum of the
    samples' mean token losses."""
    tokens = sample_sums((batch.labels != IGNORED).long(), batch).clamp(min=1)
    return torch.where(batch.segment >= 0, (weights / tokens)[batch.segment.clamp(min=0)], 0.0)


def sample_sums(values: Tensor, batch: Batch) -> Tensor:
    """[b, S] values -> [n] sums over each sample's positions. Differentiable and free of atomic adds."""
    if not batch.packed:
        return values.sum(dim=1)
    index = torch.arange(len(batch.sample_id), device=values.device)
    mine = batch.segment.unsqueeze(0) == index.view(-1, 1, 1)  # [n, b, S]
    return torch.where(mine, values.unsqueeze(0), values.new_zeros(())).sum(dim=(1, 2))


def observe(
    loss_sum: Tensor,
    batch: Batch,
    token_loss: Tensor | None = None,
    step_count: Tensor | None = None,
    hidden: Tensor | None = None,
) -> SampleObs:
    """[n] loss sums -> what algorithms may see of the samples.

    With `token_loss` [b, S] and a batch that has reference losses, their excess too. `step_count`: see `domain_counts`,
    reduced over all ranks. `hidden`: [n, h], the samples' vectors.
    """
    tokens = sample_sums((batch.labels != IGNORED).long(), batch)
    excess = None
    if token_loss is not None and batch.reference is not None:
        excess = sample_sums(clipped_excess(token_loss.detach(), batch), batch)
    return SampleObs(batch.sample_id, batch.domain, loss_sum.detach(), tokens, excess, step_count, hidden)


def clipped_excess(token_loss: Tensor, batch: Batch) -> Tensor:
    """[b, S] token losses -> [b, S] float32 max(loss - reference loss, 0), 0 where there is no target.

    Clipped token by token and summed afterwards, as DoReMi's official code does (arXiv 2305.10429).
    """
    assert batch.reference is not None
    excess = (token_loss.float() - batch.reference).clamp(min=0)
    return torch.where(batch.labels == IGNORED, 0.0, excess)


def weighted_loss(
    loss_sum: Tensor, tokens: Tensor, weights: Tensor | None, count: Tensor | float, normalization: Normalization
) -> Tensor:
    """[n] differentiable loss sums of one micro-batch -> its scalar share of the step's loss."""
    per_sample = loss_sum if normalization == "token" else loss_sum / tokens.clamp(min=1)
    if weights is not None:
        per_sample = per_sample * weights.to(per_sample)
    return per_sample.sum() / count


def token_weights(
    parts: Sequence[tuple[Tensor, Batch]], weigh: Weigh | None, total: Callable[[Tensor], Tensor]
) -> list[Tensor] | None:
    """Weights of tokens: with `keep` of all T target tokens asked for, T / K for the K with the highest scores, else 0.

    Args:
        parts: (token losses [b, S], batch) of this rank; the micro-batches that are compared, one or all of the step.
        weigh: None, or one that does not choose tokens: there are no token weights, and None is returned.
        total: sums a tensor over all ranks.

    Returns:
        [b, S] float32 for each part. K is `keep` times T, rounded up, and more where scores are equal at the border. Mean 1
        over the target tokens of all parts and ranks.

    Raises:
        TrainingFault: the batches have no reference losses.
    """
    if not isinstance(weigh, TokenWeigh):
        return None
    scores, targets = [], []
    for token_loss, batch in parts:
        if batch.reference is None:
            raise TrainingFault("token weights need reference losses, and a batch has none")
        scores.append(weigh.choice.token_scores(token_loss.detach().float(), batch.reference).float())
        targets.append(batch.labels != IGNORED)
    mine = torch.cat([score[there] for score, there in zip(scores, targets, strict=True)])
    count = total(torch.tensor(len(mine), device=mine.device))
    border = kth_largest(mine, torch.ceil(count.double() * weigh.choice.keep).long().clamp(min=1), total)
    kept = [(_ordered(score) >= border) & there for score, there in zip(scores, targets, strict=True)]
    share = count.double() / total(torch.stack([part.sum() for part in kept]).sum()).clamp(min=1)
    return [part.float() * share.float() for part in kept]


def _ordered(values: Tensor) -> Tensor:
    """float32 -> int64 in 0..2**32 - 1 in the same order; not-a-number as the largest or the smallest."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: minus zero is zero
    return torch.where(bits >= 0, bits + 2**31, -bits - 1)


def kth_largest(values: Tensor, k: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """[n] float32 of each rank, scalar k >= 1 -> the k-th largest of all ranks' values, in the form of `_ordered`.

    Exact: three histograms, of the upper 11 bits, the next 11 of those that agree so far, and the last 10, each summed over
    ranks. What travels does not grow with n.
    """
    keys, border, left = _ordered(values), torch.zeros_like(k), k
    agrees = torch.ones_like(keys, dtype=torch.bool)
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digits = (keys >> shift) & (2**width - 1)
        # Dropped keys go to a last bin.
        binned = torch.where(agrees, digits, 2**width)
        counts = total(torch.bincount(binned, minlength=2**width + 1)[:-1])
        above = counts.flip(0).cumsum(0).flip(0)  # how many have at least this digit
        digit = (above >= left).sum() - 1
        left = left - (above[digit] - counts[digit])
        border = border + (digit << shift)
        agrees = agrees & (digits == digit)
    return border


def local_count(batch: Batch, normalization: Normalization) -> Tensor:
    """What one micro-batch adds to the step's denominator: target tokens, or samples with at least one. Scalar int64."""
    targets = batch.labels != IGNORED
    if normalization == "token":
        return targets.sum()
    return (sample_sums(targets.long(), batch) > 0).sum()


def domain_counts(batch: Batch, domains: int, normalization: Normalization) -> Tensor:
    """[k] float64: `local_count` by domain. Sums of it over micro-batches and ranks are exact below 2**53."""
    counts = sample_sums((batch.labels != IGNORED).long(), batch)
    counts = counts if normalization == "token" else (counts > 0).long()
    # Comparisons rather than index_add, whose order of addition is not fixed on a GPU.
    hot = batch.domain.unsqueeze(0) == torch.arange(domains, device=counts.device).unsqueeze(1)
    return (hot * counts).sum(dim=1).double()
