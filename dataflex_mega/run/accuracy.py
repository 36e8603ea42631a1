"""compute_accuracy: an evaluation that counts, beside the loss, how often the likeliest token is the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dataflex_mega.objective as objective
from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches
from dataflex_mega.data.pool import Sample
from dataflex_mega.engines.base import Engine
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.types import IGNORE_INDEX, Batch


def evaluate_with_accuracy(
    share: PoolShare, collate: Callable[[Sequence[Sample]], Batch], engine: Engine
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, target tokens, [2] sum of the samples' shares of hits and number of samples with a target) of this rank's
    share, float64, in one pass."""
    sums = torch.zeros(4, dtype=torch.float64)
    for ids, count in lockstep_batches(share.local_ids(), share.batch_size, share.num_batches(), filler=FIRST_ID):
        values = engine.per_sample(collate(share.pool.fetch(ids)), loss_tokens_and_hits).double().cpu()
        if count:
            loss, tokens, hits = values.unbind(dim=1)
            means = hits / tokens.clamp(min=1)
            sums += torch.stack([loss.sum(), tokens.sum(), means.sum(), (tokens > 0).sum()])
    return sums[0], sums[1], sums[2:]


def loss_tokens_and_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[s, V] logits and [s] labels of one sample -> [3]: summed cross-entropy, target tokens, those predicted right."""
    losses = objective.token_losses(logits.unsqueeze(0), labels.unsqueeze(0))
    targets = labels != IGNORE_INDEX
    hits = (logits.argmax(dim=-1) == labels) & targets
    return torch.stack([losses.sum(), targets.sum(), hits.sum()]).float()
