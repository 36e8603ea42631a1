"""Update schedules: at which steps a role acts, and how many steps a run has."""

import pytest

from dataflex_mega.control.schedule import RunLength, UpdateSchedule, total_steps


def updates(schedule, steps):
    return [s for s in range(steps) if schedule.is_update(s)]


def test_a_mixer_updates_after_the_warmup_and_then_every_window():
    assert updates(UpdateSchedule(4, 3, 3, repeat_cycles=False), 20) == [4, 7, 10]
    assert updates(UpdateSchedule(4, 3, -1, repeat_cycles=False), 14) == [4, 7, 10, 13]


def test_no_warmup_updates_before_the_first_step():
    assert updates(UpdateSchedule(0, 5, 2, repeat_cycles=False), 12) == [0, 5]
    assert not UpdateSchedule(0, 5, 2, repeat_cycles=True).starts_warmup(0)


def test_selection_cycles_begin_with_a_warmup_again():
    schedule = UpdateSchedule(2, 3, 2, repeat_cycles=True)
    assert schedule.cycle_steps == 8
    assert updates(schedule, 18) == [2, 5, 10, 13]
    assert [s for s in range(18) if schedule.starts_warmup(s)] == [0, 8, 16]
    assert [s for s in range(10) if schedule.in_warmup(s)] == [0, 1, 8, 9]
    assert [schedule.update_index(s) for s in (2, 5, 10, 13)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("run_length", "selecting", "mixing", "expected"),
    [
        (RunLength(train_step=7, max_steps=99), True, True, 7),
        (RunLength(max_steps=11), True, False, 11),
        (RunLength(epochs=2, num_samples=100, global_batch_size=8), True, False, 2 * (4 + 3 * 3)),
        (RunLength(epochs=2, num_samples=100, global_batch_size=8), False, True, 4 + 3 * 3),
        (RunLength(epochs=2, num_samples=100, global_batch_size=8), False, False, 26),
        (RunLength(epochs=0.5, num_samples=100, global_batch_size=8), False, False, 7),
    ],
)
def test_total_steps(run_length, selecting, mixing, expected):
    assert total_steps(run_length, UpdateSchedule(4, 3, 3, selecting), selecting, mixing) == expected


def test_an_endless_mixture_follows_epochs():
    run_length = RunLength(epochs=1, num_samples=100, global_batch_size=10)
    assert total_steps(run_length, UpdateSchedule(4, 3, -1, repeat_cycles=False), False, True) == 10


def test_no_updates_at_all_is_a_warmup_when_mixing_and_endless_when_selecting():
    assert updates(UpdateSchedule(4, 3, 0, repeat_cycles=False), 14) == []
    assert updates(UpdateSchedule(4, 3, 0, repeat_cycles=True), 14) == [4, 7, 10, 13]


def test_updates_in_all():
    assert UpdateSchedule(4, 3, 3, repeat_cycles=False).total_updates(100) == 3
    assert UpdateSchedule(4, 3, 3, repeat_cycles=True).total_updates(26) == 6
    assert UpdateSchedule(4, 3, -1, repeat_cycles=True).total_updates(26) == 0


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("repeat_cycles", [False, True])
def test_windows_of_no_steps_have_no_updates(warmup_steps, repeat_cycles):
    schedule = UpdateSchedule(warmup_steps, 0, 3, repeat_cycles)
    assert schedule.total_updates(26) == 0 and updates(schedule, 26) == []
