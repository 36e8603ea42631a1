"""A run killed anywhere continues with the same training, on the same and on another number of processes."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support import corpus, runs

ROLES = {
    "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
    "warmup_step": 3, "update_step": 4, "update_times": 5, "max_samples": 12,
}  # fmt: skip
KILLS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("resume"))


def config_of(folder, name, **keys):
    options = {
        "per_device_train_batch_size": 4, "max_steps": 20, "save_strategy": "steps", "save_steps": 3, **ROLES, **keys,
    }  # fmt: skip
    return runs.base(folder, output_dir=str(folder / name), **options)


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run on two processes, and how long it took."""
    config = config_of(folder, "whole")
    assert runs.finish(runs.start(config, 2)) == [0, 0]  # warms the fork server and the dataset cache
    shutil.rmtree(config["output_dir"])
    started = time.monotonic()
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    return runs.rows(config), time.monotonic() - started


def numbers(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize(
    "number", [*range(5), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(5, KILLS))]
)
def test_killed_at_a_random_moment_every_later_step_is_bit_equal(folder, whole, number):
    rows, duration = whole
    config = config_of(folder, f"killed-{number}")
    moment = random.Random(number).uniform(0.1, 0.95) * duration
    processes = runs.start(config, 2)
    time.sleep(moment)
    runs.kill(processes)
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    assert [numbers(row) for row in runs.rows(config)] == [numbers(row) for row in rows]


@pytest.mark.parametrize("world", [1, 4])
def test_resumed_on_another_number_of_processes(folder, whole, world):
    rows, _ = whole
    config = config_of(folder, f"moved-{world}", per_device_train_batch_size=8 // world)
    shutil.copytree(folder / "whole", config["output_dir"])
    for checkpoint in Path(config["output_dir"]).glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-9":
            shutil.rmtree(checkpoint)
    assert runs.finish(runs.start(config, world)) == [0] * world
    resumed_rows = runs.rows(config)
    assert [row["step"] for row in resumed_rows] == list(range(1, 21))
    assert [numbers(row) for row in resumed_rows[:9]] == [numbers(row) for row in rows[:9]], "finished steps are kept"
    for row, expected in zip(resumed_rows[9:], rows[9:], strict=True):
        assert row["drawn"] == expected["drawn"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["proportions"] == pytest.approx(expected["proportions"], rel=1e-5)


def test_another_global_batch_is_refused_with_both_numbers_unless_asked_for(folder, whole):
    outputs = folder / "batch"
    shutil.copytree(folder / "whole", outputs)
    shutil.rmtree(outputs / "checkpoint-20")
    wider = config_of(folder, "batch", per_device_train_batch_size=16)
    more = {"update_step": 2, "update_times": 10}  # so that a selection still fits the data
    (status, stderr), (accepted, _) = runs.train_many(
        1, [wider, {**wider, **more, "resume_ignore": ["global_batch_size", "update_step", "update_times"]}]
    )
    assert status == 2 and stderr.count("error: ") == 1 and "global_batch_size: 8 there, 16 here" in stderr
    assert accepted == 0 and runs.rows(wider)[-1]["step"] == 20


def test_an_older_checkpoint_can_be_named_and_the_newer_ones_go(folder, whole):
    rows, _ = whole
    config = config_of(folder, "named")
    shutil.copytree(folder / "whole", config["output_dir"])
    named = Path(config["output_dir"]) / "checkpoint-9"
    shorter = {**config, "resume_from_checkpoint": str(named), "max_steps": 10, "save_strategy": "no"}
    refused = {**config, "resume_from_checkpoint": False}
    (status, stderr), (first, _) = runs.train_many(1, [{**refused, "per_device_train_batch_size": 8},
                                                      {**shorter, "per_device_train_batch_size": 8}])  # fmt: skip
    assert status == 2 and "resume_from_checkpoint: false" in stderr and first == 0
    assert [row["step"] for row in runs.rows(config)] == list(range(1, 11))
    assert runs.rows(config)[-1]["drawn"] == rows[9]["drawn"]
    assert sorted(int(p.name.split("-")[1]) for p in Path(config["output_dir"]).glob("checkpoint-*")) == [3, 6, 9]


def test_a_finished_run_given_again_trains_nothing_more(folder, whole):
    config = config_of(folder, "whole")
    before = runs.rows(config)
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    assert runs.rows(config) == before
