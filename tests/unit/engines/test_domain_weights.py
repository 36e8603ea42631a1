"""Domain weights of a step and excess losses in the engine, against the same numbers written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.control.domain_weights import PerStepDomainFactors
from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import SampleStats
from tests.distributed.layouts import samples_of, tiny_llama

RATE = 0.1
WEIGHTS = torch.tensor([0.8, 0.2], dtype=torch.float64)
DRAWN = torch.tensor([0.25, 0.75], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def engine_of(alone, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    runner = FSDPModelRunner(model, FSDPLayout("single"), alone)
    return FSDPEngine(runner, optimizer, scheduler, StepOptions(2, max_grad_norm=0.0, **options))


def token_losses(model, sample):
    """[length] losses of a sample alone, 0 where there is no target and at the end."""
    ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
    found = F.cross_entropy(model(ids.unsqueeze(0)).logits[0, :-1], labels[1:], ignore_index=-100, reduction="none")
    return torch.cat([found, found.new_zeros(1)])


def by_hand(model, made, loss_norm, normalization):
    """DoReMi's objective from domain sums: nothing here knows factors or their mean."""
    total, count = [0.0, 0.0], [0, 0]
    for sample in made:
        losses, targets = token_losses(model, sample), int((sample.labels[1:] != -100).sum())
        total[sample.domain_id] += losses.sum() / (targets if normalization == "sample" else 1)
        count[sample.domain_id] += 1 if normalization == "sample" else targets
    if loss_norm == "per_domain":
        there = [d for d in range(2) if count[d]]
        return sum(WEIGHTS[d] * total[d] / count[d] for d in there) / sum(WEIGHTS[d] for d in there)
    ratio = WEIGHTS / DRAWN
    return (ratio[0] * total[0] + ratio[1] * total[1]) / (ratio[0] * count[0] + ratio[1] * count[1])


@pytest.mark.parametrize("loss_norm", ["token", "per_domain"])
@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize(("pack", "weight_scope"), [(None, "micro_batch"), (64, "step")])
def test_the_gradient_is_that_of_the_weighted_objective(alone, loss_norm, normalization, pack, weight_scope):
    model, made = tiny_llama(), samples_of(1)
    assert {sample.domain_id for sample in made} == {0, 1}
    hand = copy.deepcopy(model)
    engine = engine_of(alone, model, normalization=normalization, weight_scope=weight_scope)
    micro_batches = [collate(made[:3], 0, pack), collate(made[3:], 0, pack)]  # uneven, and not the same domains in each
    stats = engine.train_step(micro_batches, PerStepDomainFactors(WEIGHTS, DRAWN, loss_norm))
    loss = by_hand(hand, made, loss_norm, normalization)
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    for (name, after), before in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(after, before - RATE * before.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_other_domain_weights_give_another_update(alone):
    made, after = samples_of(2), []
    for weights in (WEIGHTS, WEIGHTS.flip(0)):
        model = tiny_llama()
        engine_of(alone, model).train_step([collate(made, 0)], PerStepDomainFactors(weights, DRAWN, "token"))
        after.append(model.lm_head.weight.detach().clone())
    assert (after[0] - after[1]).abs().max() > 1e-5


@pytest.mark.parametrize("loss_norm", ["token", "per_domain"])
def test_a_step_of_one_domain_is_trained_as_if_unweighted(alone, loss_norm):
    made = [replace(sample, domain_id=1) for sample in samples_of(2)]
    weighted, plain = tiny_llama(), tiny_llama()
    engine_of(alone, weighted).train_step([collate(made, 0)], PerStepDomainFactors(WEIGHTS, DRAWN, loss_norm))
    engine_of(alone, plain).train_step([collate(made, 0)], None)
    torch.testing.assert_close(weighted.lm_head.weight, plain.lm_head.weight)


def test_weights_equal_to_the_drawn_proportions_change_nothing(alone):
    weighted, plain = tiny_llama(), tiny_llama()
    found = engine_of(alone, weighted).train_step(
        [collate(samples_of(2), 0)], PerStepDomainFactors(DRAWN, DRAWN, "token")
    )
    engine_of(alone, plain).train_step([collate(samples_of(2), 0)], None)
    torch.testing.assert_close(weighted.lm_head.weight, plain.lm_head.weight)
    assert found.weights is not None and found.weights.maximum == pytest.approx(1)


def test_factors_have_mean_one_over_the_tokens_of_the_step():
    counts = torch.tensor([30.0, 10.0], dtype=torch.float64)
    samples = SampleStats(
        torch.arange(2), torch.tensor([0, 1]), torch.ones(2), torch.ones(2).long(), step_denominators=counts
    )
    for norm in ("token", "per_domain"):
        factors = PerStepDomainFactors(WEIGHTS, DRAWN, norm)(samples).double()
        assert float((factors * counts).sum()) == pytest.approx(40)
    assert float(factors[0] / factors[1]) == pytest.approx((0.8 / 30) / (0.2 / 10))
    with pytest.raises(TrainingFault, match="step_denominators"):
        PerStepDomainFactors(WEIGHTS, DRAWN, "token")(replace(samples, step_denominators=None))


@pytest.mark.parametrize("pack", [None, 64])
def test_excess_is_clipped_token_by_token_and_summed_by_domain(alone, pack):
    model, rng = tiny_llama(), np.random.default_rng(0)
    made = [
        replace(sample, reference_losses=rng.normal(4.1, 0.5, len(sample.input_ids)).astype(np.float32))
        for sample in samples_of(3)
    ]
    with torch.no_grad():
        losses = [token_losses(model, sample) for sample in made]
    expected, gaps = [0.0, 0.0], []
    for sample, loss in zip(made, losses, strict=True):
        targets = np.append(sample.labels[1:] != -100, False)
        here = [float(a) - float(b) for a, b in zip(loss[targets], sample.reference_losses[targets], strict=True)]
        expected[sample.domain_id] += sum(max(gap, 0.0) for gap in here)
        gaps += here
    assert min(gaps) < -0.1 < 0.1 < max(gaps), "both signs, or clipping shows nothing"
    stats = engine_of(alone, model).train_step([collate(made[:4], 0, pack), collate(made[4:], 0, pack)], None)
    assert stats.domain_excess_loss.tolist() == pytest.approx(expected, rel=1e-4)


def test_without_a_reference_there_is_no_excess(alone):
    assert engine_of(alone, tiny_llama()).train_step([collate(samples_of(3), 0)], None).domain_excess_loss is None


def test_some_samples_with_a_reference_and_some_without_are_refused():
    made = samples_of(3)
    made[0] = replace(made[0], reference_losses=np.zeros(len(made[0].input_ids), np.float32))
    with pytest.raises(ValueError, match="1 of 8 samples have reference losses"):
        collate(made, 0)
