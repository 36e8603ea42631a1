"""Runs that end with the model of their best checkpoint, and the files that Hugging Face's Trainer leaves: both engines."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dataflex_mega.checkpoint_folder import survey
from tests.support import corpus, runs

HAS_MEGATRON = importlib.util.find_spec("megatron") is not None
MEGATRON = [pytest.mark.exhaustive, pytest.mark.skipif(not HAS_MEGATRON, reason="no megatron-core")]
SCRIPT = ["tests.support.callbacks:ScriptedLosses"]  # the best is step 3
MIX = {"mixer": {"name": "static"}, "warmup_step": 1, "update_step": 2, "update_times": -1}
COMMON = {
    **MIX,
    "lr_scheduler_type": "constant",
    "learning_rate": 1.0e-3,
    "per_device_train_batch_size": 2,
    "max_samples": 24,
}
EVERY_STEP = {
    "max_steps": 5, "eval_dataset": "prose", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 1, "load_best_model_at_end": True, "callbacks": SCRIPT,
}  # fmt: skip
CASES = {
    "three steps": {"max_steps": 3},
    "best": EVERY_STEP,
    "saved when best": {**EVERY_STEP, "save_strategy": "best", "metric_for_best_model": "loss"},
    "two stay": {**EVERY_STEP, "save_total_limit": 2},
    "one stays": {**EVERY_STEP, "save_total_limit": 1},
    "stopped": {**EVERY_STEP, "early_stopping_steps": 1, "save_total_limit": 1},
    "interrupted": {**EVERY_STEP, "callbacks": [*SCRIPT, "tests.support.callbacks:StopAtFour"]},
}
SOME = ("three steps", "one stays", "interrupted")


def config_of(folder, engine, name, keys):
    output = folder / f"{engine}-{name}".replace(" ", "-")
    return runs.base(folder, **{**COMMON, "engine": engine, "output_dir": str(output), **keys})


def weights(config):
    return load_file(Path(config["output_dir"]) / "model.safetensors")


def read(config, name):
    return json.loads((Path(config["output_dir"]) / name).read_text())


def checkpoints(config):
    return [one.step for one in survey(Path(config["output_dir"]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("best"))


def train(world, configs):
    results = runs.train_many(world, configs)
    for config, (status, stderr) in zip(configs, results, strict=True):
        assert status == 0, f"{config['output_dir']}: {stderr}"
    return [stderr for _, stderr in results]


@pytest.mark.parametrize(
    ("engine", "world", "more"),
    [
        ("fsdp", 1, {"names": SOME}),
        pytest.param("fsdp", 1, {}, marks=pytest.mark.exhaustive),
        pytest.param("fsdp", 2, {"fsdp": "full_shard", "names": SOME}, marks=pytest.mark.exhaustive),
        pytest.param("megatron", 1, {"names": SOME}, marks=MEGATRON),
        pytest.param("megatron", 2, {"tensor_model_parallel_size": 2, "names": SOME}, marks=MEGATRON),
    ],
)
def test_the_exported_model_is_that_of_the_best_checkpoint(folder, engine, world, more):
    names, more = more.get("names", tuple(CASES)), {key: value for key, value in more.items() if key != "names"}
    where = f"{world} of {len(names)}"
    configs = {name: config_of(folder, engine, f"{where} {name}", {**CASES[name], **more}) for name in names}
    # A run that was stopped after its fourth step goes on; its best checkpoint is one of those written before.
    again = {**configs["interrupted"], "callbacks": SCRIPT}
    *_, resumed = stderr = train(world, [*configs.values(), again])
    expected = weights(configs["three steps"])
    for name, config in configs.items():
        actual = weights(config)
        assert actual.keys() == expected.keys() and all(torch.equal(actual[k], expected[k]) for k in expected), name
    assert "done: 5 steps; the model is the best, of step 3 (eval_loss 1)" in resumed and "checkpoint-4" in resumed
    kept = {"best": [1, 2, 3, 4, 5], "saved when best": [1, 2, 3], "two stay": [3, 5], "one stays": [3], "stopped": [3]}
    assert {name: checkpoints(configs[name]) for name in names if name in kept} == {
        name: steps for name, steps in kept.items() if name in names
    }
    assert read(configs["one stays"], "eval_results.json")["eval_loss"] == 1.0
    for config in (configs["one stays"], again):
        state = read(config, "trainer_state.json")
        best = str(Path(config["output_dir"]) / "checkpoint-3")
        assert (state["best_metric"], state["best_global_step"], state["best_model_checkpoint"]) == (1.0, 3, best)
    if "stopped" in names:
        (end,) = [line for line in stderr[names.index("stopped")].splitlines() if line.startswith("stopped at")]
        assert "stopped at step 4 of 5: early stopping" in end and "best, of step 3" in end
    # What is counted over a whole run does not depend on how often it was interrupted.
    whole, parts = (read(config, "train_results.json") for config in (configs["one stays"], again))
    for key in ("train_loss", "total_flos", "epoch"):
        assert whole[key] == parts[key], key


def test_result_files_are_hugging_faces(folder):
    sets = {"eval_dataset": "code,prose", "eval_on_each_dataset": True, "per_device_eval_batch_size": 4}
    configs = [
        config_of(folder, "fsdp", "at the end", {"max_steps": 3, "do_eval": True, **sets, "eval_on_start": True}),
        config_of(folder, "fsdp", "domain loss", {
            **EVERY_STEP, **sets, "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "weighted_domain_loss",
            "init_mixture_proportions": [0.6, 0.2, 0.2], "callbacks": None, "greater_is_better": False,
        }),
    ]  # fmt: skip
    train(1, configs)
    for config in configs:
        rows = runs.rows(config)
        results, everything = read(config, "train_results.json"), read(config, "all_results.json")
        losses = [row["loss"] for row in rows]
        assert results["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-12)
        assert results.keys() == {
            "epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"
        }  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(config["output_dir"])
        tokens = sum(row["tokens"] for row in rows)
        assert results["total_flos"] == 6 * model.num_parameters(exclude_embeddings=True) * tokens
        evaluated = read(config, "eval_results.json")
        speed = ("runtime", "samples_per_second", "steps_per_second")
        assert {f"eval_{name}_{what}" for name in ("code", "prose") for what in ("loss", *speed)} <= evaluated.keys()
        assert everything == {**results, **evaluated}
        state = read(config, "trainer_state.json")
        summaries = [row for row in state["log_history"] if "train_runtime" in row]
        assert [row["train_runtime"] for row in summaries] == [results["train_runtime"]]
        assert state["train_batch_size"] == 2 and state["num_train_epochs"] == 1
        arguments = torch.load(Path(config["output_dir"]) / "training_args.bin", weights_only=False)
        assert arguments.per_device_train_batch_size == 2
    first = [row for row in read(configs[0], "trainer_state.json")["log_history"] if "eval_code_loss" in row]
    assert [row["step"] for row in first] == [0, 3]
    history = read(configs[1], "trainer_state.json")["log_history"]
    by_step = {}
    for row in history:
        by_step.setdefault(row["step"], {}).update(row)
    for row in by_step.values():
        if "eval_weighted_domain_loss" in row:
            expected = (0.6 * row["eval_code_loss"] + 0.2 * row["eval_prose_loss"]) / 0.8
            assert row["eval_weighted_domain_loss"] == pytest.approx(expected, rel=1e-12)
    assert sum("eval_weighted_domain_loss" in row for row in by_step.values()) == 3


MISTAKES = [
    ({"do_eval": True}, ["do_eval", "eval_dataset"]),
    ({"eval_on_start": True}, ["eval_on_start", "eval_dataset"]),
    ({"load_best_model_at_end": True}, ["load_best_model_at_end", "eval_strategy"]),
    ({"save_strategy": "best"}, ["save_strategy: best", "eval_strategy"]),
    ({"save_strategy": "bset"}, ["save_strategy", "bset", "did you mean 'best'"]),
    (
        {"load_best_model_at_end": True, "eval_dataset": "prose", "eval_strategy": "epoch", "save_strategy": "steps"},
        ["load_best_model_at_end", "eval_strategy epoch", "save_strategy steps"],
    ),
    (
        {**EVERY_STEP, "metric_for_best_model": "weighted_domain_loss"},
        ["metric_for_best_model", "weighted_domain_loss", "there are eval_loss, eval_perplexity"],
    ),
]


def test_keys_that_wait_for_evaluations_that_never_come_are_refused_in_one_line(folder):
    configs = [config_of(folder, "fsdp", f"mistake {n}", keys) for n, (keys, _) in enumerate(MISTAKES)]
    for (keys, words), (status, stderr) in zip(MISTAKES, runs.train_many(1, configs), strict=True):
        errors = [line for line in stderr.splitlines() if "error" in line.lower()]
        assert status == 2 and len(errors) == 1 and all(word in errors[0] for word in words), (keys, stderr)


@pytest.mark.exhaustive
def test_profilers_write_and_callbacks_get_the_figures_of_the_run_on_every_rank(folder):
    keys = {
        "max_steps": 4, "enable_torch_profiler": True, "profile_modules": "*.mlp", "report_to": "tensorboard",
        "callbacks": ["tests.support.callbacks:Listener"], "hub_token": "hf_0123456789", "weighter": "loss",
    }  # fmt: skip
    config = config_of(folder, "fsdp", "profiled", keys)
    train(2, [config])
    output = Path(config["output_dir"])
    assert {path.parent.name for path in (output / "profiler").rglob("*.json*")} == {"rank_0", "rank_1"}
    for rank in (0, 1):
        start, *logs = [json.loads(line) for line in (output / f"seen-{rank}.jsonl").read_text().splitlines()]
        assert start["report_to"] == ["tensorboard"] and "hf_0123456789" not in str(start)
        rows = runs.rows(config)
        for log in logs[:-1]:
            proportions = rows[log["step"] - 1]["proportions"]
            assert {f"mix/{name}": share for name, share in proportions.items()}.items() <= log.items()
            assert log["weight/max"] == rows[log["step"] - 1]["weights"]["max"] and log["memory/peak_rss_gib"] > 0
        assert [log["step"] for log in logs] == [2, 4, 4] and "train_runtime" in logs[-1]
