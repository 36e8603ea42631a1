"""The first-N selector takes the first samples of the pool."""

from __future__ import annotations

import pytest
import torch

from dataflex_mega.algorithms.selectors.custom import FirstNSelector
from dataflex_mega.errors import DataError
from tests.unit.algorithms.examples import generator, update_context


def test_the_first_ones_are_chosen_at_every_update() -> None:
    for step in (0, 10, 50):
        found = FirstNSelector().select(
            torch.rand(20, generator=generator(step)), 4, update_context(step), generator(step)
        )
        assert found.tolist() == [0, 1, 2, 3]


def test_more_than_there_is_names_both_numbers() -> None:
    with pytest.raises(DataError, match=r"selector\.custom: 6 samples wanted of 5 candidates"):
        FirstNSelector().select(torch.zeros(5), 6, update_context(), generator())
