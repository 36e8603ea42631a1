"""What a training step does on either engine between the forward and the backward pass: weights, loss, accumulated sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import dataflex_mega.objective as objective
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.engines.stats import StepAccumulator
from dataflex_mega.errors import NotFinite
from dataflex_mega.types import Batch, EmbeddingSpec, SampleStats, WeightFn

ForwardResult = tuple[Tensor, Tensor | None]  # [b, S] token losses; [n, h] embeddings of the samples, where asked for
Weights = tuple[Tensor | None, Tensor | None]  # [n] of samples, [b, S] of tokens; None where all weigh the same


def domain_denominators(micro_batches: Sequence[Batch], options: StepOptions, collectives: TorchCollectives) -> Tensor:
    """[k] float64: each domain's part of the loss denominator, over all micro-batches and data-parallel ranks."""
    k, normalization, of = options.num_domains, options.normalization, options.sample_loss
    counts = torch.stack([objective.domain_counts(batch, k, normalization, of) for batch in micro_batches]).sum(0)
    return collectives.all_reduce_sum(counts)


def precompute_weights(
    forward_results: Sequence[ForwardResult],
    micro_batches: Sequence[Batch],
    weight_fn: WeightFn,
    denominators: Tensor,
    collectives: TorchCollectives,
    of: objective.SampleLoss = objective.TOKEN_SUM,
) -> list[Weights]:
    """The weights of each micro-batch, from the losses of all micro-batches of the step together."""
    pairs = list(zip(forward_results, micro_batches, strict=True))
    samples = [
        objective.make_sample_stats(of.sums(losses, batch), batch, embeddings=embeddings, of=of)
        for (losses, embeddings), batch in pairs
    ]
    of_samples = weight_fn(SampleStats.concatenate(samples, denominators)).split([len(s.sample_ids) for s in samples])
    losses_and_batches = [(losses, batch) for (losses, _), batch in pairs]
    of_tokens = objective.token_weights(losses_and_batches, weight_fn, collectives.all_reduce_sum)
    return list(zip(of_samples, of_tokens or [None] * len(micro_batches), strict=True))


@dataclass
class StepLoss:
    """The loss of one training step, a micro-batch at a time. One instance per step.

    Attributes:
        denominators: see `domain_denominators`.
        divides: whether the loss is divided by the denominator here; megatron-core divides gradients at the end of the step.
        precomputed: weights of each micro-batch, where they were computed before; see `precompute_weights`.
    """

    options: StepOptions
    collectives: TorchCollectives
    weight_fn: WeightFn | None
    denominators: Tensor
    accumulator: StepAccumulator
    divides: bool
    precomputed: list[Weights] | None = None

    def needs_precompute(self, num_micro_batches: int) -> bool:
        """Whether weights compare more samples than one micro-batch has."""
        return self.weight_fn is not None and self.options.weight_scope == "step" and num_micro_batches > 1

    @property
    def embedding_spec(self) -> EmbeddingSpec | None:
        """The embeddings that `__call__` needs of the training forward pass."""
        return self.options.embedding_spec if self.weight_fn is not None and self.precomputed is None else None

    def __call__(
        self,
        number: int,
        batch: Batch,
        embeddings: Tensor | None,
        token_losses: Tensor,
        trained: Tensor | None = None,
        auxiliary: Tensor | None = None,
    ) -> Tensor:
        """Micro-batch `number` with [b, S] token losses, 0 where there is no target -> the scalar to differentiate. Adds the
        micro-batch to the accumulator.

        Args:
            trained: [b, S] what is differentiated of each token; None: `token_losses` themselves.
            auxiliary: a scalar of the micro-batch that is differentiated too, by its part of the step and without weights.
        """
        normalization, of = self.options.normalization, self.options.sample_loss
        loss_sum = of.sums(token_losses, batch)
        samples = objective.make_sample_stats(loss_sum, batch, token_losses, self.denominators, embeddings, of)
        weights, token_weights = self._weights(number, samples, batch, token_losses)
        if trained is not None or token_weights is not None:
            trained = token_losses if trained is None else trained
            loss_sum = of.sums(trained if token_weights is None else trained * token_weights, batch)
        total = self.denominators.sum().clamp(min=1)
        count = total.long() if self.divides else 1.0
        loss = objective.weighted_loss(loss_sum, samples.num_tokens, weights, count, normalization)
        if auxiliary is not None:
            loss = loss + auxiliary * (objective.loss_denominator(batch, normalization, of) / count)
        self.accumulator.add(samples, batch, loss.detach() if self.divides else loss.detach() / total, weights)
        return loss

    def _weights(self, number: int, samples: SampleStats, batch: Batch, token_losses: Tensor) -> Weights:
        if self.precomputed is not None:
            return self.precomputed[number]
        if self.weight_fn is None:
            return None, None
        of_samples = self.weight_fn(samples)
        of_tokens = objective.token_weights([(token_losses, batch)], self.weight_fn, self.collectives.all_reduce_sum)
        return of_samples, None if of_tokens is None else of_tokens[0]


def non_finite_sample_ids(accumulator: StepAccumulator, collectives: TorchCollectives) -> list[int]:
    """Ids of the step's samples, of all ranks, whose loss is NaN or infinite; sorted. Every rank must call it."""
    return sorted({i for ids in collectives.all_gather_objects(accumulator.non_finite_ids()) for i in ids})


def check_has_targets(
    grad_norm: float,
    denominators: Tensor,
    accumulator: StepAccumulator,
    collectives: TorchCollectives,
    options: StepOptions,
) -> bool:
    """Whether a step has a target token. Without one there is no loss and no gradient, and nothing to update with.

    The sum is read where the gradient is zero only, so a usual step does not wait for it. Raises NotFinite unless such steps
    are skipped (on_non_finite: continue).
    """
    if grad_norm != 0 or float(denominators.sum()) > 0:
        return True
    if options.on_non_finite == "stop":
        ids = [i for samples in accumulator.samples for i in samples.sample_ids.tolist()]
        everywhere = sorted({i for part in collectives.all_gather_objects(ids) for i in part})
        raise NotFinite("no sample of the step has a target token, so there is no loss", everywhere)
    return False


def not_finite_message(grad_norm: float, sample_ids: list[int]) -> str:
    """What is not finite; the trainer adds the step and where the samples come from."""
    return "the loss is not finite" if sample_ids else f"every loss is finite but the gradient norm is {grad_norm}"
