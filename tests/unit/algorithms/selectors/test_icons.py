"""ICONS against golden votes, a plain-Python count, and gradients that once had a false score of 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.algorithms.requests import GradientSignal
from dataflex_mega.algorithms.selectors.icons import Icons, task_votes
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import SignalTable
from tests.unit.algorithms.examples import generator, update_context

TRAIN = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [0.6, -0.8], [0.28, 0.96]], dtype=torch.float64)
TARGETS = torch.tensor([[1, 0], [0.6, 0.8], [0, 1]], dtype=torch.float64)


def influences(train: torch.Tensor, targets: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """[N, T] as the selector scores a table of inner products with mean normalised target gradients."""
    means = torch.stack([F.normalize(part).mean(0) for part in targets.split(sizes)])
    signals = {"dot": train @ means.T, "norm2": train.square().sum(1)}
    ids = torch.arange(len(train))
    return Icons().score(SignalTable(ids, ids * 0, signals))


def test_golden_influences_votes_and_choice() -> None:
    found = influences(3 * TRAIN, TARGETS, [2, 1])
    assert found[:, 0].tolist() == pytest.approx([0.8, 0.88, 0.4, -0.16, 0.16, 0.608], abs=1e-6)
    assert found[:, 1].tolist() == pytest.approx([0, 0.6, 1, 0.8, -0.8, 0.96], abs=1e-6)
    assert task_votes(found, 2).tolist() == [1, 1, 1, 0, 0, 1]
    # Four have one vote; by their mean influences 0.4, 0.74, 0.7 and 0.784 the last and the second are taken.
    assert Icons().select(found, 2, update_context(), generator()).tolist() == [5, 1]
    one = influences(TRAIN, TARGETS, [3])
    assert one[:, 0].tolist() == pytest.approx([0.5333333333, 0.7866666667, 0.6, 0.16, -0.16, 0.7253333333], abs=1e-6)
    assert task_votes(one, 2).tolist() == [0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_votes_are_those_of_numpys_quantile(count: int) -> None:
    scores = torch.randn(40, 5, generator=generator(1), dtype=torch.float64)
    borders = np.quantile(scores.numpy(), 1 - count / 40, axis=0)
    assert task_votes(scores, count).tolist() == (scores.numpy() >= borders).sum(axis=1).tolist()


def test_with_one_task_the_choice_is_that_of_the_highest_influence() -> None:
    scores = torch.randn(50, 1, generator=generator(2))
    expected = scores[:, 0].sort(descending=True).indices[:12].tolist()
    assert Icons().select(scores, 12, update_context(), generator()).tolist() == expected


def test_orthogonal_gradients_have_no_influence() -> None:
    assert influences(torch.tensor([[1.0, 0, 0, 1]]), torch.tensor([[0.0, 1, 1, 0]]), [1]).tolist() == [[0.0]]


def test_a_generalist_is_taken_before_specialists() -> None:
    """Best of no task, second of all three."""
    scores = torch.tensor([[0.9, 0, 0], [0, 0.9, 0], [0, 0, 0.9], [0.8, 0.8, 0.8]])
    assert Icons().select(scores, 2, update_context(), generator())[0].item() == 3


def test_scores_that_are_not_numbers_come_last() -> None:
    scores = torch.tensor([[math.nan, 1.0], [0.1, 0.2], [0.3, -0.5]])
    assert set(Icons().select(scores, 2, update_context(), generator()).tolist()) == {1, 2}


def test_what_is_wrong_is_refused() -> None:
    for sizes in ([], [3, 0]):
        with pytest.raises(ConfigError, match=r"selector\.icons\.task_boundaries: .*found"):
            Icons(task_boundaries=sizes)
    with pytest.raises(DataError, match="7 samples wanted, 6 candidates"):
        Icons().select(torch.zeros(6, 2), 7, update_context(), generator())
    assert Icons(gradient_type="sgd").requests() == (GradientSignal(adam=False),)
    assert Icons(task_boundaries=[2, 3]).requests() == (GradientSignal(adam=True, task_boundaries=(2, 3)),)
