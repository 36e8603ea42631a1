"""The static mixer: the run's initial proportions, or fixed ones."""

from __future__ import annotations

import math

import pytest

from dataflex_mega.algorithms.mixers.static import Static
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build
from tests.unit.algorithms.examples import DOMAINS, generator, update_context


def shares(mixer: Static) -> list[float]:
    mixer.setup(DOMAINS)
    return mixer.proportions(update_context(), generator()).tolist()


def test_without_a_parameter_the_run_keeps_its_initial_proportions() -> None:
    assert shares(Static()) == pytest.approx([0.5, 0.3, 0.2], abs=1e-15)


def test_given_numbers_are_taken_relative_to_their_sum() -> None:
    mixer = build("mixer", {"name": "static", "proportions": [2, 0, 6]})
    assert isinstance(mixer, Static)
    assert shares(mixer) == [0.25, 0.0, 0.75]


@pytest.mark.parametrize("wrong", [[0.5, 0.6, -0.1], [0.0, 0.0, 0.0], [math.nan, 0.5, 0.5], [math.inf, 1.0, 1.0], []])
def test_wrong_numbers_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"mixer\.static\.proportions: must be finite"):
        Static(wrong)


def test_a_wrong_number_of_them_names_the_datasets() -> None:
    with pytest.raises(ConfigError, match=r"2 numbers for 3 datasets \(web, wiki, code\)"):
        Static([0.5, 0.5]).setup(DOMAINS)
