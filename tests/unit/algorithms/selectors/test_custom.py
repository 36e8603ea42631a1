"""The first of the pool."""

from __future__ import annotations

import pytest
import torch

from dataflex_mega.algorithms.selectors.custom import Custom
from dataflex_mega.errors import DataError
from tests.unit.algorithms.examples import clock, generator


def test_the_first_ones_are_chosen_at_every_update() -> None:
    for step in (0, 10, 50):
        found = Custom().choose(torch.rand(20, generator=generator(step)), 4, clock(step), generator(step))
        assert found.tolist() == [0, 1, 2, 3]


def test_more_than_there_is_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"selector\.custom: 6 samples wanted of 5 candidates"):
        Custom().choose(torch.zeros(5), 6, clock(), generator())
