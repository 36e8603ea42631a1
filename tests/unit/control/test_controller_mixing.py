"""What the controller does to a mixer's proportions (floors, caps, epochs), and domain weights that change every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import Mixer
from dataflex_mega.algorithms.mixers.doremi import DoReMi
from dataflex_mega.control.domain_weights import PerStepDomainFactors
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.data.limits import make_limits
from dataflex_mega.errors import DataError
from dataflex_mega.types import SampleStats, TrainState
from tests.unit.algorithms.examples import stats
from tests.unit.control.test_controller import SIZES, ByLoss, G, controller, drive

NAMES = ("a", "b", "c")


@dataclass
class Mostly(Mixer):
    """Nine tenths of the second domain, which has 17 samples."""

    def proportions(self, context, rng):
        return torch.tensor([0.06, 0.9, 0.04], dtype=torch.float64)


def limited(schedule, epochs=None, least=None, most=None, **roles):
    limits = make_limits(NAMES, SIZES, {"min_proportion": least, "max_proportion": most}, epochs)
    return controller(schedule, limits=limits, **roles)


def counted(batches):
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    return np.array([np.histogram(batch, offsets)[0] for batch in batches])


def test_floors_and_caps_hold_for_what_is_drawn():
    made = limited(UpdateSchedule(0, 5, -1, repeat_cycles=False), least=0.1, most=0.6, mixer=Mostly())
    batches, plans = drive(made, 40)
    assert plans[-1].proportions == pytest.approx((0.24, 0.6, 0.16))
    shares = counted(batches).sum(axis=0) / (40 * G)
    assert shares == pytest.approx([0.24, 0.6, 0.16], abs=1 / (40 * G))


def test_a_domain_is_drawn_no_more_than_its_epochs_and_the_others_take_its_share():
    made = limited(UpdateSchedule(0, 5, -1, repeat_cycles=False), epochs=[3, 2, 3], mixer=Mostly())
    batches, plans = drive(made, 24)
    drawn = counted(batches).cumsum(axis=0)
    assert (drawn <= np.array([3, 2, 3]) * SIZES).all()
    assert 2 * 17 - G < drawn[-1][1] <= 2 * 17, "all but the last step's worth"
    stopped = int(np.flatnonzero(counted(batches)[:, 1])[-1]) + 1
    assert stopped % 5 != 0, "between two updates, so that stopping is not the update's doing"
    later = [plan for plan in plans if plan.start_step >= stopped]
    assert len(later) > 1 and all(plan.proportions == pytest.approx((0.6, 0, 0.4)) for plan in later)


def test_epochs_that_run_out_end_the_run_with_a_line():
    made = limited(UpdateSchedule(0, 5, -1, repeat_cycles=False), epochs=1, mixer=Mostly())
    with pytest.raises(DataError, match=r"max_epochs: at step 1[3-5] a, b, c had been drawn that often"):
        drive(made, 40)


def test_without_a_mixer_moving_the_first_plan_keeps_to_the_limits_too():
    made = limited(UpdateSchedule(0, 0, 1, repeat_cycles=False), most=0.45, mixer=Mostly())
    assert max(made.initial_plan().proportions) == pytest.approx(0.45)


def test_what_is_spent_survives_a_restart():
    schedule = UpdateSchedule(0, 50, -1, repeat_cycles=False)
    whole = limited(schedule, epochs=[3, 2, 3], mixer=Mostly())
    batches, plans = drive(whole, 20)
    again = limited(schedule, epochs=[3, 2, 3], mixer=Mostly())
    again.load_state_dict(whole.state_dict())
    assert whole.state_dict()["exhausted_domains"] == [1] == again.state_dict()["exhausted_domains"]
    state = TrainState(20, plans[-1])
    assert not again.needs_new_plan(state)
    assert again.next_plan(TrainState(50, plans[-1])).proportions[1] == 0, "also at the next update"
    assert len(batches) == 20


# -- weights of every step ---------------------------------------------------------------------------------------------


def doremi_at(step, schedule=None, **roles):
    made = controller(schedule or UpdateSchedule(0, 5, -1, repeat_cycles=False), mixer=DoReMi(), **roles)
    state = TrainState(0, made.initial_plan())
    if made.needs_new_plan(state):
        state.plan = made.next_plan(state)
    for done in range(1, step + 1):
        made.observe(stats({0: 1.0 * done, 1: 2.0, 2: 3.0}), replace_step(state, done))
    state.step = step
    return made, state


def replace_step(state, step):
    return TrainState(step, state.plan)


def test_weights_move_between_updates_and_stand_still_in_the_plan():
    factors = []
    for step in range(3):
        made, state = doremi_at(step)
        weigh = made.weight_fn(state)
        assert isinstance(weigh, PerStepDomainFactors) and not made.needs_new_plan(replace(state, step=step + 1))
        factors.append(weigh.weights.tolist())
        assert state.plan.domain_loss_weights == pytest.approx([1 / 3] * 3)
    assert factors[0] == pytest.approx([1 / 3] * 3) and factors[0] != factors[1] != factors[2]


def test_a_resumed_controller_weighs_as_the_first_would():
    made, state = doremi_at(3)
    again, _ = doremi_at(0)
    again.load_state_dict(made.state_dict())
    first, second = made.weight_fn(state), again.weight_fn(state)
    assert torch.equal(first.weights, second.weights) and first.loss_norm == second.loss_norm == "token"


def test_the_loss_is_unweighted_in_a_warmup():
    made, state = doremi_at(2, UpdateSchedule(4, 5, -1, repeat_cycles=False))
    assert made.weight_fn(state) is None


def test_a_weighter_beside_it_multiplies():
    made, state = doremi_at(2, weighter=ByLoss())
    counts = torch.tensor([4.0, 8.0, 4.0], dtype=torch.float64)
    samples = SampleStats(
        torch.arange(4), torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.ones(4).long(),
        step_denominators=counts,
    )  # fmt: skip
    by_domain = made.weight_fn(TrainState(state.step, state.plan))(samples)
    alone, _ = doremi_at(2)
    factors = alone.weight_fn(state)(samples)
    product = factors * torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert torch.allclose(by_domain, product / product.mean() * factors.mean())
