"""The controller with the real sampler and small algorithms: what is planned, chosen, weighed."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import Domains, Mixer, Selector, Weighter
from dataflex_mega.control.controller import MAX_PLAN_STEPS, Controller, Roles
from dataflex_mega.control.schedule import Schedule
from dataflex_mega.data.candidates import Candidates
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import SampleObs, SignalTable, TrainState

G = 8
SIZES = (40, 17, 60)
ALONE = Collectives(SimpleNamespace(rank=0, world=1, dp_rank=0, dp_size=1, stages=1, device=torch.device("cpu")))


@dataclass
class Highest(Selector):
    """The largest scores."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    def score(self, table):
        return table["loss"]

    def choose(self, scores, count, clock, rng):
        return scores.topk(count).indices


@dataclass
class Turning(Mixer):
    """Another domain leads at each update; counts what it saw."""

    def setup(self, domains):
        self.seen, self.turn = 0, 0

    def observe(self, stats, proportions, step):
        self.seen += 1

    def proportions(self, clock, rng):
        self.turn = clock.update
        weights = torch.ones(3, dtype=torch.float64)
        weights[clock.update % 3] = 4
        return weights / weights.sum()

    def state(self):
        return {"seen": self.seen}

    def restore(self, state):
        self.seen = state["seen"]


@dataclass
class ByLoss(Weighter):
    """Proportional to the loss."""

    def weights(self, obs, step, total_steps):
        return obs.loss / obs.loss.mean()


class FakeScores:
    """Losses that are a fixed permutation of the ids."""

    def __init__(self):
        total = sum(SIZES)
        self.losses = torch.from_numpy(np.random.default_rng(0).permutation(total).astype(np.float32))
        self.calls = 0

    def shares(self):
        return [sum(SIZES)]

    def table(self, needs):
        self.calls += 1
        ids = torch.arange(sum(SIZES))
        return SignalTable(ids, torch.bucketize(ids, torch.tensor([39, 56])), {"loss": self.losses})


def controller(schedule, **roles):
    initial = tuple(s / sum(SIZES) for s in SIZES)
    domains = Domains(("a", "b", "c"), SIZES, initial)
    sampler = Sampler(SIZES, G, seed=5)
    return Controller(Roles(**roles), domains, schedule, sampler, ALONE, FakeScores(), G, 100, 5)


def drive(made, steps):
    """Ids of each step, and the plans, as the trainer's loop would go."""
    state = TrainState(0, made.first_plan())
    batches, plans = [], [state.plan]
    for _ in range(steps):
        if made.due(state):
            state.plan = made.next_plan(state)
            plans.append(state.plan)
        batches.append(made.sampler.global_batch(state.plan, state.step))
        state.step += 1
    return batches, plans


@pytest.mark.parametrize(
    ("roles", "schedule", "ends"),
    [
        ({}, Schedule(0, 1, -1, repeats=False), [20] * 6),
        ({"mixer": Turning()}, Schedule(2, 3, -1, repeats=False), [2, 2, 5, 5, 5, 8]),
        ({"mixer": Turning()}, Schedule(0, 1, -1, repeats=False), [1, 2, 3, 4, 5, 6]),
        ({"selector": Highest()}, Schedule(2, 3, 1, repeats=True), [2, 2, 5, 5, 5, 7]),  # a warm-up begins at 5
    ],
)
def test_a_plan_ends_where_a_role_is_due_next(roles, schedule, ends):
    made = controller(schedule, **roles)
    found = [made.plan_end(step, 20) for step in range(6)]
    assert found == ends
    _, plans = drive(made, 9)
    assert {plan.start for plan in plans} - {0} <= set(found) | set(range(6, 20))
    assert made.plan_end(3, 4) == 4


def test_a_selection_trains_exactly_the_chosen_ids_once_each():
    made = controller(Schedule(2, 5, 2, repeats=True), selector=Highest())
    batches, plans = drive(made, 12)
    top = made.scores.losses.topk(5 * G).indices.sort().values
    for window in (batches[2:7], batches[7:12]):
        assert sorted(np.concatenate(window)) == top.tolist()
    assert made.last_selection.overlap == 1.0 and made.last_selection.step == 7
    assert made.last_selection.quantiles[-1] == sum(SIZES) - 1
    warm = np.concatenate(batches[:2])
    assert len(set(warm)) == 2 * G and plans[0].phase == "warmup" and made.scores.calls == 2


def test_selecting_and_mixing_agree_on_the_counts_and_the_ids():
    made = controller(Schedule(0, 3, -1, repeats=True), selector=Highest(), mixer=Turning())
    batches, plans = drive(made, 12)
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    target, drawn = np.zeros(3), np.zeros(3)
    for window, plan in zip(range(0, 12, 3), plans[1:], strict=True):
        ids = np.concatenate(batches[window : window + 3])
        counts = np.histogram(ids, offsets)[0]
        target += np.array(plan.proportions) * 3 * G
        drawn += counts
        assert np.abs(drawn - target).max() <= 1, "drawn shares follow the changing mixture"
        for d in range(3):
            here = made.scores.losses[offsets[d] : offsets[d + 1]]
            if counts[d] < SIZES[d]:
                best = (here.topk(int(counts[d])).indices + offsets[d]).sort().values
                assert sorted(ids[(ids >= offsets[d]) & (ids < offsets[d + 1])]) == best.tolist()


