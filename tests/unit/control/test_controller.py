"""The controller with the real sampler and small algorithms: plans, selections and weights."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Selector, Weighter
from dataflex_mega.algorithms.requests import LossSignal
from dataflex_mega.control.controller import MAX_PLAN_STEPS, DataController, RoleSet
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.stages import StageConfig
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import SampleStats, SignalTable, TrainState

G = 8
SIZES = (40, 17, 60)
ALONE = TorchCollectives(
    SimpleNamespace(rank=0, world_size=1, dp_rank=0, dp_size=1, pipeline_stages=1, device=torch.device("cpu"))
)


@dataclass
class Highest(Selector):
    """The largest scores."""

    def requests(self):
        return (LossSignal(),)

    def score(self, table):
        return table["loss"]

    def select(self, scores, count, context, rng):
        return scores.topk(count).indices


@dataclass
class Turning(Mixer):
    """Another domain leads at each update; counts what it saw."""

    def setup(self, domains):
        self.seen, self.turn = 0, 0

    def observe(self, stats, proportions, step):
        self.seen += 1

    def proportions(self, context, rng):
        self.turn = context.update_index
        weights = torch.ones(3, dtype=torch.float64)
        weights[context.update_index % 3] = 4
        return weights / weights.sum()

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@dataclass
class ByLoss(Weighter):
    """Proportional to the loss."""

    def weights(self, samples, step, total_steps):
        return samples.loss / samples.loss.mean()


class FakeSignals:
    """A SignalSource: losses by id, a fixed permutation of the ids; remembers which candidates were asked for."""

    def __init__(self, sizes=SIZES, losses=None):
        total = sum(sizes)
        self.ends = torch.tensor(sizes).cumsum(0)
        shuffled = np.random.default_rng(0).permutation(total).astype(np.float32)
        self.losses = torch.from_numpy(shuffled) if losses is None else losses
        self.asked_ids, self.asked_steps, self.updates, self.steps = [], [], [], []

    def signal_names(self, selector):
        return sorted(request.name for request in selector.requests())

    def table(self, selector, ids, step):
        self.asked_ids.append(ids)
        self.asked_steps.append(step)
        ids = torch.arange(len(self.losses)) if ids is None else torch.from_numpy(ids)
        return SignalTable(ids, self.domain_ids(ids), {"loss": self.losses[ids]}), [len(ids)]

    def domain_ids(self, ids):
        return torch.searchsorted(self.ends, ids, right=True)

    def before_update(self, algorithm, step):
        self.updates.append((algorithm, step))

    def before_step(self, algorithm, step, ids):
        self.steps.append((algorithm, step, ids().tolist()))


def controller(schedule, candidates=None, limits=None, **roles):
    initial = tuple(s / sum(SIZES) for s in SIZES)
    domains = DomainInfo(("a", "b", "c"), SIZES, initial)
    return DataController(
        RoleSet(**roles), domains, StageConfig.shared(schedule), Sampler(SIZES, G, seed=5), ALONE, FakeSignals(),
        total_steps=100, seed=5, limits=limits, candidates=candidates,
    )  # fmt: skip


def drive(made, steps):
    """Ids of each step, and the plans, as the trainer's loop would go."""
    state = TrainState(0, made.initial_plan())
    batches, plans = [], [state.plan]
    for _ in range(steps):
        if made.needs_new_plan(state):
            state.plan = made.next_plan(state)
            plans.append(state.plan)
        batches.append(made.sampler.global_batch(state.plan, state.step))
        state.step += 1
    return batches, plans


@pytest.mark.parametrize(
    ("roles", "schedule", "ends"),
    [
        ({}, UpdateSchedule(0, 1, -1, repeat_cycles=False), [20] * 6),
        ({"mixer": Turning()}, UpdateSchedule(2, 3, -1, repeat_cycles=False), [2, 2, 5, 5, 5, 8]),
        ({"mixer": Turning()}, UpdateSchedule(0, 1, -1, repeat_cycles=False), [1, 2, 3, 4, 5, 6]),
        (
            {"selector": Highest()},
            UpdateSchedule(2, 3, 1, repeat_cycles=True),
            [2, 2, 5, 5, 5, 7],
        ),  # a warm-up begins at 5
    ],
)
def test_a_plan_ends_where_a_role_is_due_next(roles, schedule, ends):
    made = controller(schedule, **roles)
    found = [made.next_update_step(step, 20) for step in range(6)]
    assert found == ends
    _, plans = drive(made, 9)
    assert {plan.start_step for plan in plans} - {0} <= set(found) | set(range(6, 20))
    assert made.next_update_step(3, 4) == 4


def test_a_selection_trains_exactly_the_chosen_ids_once_each():
    made = controller(UpdateSchedule(2, 5, 2, repeat_cycles=True), selector=Highest())
    batches, plans = drive(made, 12)
    top = made.signals.losses.topk(5 * G).indices.sort().values
    for window in (batches[2:7], batches[7:12]):
        assert sorted(np.concatenate(window)) == top.tolist()
    assert made.selection.last_record.overlap == 1.0 and made.selection.last_record.step == 7
    assert made.selection.last_record.quantiles[-1] == sum(SIZES) - 1
    warm = np.concatenate(batches[:2])
    assert len(set(warm)) == 2 * G and plans[0].phase == "warmup" and len(made.signals.asked_ids) == 2


def test_selecting_and_mixing_agree_on_the_counts_and_the_ids():
    made = controller(UpdateSchedule(0, 3, -1, repeat_cycles=True), selector=Highest(), mixer=Turning())
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
            here = made.signals.losses[offsets[d] : offsets[d + 1]]
            if counts[d] < SIZES[d]:
                best = (here.topk(int(counts[d])).indices + offsets[d]).sort().values
                assert sorted(ids[(ids >= offsets[d]) & (ids < offsets[d + 1])]) == best.tolist()


