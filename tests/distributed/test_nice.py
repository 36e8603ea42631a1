"""NICE in whole runs: equal on 1, 2 and 4 processes, with DDP and FSDP2, full and LoRA; prompts and rewards matter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataflex_mega.providers.policy_gradients import split_prompt_answer
from tests.support import corpus, runs
from tests.support.built_run import Trial, build_run

pytestmark = pytest.mark.exhaustive

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
    selection = json.loads(path.read_text())
    return selection["indices"], next(iter(selection["metric"].values()))


@pytest.fixture(scope="module")
def alone(folder):
    configs = {
        "full": config_of(folder, "full"),
        "lora": config_of(folder, "lora", **LORA),
        "other": config_of(folder, "other", selector={**NICE, "seed": 5}),
        "none": config_of(folder, "none", selector={**NICE, "reward": "tests.distributed.test_nice:none"}),
    }
    finished = runs.train_many(1, list(configs.values()))
    assert [status for status, _ in finished] == [0] * len(configs), finished
    return configs


def test_answers_decide_and_no_reward_is_score_zero(alone):
    assert selected(alone["full"])[1] != selected(alone["other"])[1]
    assert all(abs(score) <= 1 for score in selected(alone["full"])[1])
    assert selected(alone["none"]) == (list(range(8)), [0.0] * 8)


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_processes_chooses_the_same(folder, alone, world):
    configs = {
        name: {**alone[name], "output_dir": str(folder / f"{name}-{world}"), "per_device_train_batch_size": 8 // world,
               **({"fsdp": "full_shard"} if name == "full" else {})}
        for name in ("full", "lora")
    }  # fmt: skip
    for name, (status, stderr) in zip(configs, runs.train_many(world, list(configs.values())), strict=True):
        assert status == 0, stderr
        ids, scores = selected(alone[name])
        assert selected(configs[name])[0] == ids and selected(configs[name])[1] == pytest.approx(scores, abs=1e-4)


def test_what_cannot_be_is_one_line_before_the_model_is_built(folder):
    cases = [
        ({"stage": "pt", "dataset": "prose", "eval_dataset": "tables"}, "needs stage: sft"),
        ({"selector": {**NICE, "reward": "overlop"}}, "did you mean 'overlap'"),
        ({"eval_dataset": None}, "eval_dataset: selector nice needs target samples"),
        ({"engine": "megatron"}, "selector nice needs generation, not supported by engine: megatron"),
    ]
    configs = [config_of(folder, f"refused-{n}", **keys) for n, (keys, _) in enumerate(cases)]
    for (_, message), (status, stderr) in zip(cases, runs.train_many(1, configs), strict=True):
        assert status == 2 and message in stderr, stderr


def often(prompts, answers, references):
    """How many letters of an answer are from the first half of the alphabet."""
    return [sum(letter in "abcdefghijklm" for letter in answer.lower()) for answer in answers]


def test_a_step_on_the_best_raises_the_expected_reward_more_than_one_on_the_worst(folder):
    """The expectation is exact: answers have one token, so it is a sum over the vocabulary."""
    selector = {
        **NICE, "reward": "tests.distributed.test_nice:often", "mc_samples": 32, "max_new_tokens": 1, "top_k": 0,
        "top_p": 1.0, "generation_temperature": 1.0, "baseline": "mean",
    }  # fmt: skip
    run, trainer = build_run(config_of(folder, "effect", selector=selector, lr_scheduler_type="constant"))
    engine, tokenizer = trainer.engine, run.session.tokenizer
    tokens = [tokenizer.decode([token], skip_special_tokens=True) for token in range(512)]
    rewards = torch.tensor(often(tokens, tokens, tokens)).double()
    (group,) = run.data.evaluation.values()
    prompts = [split_prompt_answer(sample, 4096)[0] for sample in group.fetch(np.arange(len(group)))]

    def expected():
        with torch.no_grad():
            rows = [engine.model(input_ids=torch.from_numpy(p).unsqueeze(0)).logits[0, -1, :512] for p in prompts]
        return float((torch.softmax(torch.stack(rows).double(), 1) @ rewards).mean())

    selector = run.roles.algorithms.selector
    table, _ = trainer.controller.signals.table(selector, None, 0)
    scores = selector.score(table)
    order = selector.select(scores, len(scores), None, None).numpy()
    trial, expectations = Trial(engine), [expected()]
    for ids in (order[:8], order[-8:]):
        engine.train_step([run.data.collate(run.data.pool.fetch(np.sort(ids)))], None)
        expectations.append(expected())
        trial.undo()
    trainer.loader.close()
    before, best, worst = expectations
    assert best > before * 1.003 and best > worst * 1.01, expectations
