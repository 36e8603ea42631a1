"""RHO-LOSS: the difference of losses, largest first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.requests import LossSignal, ReferenceLossSignal, Request
from dataflex_mega.algorithms.selectors.rho_loss import RhoLoss
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import DataError
from dataflex_mega.providers.server import SignalServer
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.types import SignalTable
from tests.unit.algorithms.examples import generator, update_context
from tests.unit.providers.contexts import signal_context

LOSS = torch.tensor([5.0, 3.0, 2.0, 3.5])
REFERENCE = torch.tensor([4.9, 1.0, 1.9, 1.5])  # noise, learnable, known, learnable


def table(loss: torch.Tensor = LOSS) -> SignalTable:
    return SignalTable(torch.arange(4), torch.zeros(4).long(), {"loss": loss, "reference_loss": REFERENCE})


def test_learnable_samples_come_first_and_the_highest_loss_does_not() -> None:
    scores = RhoLoss().score(table())
    assert scores.tolist() == pytest.approx([0.1, 2.0, 0.1, 2.0], abs=1e-6)
    assert sorted(RhoLoss().select(scores, 2, update_context(), generator()).tolist()) == [1, 3]


def test_ties_go_by_place() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0])
    assert RhoLoss().select(scores, 3, update_context(), generator()).tolist() == [1, 3, 0]


def test_a_model_that_is_its_own_reference_prefers_nothing() -> None:
    assert RhoLoss().score(table(REFERENCE)).tolist() == [0.0] * 4


def test_losses_that_are_no_number_are_not_chosen() -> None:
    scores = RhoLoss().score(table(torch.tensor([torch.nan, 3.0, 2.0, torch.inf])))
    assert RhoLoss().select(scores, 2, update_context(), generator()).tolist() == [1, 2]
    with pytest.raises(DataError, match="3 samples wanted, 2 have a finite loss"):
        RhoLoss().select(scores, 3, update_context(), generator())


class Rows:
    """Three rows: all targets, some, none."""

    labels = ([1, 2, 3, 4], [-100, -100, 7], [-100, -100])

    def __len__(self) -> int:
        return 3

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.ones(len(self.labels[r]), np.int64), np.array(self.labels[r], np.int64)) for r in rows]


class References:
    values = ([0.5, 1.0, 3.0, 0.0], [9.0, 2.0, 0.0], [4.0, 0.0])

    def fetch(self, ids: np.ndarray) -> list[np.ndarray]:
        return [np.array(self.values[i], np.float32) for i in ids]


def test_the_reference_loss_is_the_mean_over_the_targets_of_a_sample() -> None:
    assert RhoLoss().requests() == (LossSignal(), ReferenceLossSignal())

    class ReferenceOnly(RhoLoss):
        def requests(self) -> tuple[Request, ...]:
            return (ReferenceLossSignal(),)

    pool = SamplePool([Domain("only", Rows())]).with_references(References())
    context = signal_context(pool, engine=None)  # without an engine: no forward pass is needed
    found, _ = SignalServer(context, PoolShare(pool, 2, 0, 1)).table(ReferenceOnly(), None, 0)
    assert found["reference_loss"][:2].tolist() == [1.5, 2.0]
    assert found["reference_loss"][2:].isnan().tolist() == [True]  # no target
