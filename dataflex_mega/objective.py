"""From logits to the number that is differentiated: token loss -> sample loss -> weights -> weighted sum.

loss = sum_i w_i * L_i / count, where L_i sums the token losses of sample i. With token normalisation `count` is the
number of target tokens of the whole optimizer step, over all ranks and micro-batches; with sample normalisation L_i is
divided by the sample's own tokens and `count` is the number of samples that have any. Both are known before the forward
pass, and because the weights have mean 1 neither depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex_mega.errors import TrainingFault, UserCall
from dataflex_mega.types import IGNORE_INDEX, Batch, SampleStats, TokenWeightFn, WeightFn

Normalization = Literal["token", "sample"]


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[b, S, V] logits, [b, S] shifted labels -> [b, S] cross-entropy, 0 where there is no target; float32, or float64 as
    the logits are."""
    flat = logits.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(labels)


def mean_weights(weights: Tensor, batch: Batch) -> Tensor:
    """[n] weights of samples -> [b, S] weights of tokens, with which the sum of the token losses is the weighted sum of the
    samples' mean token losses."""
    tokens = sample_sums((batch.labels != IGNORE_INDEX).long(), batch).clamp(min=1)
    return torch.where(batch.segment_ids >= 0, (weights / tokens)[batch.segment_ids.clamp(min=0)], 0.0)


def sample_sums(values: Tensor, batch: Batch) -> Tensor:
    """[b, S] values -> [n] sums over each sample's positions. Differentiable and free of atomic adds."""
    if not batch.is_packed:
        return values.sum(dim=1)
    index = torch.arange(len(batch.sample_ids), device=values.device)
    belongs = batch.segment_ids.unsqueeze(0) == index.view(-1, 1, 1)  # [n, b, S]
    return torch.where(belongs, values.unsqueeze(0), values.new_zeros(())).sum(dim=(1, 2))


def num_targets(batch: Batch) -> Tensor:
    """[n] int64: target tokens of each sample."""
    return sample_sums((batch.labels != IGNORE_INDEX).long(), batch)


class SampleLoss(Protocol):
    """What the loss of a sample is: how [b, S] token losses of a batch become one number a sample."""

    @property
    def report_names(self) -> tuple[str, ...]:
        """What `report` gives, by the names that logs show."""
        ...

    def sums(self, token_losses: Tensor, batch: Batch) -> Tensor:
        """[n] losses, differentiable: what is divided by `counts` to be a sample's mean loss."""
        ...

    def counts(self, batch: Batch) -> Tensor:
        """[n] int64: over how much a sample's loss is summed, 0 for a sample that trains nothing."""
        ...

    def report(self, token_losses: Tensor, batch: Batch) -> Tensor | None:
        """[n, m] values of each sample for logs, in the order of `report_names`; None when there are none."""
        ...


class TokenSum:
    """The loss of a sample is the sum over its target tokens."""

    report_names: tuple[str, ...] = ()

    def sums(self, token_losses: Tensor, batch: Batch) -> Tensor:
        return sample_sums(token_losses, batch)

    def counts(self, batch: Batch) -> Tensor:
        return num_targets(batch)

    def report(self, token_losses: Tensor, batch: Batch) -> Tensor | None:
        return None


TOKEN_SUM = TokenSum()


def make_sample_stats(
    loss_sum: Tensor,
    batch: Batch,
    token_loss: Tensor | None = None,
    step_denominators: Tensor | None = None,
    embeddings: Tensor | None = None,
    of: SampleLoss = TOKEN_SUM,
) -> SampleStats:
    """[n] loss sums -> what algorithms may see of the samples, detached.

    Args:
        loss_sum: [n] of `of.sums`.
        batch: the micro-batch they belong to.
        token_loss: [b, S]; with it and a batch that has reference losses, the samples' excess loss is summed too.
        step_denominators: [k] of `domain_counts`, summed over all micro-batches and ranks.
        embeddings: [n, h], the samples' vectors.
        of: what the loss of a sample is. What it reports needs `token_loss`.
    """
    tokens = of.counts(batch)
    report = None if token_loss is None else of.report(token_loss.detach(), batch)
    excess = None
    if token_loss is not None and batch.reference_losses is not None:
        excess = sample_sums(clipped_excess(token_loss.detach(), batch), batch)
    return SampleStats(
        batch.sample_ids, batch.domain_ids, loss_sum.detach(), tokens, excess, step_denominators, embeddings, report
    )


def clipped_excess(token_loss: Tensor, batch: Batch) -> Tensor:
    """[b, S] token losses -> [b, S] float32 max(loss - reference loss, 0), 0 where there is no target.

    Clipped token by token and summed afterwards, as DoReMi's official code does (arXiv 2305.10429).
    """
    assert batch.reference_losses is not None
    excess = (token_loss.float() - batch.reference_losses).clamp(min=0)
    return torch.where(batch.labels == IGNORE_INDEX, 0.0, excess)


