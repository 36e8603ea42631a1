"""The loss of a training step as both engines use it: divided here, or by megatron-core at the end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.engines.stats import StepAccumulator
from dataflex_mega.engines.step import (
    StepLoss,
    domain_denominators,
    non_finite_sample_ids,
    not_finite_message,
    precompute_weights,
)

CPU = torch.device("cpu")
ALONE = TorchCollectives(ParallelInfo(0, 1, CPU, 0, 1))
LENGTHS = ((4, 3), (6, 2))


def micro_batches():
    return [
        collate([Sample(10 * b + i, i, np.arange(n), np.arange(n)) for i, n in enumerate(lengths)], 0)
        for b, lengths in enumerate(LENGTHS)
    ]


def losses_of(batch):
    torch.manual_seed(len(batch.input_ids[0]))
    return torch.where(batch.labels == -100, 0.0, torch.rand(batch.labels.shape)).requires_grad_(True)


def by_mean_loss(samples):
    return samples.loss / samples.loss.mean()


def step_loss(divides, weight_fn, weight_scope="micro_batch", normalization="token"):
    options = StepOptions(2, weight_scope=weight_scope, normalization=normalization)
    batches = micro_batches()
    accumulator = StepAccumulator(2, CPU)
    denominators = domain_denominators(batches, options, ALONE)
    return StepLoss(options, ALONE, weight_fn, denominators, accumulator, divides), batches


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("weight_fn", [None, by_mean_loss])
def test_a_loss_divided_here_and_one_divided_at_the_end_are_the_same(weight_fn, normalization):
    totals = []
    for divides in (True, False):
        step, batches = step_loss(divides, weight_fn, normalization=normalization)
        total = sum(float(step(n, batch, None, losses_of(batch))) for n, batch in enumerate(batches))
        totals.append(total if divides else total / float(step.denominators.sum()))
        assert float(step.accumulator.loss_sum) == pytest.approx(totals[-1], rel=1e-6)
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


def test_weights_of_the_step_compare_all_micro_batches():
    step, batches = step_loss(True, by_mean_loss, weight_scope="step")
    assert step.needs_precompute(2) and not step.needs_precompute(1)
    results = [(losses_of(batch).detach(), None) for batch in batches]
    step.precomputed = precompute_weights(results, batches, by_mean_loss, step.denominators, ALONE)
    weights = torch.cat([of_samples for of_samples, _ in step.precomputed])
    means = torch.cat(
        [(losses.sum(1) / (batch.labels != -100).sum(1)) for (losses, _), batch in zip(results, batches, strict=True)]
    )
    torch.testing.assert_close(weights, means / means.mean())
    assert all(of_tokens is None for _, of_tokens in step.precomputed)
    expected = sum(
        float((w * losses.sum(1)).sum()) for (w, _), (losses, _) in zip(step.precomputed, results, strict=True)
    )
    total = sum(float(step(n, batch, None, losses_of(batch))) for n, batch in enumerate(batches))
    assert total == pytest.approx(expected / float(step.denominators.sum()), rel=1e-6)


def test_the_training_forward_gives_embeddings_only_to_a_weighter_that_still_needs_them():
    step, _ = step_loss(True, None)
    step.options = SimpleNamespace(embedding_spec="spec")
    assert step.embedding_spec is None
    step.weight_fn = by_mean_loss
    assert step.embedding_spec == "spec"
    step.precomputed = []
    assert step.embedding_spec is None


def test_samples_that_are_not_finite_are_named_once_and_in_order():
    step, batches = step_loss(True, None)
    for number in (1, 0, 1):
        losses = losses_of(batches[number]).detach()
        losses[1, 0] = torch.nan
        step(number, batches[number], None, losses)
    assert non_finite_sample_ids(step.accumulator, ALONE) == [1, 11]
    assert not_finite_message(1.0, [1]) == "the loss is not finite"
    assert not_finite_message(float("inf"), []) == "every loss is finite but the gradient norm is inf"


def test_every_capability_has_a_word_of_its_own():
    names = [name for name in vars(Capability) if name.isupper()]
    assert len(Capability.all()) == len(names) >= 9
