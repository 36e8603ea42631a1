"""Choice by loss range: golden numbers, the distribution of what is drawn, and no limit on the number of candidates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.requests import LossSignal
from dataflex_mega.algorithms.selectors.loss import LossSelector, focus_weights, quantile
from dataflex_mega.errors import ConfigError, DataError
from tests.unit.algorithms.examples import generator, table_for, update_context

SIX = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def select_from(selector: LossSelector, losses: torch.Tensor, count: int, run: int = 0) -> list[int]:
    return selector.select(losses, count, update_context(), generator(run)).tolist()


def test_golden_chances() -> None:
    assert float(quantile(SIX.double(), 0.33)) == pytest.approx(2.65)
    assert float(quantile(SIX.double(), 0.66)) == pytest.approx(4.30)
    found = focus_weights(SIX, "high", 5.0, (0.33, 0.66), 1.0)
    assert found.tolist() == pytest.approx([0.0714286] * 4 + [0.3571429] * 2, abs=5e-8)
    found = focus_weights(SIX, "high", 5.0, (0.33, 0.66), 2.0)
    assert found.tolist() == pytest.approx([0.118034] * 4 + [0.2639320] * 2, abs=5e-7)


@pytest.mark.parametrize(("focus", "inside"), [("low", [0, 1]), ("medium", [2, 3]), ("high", [4, 5])])
def test_each_focus_favours_its_range(focus: Any, inside: list[int]) -> None:
    found = focus_weights(SIX, focus, 3.0, (0.33, 0.66), 1.0)
    expected = [3 / 10 if i in inside else 1 / 10 for i in range(6)]
    assert found.tolist() == pytest.approx(expected)


def test_bounds_belong_to_the_lower_range() -> None:
    assert focus_weights(SIX[:5], "low", 2.0, (0.5, 1.0), 1.0).tolist() == pytest.approx([0.25] * 3 + [0.125] * 2)
    assert focus_weights(SIX[:5], "high", 2.0, (0.0, 0.5), 1.0).tolist() == pytest.approx([1 / 7] * 3 + [2 / 7] * 2)
    assert focus_weights(SIX[:5], "medium", 2.0, (0.5, 1.0), 1.0).tolist() == pytest.approx([1 / 7] * 3 + [2 / 7] * 2)


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 0.5, 0.66, 1.0])
def test_quantile_equals_numpy(n: int, share: float) -> None:
    values = torch.rand(n, generator=generator(n), dtype=torch.float64).sort().values
    assert float(quantile(values, share)) == pytest.approx(np.quantile(values.numpy(), share), rel=1e-14)


def test_equal_losses_are_all_alike() -> None:
    assert focus_weights(torch.ones(4), "high", 5.0, (0.33, 0.66), 1.0).tolist() == [0.25] * 4


def test_losses_that_are_not_finite_are_never_chosen_and_shift_no_quantile() -> None:
    spoilt = torch.tensor([math.nan, 1, 2, math.inf, 3, 4, 5, 6, -math.inf])
    good = [1, 2, 4, 5, 6, 7]
    found = focus_weights(spoilt, "high", 5.0, (0.33, 0.66), 1.0)
    assert found[good].tolist() == focus_weights(SIX, "high", 5.0, (0.33, 0.66), 1.0).tolist()
    assert sorted(select_from(LossSelector(), spoilt, 6)) == good
    assert set(select_from(LossSelector(replacement=True), spoilt, 500)) == set(good)


def test_the_first_one_drawn_follows_the_chances() -> None:
    runs = 6000
    seen = torch.zeros(6, dtype=torch.float64)
    for run in range(runs):
        seen[select_from(LossSelector(), SIX, 1, run)] += 1
    expected = focus_weights(SIX, "high", 5.0, (0.33, 0.66), 1.0)
    assert (seen / runs).tolist() == pytest.approx(expected.tolist(), abs=4.5 * (0.36 * 0.64 / runs) ** 0.5)


def test_pairs_are_drawn_one_after_the_other_without_replacement() -> None:
    """P(i then j) = p_i p_j / (1 - p_i), over all ordered pairs."""
    losses, runs = torch.tensor([1.0, 2.0, 3.0, 4.0]), 12_000
    p = focus_weights(losses, "high", 5.0, (0.33, 0.66), 1.0).tolist()
    seen = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for run in range(runs):
        first, second = select_from(LossSelector(), losses, 2, run)
        seen[first, second] += 1
    expected = {(i, j): runs * p[i] * p[j] / (1 - p[i]) for i, j in seen}
    statistic = sum((seen[pair] - expected[pair]) ** 2 / expected[pair] for pair in seen)
    assert statistic < 11 + 5 * math.sqrt(22)


def test_with_replacement_the_chances_hold_too() -> None:
    found = select_from(LossSelector(replacement=True, focus="low"), SIX, 20_000)
    shares = np.bincount(found, minlength=6) / 20_000
    assert shares.tolist() == pytest.approx([5 / 14] * 2 + [1 / 14] * 4, abs=0.015)


def test_scores_are_the_losses() -> None:
    selector = LossSelector()
    assert selector.requests() == (LossSignal(),)
    assert torch.equal(selector.score(table_for(selector)), table_for(selector)["loss"])


@pytest.mark.parametrize("replacement", [False, True])
def test_more_candidates_than_torch_multinomial_takes(replacement: bool) -> None:
    many = 2**24 + 3
    losses = torch.linspace(0, 1, many)
    with pytest.raises(RuntimeError):
        torch.multinomial(losses, 1)  # the limit that is avoided
    found = torch.tensor(select_from(LossSelector(focus_weight=99.0, replacement=replacement), losses, 1000))
    assert float((losses[found] > 0.66).double().mean()) == pytest.approx(99 * 0.34 / (99 * 0.34 + 0.66), abs=0.03)


def test_more_than_there_is_names_the_numbers() -> None:
    with pytest.raises(DataError, match="7 samples wanted of 6 candidates, 6 with a finite loss"):
        select_from(LossSelector(), SIX, 7)
    spoilt = torch.full((3,), math.nan)
    for replacement in (False, True):
        with pytest.raises(DataError, match="1 samples wanted of 3 candidates, 0 with a finite loss"):
            select_from(LossSelector(replacement=replacement), spoilt, 1)
    assert len(select_from(LossSelector(replacement=True), SIX, 7)) == 7


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"focus_weight": 0.0}, "focus_weight"),
        ({"focus_weight": math.nan}, "focus_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e-4}, "temperature"),
        ({"temperature": 1e-9, "focus_weight": 0.5}, "temperature"),
        ({"quantiles": (0.7, 0.3)}, "quantiles"),
        ({"quantiles": (-0.1, 0.3)}, "quantiles"),
        ({"quantiles": (0.1, 1.3)}, "quantiles"),
        ({"quantiles": (0.1, math.nan)}, "quantiles"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"selector\.loss\.{key}: .*found"):
        LossSelector(**parameters)