def test_a_warmup_between_cycles_draws_from_the_whole_pool_again():
    made = controller(UpdateSchedule(2, 1, 2, repeat_cycles=True), selector=Highest())
    batches, plans = drive(made, 16)
    warm = [s for s in range(16) if made.stages.schedules["selector"].in_warmup(s)]
    seen = np.concatenate([batches[s] for s in warm])
    assert len(set(seen)) == len(seen), "the pool's cursors went on where they stood"
    assert [p.phase for p in plans if p.selected_ids is None] == ["warmup"] * 4
    assert all(p.proportions == made.domains.initial_proportions for p in plans if p.selected_ids is None)


def test_weights_reach_the_own_rows_and_stop_in_warmups():
    made = controller(UpdateSchedule(1, 5, -1, repeat_cycles=False), weighter=ByLoss())
    state = TrainState(0, made.initial_plan())
    assert made.weight_fn(state) is None
    state.step = 1
    samples = SampleStats(
        torch.arange(4), torch.zeros(4).long(), torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.ones(4).long()
    )
    assert torch.allclose(made.weight_fn(state)(samples), torch.tensor([1.0, 2.0, 3.0, 6.0]) / 3)


def test_domain_weights_of_a_mixer_have_mean_one_over_the_plans_draws():
    @dataclass
    class Heavy(Turning):
        """Weighs domain 1 three times."""

        def loss_weights(self):
            return torch.tensor([1.0, 3.0, 1.0])

    made = controller(UpdateSchedule(0, 5, -1, repeat_cycles=False), mixer=Heavy())
    state = TrainState(0, made.initial_plan())
    state.plan = made.next_plan(state)
    samples = SampleStats(torch.arange(4), torch.tensor([0, 1, 1, 2]), torch.ones(4), torch.ones(4).long())
    mean = (4 * 1 + 1 * 3 + 1 * 1) / 6  # under the proportions that `Turning` gives at its first update
    assert torch.allclose(made.weight_fn(state)(samples), torch.tensor([1.0, 3.0, 3.0, 1.0]) / mean)
    one = SampleStats(samples.sample_ids[1:2], samples.domain_ids[1:2], samples.loss_sum[1:2], samples.num_tokens[1:2])
    assert torch.allclose(made.weight_fn(state)(one), torch.tensor([3.0]) / mean), "however the batch is cut"


def test_a_long_plan_is_continued_without_changing_what_is_drawn():
    made = controller(UpdateSchedule(0, 0, 1, repeat_cycles=False))
    state = TrainState(MAX_PLAN_STEPS, made.initial_plan())
    assert made.needs_new_plan(state)
    renewed = made.next_plan(state)
    assert renewed.start_step == MAX_PLAN_STEPS
    for step in (MAX_PLAN_STEPS, MAX_PLAN_STEPS + 7):
        assert np.array_equal(made.sampler.global_batch(renewed, step), made.sampler.global_batch(state.plan, step))


def test_state_goes_round_and_other_roles_are_refused():
    schedule = UpdateSchedule(0, 3, -1, repeat_cycles=True)
    made = controller(schedule, selector=Highest(), mixer=Turning())
    drive(made, 4)
    made.observe(None, TrainState(4, made.initial_plan()))
    again = controller(schedule, selector=Highest(), mixer=Turning())
    again.load_state_dict(made.state_dict())
    assert again.roles.mixer.seen == 1
    assert torch.equal(again.state_dict()["previous_selection"], made.state_dict()["previous_selection"])
    with pytest.raises(CheckpointError, match="mixer"):
        controller(schedule, selector=Highest()).load_state_dict(made.state_dict())


def of_parts(reuse_old_scores, **roles):
    candidates = CandidateRotation(SIZES, 0.3, 5, reuse_old_scores=reuse_old_scores)
    return controller(UpdateSchedule(2, 2, 6, repeat_cycles=True), candidates, selector=Highest(), **roles)


def test_a_selection_from_a_part_chooses_the_best_of_that_part():
    made = of_parts(reuse_old_scores=False)
    batches, _ = drive(made, 14)
    assert len(made.signals.asked_ids) == 6
    for update, asked in enumerate(made.signals.asked_ids):
        asked = torch.from_numpy(asked)
        best = asked[made.signals.losses[asked].topk(2 * G).indices]
        assert sorted(np.concatenate(batches[2 + 2 * update : 4 + 2 * update])) == sorted(best.tolist())


def test_kept_scores_make_it_the_best_of_all_parts_so_far_and_survive_a_restart():
    made = of_parts(reuse_old_scores=True)
    batches, _ = drive(made, 14)
    for update in range(6):
        asked = torch.from_numpy(np.unique(np.concatenate(made.signals.asked_ids[: update + 1])))
        best = asked[made.signals.losses[asked].topk(2 * G).indices]
        assert sorted(np.concatenate(batches[2 + 2 * update : 4 + 2 * update])) == sorted(best.tolist())
    again = of_parts(reuse_old_scores=True)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.state_dict()["candidates"]["scores"], made.state_dict()["candidates"]["scores"])


def test_parts_beside_a_mixer_hold_what_it_draws_of_every_domain():
    made = of_parts(reuse_old_scores=False, mixer=Turning())
    batches, plans = drive(made, 14)
    for plan, window in zip(plans[1:], (batches[2 + 2 * u : 4 + 2 * u] for u in range(6)), strict=True):
        drawn = np.concatenate(window)
        assert len(set(drawn)) == len(drawn) == 2 * G, "no sample twice"
        assert set(drawn) == set(plan.selected_ids.tolist())
