"""LESS's aggregation against a hand calculation, and its parameters."""

from dataclasses import replace

import pytest
import torch

from dataflex_mega.algorithms.requests import GradientSignal, StoredGradientSignal
from dataflex_mega.algorithms.selectors.less import Less
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import ProjectionSpec, SignalTable, UpdateContext
from tests.unit.algorithms.examples import generator, update_context


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
    assert less.select(ties, 3, update_context(), generator()).tolist() == [1, 3, 0]
    with pytest.raises(DataError, match="5 samples wanted, 4"):
        less.select(ties, 5, update_context(), generator())


def test_what_it_asks_for():
    assert Less().requests() == (GradientSignal(adam=True),) and Less().requests()[0].name == "gradient_adam"
    (plain,) = Less(gradient_type="sgd").requests()
    assert plain == GradientSignal(adam=False) and plain.name == "gradient_sgd"
    (stored,) = Less(mode="store", side=8).requests()
    assert stored == StoredGradientSignal(True, ProjectionSpec("two_sided", 8, 0)) and stored.name == "store_adam"
    (dense,) = Less(mode="store", projection="dense", seed=3).requests()
    assert dense.projection == ProjectionSpec("dense", 8192, 3)
    assert Less(mode="store", projection="dense", proj_dim=64).requests()[0].projection.size == 64
    assert Less(mode="store", store_dir="s", store_block=7).requests()[0] == replace(
        Less(mode="store").requests()[0], store_dir="s", block_size=7
    )


# -- several checkpoints ---------------------------------------------------------------------------------------------------

# LESS's example: two checkpoints with rates 3e-5 and 1e-5, two candidates, two sub-tasks of two targets each.
FIRST, SECOND = [[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [1.0, 0.0]]  # candidates at each
TARGETS = (
    [[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]],
    [[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.8, 0.6]]],
)


def cosines_at(less, candidates, targets):
    """What a round's table gives; lengths do not count."""
    rows = torch.tensor(candidates) * 3
    directions = torch.tensor(targets).mean(1)
    return less.score(table((rows @ directions.t()).tolist(), rows.square().sum(1).tolist()))


def at(step, rate):
    return UpdateContext(step, 100, step // 10, 3, learning_rate=rate)


def test_checkpoints_are_added_up_by_their_learning_rates():
    """The paper's order: mean over targets, sum over checkpoints, then the largest sub-task."""
    less, ids = Less(checkpoints=2), torch.arange(2)
    first = less.combine_updates(ids, cosines_at(less, FIRST, TARGETS[0]), at(10, 3e-5))
    assert first.tolist() == pytest.approx([0.7, 0.98]) and first.dtype == torch.float32
    both = less.combine_updates(ids, cosines_at(less, SECOND, TARGETS[1]), at(20, 1e-5))
    assert both.tolist() == pytest.approx([0.625, 0.96], abs=1e-6)
    third = less.combine_updates(ids, cosines_at(less, FIRST, TARGETS[0]), at(30, 1e-5))
    # The first is forgotten: (S_2 + S_1) / 2 with S_1 = [[.5, .7], [.7, .98]], S_2 = [[1, .6], [0, .9]].
    assert third.tolist() == pytest.approx([0.75, 0.94], abs=1e-6)


def test_a_candidate_has_no_entry_of_a_round_that_did_not_score_it():
    less = Less(checkpoints=3)
    rounds = [
        (10, 4.0, [0, 3, 5], [[0.1, 0.2], [0.3, -0.4], [0.5, 0.6]]),
        (20, 2.0, [1, 3, 7], [[0.9, -0.8], [0.6, 0.2], [0.4, 0.3]]),
        (30, 0.0, [3, 5, 8], [[-0.5, 0.0], [0.0, 0.1], [0.2, 0.7]]),
    ]
    found = [less.combine_updates(torch.tensor(i), torch.tensor(c), at(s, r)).tolist() for s, r, i, c in rounds]
    assert found[0] == pytest.approx([0.2, 0.3, 0.6])
    assert found[1] == pytest.approx([0.9, (4 * 0.3 + 2 * 0.6) / 6, 0.4])
    # 3: rates 4, 2, 0; 5: rates 4, 0; 8: only the rate 0, which then counts alone.
    assert found[2] == pytest.approx([0.4, 0.6, 0.7])


def test_rounds_survive_a_restart_and_one_checkpoint_keeps_nothing():
    generated = torch.Generator().manual_seed(0)
    rounds = [(torch.arange(step % 3, 20), torch.rand(20, 2, generator=generated)) for step in range(5)]

    def go(less, steps):
        return [less.combine_updates(rounds[s][0], rounds[s][1][rounds[s][0]], at(s, 0.1 * (s + 1))) for s in steps]

    whole, half, other = (Less(checkpoints=3) for _ in range(3))
    expected = go(whole, range(5))
    go(half, range(3))
    saved = half.state_dict()
    assert [r["step"] for r in saved["history"]] == [0, 1, 2]
    other.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(go(other, (3, 4)), expected[3:], strict=True))
    assert len(whole.state_dict()["history"]) == 3
    again = go(other, (4,))[0]
    assert torch.equal(again, expected[4]), "the same round twice counts once"
    with pytest.raises(DataError, match="step 9 compares with 3 sub-tasks, records before have 2"):
        other.combine_updates(torch.arange(4), torch.zeros(4, 3), at(9, 1.0))
    plain, scores = Less(), torch.rand(4)
    assert plain.combine_updates(torch.arange(4), scores, at(1, 1.0)) is scores and plain.state_dict() == {}


@pytest.mark.parametrize(
    "wrong", [{"side": 0}, {"proj_dim": 0}, {"store_block": 0}, {"checkpoints": 0}, {"store_dir": "x"}]
)
def test_what_cannot_be_is_named(wrong):
    with pytest.raises(ConfigError, match=rf"selector\.less\.{next(iter(wrong))}:"):
        Less(**wrong)
