import pytest

from dataflex_mega.control.schedule import Budget, Schedule, total_steps


def updates(schedule, steps):
    return [s for s in range(steps) if schedule.is_update(s)]


def test_a_mixer_updates_after_the_warmup_and_then_every_window():
    assert updates(Schedule(4, 3, 3, repeats=False), 20) == [4, 7, 10]
    assert updates(Schedule(4, 3, -1, repeats=False), 14) == [4, 7, 10, 13]


def test_no_warmup_updates_before_the_first_step():
    assert updates(Schedule(0, 5, 2, repeats=False), 12) == [0, 5]
    assert not Schedule(0, 5, 2, repeats=True).starts_warmup(0)


def test_selection_cycles_begin_with_a_warmup_again():
    schedule = Schedule(2, 3, 2, repeats=True)
    assert schedule.cycle == 8
    assert updates(schedule, 18) == [2, 5, 10, 13]
    assert [s for s in range(18) if schedule.starts_warmup(s)] == [0, 8, 16]
    assert [s for s in range(10) if schedule.warming(s)] == [0, 1, 8, 9]
    assert [schedule.update_number(s) for s in (2, 5, 10, 13)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("budget", "selecting", "mixing", "expected"),
    [
        (Budget(train_step=7, max_steps=99), True, True, 7),
        (Budget(max_steps=11), True, False, 11),
        (Budget(epochs=2, samples=100, global_batch=8), True, False, 2 * (4 + 3 * 3)),
        (Budget(epochs=2, samples=100, global_batch=8), False, True, 4 + 3 * 3),
        (Budget(epochs=2, samples=100, global_batch=8), False, False, 26),
        (Budget(epochs=0.5, samples=100, global_batch=8), False, False, 7),
    ],
)
def test_total_steps(budget, selecting, mixing, expected):
    assert total_steps(budget, Schedule(4, 3, 3, selecting), selecting, mixing) == expected


def test_an_endless_mixture_follows_epochs():
    budget = Budget(epochs=1, samples=100, global_batch=10)
    assert total_steps(budget, Schedule(4, 3, -1, repeats=False), False, True) == 10


def test_no_updates_at_all_is_a_warmup_when_mixing_and_endless_when_selecting():
    assert updates(Schedule(4, 3, 0, repeats=False), 14) == []
    assert updates(Schedule(4, 3, 0, repeats=True), 14) == [4, 7, 10, 13]


def test_updates_in_all():
    assert Schedule(4, 3, 3, repeats=False).total_updates(100) == 3
    assert Schedule(4, 3, 3, repeats=True).total_updates(26) == 6
    assert Schedule(4, 3, -1, repeats=True).total_updates(26) == 0
