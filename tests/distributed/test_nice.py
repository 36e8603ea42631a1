"""NICE in whole runs: one choice on 1, 2 and 4 processes, DDP and FSDP2, full and LoRA; prompts and rewards matter."""

import json
from pathlib import Path

import pytest

from tests.support import corpus, runs

KEYS = {
    "stage": "sft", "template": "default", "dataset": "sft", "eval_dataset": "sft", "max_samples": 16, "cutoff_len": 96,
    "warmup_step": 2, "update_step": 1, "update_times": 1, "max_steps": 3, "per_device_eval_batch_size": 8,
}  # fmt: skip
NICE = {"name": "nice", "reward": "tests.distributed.test_nice:vowels", "mc_samples": 4, "max_new_tokens": 6}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


def vowels(prompts, answers, references):
    """Even an untrained model gets some of these."""
    assert all("Human" in prompt for prompt in prompts) and all(references)
    return [sum(letter in "aeiou" for letter in answer) for answer in answers]


def none(prompts, answers, references):
    return [0.0] * len(answers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("nice"))


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / name), **{"selector": NICE, **KEYS, **keys})


def selected(config):
    (path,) = (Path(config["output_dir"]) / "selections").glob("step_*.json")
    found = json.loads(path.read_text())
    return found["indices"], next(iter(found["metric"].values()))


@pytest.fixture(scope="module")
def alone(folder):
    made = {
        "full": config_of(folder, "full"),
        "lora": config_of(folder, "lora", **LORA),
        "other": config_of(folder, "other", selector={**NICE, "seed": 5}),
        "none": config_of(folder, "none", selector={**NICE, "reward": "tests.distributed.test_nice:none"}),
    }
    finished = runs.forked_many(1, list(made.values()))
    assert [status for status, _ in finished] == [0] * len(made), finished
    return made


def test_answers_decide_and_no_reward_is_score_zero(alone):
    assert selected(alone["full"])[1] != selected(alone["other"])[1]
    assert all(abs(score) <= 1 for score in selected(alone["full"])[1])
    assert selected(alone["none"]) == (list(range(8)), [0.0] * 8)


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_processes_chooses_the_same(folder, alone, world):
    made = {
        name: {**alone[name], "output_dir": str(folder / f"{name}-{world}"), "per_device_train_batch_size": 8 // world,
               **({"fsdp": "full_shard"} if name == "full" else {})}
        for name in ("full", "lora")
    }  # fmt: skip
    for name, (status, heard) in zip(made, runs.forked_many(world, list(made.values())), strict=True):
        assert status == 0, heard
        ids, scores = selected(alone[name])
        assert selected(made[name])[0] == ids and selected(made[name])[1] == pytest.approx(scores, abs=1e-4)


def test_what_cannot_be_is_one_line_before_the_model_is_built(folder):
    cases = [
        ({"stage": "pt", "dataset": "prose", "eval_dataset": "tables"}, "needs stage: sft"),
        ({"selector": {**NICE, "reward": "overlop"}}, "did you mean 'overlap'"),
        ({"eval_dataset": None}, "eval_dataset: selector nice needs target samples"),
        ({"engine": "megatron"}, "engine: megatron does not have"),
    ]
    configs = [config_of(folder, f"refused-{n}", **keys) for n, (keys, _) in enumerate(cases)]
    for (_, message), (status, heard) in zip(cases, runs.forked_many(1, configs), strict=True):
        assert status == 2 and message in heard, heard
