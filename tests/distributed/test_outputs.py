"""A run's output: models that other libraries load, logs, plots; each way of tuning and packing in a whole run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

SFT = {"stage": "sft", "dataset": "sft", "template": "default", "cutoff_len": 64}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
MIX = {"mixer": {"name": "odm", "reward_scale": 5.0}, "warmup_step": 1, "update_step": 2, "update_times": -1}
WEIGHT = {"weighter": {"name": "loss", "strategy": "extremes"}}

CASES = {
    "mix": {
        **MIX, "save_strategy": "steps", "save_steps": 3, "eval_dataset": "prose,code", "eval_on_each_dataset": True,
        "eval_strategy": "steps", "eval_steps": 3, "plot_loss": True, "tensorboard": True,
    },
    "lora": {
        **SFT, **LORA, **WEIGHT, "eval_dataset": "sft", "eval_strategy": "steps", "eval_steps": 2, "plot_loss": True,
        "tensorboard": True, "do_predict": True, "predict_with_generate": True, "max_new_tokens": 3,
        "do_sample": False,
    },
    "lora+": {**SFT, **LORA, **WEIGHT, "loraplus_lr_ratio": 4.0},
    "freeze": {**SFT, **WEIGHT, "finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "plain": {**SFT, **WEIGHT},
    "packed": {**SFT, **WEIGHT, "packing": True, "cutoff_len": 65},  # LLaMA-Factory takes one off when packing
    "checkpointed": {**SFT, **WEIGHT, "disable_gradient_checkpointing": False},
    "bf16": {**SFT, **WEIGHT, "bf16": True},
    "held out": {**MIX, "val_size": 0.2, "dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 3},
    "sample norm": {**SFT, **WEIGHT, "loss_normalization": "sample", "max_grad_norm": 0.0},
    "constant": {**SFT, **WEIGHT, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "optim": "sgd"},
    "stopping": {
        **SFT, **WEIGHT, "eval_dataset": "sft", "eval_strategy": "steps", "eval_steps": 1, "early_stopping_steps": 2,
        "early_stopping_min_delta": 100.0, "max_steps": 6,
    },
    "by epoch": {
        **SFT, **WEIGHT, "max_steps": 25, "eval_dataset": "sft", "eval_strategy": "epoch", "save_strategy": "epoch",
    },
    "callback": {**SFT, **WEIGHT, "callbacks": ["tests.support.callbacks:StopAtThree"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = corpus.write(tmp_path_factory.mktemp("outputs"))
    configs = {
        name: runs.base(folder, **{"output_dir": str(folder / name.replace(" ", "-")), **keys})
        for name, keys in CASES.items()
    }
    results = runs.train_many(1, list(configs.values()), plain=True)
    for name, (status, stderr) in zip(configs, results, strict=True):
        assert status == 0, f"{name}: {stderr}"
    return configs


def output(finished, name):
    return Path(finished[name]["output_dir"])


def test_a_full_model_loads_with_transformers(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(output(finished, "mix"))
    tokenizer = AutoTokenizer.from_pretrained(output(finished, "mix"))
    ids = tokenizer("def main():", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    before = load_file(Path(finished["mix"]["model_name_or_path"]) / "model.safetensors")
    after = load_file(output(finished, "mix") / "model.safetensors")
    assert before.keys() == after.keys() and all(not torch.equal(before[k], after[k]) for k in before)


@pytest.fixture(scope="module")
def merged(finished, tmp_path_factory):
    """The adapter of a dynamic run, merged by `dataflex-cli export`."""
    folder = tmp_path_factory.mktemp("merged")
    keys = {
        "model_name_or_path": finished["lora"]["model_name_or_path"], "adapter_name_or_path": str(output(finished, "lora")),
        "template": "default", "export_dir": str(folder / "merged"), "infer_dtype": "float32",
    }  # fmt: skip
    (folder / "export.yaml").write_text(yaml.safe_dump(keys))
    done = cli("export", str(folder / "export.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "merged"


def cli(*arguments, stdin=None):
    """`dataflex-cli` with these arguments and this standard input."""
    command = [str(Path(sys.executable).parent / "dataflex-cli"), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, input=stdin, timeout=300)


def test_chat_answers_from_the_merged_model(merged):
    keys = {"model_name_or_path": str(merged), "template": "default", "max_new_tokens": 5, "do_sample": False}
    path = merged.parent / "chat.yaml"
    path.write_text(yaml.safe_dump({**keys, "infer_dtype": "float32"}))
    done = cli("chat", str(path), stdin="Explain assert in Python.\nexit\n")
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.split("Assistant: ", 1)[1].split("\nUser:")[0]
    assert len(answer) > 1, done.stdout  # five tokens, which a model this small may well spend on line ends


def test_every_prompt_of_the_evaluation_set_is_answered_after_training(finished):
    rows = [
        json.loads(line) for line in (output(finished, "lora") / "generated_predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len(corpus.instructions())
    assert [row["label"].strip()[:20] for row in rows] == [r["output"].strip()[:20] for r in corpus.instructions()]
    assert any(row["predict"] for row in rows)
    scores = json.loads((output(finished, "lora") / "predict_results.json").read_text())
    assert "predict_rouge-l" in scores
    assert (output(finished, "lora") / "training_loss.png").is_file()
    assert list((output(finished, "lora") / "runs").rglob("events.*"))


def test_an_adapter_loads_with_peft_and_is_what_was_merged(finished, merged):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished["lora"]["model_name_or_path"])
    model = PeftModel.from_pretrained(base, output(finished, "lora"))
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - adapted).abs().max() > 1e-6, "training changed the adapter"
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)


def test_the_log_files_of_llamafactory_and_dataflex(finished):
    folder = output(finished, "mix")
    log = runs.rows(finished["mix"])
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    peer = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert {row["current_steps"] for row in peer if "loss" in row} == {2, 4, 6}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
    weights = [json.loads(line) for line in (folder / "odm_weights.jsonl").read_text().splitlines()]
    fields = {"step", "timestamp", "domain_names", "domain_weights", "estimated_rewards", "exploration_rate", "alpha"}
    assert [row["step"] for row in weights] == [1, 3, 5] and all(fields <= set(row) for row in weights)
    for name in ("training_loss.png", "proportions.png", "domain_loss.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_tensorboard_has_every_scalar(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output(finished, "mix") / "runs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "seconds/train"}
    for domain in ("code", "prose", "tables"):
        expected |= {f"{kind}/{domain}" for kind in ("mix/proportion", "mix/drawn", "domain/loss", "domain/perplexity")}
    assert expected <= tags
    proportions = [events.Scalars(f"mix/drawn/{d}")[-1].value for d in ("code", "prose", "tables")]
    assert sum(proportions) == pytest.approx(1)


def test_evaluation_is_the_token_mean_of_the_final_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = json.loads((output(finished, "mix") / "trainer_state.json").read_text())
    logged = [row["eval_prose_loss"] for row in state["log_history"] if "eval_prose_loss" in row][-1]
    model = AutoModelForCausalLM.from_pretrained(output(finished, "mix"))
    tokenizer = AutoTokenizer.from_pretrained(output(finished, "mix"))
    ids = [t for text in corpus.domains()["prose"] for t in tokenizer.encode(text + tokenizer.eos_token)]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        by_hand = model(blocks, labels=blocks).loss  # blocks are full, so the mean over tokens is the mean over blocks
    assert logged == pytest.approx(float(by_hand), rel=1e-4)


def test_packing_and_checkpointing_do_not_change_the_losses(finished):
    plain = runs.rows(finished["plain"])
    for name in ("packed", "checkpointed"):
        for row, expected in zip(runs.rows(finished[name]), plain, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name


def test_other_tunings_train(finished):
    for name in ("lora", "lora+", "freeze", "plain", "bf16", "sample norm"):
        log = runs.rows(finished[name])
        assert len(log) == 6 and all(math.isfinite(row["loss"]) for row in log), name
        assert log[-1]["loss"] < log[0]["loss"], name
    assert runs.rows(finished["lora"])[-1]["loss"] != runs.rows(finished["lora+"])[-1]["loss"]
    before = load_file(Path(finished["freeze"]["model_name_or_path"]) / "model.safetensors")
    after = load_file(output(finished, "freeze") / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert changed and all(".layers.1." in name for name in changed)


def test_the_schedule_is_the_one_asked_for(finished):
    rates = [row["learning_rate"] for row in runs.rows(finished["constant"])]
    assert rates == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01])


def test_held_out_rows_leave_their_domains(finished):
    state = json.loads((output(finished, "held out") / "trainer_state.json").read_text())
    assert any("eval_loss" in row for row in state["log_history"])


def test_evaluation_and_saving_by_epoch(finished):
    """80 samples in batches of 8: an epoch is 10 steps; the end counts as one."""
    state = json.loads((output(finished, "by epoch") / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [10, 20, 25]
    steps = sorted(int(p.name.split("-")[1]) for p in output(finished, "by epoch").glob("checkpoint-*"))
    assert steps == [10, 20, 25]


def test_callbacks_can_stop_a_run(finished):
    assert len(runs.rows(finished["callback"])) == 3
    assert len(runs.rows(finished["stopping"])) < 6


SHARDED = {"fsdp": "full_shard", "per_device_train_batch_size": 4}
SHARDED_CASES = {
    "plain": {},
    "checkpointed": {"disable_gradient_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
    "kept": {"fsdp_config": {"reshard_after_forward": False}},
    "layers": {"fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaMLP"}},
    "bf16": {"bf16": True},
    "bf16 lora": {"bf16": True, **LORA},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
}


def test_sharded_variants(tmp_path_factory):
    folder = corpus.write(tmp_path_factory.mktemp("sharded"))
    configs = {
        name: runs.base(
            folder, **{"output_dir": str(folder / name.replace(" ", "-")), **SFT, **WEIGHT, **SHARDED, **keys}
        )
        for name, keys in SHARDED_CASES.items()
    }
    for name, (status, stderr) in zip(configs, runs.train_many(2, list(configs.values())), strict=True):
        assert status == 0, f"{name}: {stderr}"
    logs = {name: runs.rows(config) for name, config in configs.items()}
    for name in ("checkpointed", "kept", "layers"):
        for row, expected in zip(logs[name], logs["plain"], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
    assert logs["bf16"][-1]["loss"] == pytest.approx(logs["plain"][-1]["loss"], rel=0.02)
    for name, log in logs.items():
        assert log[-1]["loss"] < log[0]["loss"], name
    assert load_file(Path(configs["bf16"]["output_dir"]) / "model.safetensors")
