"""LESS's aggregation against a hand calculation, and its parameters."""

import pytest
import torch

from dataflex_mega.algorithms.selectors.less import Less
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import FeatureSpec, SignalTable
from tests.unit.algorithms.examples import clock, generator


def table(dot, norm2):
    rows = torch.arange(len(norm2))
    return SignalTable(rows, rows * 0, {"dot": torch.tensor(dot), "norm2": torch.tensor(norm2)})


def test_the_largest_sub_task_mean_of_cosines():
    """T = (1,0), (0.6,0.8); sub-tasks {(1,0), (0,1)} and {(0.6,0.8), (0.8,0.6)}: LESS's example at one checkpoint."""
    targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    candidates = torch.tensor([[1.0, 0.0], [0.6, 0.8]]) * torch.tensor([[3.0], [0.1]])  # lengths do not count
    dot = candidates @ targets.mean(1).t()
    scores = Less().score(table(dot.tolist(), candidates.square().sum(1).tolist()))
    assert scores.tolist() == pytest.approx([0.7, 0.98])


def test_the_best_first_and_nothing_without_a_gradient():
    less = Less()
    scores = less.score(table([[1.0, -1.0], [0.0, 0.0], [-1.0, -2.0]], [4.0, 0.0, 4.0]))
    assert scores.tolist() == [0.5, 0.0, -0.5]
    ties = torch.tensor([0.1, 0.5, float("nan"), 0.5])
    assert less.choose(ties, 3, clock(), generator()).tolist() == [1, 3, 0]
    with pytest.raises(DataError, match="5 samples wanted, 4"):
        less.choose(ties, 5, clock(), generator())


def test_what_it_asks_for():
    assert Less().needs == {"gradient_adam"} and Less(gradient_type="sgd").needs == {"gradient_sgd"}
    stored = Less(mode="store", side=8)
    assert stored.needs == {"store_adam"} and stored.feature_spec() == FeatureSpec("two_sided", 8, 0)
    assert Less(mode="store", projection="dense", seed=3).feature_spec() == FeatureSpec("dense", 8192, 3)
    assert Less(mode="store", projection="dense", proj_dim=64).feature_spec().size == 64


@pytest.mark.parametrize("wrong", [{"side": 0}, {"proj_dim": 0}, {"store_block": 0}, {"store_dir": "x"}])
def test_what_cannot_be_is_named(wrong):
    with pytest.raises(ConfigError, match=rf"selector\.less\.{next(iter(wrong))}:"):
        Less(**wrong)
