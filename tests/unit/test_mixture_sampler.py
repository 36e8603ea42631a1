"""MixtureBatchSampler: draws, updates, prefetching, ranks and restarts; every number is a function of seed and losses."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils.data import DataLoader

import dataflex_mega as dm
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import CheckpointError, ConfigError, TrainingFault

SIZES = {"a": 10, "b": 30, "c": 20}
STEPS = 12


@dataclass
class ByLoss(dm.Mixer):
    """Draws in proportion to the domains' last mean losses."""

    _losses: torch.Tensor = field(default_factory=lambda: torch.ones(3, dtype=torch.float64), init=False)

    def observe(self, stats, proportions, step):
        self._losses = stats.domain_loss / stats.domain_tokens.clamp(min=1) + 0.1

    def proportions(self, context, rng):
        return self._losses / self._losses.sum()

    def state_dict(self):
        return {"losses": self._losses}

    def load_state_dict(self, state):
        self._losses = state["losses"]


def sampler(**keys):
    return dm.MixtureBatchSampler(SIZES, 8, 5, **{"mixer": ByLoss(), "update_every": 2, **keys})


def losses_of(step):
    """Domain loss sums and tokens that depend on the step alone."""
    rng = torch.Generator().manual_seed(step)
    return torch.rand(3, generator=rng, dtype=torch.float64) * 5, torch.ones(3, dtype=torch.float64)


def batches(made):
    """Batches without end, epoch after epoch."""
    while True:
        yield from made


def drive(made, steps, first=0, ahead=0):
    """Fetch and observe `steps` steps, with `ahead` more fetched before each is observed -> the batches by step."""
    source, found = batches(made), []
    per_step = made.partition.grad_accumulation
    for step in range(first, first + steps):
        while len(found) < (step - first + 1 + ahead) * per_step:
            found.append(next(source))
        made.observe(*losses_of(step))
    return found[: steps * per_step]


def test_without_a_mixer_it_draws_what_the_training_loop_draws():
    made = dm.MixtureBatchSampler(SIZES, 8, 5)
    own = Sampler(list(SIZES.values()), 8, 5)
    plan = own.next_plan(None, 0, [10 / 60, 30 / 60, 20 / 60])
    source = batches(made)
    assert [next(source) for _ in range(20)] == [own.global_batch(plan, step).tolist() for step in range(20)]


def test_a_domain_is_seen_once_before_it_is_seen_twice():
    made = dm.MixtureBatchSampler({"a": 16, "b": 16}, 8, 0)
    assert sorted(i for batch in made for i in batch) == list(range(32))


def test_an_update_uses_all_losses_before_it():
    made = sampler()
    drive(made, 4)
    next(batches(made))  # the update before step 4
    sums, _ = losses_of(3)
    expected = (sums + 0.1) / (sums + 0.1).sum()
    assert list(made.proportions.values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("dp_size, accumulation", [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_divide_the_same_samples(dp_size, accumulation):
    whole = drive(sampler(), STEPS)
    parts = [
        drive(sampler(dp_rank=rank, dp_size=dp_size, grad_accumulation=accumulation), STEPS) for rank in range(dp_size)
    ]
    for step in range(STEPS):
        joined = [i for part in parts for micro in part[step * accumulation : (step + 1) * accumulation] for i in micro]
        assert joined == whole[step]


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("other", [{}, {"dp_size": 2, "dp_rank": 1}, {"grad_accumulation": 2}])
def test_a_restart_goes_on_exactly_also_on_another_number_of_ranks(stop, other):
    first = sampler()
    drive(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = sampler(**other)
    resumed.load_state_dict(state)
    assert (
        drive(resumed, STEPS - stop, first=stop)
        == drive(sampler(**other), STEPS)[stop * resumed.partition.grad_accumulation :]
    )


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_how_far_a_loader_fetches_ahead_changes_nothing_and_survives_a_restart(ahead):
    expected = drive(sampler(prefetch=3), STEPS, ahead=3)
    assert drive(sampler(prefetch=3), STEPS, ahead=ahead) == expected
    first = sampler(prefetch=3)
    drive(first, 5, ahead=ahead)
    resumed = sampler(prefetch=3)
    resumed.load_state_dict(first.state_dict())
    assert drive(resumed, STEPS - 5, first=5, ahead=ahead) == expected[5:]


def test_a_loader_that_fetches_ahead_is_named():
    with pytest.raises(TrainingFault, match="step 3 is fetched before the losses of step 1 were observed"):
        list(sampler())


def test_losses_of_a_step_that_was_not_fetched_are_refused():
    with pytest.raises(TrainingFault, match="step 1 was not fetched"):
        sampler().observe(*losses_of(0))


def test_the_losses_must_be_one_per_domain():
    made = sampler()
    next(iter(made))
    with pytest.raises(TrainingFault, match=r"expected two tensors \[3\]"):
        made.observe(torch.zeros(2), torch.zeros(2))


def test_it_is_a_batch_sampler_of_a_plain_data_loader():
    made = dm.MixtureBatchSampler(SIZES, 8, 5)
    loader = DataLoader(list(range(60)), batch_sampler=made)
    assert len(loader) == 8
    assert [batch.tolist() for batch in loader] == list(dm.MixtureBatchSampler(SIZES, 8, 5))


def test_a_stateful_data_loader_restores_it():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        return stateful.StatefulDataLoader(list(range(60)), batch_sampler=dm.MixtureBatchSampler(SIZES, 8, 5))

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    source = iter(first)
    begun = [next(source).tolist() for _ in range(3)]
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert begun + [batch.tolist() for batch in resumed] == whole


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"dp_size": 3}, "multiple of dp_size"),
        ({"dp_rank": 1}, "0 <= dp_rank < dp_size"),
        ({"update_every": 0}, "update_every must be >= 1"),
        ({"proportions": [1, 2]}, "3 numbers"),
        ({"mixer": "doge"}, "knows domain losses only"),
        ({"mixer": "odn"}, "odm"),
    ],
)
def test_what_cannot_be_is_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        sampler(**keys)


def test_the_state_of_another_sampler_is_refused_by_name():
    with pytest.raises(CheckpointError, match="batch_size: 8 there, 16 here"):
        dm.MixtureBatchSampler(SIZES, 16, 5).load_state_dict(dm.MixtureBatchSampler(SIZES, 8, 5).state_dict())
