"""Schedules that go by evaluations, early stopping, and runs without a step left: whole runs on both engines."""

import importlib.util
from pathlib import Path

import pytest

from tests.support import corpus, runs

RATE, STEPS, SAVED = 1.0e-3, 7, 4
MIX = {"mixer": {"name": "static"}, "warmup_step": 1, "update_step": 2, "update_times": -1}
# No value is ever ten times lower than the best, so the rate halves after every evaluation but the first.
HALVING = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.9},
    "eval_strategy": "steps", "eval_steps": 2, "max_samples": 20,
}  # fmt: skip
HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
MEGATRON = [pytest.mark.exhaustive, pytest.mark.skipif(not HAS_MEGATRON, reason="no megatron-core")]
ENGINES = ["fsdp", pytest.param("megatron", marks=MEGATRON)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("schedules"))


def config_of(folder, name, **keys):
    options = {"max_steps": STEPS, "learning_rate": RATE, "eval_dataset": "prose", "per_device_train_batch_size": 2}
    return runs.base(folder, output_dir=str(folder / name), **{**options, **MIX, **keys})


def train(*configs):
    results = runs.train_many(1, list(configs))
    for config, (status, stderr) in zip(configs, results, strict=True):
        assert status == 0, f"{config['output_dir']}: {stderr}"
    return [stderr for _, stderr in results]


def numbers(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rate_that_falls_on_a_plateau_trains_and_goes_on_bit_equal(folder, engine):
    keys = {**HALVING, "engine": engine, "save_strategy": "steps", "save_steps": SAVED}
    whole = config_of(folder, f"{engine}-whole", **keys)
    checkpoint = str(folder / f"{engine}-whole" / f"checkpoint-{SAVED}")
    moved = config_of(folder, f"{engine}-moved", **{**keys, "save_strategy": "no"}, resume_from_checkpoint=checkpoint)
    none_left = config_of(folder, f"{engine}-none", **{**keys, "max_steps": SAVED}, resume_from_checkpoint=checkpoint)
    stderr = train(whole, moved, none_left)
    rows = runs.rows(whole)
    assert [row["learning_rate"] for row in rows] == [RATE] * 4 + [RATE / 2] * 2 + [RATE / 4]
    assert [numbers(row) for row in runs.rows(moved)] == [numbers(row) for row in rows[SAVED:]]
    assert f"done: {SAVED} steps" in stderr[2] and (Path(none_left["output_dir"]) / "model.safetensors").is_file()


def test_early_stopping_ends_where_it_should_and_a_stopped_run_has_no_step_left(folder):
    keys = {"eval_strategy": "steps", "eval_steps": 1, "max_samples": 20, "save_strategy": "steps", "save_steps": 1}
    better = config_of(folder, "better", early_stopping_steps=1, **keys)
    stopped = config_of(folder, "stopped", early_stopping_steps=2, early_stopping_min_delta=100.0, **keys)
    stderr = train(better, stopped, stopped)
    losses = evaluated(better)
    assert losses == sorted(losses, reverse=True), "the test wants a run that gets better at every evaluation"
    assert f"done: {STEPS} steps" in stderr[0] and len(runs.rows(better)) == STEPS
    for end in stderr[1:]:
        assert f"stopped at step 3 of {STEPS}: early stopping (eval_loss did not improve 2 times)" in end
    assert len(runs.rows(stopped)) == 3


def evaluated(config):
    rows = runs.rows(config, "trainer_log.jsonl")
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["lr_scheduler_kwargs", "min_lr"]),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, ["lr_scheduler_kwargs", "lr_end"]),
        ({"adam_beta1": 2.0}, ["adam_beta1", "< 1", "2"]),
        ({"early_stopping_steps": 1, "eval_strategy": "steps", "eval_dataset": "prose,code", "eval_on_each_dataset": True},
         ["metric_for_best_model", "eval_prose_loss", "eval_code_loss"]),
        ({"metric_for_best_model": "eval_losss", "eval_strategy": "steps"}, ["metric_for_best_model", "eval_loss"]),
    ],
)  # fmt: skip
def test_what_libraries_would_refuse_ends_in_one_line_before_a_model_is_built(folder, engine, keys, words):
    from unittest import mock

    from dataflex_mega.run import build

    config = config_of(folder, "refused", **{"engine": engine, **keys})
    with mock.patch.object(build, "build_engine", side_effect=AssertionError("the model was built")):
        status, stderr = runs.train_here(config)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and all(word in lines[0] for word in words), stderr
