"""The random selector: uniform draws, without repeats where possible."""

from __future__ import annotations

import pytest
import torch

from dataflex_mega.algorithms.selectors.random import RandomSelector
from dataflex_mega.errors import DataError
from tests.unit.algorithms.examples import generator, update_context


def select_from(selector: RandomSelector, candidates: int, count: int, run: int = 0) -> list[int]:
    return selector.select(torch.zeros(candidates), count, update_context(), generator(run)).tolist()


def test_every_candidate_has_the_same_chance() -> None:
    seen = torch.zeros(10)
    for run in range(3000):
        seen[select_from(RandomSelector(), 10, 3, run)] += 1
    assert seen.tolist() == pytest.approx([900] * 10, abs=5 * (3000 * 0.3 * 0.7) ** 0.5)


def test_all_candidates_may_be_asked_for() -> None:
    assert sorted(select_from(RandomSelector(), 30, 30)) == list(range(30))


def test_replacement_may_choose_more_than_there_is() -> None:
    found = select_from(RandomSelector(replacement=True), 5, 400)
    assert len(found) == 400 and set(found) == set(range(5))


def test_seeds_and_updates_choose_differently() -> None:
    found = {
        tuple(select_from(RandomSelector(seed=s), 100, 10, run)) for s in (None, 0, 1, 5, 2**80) for run in range(4)
    }
    assert len(found) == 20
    assert select_from(RandomSelector(seed=7), 100, 10) == select_from(RandomSelector(seed=7), 100, 10)


def test_more_than_there_is_names_both_numbers() -> None:
    with pytest.raises(DataError, match="11 samples wanted of 10 candidates"):
        select_from(RandomSelector(), 10, 11)
    with pytest.raises(DataError, match="1 samples wanted of 0 candidates"):
        select_from(RandomSelector(replacement=True), 0, 1)
