"""A server of signals: which providers are called, with which candidates, and what algorithms receive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import Mixer
from dataflex_mega.algorithms.requests import LossSignal, Request
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import TrainingFault
from dataflex_mega.providers import registry
from dataflex_mega.providers.registry import Provider, find_provider, provides
from dataflex_mega.providers.server import SignalServer
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.types import SampleStats
from tests.support.rows import EqualTokens
from tests.unit.providers.contexts import rank_info, signal_context
from tests.unit.providers.test_registry import Asks

SIZES = (7, 4)


@dataclass(frozen=True)
class FirstToken(Request):
    """Columns "first" and "twice"."""


@dataclass(frozen=True)
class Dear(Request):
    """A signal that nobody asks for."""


@dataclass(frozen=True)
class PlanNumber(Request):
    """The step of an update times a factor."""

    factor: int = 1


@dataclass(frozen=True)
class BatchIds(Request):
    """The ids of a batch."""


@pytest.fixture
def made(monkeypatch):
    """The providers that were made, in their order."""
    find_provider(LossSignal(), "a test")
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    instances = []

    class Recorded(Provider):
        def __init__(self, context):
            super().__init__(context)
            self.num_batches, self.steps = [], []
            instances.append(self)

    @provides(FirstToken, scope="candidates")
    class FirstTokenProvider(Recorded):
        def compute(self, request, scope):
            batches = list(scope.batches())
            self.num_batches.append(len(batches))
            self.steps.append(scope.step)
            tokens = torch.tensor([int(s.input_ids[0]) for samples, count in batches for s in samples[:count]])
            return {"first": tokens, "twice": tokens * 2}

    @provides(Dear, scope="candidates")
    class DearProvider(Recorded):
        def compute(self, request, scope):
            raise AssertionError("nobody asked")

    @provides(PlanNumber, scope="plan")
    class PlanNumberProvider(Recorded):
        def compute(self, request, scope):
            return scope.step * request.factor

    @provides(BatchIds, scope="batch")
    class BatchIdsProvider(Recorded):
        def compute(self, request, scope):
            return scope.step, scope.ids().tolist()

    return instances


def server(rank=0, ranks=1, engine=None):
    pool = SamplePool([Domain("a", EqualTokens(SIZES[0], 10)), Domain("b", EqualTokens(SIZES[1], 50))])
    context = signal_context(pool, engine, parallel_info=rank_info(rank, ranks))
    return SignalServer(context, PoolShare(pool, 2, rank, ranks))


@dataclass
class Receives(Mixer):
    """Writes down what it receives."""

    def __post_init__(self):
        self.received = []

    def requests(self):
        return (LossSignal(), PlanNumber(2), BatchIds(), PlanNumber(3))

    def is_due(self, request, step):
        return request != PlanNumber(3) or step % 2 == 0

    def receive(self, request, value, step):
        self.received.append((request, value, step))

    def proportions(self, context, rng):
        return torch.ones(2, dtype=torch.float64) / 2


def test_a_provider_sees_each_ranks_candidates_in_equally_many_batches(made):
    servers = [server(rank, 3) for rank in range(3)]
    tables, counts = zip(*(one.table(Asks(FirstToken()), None, 4) for one in servers), strict=True)
    assert len({tuple(provider.num_batches) for provider in made}) == 1 and all(p.steps == [4] for p in made)
    assert torch.cat([t["first"] for t in tables]).tolist() == [*range(10, 17), *range(50, 54)]
    assert torch.cat([t["twice"] for t in tables])[3] == 26
    assert torch.cat([t.sample_ids for t in tables]).tolist() == list(range(11))
    assert torch.cat([t.domain_ids for t in tables]).tolist() == [0] * 7 + [1] * 4
    assert [len(t["first"]) for t in tables] == counts[0] == counts[1] == counts[2]


def test_the_candidates_may_be_some_samples_of_the_pool(made):
    tables = [server(rank, 2).table(Asks(FirstToken()), np.array([1, 6, 7, 10]), 0)[0] for rank in range(2)]
    assert torch.cat([t["first"] for t in tables]).tolist() == [11, 16, 50, 53]
    assert torch.cat([t.domain_ids for t in tables]).tolist() == [0, 0, 1, 1]


def test_a_provider_that_nobody_asks_for_is_not_made(made):
    one = server()
    assert one.table(Asks(), None, 0)[0].signals == {} and made == []
    one.table(Asks(FirstToken()), None, 0)
    one.table(Asks(FirstToken()), None, 5)
    assert len(made) == 1 and made[0].steps == [0, 5], "one of a kind for a run"


def test_columns_of_several_requests_stand_beside_each_other(made):
    class Engine:
        def sample_losses(self, batch):
            count = torch.full((len(batch.sample_ids),), 2)
            return SampleStats(batch.sample_ids, batch.domain_ids, batch.sample_ids * 4.0, count)

    one = server(engine=Engine())
    table, counts = one.table(Asks(LossSignal(), FirstToken()), None, 0)
    assert set(table.signals) == {"loss", "first", "twice"} and counts == [11]
    assert table["loss"].tolist() == [2.0 * i for i in range(11)] and table["loss"].dtype == torch.float32
    assert one.signal_names(Asks(LossSignal(), FirstToken(), PlanNumber())) == ["first_token", "loss"]


def test_an_algorithm_receives_what_is_due_at_its_scope(made):
    one, mixer = server(), Receives()
    one.before_update(mixer, 3)
    assert mixer.received == [(PlanNumber(2), 6, 3)]
    one.before_update(mixer, 4)
    assert mixer.received[1:] == [(PlanNumber(2), 8, 4), (PlanNumber(3), 12, 4)]
    one.before_step(mixer, 5, lambda: np.array([3, 1]))
    assert mixer.received[3:] == [(BatchIds(), (5, [3, 1]), 5)]


def test_a_batch_is_not_drawn_for_an_algorithm_that_does_not_ask_for_it(made):
    def never():
        raise AssertionError("drawn")

    server().before_step(Asks(PlanNumber(), FirstToken()), 0, never)
    assert made == []


def test_an_algorithm_without_receive_is_named(made):
    with pytest.raises(TrainingFault, match=r"Asks makes the request PlanNumber\(factor=1\) and has no `receive`"):
        server().before_update(Asks(PlanNumber()), 0)