def weighted_loss(
    loss_sum: Tensor, tokens: Tensor, weights: Tensor | None, count: Tensor | float, normalization: Normalization
) -> Tensor:
    """[n] differentiable loss sums of one micro-batch -> what it adds to the step's loss, a scalar."""
    per_sample = loss_sum if normalization == "token" else loss_sum / tokens.clamp(min=1)
    if weights is not None:
        per_sample = per_sample * weights.to(per_sample)
    return per_sample.sum() / count


def token_weights(
    losses: Sequence[tuple[Tensor, Batch]],
    weigh: WeightFn | None,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> list[Tensor] | None:
    """Weights of tokens: T / K for the K of all T target tokens that have the highest scores, 0 for the others.

    Args:
        losses: (token losses [b, S], batch) of this rank: the micro-batches whose tokens compete, one or all of the step.
        weigh: the step's weight function. Unless it selects tokens, there are no token weights, and None is returned.
        all_reduce_sum: sums a tensor over all ranks.

    Returns:
        [b, S] float32 for each micro-batch, mean 1 over the target tokens of all of them and all ranks. K is the fraction
        that is asked for times T, rounded up, and more where scores are equal at the threshold.

    Raises:
        TrainingFault: the batches have no reference losses.
    """
    if not isinstance(weigh, TokenWeightFn):
        return None
    scores, is_target = [], []
    for token_loss, batch in losses:
        if batch.reference_losses is None:
            raise TrainingFault("token weights need reference losses, and a batch has none")
        with UserCall("the weighter's TokenSelection.scores"):
            score = weigh.selection.scores(token_loss.detach().float(), batch.reference_losses)
        if not isinstance(score, Tensor) or score.shape != token_loss.shape:
            found = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            expected = f"{list(token_loss.shape)} was expected, one for each token"
            raise TrainingFault(f"the weighter's TokenSelection.scores returned {found}, {expected}")
        scores.append(score.float())
        is_target.append(batch.labels != IGNORE_INDEX)
    local_scores = torch.cat([score[mask] for score, mask in zip(scores, is_target, strict=True)])
    count = all_reduce_sum(torch.tensor(len(local_scores), device=local_scores.device))
    k = torch.ceil(count.double() * weigh.selection.keep_ratio).long().clamp(min=1)
    threshold = kth_largest(local_scores, k, all_reduce_sum)
    selected = [(_as_ordered_int(score) >= threshold) & mask for score, mask in zip(scores, is_target, strict=True)]
    num_selected = all_reduce_sum(torch.stack([mask.sum() for mask in selected]).sum())
    weight = count.double() / num_selected.clamp(min=1)
    return [mask.float() * weight.float() for mask in selected]


def _as_ordered_int(values: Tensor) -> Tensor:
    """float32 -> int64 in 0..2**32 - 1 in the same order; NaN is the largest or the smallest."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: minus zero is zero
    return torch.where(bits >= 0, bits + 2**31, -bits - 1)


def kth_largest(values: Tensor, k: Tensor, all_reduce_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """[n] float32 of each rank, scalar k >= 1 -> the k-th largest of all ranks' values, in the form of `_as_ordered_int`.

    Exact: three histograms, each summed over all ranks: of the upper 11 bits, of the next 11 bits of the values that agree
    with the result so far, and of the last 10. What is communicated does not grow with n.
    """
    keys, result, rank = _as_ordered_int(values), torch.zeros_like(k), k
    agrees = torch.ones_like(keys, dtype=torch.bool)
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        digits = (keys >> shift) & (2**width - 1)
        binned = torch.where(agrees, digits, 2**width)  # a further bin for the others
        counts = all_reduce_sum(torch.bincount(binned, minlength=2**width + 1)[:-1])
        at_least = counts.flip(0).cumsum(0).flip(0)  # values with at least this digit
        digit = (at_least >= rank).sum() - 1
        rank = rank - (at_least[digit] - counts[digit])
        result = result + (digit << shift)
        agrees = agrees & (digits == digit)
    return result


def loss_denominator(batch: Batch, normalization: Normalization, of: SampleLoss = TOKEN_SUM) -> Tensor:
    """What one micro-batch adds to the step's denominator: target tokens, or samples with at least one. Scalar int64."""
    counts = of.counts(batch)
    return counts.sum() if normalization == "token" else (counts > 0).sum()


def domain_counts(batch: Batch, domains: int, normalization: Normalization, of: SampleLoss = TOKEN_SUM) -> Tensor:
    """[k] float64: `loss_denominator` by domain. Its sums over micro-batches and ranks are exact below 2**53."""
    counts = of.counts(batch)
    counts = counts if normalization == "token" else (counts > 0).long()
    # Comparisons rather than index_add, whose order of addition is not fixed on a GPU.
    hot = batch.domain_ids.unsqueeze(0) == torch.arange(domains, device=counts.device).unsqueeze(1)
    return (hot * counts).sum(dim=1).double()
