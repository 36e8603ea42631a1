"""Roles on update schedules of their own, with the real sampler: what is drawn when and in which order."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Selector
from dataflex_mega.algorithms.requests import LossSignal, ReferenceLossSignal
from dataflex_mega.control.controller import DataController, RoleSet
from dataflex_mega.control.passes import OrderedPasses, OrderOptions
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.stages import ScoreSource, StageConfig
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.registry import build
from dataflex_mega.types import TrainState
from tests.unit.control.test_controller import ALONE, ByLoss, FakeSignals

SIZES, G = (40, 24, 56), 4
TOTAL = sum(SIZES)
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])


@dataclass
class Losses(Selector):
    """Keeps the lowest losses."""

    def requests(self):
        return (LossSignal(),)

    def score(self, table):
        return table["loss"]

    def select(self, scores, count, context, rng):
        return scores.topk(count, largest=False).indices


class LossesAndMore(Losses):
    """Requests more than the losses, so its signals are computed at every call."""

    def requests(self):
        return (LossSignal(), ReferenceLossSignal())


@dataclass
class Turning(Mixer):
    """Another domain leads at each update."""

    def proportions(self, context, rng):
        weights = torch.ones(3, dtype=torch.float64)
        weights[context.update_index % 3] = 4
        return weights / weights.sum()


def counts(made):
    """How many samples each forward pass scored."""
    return [TOTAL if ids is None else len(ids) for ids in made.signals.asked_ids]


def schedule(warmup_steps, update_every):
    return UpdateSchedule(warmup_steps, update_every, -1, repeat_cycles=False)


def staged(pattern=None, schedules=None, source=None, order_options=None, roles=None, batch_size=G, **options):
    roles = dict(roles or {})
    if pattern is not None:
        roles["reorder"] = build("reorder", pattern)
    bounds = [0, TOTAL] if "mixer" not in roles else OFFSETS.tolist()
    passes = OrderedPasses(roles["reorder"], order_options or OrderOptions(), bounds) if pattern is not None else None
    role_schedules = {
        "selector": schedule(0, 6),
        "mixer": schedule(0, 3),
        "weighter": schedule(2, 1),
        "reorder": schedule(0, 3),
    }
    role_schedules |= schedules or {}
    stages = StageConfig(role_schedules, source or ScoreSource(selector=Losses()), **options)
    sizes = tuple(size / TOTAL for size in SIZES)
    return DataController(
        RoleSet(**roles), DomainInfo(("a", "b", "c"), SIZES, sizes), stages, Sampler(SIZES, batch_size, seed=5), ALONE,
        FakeSignals(SIZES, torch.arange(float(TOTAL))), total_steps=100, seed=5, passes=passes,
    )  # fmt: skip


def drive(made, steps, state=None, hook=None):
    state = state or TrainState(0, made.initial_plan())
    batches = []
    for _ in range(steps):
        if hook is not None:
            hook(made, state.step)
        if made.needs_new_plan(state):
            state.plan = made.next_plan(state)
        batches.append(made.sampler.global_batch(state.plan, state.step))
        state.step += 1
    return batches, state


def means(batches, size):
    return [float(np.mean(np.concatenate(batches[i : i + size]))) for i in range(0, len(batches), size)]


def test_a_folding_run_goes_up_and_down_though_it_is_scored_anew_at_every_update():
    """30 steps of 4 are one pass over 120: thirds from low to high, each of ten steps; windows of three steps."""
    batches, _ = drive(staged({"name": "folding", "layers": 3}), 30)
    ids = np.concatenate(batches)
    assert ids.tolist() == [*range(0, 120, 3), *range(1, 120, 3), *range(2, 120, 3)]


def test_the_whole_pool_is_seen_once_a_pass_whatever_the_losses_do():
    def change(made, step):
        made.signals.losses = torch.rand(TOTAL, generator=torch.Generator().manual_seed(step))

    made = staged({"name": "saw", "num_sections": 3, "folding_ratio": 0.1})
    batches, _ = drive(made, 60, hook=change)
    for first in (0, 30):
        assert sorted(np.concatenate(batches[first : first + 30])) == list(range(TOTAL))


def test_only_what_is_left_is_scored():
    made = staged("sorting")
    drive(made, 12)
    assert counts(made) == [120, 108, 96, 84]
    assert (
        made.ordered.last_record.num_scored == 84
        and made.ordered.last_record.step == 9
        and made.ordered.last_record.end == 12
    )


def test_what_a_selector_requested_for_its_update_comes_before_it_scores():
    made = staged("sorting", roles={"selector": Losses(), "mixer": Turning()})
    drive(made, 7)
    selector, mixer, scores = made.roles.selector, made.roles.mixer, made.stages.source.selector
    assert [(algorithm is scores, step) for algorithm, step in made.signals.updates if algorithm is not mixer] == [
        (False, 0), (True, 0), (True, 3), (False, 6), (True, 6),
    ]  # fmt: skip
    assert [step for algorithm, step in made.signals.updates if algorithm is mixer] == [0, 3, 6]
    assert selector is not scores


def test_a_warmup_is_drawn_at_random_and_counts_as_seen():
    made = staged("sorting", schedules={"reorder": schedule(4, 3)})
    batches, _ = drive(made, 30)
    warm = set(np.concatenate(batches[:4]).tolist())
    assert len(warm) == 16
    assert np.concatenate(batches[4:]).tolist() == [i for i in range(TOTAL) if i not in warm]


def test_fixed_scores_and_descending():
    fixed = torch.arange(float(TOTAL)).flip(0)
    made = staged(
        "sorting", source=ScoreSource(fixed=fixed), order_options=OrderOptions(ascending=False), rescore=False
    )
    batches, _ = drive(made, 30)
    assert np.concatenate(batches).tolist() == list(range(TOTAL)) and counts(made) == []


def test_scored_once_and_every_other_time():
    once = staged("sorting", rescore=False)
    drive(once, 12)
    assert counts(once) == [120]
    other = staged("sorting", score_every=2)
    drive(other, 12)
    assert counts(other) == [120, 96]


def test_without_consume_once_every_update_begins_anew():
    batches, _ = drive(staged("sorting", consume_once=False), 9)
    assert [sorted(np.concatenate(batches[i : i + 3])) for i in (0, 3, 6)] == [list(range(12))] * 3


def test_a_sample_of_the_pool_is_scored_and_the_others_are_in_the_middle():
    made = staged("sorting", source=ScoreSource(selector=Losses(), max_samples=20))
    batches, _ = drive(made, 3)
    assert counts(made) == [20]
    low = np.concatenate(batches)[:6]
    assert low.tolist() == sorted(low.tolist()), "the lowest of those that were scored come first"


def test_with_a_mixture_the_counts_are_those_of_the_mixture_and_each_domain_is_in_order():
    made = staged("sorting", roles={"mixer": Turning()})
    plain = staged(roles={"mixer": Turning()})
    batches, _ = drive(made, 12)
    expected, _ = drive(plain, 12)
    for ours, theirs in zip(batches, expected, strict=True):
        assert np.histogram(ours, OFFSETS)[0].tolist() == np.histogram(theirs, OFFSETS)[0].tolist()
    seen = np.concatenate([sorted(batch) for batch in batches])
    for d in range(3):
        here = seen[(seen >= OFFSETS[d]) & (seen < OFFSETS[d + 1])]
        assert here.tolist() == (OFFSETS[d] + np.arange(len(here)) % SIZES[d]).tolist()


@pytest.mark.parametrize("selector", [Losses(), LossesAndMore()])
def test_a_filter_and_the_scores_of_an_order_ask_for_signals_of_their_own_step(selector):
    made = staged("sorting", roles={"selector": selector}, source=ScoreSource(selector=selector), mode="filter")
    drive(made, 9)
    assert made.signals.asked_steps == ([0, 3, 6] if type(selector) is Losses else [0, 0, 3, 6, 6])


def test_filter_then_order_never_serves_a_sample_twice_though_the_pool_changes():
    def change(made, step):
        made.signals.losses = torch.rand(TOTAL, generator=torch.Generator().manual_seed(step // 6))

    made = staged("sorting", roles={"selector": Losses()}, mode="filter", keep_ratio=0.5)
    batches, _ = drive(made, 15, hook=change)
    ids = np.concatenate(batches)
    assert len(set(ids.tolist())) == len(ids) == 60
    assert [count for count in counts(made) if count == 120] == [120] * 3, (
        "the selections, whose losses serve the order too"
    )
    assert len(counts(made)) == 5 and all(24 <= count <= 48 for count in counts(made)[1::2])
    assert set(batches[-1].tolist()) <= set(made.selected_ids.tolist())


def test_selecting_and_ordering_by_loss_at_one_step_measure_once():
    made = staged("sorting", roles={"selector": Losses()}, mode="filter", keep_ratio=0.5)
    drive(made, 3)
    assert counts(made) == [120]


def test_losses_may_be_some_steps_old():
    made = staged("sorting", max_score_age={"reorder": 3})
    drive(made, 9)
    assert counts(made) == [120, 96], "at step 3 those of step 0 will do, at step 6 they are too old"


def test_a_drawn_selection_is_the_window_that_is_ordered():
    made = staged("sorting", roles={"selector": Losses()}, order_options=OrderOptions(ascending=False),
                  schedules={"selector": schedule(0, 6), "reorder": schedule(0, 6)})  # fmt: skip
    batches, _ = drive(made, 12)
    for first in (0, 6):
        assert np.concatenate(batches[first : first + 6]).tolist() == list(range(23, -1, -1))


def test_filter_then_mix_goes_on_in_the_same_choice():
    made = staged(roles={"selector": Losses(), "mixer": Turning()}, mode="filter", keep_ratio=0.5)
    batches, state = drive(made, 6)
    ids = np.concatenate(batches)
    assert set(ids.tolist()) <= set(range(60)), "the lower half"
    assert len(set(ids.tolist())) == len(ids), "the second mixture goes on where the first one stopped"
    assert state.plan.proportions[2] == 0 and sum(state.plan.proportions) == pytest.approx(1)


def test_weights_have_a_schedule_of_their_own():
    made = staged("sorting", roles={"weighter": ByLoss()})
    assert made.weight_fn(TrainState(1, made.initial_plan())) is None
    assert made.weight_fn(TrainState(2, made.initial_plan())) is not None


@pytest.mark.parametrize("cut", [1, 5, 6, 8])
@pytest.mark.parametrize(
    ("roles", "options"),
    [
        ({}, {}),
        ({"mixer": Turning}, {}),
        ({"selector": Losses, "mixer": Turning}, {"mode": "filter", "max_score_age": {"reorder": 4}}),
    ],
)
def test_a_restart_changes_nothing(roles, options, cut):
    def made():
        return staged("segment", roles={name: cls() for name, cls in roles.items()}, **options)

    expected, _ = drive(made(), 14)
    first, again = made(), made()
    begun, state = drive(first, cut)
    again.load_state_dict(first.state_dict())
    rest, _ = drive(again, 14 - cut, TrainState(state.step, state.plan))
    for one, other in zip(expected, begun + rest, strict=True):
        assert one.tolist() == other.tolist()


def test_a_plan_that_another_batch_size_cut_short_loses_no_sample():
    made = staged("sorting", schedules={"reorder": schedule(0, 6)})
    batches, state = drive(made, 2)
    state.plan = made.sampler.plan_from(state.plan, 2)
    other = staged("sorting", schedules={"reorder": schedule(0, 6)}, batch_size=5)
    other.load_state_dict(made.state_dict())
    rest, _ = drive(other, 4, state)
    assert np.concatenate(batches + rest).tolist() == list(range(8 + 20))
