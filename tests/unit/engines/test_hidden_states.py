"""Hidden states of the training forward: pooled as written out by hand, and their weights change the gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.requests import EmbeddingSignal, requests_of
from dataflex_mega.algorithms.weighters.adapt import Adapt
from dataflex_mega.algorithms.weighters.joint_update_aware import JointUpdateAware, solve_exact
from dataflex_mega.control.controller import DataController, RoleSet
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.stages import StageConfig
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Domain, Sample, SamplePool
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.hidden_states import layers_of
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers.embeddings import EmbeddingProvider
from dataflex_mega.providers.server import SignalServer
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.signals.sample_embeddings import (
    MeanTargetEmbedding,
    l2_normalize,
    pool_hidden_states,
    position_weights,
)
from dataflex_mega.types import EmbeddingSpec, TrainState
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.engines.test_domain_weights import RATE, engine_of, token_losses
from tests.unit.providers.contexts import signal_context


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


class Rows:
    """Samples as rows of a domain."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def fetch(self, rows):
        return [(self.samples[r].input_ids, self.samples[r].labels) for r in rows]


def by_hand(model, sample, pooling, layer=-1):
    """[h] of a sample alone, from transformers' own hidden_states."""
    with torch.no_grad():
        states = model(torch.from_numpy(sample.input_ids).unsqueeze(0), output_hidden_states=True).hidden_states[layer][
            0
        ]
    t = torch.arange(1, len(states) + 1).float()
    counted = {"mean": torch.ones_like(t), "position_weighted": t, "last": (t == len(t)).float()}[pooling]
    return (counted.unsqueeze(1) * states).sum(0) / counted.sum()


def test_positions_of_four_weigh_a_tenth_to_four_tenths():
    batch = collate([Sample(0, 0, np.arange(4), np.arange(4)), Sample(1, 0, np.arange(2), np.arange(2))], 0)
    assert position_weights(batch, "position_weighted")[0, :5].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.0])
    assert position_weights(batch, "mean")[1, :3].tolist() == [0.5, 0.5, 0.0]
    assert position_weights(batch, "last")[:, :5].tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("pooling", ["mean", "position_weighted", "last"])
@pytest.mark.parametrize("layer", [-1, 0, 1, 2, -2])
@pytest.mark.parametrize("pack", [None, 64])
def test_vectors_are_those_of_each_sample_alone(alone, pooling, layer, pack):
    model, made = tiny_llama(), samples_of(1)
    found = engine_of(alone, model).embed(collate(made, 0, pack), EmbeddingSpec(pooling, layer, normalize=False))
    expected = torch.stack([by_hand(model, sample, pooling, layer) for sample in made])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_sequence_add_up():
    batch = collate(samples_of(2), 0, 64)
    states = torch.randn(*batch.input_ids.shape, 3)
    shares = torch.randperm(states.shape[1]).split([5, 20, states.shape[1] - 25])
    parts = [pool_hidden_states(states[:, places], batch, "position_weighted", places) for places in shares]
    torch.testing.assert_close(sum(parts), pool_hidden_states(states, batch, "position_weighted"))


def test_a_layer_that_is_not_there_is_refused(alone):
    with pytest.raises(ConfigError, match=r"embed_layer: must be in -3\.\.2, the model has 2 layers, found 3"):
        engine_of(alone, tiny_llama()).embed(collate(samples_of(1), 0), EmbeddingSpec("mean", 3))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_targets_mean_is_the_same_on_any_number_of_ranks(alone, count, ranks):
    model, made = tiny_llama(), samples_of(3)
    engine = engine_of(alone, model)
    groups = [SamplePool([Domain("a", Rows(made[:5]))]), SamplePool([Domain("b", Rows(made[5:]))])]
    spec = EmbeddingSpec("mean")
    sums: list[torch.Tensor] = []
    for rank in range(ranks):
        part = MeanTargetEmbedding(
            groups, lambda s: collate(s, 0), engine.embed, 2, rank, ranks, lambda v: sums.append(v) or v
        )
        part(spec, count)
    used = made if count == 0 else [made[0], made[2], made[5]]
    expected = l2_normalize(torch.stack([by_hand(model, sample, "mean") for sample in used])).double().mean(0)
    torch.testing.assert_close(torch.stack(sums).sum(0) / len(used), expected, rtol=1e-5, atol=1e-6)


