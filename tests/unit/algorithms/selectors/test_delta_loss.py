"""Choice by the fall of the loss: golden windows, the distribution of what is drawn, and the first losses kept."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.selectors.delta_loss import DeltaLoss, training_progress, window_bounds, window_weights
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import UpdateContext
from tests.unit.algorithms.examples import generator, table_for


def update_context(update: int, updates: int = 5, step: int | None = None) -> UpdateContext:
    return UpdateContext(10 * (update + 1) if step is None else step, 100, update, 3, updates)


def started(first: torch.Tensor, **parameters: Any) -> DeltaLoss:
    """A selector whose first update saw these losses."""
    selector = DeltaLoss(**parameters)
    selector.setup(DomainInfo(("only",), (len(first),), (1.0,)))
    selector.select(first, 1, update_context(0), generator())
    return selector


def test_golden_windows() -> None:
    found = [window_bounds(100, 100, training_progress(update_context(u)), 0.2) for u in range(5)]
    assert found == [(0, 20), (6, 26), (40, 60), (73, 93), (79, 99)]
    big = [window_bounds(100_000, 100_000, training_progress(update_context(u, 30)), 0.2)[0] for u in (0, 29)]
    assert big == [535, 79_464]


def test_progress_is_the_update_over_the_last_or_the_step_where_there_is_no_last() -> None:
    assert [training_progress(update_context(u)) for u in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert training_progress(update_context(0, 1)) == 0.0
    assert [training_progress(update_context(7, 0, step)) for step in (0, 30, 100, 200)] == [0.0, 0.3, 1.0, 1.0]


@pytest.mark.parametrize("update", range(1, 5))
@pytest.mark.parametrize("worse", [0, 30, 70, 100])
def test_weights_follow_the_rule_in_plain_python(update: int, worse: int) -> None:
    """`worse` samples of 100 have a higher loss than at first."""
    deltas = [((i * 37) % 100) - worse + 0.5 for i in range(100)]
    start = int(1 / (1 + math.exp(-10 * (update / 4 - 0.5))) * 80)
    inside = set()
    for place, i in enumerate(sorted(range(100), key=lambda i: -deltas[i])):
        if start <= place < start + 20 and deltas[i] >= 0:
            inside.add(i)
    found = window_weights(torch.tensor(deltas), update / 4, 0.2, 0.025)
    assert found.tolist() == [1.0 if i in inside else 0.025 for i in range(100)]


def test_equal_deltas_go_by_position() -> None:
    assert window_weights(torch.zeros(10), 0.0, 0.2, 0.5).tolist() == [1.0, 1.0] + [0.5] * 8


def test_a_small_pool_has_a_window_of_one() -> None:
    assert window_weights(torch.tensor([1.0, 2.0]), 0.0, 0.2, 0.025).tolist() == [0.025, 1.0]


def test_first_update_gives_every_sample_the_same_chance() -> None:
    losses, seen = torch.linspace(0, 9, 10), torch.zeros(10)
    for run in range(3000):
        selector = DeltaLoss()
        selector.setup(DomainInfo(("only",), (10,), (1.0,)))
        seen[selector.select(losses, 3, update_context(0), generator(run))] += 1
    assert seen.tolist() == pytest.approx([900] * 10, abs=5 * (3000 * 0.3 * 0.7) ** 0.5)


def test_later_updates_prefer_what_the_window_holds() -> None:
    """At x = 1/4 of 100 samples the window is 6..25; outside, 80 samples share 2 of 22 parts of the chance."""
    first = torch.full((100,), 5.0)
    now = 5.0 - torch.arange(100) / 50  # sample 99 improved most
    seen = torch.zeros(100, dtype=torch.float64)
    selector = started(first)
    for run in range(20_000):
        seen[selector.select(now, 1, update_context(1), generator(run))] += 1
    inside = seen.flip(0)[6:26]
    assert float(inside.sum()) / 20_000 == pytest.approx(20 / 22, abs=0.01)
    assert inside.tolist() == pytest.approx([20_000 / 22] * 20, rel=0.2)


def test_the_window_moves_from_the_most_to_the_least_improved() -> None:
    first, now = torch.full((200,), 5.0), 5.0 - torch.arange(200) / 100
    selector = started(first, outside_weight=1e-9)
    means = [float(selector.select(now, 40, update_context(u), generator(u)).double().mean()) for u in range(1, 5)]
    assert means == sorted(means, reverse=True) and means[0] > 150 and means[-1] < 30


def test_the_first_update_repeated_at_its_step_is_the_first_update_again() -> None:
    selector, losses = started(torch.rand(40, generator=generator())), torch.rand(40, generator=generator(1))
    once = selector.select(losses, 10, update_context(0), generator(2))
    assert torch.equal(once, selector.select(losses, 10, update_context(0), generator(2)))
    assert torch.equal(selector.state_dict()["initial"], losses)


def test_losses_that_are_not_finite_are_never_chosen() -> None:
    first = torch.tensor([5.0, math.nan, 5.0, 5.0, 5.0])
    now = torch.tensor([1.0, 1.0, math.inf, 2.0, 3.0])
    selector = started(first)
    assert sorted(selector.select(now, 3, update_context(2), generator()).tolist()) == [0, 3, 4]
    with pytest.raises(DataError, match="4 samples wanted of 5 candidates, 3 with a finite loss"):
        selector.select(now, 4, update_context(2), generator())


def test_a_resumed_run_compares_with_the_first_losses() -> None:
    first, now = torch.rand(60, generator=generator()) + 2, torch.rand(60, generator=generator(1))
    whole, resumed = started(first), DeltaLoss()
    resumed.setup(DomainInfo(("only",), (60,), (1.0,)))
    state = whole.state_dict()
    resumed.load_state_dict(
        {"initial": state["initial"].clone(), **json.loads(json.dumps({"first_step": state["first_step"]}))}
    )
    for update in (1, 2, 4):
        found = [s.select(now, 20, update_context(update), generator(update)) for s in (whole, resumed)]
        assert torch.equal(*found)
    anew = started(now)
    assert not torch.equal(
        anew.select(now, 20, update_context(2), generator(2)), whole.select(now, 20, update_context(2), generator(2))
    )


def test_nothing_is_stored_before_the_first_update() -> None:
    selector = DeltaLoss()
    selector.load_state_dict({})
    assert selector.state_dict() == {}


def test_a_checkpoint_of_another_pool_is_refused() -> None:
    selector = DeltaLoss()
    selector.setup(DomainInfo(("only",), (9,), (1.0,)))
    with pytest.raises(CheckpointError, match="of 8 samples, this run has 9"):
        selector.load_state_dict(started(torch.rand(8)).state_dict())


def test_a_part_of_the_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"selector\.delta_loss: .*no mixer.*found 4 of 8 candidates"):
        started(torch.rand(8)).select(torch.rand(4), 1, update_context(1), generator())


def test_scores_are_the_losses() -> None:
    assert torch.equal(DeltaLoss().score(table_for(DeltaLoss())), table_for(DeltaLoss())["loss"])


@pytest.mark.parametrize("key", ["window_size", "outside_weight"])
@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1, math.nan])
def test_wrong_parameters_name_their_key(key: str, wrong: float) -> None:
    parameters: dict[str, Any] = {key: wrong}
    with pytest.raises(ConfigError, match=rf"selector\.delta_loss\.{key}: must be > 0 and <= 1, found"):
        DeltaLoss(**parameters)