def test_a_warmup_between_cycles_draws_from_the_whole_pool_again():
    made = controller(Schedule(2, 1, 2, repeats=True), selector=Highest())
    batches, plans = drive(made, 16)
    warm = [s for s in range(16) if made.schedule.warming(s)]
    seen = np.concatenate([batches[s] for s in warm])
    assert len(set(seen)) == len(seen), "the pool's cursors went on where they stood"
    assert [p.phase for p in plans if p.chosen is None] == ["warmup"] * 4
    assert all(p.proportions == made.domains.initial for p in plans if p.chosen is None)


def test_weights_reach_the_own_rows_and_stop_in_warmups():
    made = controller(Schedule(1, 5, -1, repeats=False), weighter=ByLoss())
    state = TrainState(0, made.first_plan())
    assert made.weigher(state) is None
    state.step = 1
    obs = SampleObs(torch.arange(4), torch.zeros(4).long(), torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.ones(4).long())
    assert torch.allclose(made.weigher(state)(obs), torch.tensor([1.0, 2.0, 3.0, 6.0]) / 3)


def test_domain_weights_of_a_mixer_have_mean_one_over_the_plans_draws():
    @dataclass
    class Heavy(Turning):
        """Weighs domain 1 three times."""

        def loss_weights(self):
            return torch.tensor([1.0, 3.0, 1.0])

    made = controller(Schedule(0, 5, -1, repeats=False), mixer=Heavy())
    state = TrainState(0, made.first_plan())
    state.plan = made.next_plan(state)
    obs = SampleObs(torch.arange(4), torch.tensor([0, 1, 1, 2]), torch.ones(4), torch.ones(4).long())
    mean = (4 * 1 + 1 * 3 + 1 * 1) / 6  # under the proportions that `Turning` gives at its first update
    assert torch.allclose(made.weigher(state)(obs), torch.tensor([1.0, 3.0, 3.0, 1.0]) / mean)
    one = SampleObs(obs.sample_id[1:2], obs.domain[1:2], obs.loss_sum[1:2], obs.tokens[1:2])
    assert torch.allclose(made.weigher(state)(one), torch.tensor([3.0]) / mean), "however the batch is cut"


def test_a_long_plan_is_continued_without_changing_what_is_drawn():
    made = controller(Schedule(0, 0, 1, repeats=False))
    state = TrainState(MAX_PLAN_STEPS, made.first_plan())
    assert made.due(state)
    renewed = made.next_plan(state)
    assert renewed.start == MAX_PLAN_STEPS
    for step in (MAX_PLAN_STEPS, MAX_PLAN_STEPS + 7):
        assert np.array_equal(made.sampler.global_batch(renewed, step), made.sampler.global_batch(state.plan, step))


def test_state_goes_round_and_other_roles_are_refused():
    schedule = Schedule(0, 3, -1, repeats=True)
    made = controller(schedule, selector=Highest(), mixer=Turning())
    drive(made, 4)
    made.observe(None, TrainState(4, made.first_plan()))
    again = controller(schedule, selector=Highest(), mixer=Turning())
    again.restore(made.state())
    assert again.roles.mixer.seen == 1
    assert torch.equal(again.state()["previous_selection"], made.state()["previous_selection"])
    with pytest.raises(CheckpointError, match="mixer"):
        controller(schedule, selector=Highest()).restore(made.state())


class PartScores(FakeScores):
    """Losses of what is asked for; remembers what that was."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def consider(self, ids):
        self.asked.append(ids)

    def shares(self):
        return [len(self.asked[-1])]

    def table(self, needs):
        ids = torch.from_numpy(self.asked[-1])
        return SignalTable(ids, torch.bucketize(ids, torch.tensor([39, 56])), {"loss": self.losses[ids]})


def of_parts(keeps, **roles):
    made = controller(Schedule(2, 2, 6, repeats=True), selector=Highest(), **roles)
    made.scores, made.candidates = PartScores(), Candidates(SIZES, 0.3, 5, keeps=keeps)
    return made


def test_a_selection_from_a_part_chooses_the_best_of_that_part():
    made = of_parts(keeps=False)
    batches, _ = drive(made, 14)
    assert len(made.scores.asked) == 6
    for update, asked in enumerate(made.scores.asked):
        asked = torch.from_numpy(asked)
        best = asked[made.scores.losses[asked].topk(2 * G).indices]
        assert sorted(np.concatenate(batches[2 + 2 * update : 4 + 2 * update])) == sorted(best.tolist())


def test_kept_scores_make_it_the_best_of_all_parts_so_far_and_survive_a_restart():
    made = of_parts(keeps=True)
    batches, _ = drive(made, 14)
    for update in range(6):
        asked = torch.from_numpy(np.unique(np.concatenate(made.scores.asked[: update + 1])))
        best = asked[made.scores.losses[asked].topk(2 * G).indices]
        assert sorted(np.concatenate(batches[2 + 2 * update : 4 + 2 * update])) == sorted(best.tolist())
    again = of_parts(keeps=True)
    again.restore(made.state())
    assert torch.equal(again.state()["candidates"]["scores"], made.state()["candidates"]["scores"])


def test_parts_beside_a_mixer_hold_what_it_draws_of_every_domain():
    made = of_parts(keeps=False, mixer=Turning())
    batches, plans = drive(made, 14)
    for plan, window in zip(plans[1:], (batches[2 + 2 * u : 4 + 2 * u] for u in range(6)), strict=True):
        drawn = np.concatenate(window)
        assert len(set(drawn)) == len(drawn) == 2 * G, "no sample twice"
        assert set(drawn) == set(plan.chosen.tolist())