def weighing(alone, model, weighter, made):
    """(engine, controller) of a run with this weighter, whose targets are the first three samples."""
    (request,) = requests_of(weighter, EmbeddingSignal)
    engine = engine_of(alone, model, **EmbeddingProvider.step_options(request), weight_scope="step")
    pool = SamplePool([Domain(name, Rows(part)) for name, part in (("a", made[:4]), ("b", made[4:]))])
    evaluation = {"eval": SamplePool([Domain("eval", Rows(made[:3]))])}
    context = signal_context(pool, engine, evaluation=evaluation, parallel_info=alone, batch_size=4)
    controller = DataController(
        RoleSet(weighter=weighter), DomainInfo(("a", "b"), (4, 4), (0.5, 0.5)),
        StageConfig.shared(UpdateSchedule(0, 0, 0, repeat_cycles=False)), Sampler((4, 4), 8, 0), engine.collectives,
        SignalServer(context, PoolShare(pool, 4, 0, 1)), total_steps=10, seed=0,
    )  # fmt: skip
    return engine, controller


def expected_weights(model, weighter, made):
    """From hidden states of samples alone and the formulas of the two methods."""
    pooling = requests_of(weighter, EmbeddingSignal)[0].spec.pooling
    vectors = [F.normalize(by_hand(model, sample, pooling), dim=0).double() for sample in made]
    target = torch.stack(vectors[:3]).mean(0)
    if isinstance(weighter, Adapt):
        f = torch.stack([torch.sigmoid(v @ target / weighter.tau) for v in vectors])
        return (f / f.mean()).float()
    z = torch.stack(vectors)
    return (8 * solve_exact(z @ F.normalize(target, dim=0), weighter.beta * z @ z.T, weighter.tau)).float()


@pytest.mark.parametrize("weighter", [Adapt(tau=0.1), JointUpdateAware(tau=0.2)], ids=["adapt", "joint"])
@pytest.mark.parametrize("cut", [(8,), (3, 5)])
@pytest.mark.parametrize("pack", [None, 64])
def test_the_gradient_is_that_of_the_weighted_loss(alone, weighter, cut, pack):
    model, made, weighter = tiny_llama(), samples_of(4), copy.deepcopy(weighter)
    hand = copy.deepcopy(model)
    weights = expected_weights(hand, weighter, made)
    assert float(weights.max() - weights.min()) > 0.02
    losses = [token_losses(hand, sample).sum() for sample in made]
    count = sum(int((sample.labels[1:] != -100).sum()) for sample in made)
    loss = sum(w * one for w, one in zip(weights, losses, strict=True)) / count
    loss.backward()
    engine, controller = weighing(alone, model, weighter, made)
    micro_batches, first = [], 0
    for size in cut:
        micro_batches.append(collate(made[first : first + size], 0, pack))
        first += size
    stats = engine.train_step(micro_batches, controller.weight_fn(TrainState(0, controller.initial_plan())))
    assert stats.loss == pytest.approx(loss.item(), rel=1e-4)
    for (name, after), before in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(after, before - RATE * before.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_targets_are_embedded_once_a_step_and_by_the_model_of_then(alone):
    made, weighter = samples_of(5), Adapt(refresh_interval=2)
    engine, controller = weighing(alone, tiny_llama(), weighter, made)
    asked, embed = [], engine.embed
    engine.embed = lambda batch, *specs: asked.append(specs) or embed(batch, *specs)  # one batch of targets each time
    anchors = []
    for step in range(4):
        weigh = controller.weight_fn(TrainState(step, controller.initial_plan()))
        engine.train_step([collate(made[:4], 0), collate(made[4:], 0)], weigh)
        anchors.append(weighter.state_dict()["anchor"])
    assert len(asked) == 2 and torch.equal(anchors[0], anchors[1]) and not torch.equal(anchors[1], anchors[2])


def test_layers_are_found_in_a_model_that_fsdp2_has_sharded(alone):
    model = tiny_llama(0)
    plain = layers_of(model)
    for layer in plain:
        fully_shard(layer)
    fully_shard(model)
    assert len(plain) == model.config.num_hidden_layers
    assert layers_of(model) == plain
