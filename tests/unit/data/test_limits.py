"""Floors, caps and epochs: the projection against a minimiser that does not share its code, and its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataflex_mega.data.limits import ProportionLimits, make_limits, project_to_bounds
from dataflex_mega.errors import ConfigError, DataError

NAMES = ("a", "b", "c")


def bisected(p: list[float], low: list[float], high: list[float]) -> list[float]:
    """clip(s p, low, high) with the scale found by halving."""
    lower, upper = 0.0, 1e9
    for _ in range(300):
        middle = (lower + upper) / 2
        total = sum(min(max(middle * x, a), b) for x, a, b in zip(p, low, high, strict=True))
        lower, upper = (middle, upper) if total < 1 else (lower, middle)
    return [min(max(upper * x, a), b) for x, a, b in zip(p, low, high, strict=True)]


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("seed", range(40))
def test_projection_is_the_scale_found_by_bisection_and_no_feasible_point_is_nearer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 9))
    p = rng.dirichlet(np.full(k, 0.4)) * (1 - 1e-6) + 1e-6 / k
    low, high = rng.uniform(0, 0.9 / k, k), rng.uniform(1.1 / k, 1, k)
    found = np.array(project_to_bounds(p.tolist(), low.tolist(), high.tolist()))
    assert found.sum() == pytest.approx(1, abs=1e-14)
    assert (found >= low - 1e-13).all() and (found <= high + 1e-13).all()
    assert found.tolist() == pytest.approx(bisected(p.tolist(), low.tolist(), high.tolist()), abs=1e-12)
    for _ in range(50):  # a step along any direction that keeps the sum and the bounds goes uphill
        other = found + rng.normal(0, 0.01, k)
        other = np.clip(other, low, high)
        other[0] += 1 - other.sum()
        if (other > 0).all() and low[0] <= other[0] <= high[0]:
            assert divergence(other, p) >= divergence(found, p) - 1e-12


def test_allowed_proportions_are_returned_bit_by_bit() -> None:
    p = (0.1, 0.2, 0.7)
    assert project_to_bounds(p, (0.0,) * 3, (1.0,) * 3) == p


def test_a_floor_takes_from_the_others_in_proportion() -> None:
    assert project_to_bounds((0.02, 0.49 * 2 / 3 * 1.5, 0.49), (0.1,) * 3, (1,) * 3) == pytest.approx((0.1, 0.45, 0.45))
    assert project_to_bounds((0.0, 0.6, 0.4), (0.1,) * 3, (1,) * 3) == pytest.approx((0.1, 0.54, 0.36))


def test_a_cap_gives_to_the_others_in_proportion_and_a_cap_of_zero_drops_the_domain() -> None:
    assert project_to_bounds((0.8, 0.15, 0.05), (0,) * 3, (0.5,) * 3) == pytest.approx((0.5, 0.375, 0.125))
    assert project_to_bounds((0.8, 0.15, 0.05), (0,) * 3, (0, 1, 1)) == pytest.approx((0, 0.75, 0.25))


def test_what_caps_leave_over_goes_evenly_to_domains_that_were_asked_for_nothing() -> None:
    assert project_to_bounds((1.0, 0.0, 0.0), (0,) * 3, (0.5, 1, 1)) == pytest.approx((0.5, 0.25, 0.25))
    assert project_to_bounds((1.0, 0.0, 0.0), (0,) * 3, (0.5, 0.1, 1)) == pytest.approx((0.5, 0.1, 0.4))
    assert project_to_bounds((1.0, 0.0, 0.0), (0,) * 3, (0, 0, 1)) == pytest.approx((0, 0, 1))


@pytest.mark.parametrize(("low", "high"), [((0.5,) * 3, (1,) * 3), ((0,) * 3, (0.3,) * 3), ((0.2, 0, 0), (0.1, 1, 1))])
def test_bounds_that_no_proportions_satisfy_are_refused(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="no proportions lie within"):
        project_to_bounds((0.2, 0.3, 0.5), low, high)


def limits(**changes: object) -> ProportionLimits:
    keys = {"min_proportion": changes.get("minimum"), "max_proportion": changes.get("maximum")}
    made = make_limits(NAMES, (40, 10, 25), keys, changes.get("epochs"))  # type: ignore[arg-type]
    assert made is not None
    return made


def test_one_number_is_for_all_and_a_list_for_each() -> None:
    assert limits(minimum=0.1).minimum == (0.1,) * 3 and limits(minimum=0.1).maximum == (1.0,) * 3
    made = limits(epochs=[2, 0.55, 1])
    assert made.max_samples == (80, 5, 25) and made.has_epoch_limit and not limits(maximum=0.9).has_epoch_limit
    assert limits(minimum=0.1).max_samples == (math.inf,) * 3
    assert make_limits(NAMES, (1, 1, 1), {"min_proportion": None, "max_proportion": None}, None) is None


def test_a_domain_is_exhausted_before_the_step_that_would_pass_its_epochs() -> None:
    made = limits(epochs=2)
    assert made.exhausted((78, 20, 50), (2, 0, 0)) == frozenset()
    assert made.exhausted((79, 20, 49), (2, 1, 1)) == {0, 1}


def test_exhausted_domains_get_nothing_even_with_a_floor() -> None:
    made = limits(epochs=1, minimum=0.2)
    assert made.apply((0.5, 0.25, 0.25), frozenset({1}), 7) == pytest.approx((2 / 3, 0, 1 / 3))


def test_when_nothing_is_left_the_step_and_the_domains_are_named() -> None:
    with pytest.raises(DataError, match=r"at step 8 a, b, c had been drawn that often, and no domain is left"):
        limits(epochs=1).apply((0.5, 0.25, 0.25), frozenset({0, 1, 2}), 7)
    with pytest.raises(DataError, match=r"at step 8 b had been .* lets the others have 0\.8 of a batch"):
        limits(epochs=1, maximum=0.4).apply((0.4, 0.3, 0.3), frozenset({1}), 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minimum": [0.1, 0.2]}, r"min_proportion: 2 numbers for 3 datasets \(a, b, c\)"),
        ({"minimum": 0.4}, r"min_proportion: the floors of 3 datasets sum to 1\.2, above 1"),
        ({"maximum": 0.3}, r"max_proportion: the caps of 3 datasets sum to 0\.9, below 1"),
        (
            {"minimum": [0, 0.3, 0], "maximum": [1, 0.2, 1]},
            r"min_proportion: 0\.3 of b is above its max_proportion 0\.2",
        ),
    ],
)
def test_limits_that_cannot_hold_name_their_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits(**changes)


def test_a_run_longer_than_its_epochs_is_refused_before_it_begins() -> None:
    limits(epochs=2).check_run(150)
    with pytest.raises(ConfigError, match="the run draws 151 samples, the datasets may give 150"):
        limits(epochs=2).check_run(151)
