"""Token weights: the border is the k-th largest of all ranks, and the gradient is that of the mean over kept tokens."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataflex_mega import objective
from dataflex_mega.algorithms.weighters.rho1 import Rho1
from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.errors import ConfigError, TrainingFault
from dataflex_mega.types import TokenWeightFn
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.engines.test_domain_weights import RATE, engine_of, token_losses


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def ones(samples):
    return torch.ones_like(samples.loss_sum)


def same(value):
    return value


def with_references(seed, scale=0.5):
    rng = np.random.default_rng(seed)
    return [
        replace(s, reference_losses=rng.normal(4.1, scale, len(s.input_ids)).astype(np.float32))
        for s in samples_of(seed)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_kth_largest_is_that_of_a_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(500, generator=generator) * 10.0 ** (seed % 7 - 3)
    values[:40] = values[40]  # ties
    values[450:455] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])
    order = values.sort(descending=True).values
    for k in (1, 2, 41, 250, 499, 500):
        found = objective.kth_largest(values, torch.tensor(k), same)
        assert int((objective._as_ordered_int(values) >= found).sum()) == int((values >= order[k - 1]).sum())


def test_ranks_that_only_add_their_histograms_find_the_border_of_all():
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    parts = [values[:10], values[10:10], values[10:]]
    whole = objective.kth_largest(values, torch.tensor(77), same)
    tapes = [[] for _ in parts]

    def recording(tape):
        return lambda counts: tape.append(counts) or counts

    # Replay: each rank's k-th histogram needs the total of the ones before, so ranks go through the rounds together.
    sums: list[torch.Tensor] = []
    for number in range(3):
        tapes = [[] for _ in parts]
        for part, tape in zip(parts, tapes, strict=True):

            def total(counts, tape=tape):
                tape.append(counts)
                return sums[len(tape) - 1] if len(tape) <= len(sums) else counts

            objective.kth_largest(part, torch.tensor(77), total)
        sums.append(torch.stack([tape[number] for tape in tapes]).sum(0))
    for part in parts:
        replayed = iter(sums)
        assert int(objective.kth_largest(part, torch.tensor(77), lambda _, left=replayed: next(left))) == int(whole)


@pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(("pack", "weight_scope"), [(None, "step"), (64, "step")])
def test_the_gradient_is_that_of_the_mean_over_kept_tokens(alone, keep_ratio, pack, weight_scope):
    model, made = tiny_llama(), with_references(1)
    hand = copy.deepcopy(model)
    rows = [(token_losses(hand, sample), sample) for sample in made]
    losses = torch.cat([loss[:-1][torch.from_numpy(s.labels[1:] != -100)] for loss, s in rows])
    targets = np.concatenate([s.reference_losses[:-1][s.labels[1:] != -100] for _, s in rows])
    excess = losses.detach() - torch.from_numpy(targets)
    kept = excess.argsort(descending=True)[: int(np.ceil(keep_ratio * len(excess) - 1e-9))]
    loss = losses[kept].mean()
    loss.backward()
    engine = engine_of(alone, model, weight_scope=weight_scope)
    micro_batches = [collate(made[:3], 0, pack), collate(made[3:], 0, pack)]
    stats = engine.train_step(micro_batches, TokenWeightFn(ones, Rho1(keep_ratio).token_selection()))
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    assert stats.mean_loss == pytest.approx(losses.mean().item(), rel=1e-5), "statistics are of all tokens"
    for (name, after), before in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(after, before - RATE * before.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_micro_compares_within_a_micro_batch(alone):
    made = with_references(2)
    one, two = collate(made[:4], 0), collate(made[4:], 0)
    two = replace(two, reference_losses=two.reference_losses + 50)  # all of its excesses are below all of the other's
    stats = {}
    for weight_scope in ("micro_batch", "step"):
        engine = engine_of(alone, tiny_llama(), weight_scope=weight_scope)
        stats[weight_scope] = engine.train_step([one, two], TokenWeightFn(ones, Rho1(0.4).token_selection()))
    assert stats["micro_batch"].loss != pytest.approx(stats["step"].loss, rel=1e-4)


def test_weights_have_mean_one_over_targets_and_equal_excess_keeps_all():
    batch = collate(with_references(3), 0, 64)
    losses = torch.rand(batch.labels.shape)
    (weights,) = objective.token_weights([(losses, batch)], TokenWeightFn(ones, Rho1(0.5).token_selection()), same)
    there = batch.labels != -100
    assert float(weights[there].double().mean()) == pytest.approx(1, abs=1e-6) and not weights[~there].any()
    even = replace(batch, reference_losses=losses.clone())
    (weights,) = objective.token_weights([(losses, even)], TokenWeightFn(ones, Rho1(0.5).token_selection()), same)
    assert torch.equal(weights, there.float())


def test_other_weighers_have_no_token_weights_and_a_missing_reference_is_a_fault():
    batch = collate(samples_of(3), 0)
    losses = torch.rand(batch.labels.shape)
    assert objective.token_weights([(losses, batch)], ones, same) is None
    assert objective.token_weights([(losses, batch)], None, same) is None
    with pytest.raises(TrainingFault, match="need reference losses"):
        objective.token_weights([(losses, batch)], TokenWeightFn(ones, Rho1().token_selection()), same)


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(keep_ratio):
    with pytest.raises(ConfigError, match=r"weighter\.rho1\.keep_ratio: must be > 0 and <= 1"):
        Rho1(keep_ratio)
