"""Sums of a step, statistics of weights, loss scaling, plan digests, and nearest names."""

import math
from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.engines.fsdp.precision import LossScale, LossScaler
from dataflex_mega.engines.stats import StepAccumulator
from dataflex_mega.errors import did_you_mean
from dataflex_mega.types import Batch, SampleStats, SamplingPlan

ALONE = TorchCollectives(
    SimpleNamespace(rank=0, world_size=1, dp_rank=0, dp_size=1, pipeline_stages=1, device=torch.device("cpu"))
)


def batch_of(count):
    ids = torch.zeros(count, 4, dtype=torch.int64)
    return Batch(ids, ids, torch.tensor([[0, 0, 0, -1]] * count), ids, torch.arange(count), torch.zeros(count).long())


def test_sums_are_by_domain_over_all_micro_batches():
    sums = StepAccumulator(3, torch.device("cpu"))
    for losses, domains in (([1.0, 2.0], [0, 2]), ([4.0, 8.0], [2, 2])):
        samples = SampleStats(torch.arange(2), torch.tensor(domains), torch.tensor(losses), torch.tensor([5, 7]))
        sums.add(samples, batch_of(2), torch.tensor(0.5), None)
    stats = sums.reduce(ALONE, grad_norm=1.0, has_weights=False)
    assert stats.domain_loss.tolist() == [1.0, 0.0, 14.0]
    assert stats.domain_tokens.tolist() == [5.0, 0.0, 19.0]
    assert stats.domain_samples.tolist() == [1.0, 0.0, 3.0]
    assert stats.num_tokens == 12 and stats.loss == 1.0 and stats.mean_loss == 15 / 24 and stats.weights is None


@pytest.mark.parametrize("stopping", [0, 1, 8192])
def test_a_request_to_stop_changes_no_sum(stopping):
    """As if that many ranks with 12 tokens each were summed."""

    class Summed(TorchCollectives):
        def all_reduce_sum_with_pipeline(self, values):
            others = values.clone()
            others[3 * 4 + 1] = 12.0 + 2.0**40  # loss, tokens, ... come after four sums by domain
            return values + others * (stopping - 1)

    sums = StepAccumulator(3, torch.device("cpu"))
    samples = SampleStats(torch.arange(2), torch.tensor([0, 2]), torch.ones(2), torch.tensor([5, 7]))
    for _ in range(2):
        sums.add(samples, batch_of(2), torch.tensor(0.5), None)
    collectives = Summed(ALONE.parallel_info) if stopping else ALONE
    stats = sums.reduce(collectives, 1.0, has_weights=False, stop_requested=lambda: stopping > 0)
    assert stats.num_tokens == 12 * max(1, stopping) and stats.stop_requested == (stopping > 0)


def test_weight_statistics_against_the_definition():
    weights = torch.tensor([0.2, 0.8, 1.0, 2.0])
    sums = StepAccumulator(1, torch.device("cpu"))
    for part in weights.split(2):
        samples = SampleStats(torch.arange(2), torch.zeros(2).long(), torch.ones(2), torch.ones(2).long())
        sums.add(samples, batch_of(2), torch.tensor(0.0), part)
    found = sums.reduce(ALONE, 0.0, has_weights=True).weights
    p = (weights / weights.sum()).tolist()
    assert found.entropy == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(4), rel=1e-6)
    assert (found.minimum, found.maximum) == (pytest.approx(0.2), 2.0)


def test_samples_with_a_nan_loss_are_named():
    sums = StepAccumulator(1, torch.device("cpu"))
    losses = torch.tensor([1.0, torch.nan, torch.inf])
    samples = SampleStats(torch.tensor([5, 6, 7]), torch.zeros(3).long(), losses, torch.ones(3).long())
    sums.add(samples, batch_of(3), torch.tensor(torch.nan), None)
    assert sums.non_finite_ids() == [6, 7]


def test_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScaler(True, LossScale(start=8.0, interval=3))
    scale.update(False)
    assert scale.value == 4.0
    for _ in range(3):
        scale.update(True)
    assert scale.value == 8.0 and scale.finite_steps == 0
    copy = LossScaler(True)
    copy.load_state_dict(scale.state_dict())
    assert copy.value == 8.0
    off = LossScaler(False)
    off.update(False)
    assert off.value == 1.0


def test_a_loss_scale_has_a_floor_or_is_constant():
    low = LossScaler(True, LossScale(start=8.0, floor=4.0))
    low.update(False)
    low.update(False)
    assert low.value == 4.0
    constant = LossScaler(True, LossScale(start=8.0, interval=1, constant=True))
    constant.update(False)
    constant.update(True)
    assert constant.value == 8.0


def test_a_digest_changes_with_whatever_changes_the_draws():
    base = {"start_step": 3, "proportions": (0.5, 0.5), "cursors": (1, 2), "credits": (0.25, -0.25)}
    first = SamplingPlan(**base).digest()
    assert SamplingPlan(**base).digest() == first
    others = [
        {"start_step": 4}, {"proportions": (0.5 + 1e-17, 0.5)}, {"proportions": (0.5 + 1e-15, 0.5)}, {"cursors": (1, 3)},
        {"credits": (0.25, -0.250001)}, {"selected_ids": torch.tensor([1])}, {"pool_cursors": (1, 1)},
        {"domain_loss_weights": (1.0, 2.0)},
    ]  # fmt: skip
    changed = [SamplingPlan(**{**base, **other}).digest() != first for other in others]
    assert changed == [True, False, *[True] * 6]  # 0.5 + 1e-17 is 0.5


def test_a_digest_is_the_one_that_metrics_of_earlier_runs_record():
    plan = SamplingPlan(
        start_step=3,
        proportions=(0.5, 0.5),
        cursors=(1, 2),
        credits=(0.25, -0.25),
        selected_ids=torch.tensor([1, 5]),
        pool_cursors=(1, 1),
        domain_loss_weights=(1.0, 2.0),
        ordered_ids=torch.tensor([5, 1]),
    )
    assert plan.digest() == "18ec646adefb1c75e6dd4bda3f6c44c1567b51354fe000ec7952371afef5f49a"


def test_nearest_names():
    assert did_you_mean("warmupstep", ["warmup_step", "update_step"]) == " (did you mean 'warmup_step'?)"
    assert did_you_mean("zzz", ["warmup_step"]) == ""
