"""Rho-1 chooses tokens by their excess loss; that the choice is exact over ranks is tested beside the engines."""

import pytest
import torch

from dataflex_mega.algorithms.weighters.rho1 import Rho1
from dataflex_mega.errors import ConfigError
from dataflex_mega.objective import token_weights
from dataflex_mega.registry import build
from dataflex_mega.types import IGNORE_INDEX, Batch, TokenWeightFn
from tests.unit.algorithms.examples import observed


def batch_of(labels, reference):
    count, width = labels.shape
    segment = torch.arange(count).unsqueeze(1).expand(count, width)
    ids = torch.arange(count)
    return Batch(labels.clamp(min=0), labels, segment, segment, ids, ids, reference_losses=reference)


def weights_of(keep_ratio, losses, reference, labels):
    weigh = TokenWeightFn(lambda samples: torch.ones_like(samples.loss_sum), Rho1(keep_ratio).token_selection())
    return token_weights([(losses, batch_of(labels, reference))], weigh, lambda x: x)[0]


def test_the_score_is_the_excess_and_is_not_clipped():
    found = Rho1().token_selection().scores(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 3.0]]))
    assert found.tolist() == [[1.5, -2.0]]


def test_golden_choice_of_four_tokens_out_of_six():
    """Excesses 1, 2, -1 and 3, 0, 0.5; the seventh token, with the largest, is no target. ceil(0.6 * 6) = 4 are kept."""
    losses = torch.tensor([[2.0, 3.0, 1.0, 9.0], [4.0, 1.0, 1.5, 0.0]])
    reference = torch.tensor([[1.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    labels = torch.tensor([[5, 5, 5, IGNORE_INDEX], [5, 5, 5, IGNORE_INDEX]])
    assert weights_of(0.6, losses, reference, labels).tolist() == [[1.5, 1.5, 0, 0], [1.5, 0, 1.5, 0]]


@pytest.mark.parametrize("keep_ratio", [0.1, 0.35, 0.6, 1.0])
def test_against_a_sort_and_with_mean_one(keep_ratio):
    torch.manual_seed(0)
    losses, reference = torch.rand(4, 30) * 5, torch.rand(4, 30) * 5
    labels = torch.where(torch.rand(4, 30) < 0.2, IGNORE_INDEX, 7)
    there = labels != IGNORE_INDEX
    found = weights_of(keep_ratio, losses, reference, labels)
    count = int(there.sum())
    wanted = -int(-keep_ratio * count // 1)
    best = (losses - reference)[there].sort(descending=True).values[wanted - 1]
    kept = there & (losses - reference >= best)
    assert int(kept.sum()) == wanted, "no two of these are equal"
    torch.testing.assert_close(found, kept.float() * (count / wanted))
    assert float(found[there].mean()) == pytest.approx(1.0, rel=1e-6)


def test_everything_kept_is_plain_training_and_so_are_equal_excesses():
    losses, labels = torch.tensor([[1.0, 2.0, 3.0]]), torch.full((1, 3), 5)
    assert weights_of(1.0, losses, torch.zeros(1, 3), labels).tolist() == [[1, 1, 1]]
    assert weights_of(0.4, losses, losses - 1, labels).tolist() == [[1, 1, 1]], "all stand at the border"


def test_samples_weigh_the_same():
    assert Rho1().weights(observed([1.0, 2.0, 9.0]), 0, 1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_named(keep_ratio):
    with pytest.raises(
        ConfigError, match=r"weighter\.rho1\.keep_ratio: (must be > 0 and <= 1|expected a number), found"
    ):
        build("weighter", {"name": "rho1", "keep_ratio": keep_ratio})
