"""Every stage of LLaMA-Factory as a static run, from YAMLs with the keys of its own examples."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from tests.support import corpus, runs

# What its examples of all stages share, and the sizes of these tests.
SHARED = {
    "trust_remote_code": True, "do_train": True, "template": "qwen3_nothink", "cutoff_len": 64, "max_samples": 12,
    "overwrite_cache": True, "dataloader_num_workers": 0, "logging_steps": 1, "save_steps": 500, "plot_loss": True,
    "overwrite_output_dir": True, "save_only_model": False, "report_to": "none", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "learning_rate": 1.0e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None, "max_steps": 2,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
TRAINED = {
    "pt": {"stage": "pt", "dataset": "prose", "template": None, **LORA},
    "sft": {"stage": "sft", "dataset": "sft", **LORA},
    "full": {"stage": "sft", "dataset": "sft", "finetuning_type": "full", "ddp_backend": "gloo"},
    "freeze": {"stage": "sft", "dataset": "sft", "finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "dpo": {"stage": "dpo", "dataset": "pairs", "pref_beta": 0.1, "pref_loss": "sigmoid", **LORA},
    "kto": {"stage": "kto", "dataset": "liked", "pref_beta": 0.1, **LORA},
    "rm": {"stage": "rm", "dataset": "pairs", **LORA},
}
GENERATING = {
    "stage": "sft", "do_train": None, "do_predict": True, "predict_with_generate": True, "eval_dataset": "sft",
    "max_samples": 2, "max_new_tokens": 4, "bf16": None, **LORA,
}  # fmt: skip
REFUSED = {
    "ppo": {"stage": "ppo", "dataset": "sft", **LORA},  # LLaMA-Factory asks for a trl that it cannot be imported with
    "pictures": {"stage": "sft", "dataset": "pictures", "template": "qwen2_vl", **LORA},
    "template": {"stage": "sft", "dataset": "sft", "template": "qwen3_nothin", **LORA},
    "precision": {"stage": "sft", "dataset": "sft", "finetuning_type": "full", "bf16": None, "pure_bf16": True},
    "package": {"stage": "sft", "dataset": "sft", "finetuning_type": "full", "use_badam": True},
    "model": {"stage": "sft", "dataset": "sft", "model_name_or_path": "/not/there", **LORA},
}
SAID = {
    "pictures": "error: Processor was not found",
    "template": "error: template: there is no 'qwen3_nothin' (did you mean 'qwen3_nothink'?)",
    "precision": "error: This device does not support `pure_bf16`.",
    "package": "To fix: run `pip install badam",
    "model": "error: model_name_or_path '/not/there': Failed to load tokenizer.",
}


def write_preferences(data):
    """Data sets in the layouts of LLaMA-Factory's demo data: pairs, likes, and rows with pictures."""
    rows = corpus.instructions(12)
    turns = [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in rows
    ]
    contents = {
        "pairs": [
            {"instruction": r["instruction"], "chosen": r["output"], "rejected": r["output"][::-1]} for r in rows
        ],
        "liked": [{"messages": turn, "label": number % 2 == 0} for number, turn in enumerate(turns)],
        "pictures": [{"messages": turn, "images": ["none.png"]} for turn in turns],
    }
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    talk = {"formatting": "sharegpt", "tags": tags}
    info = json.loads((data / "dataset_info.json").read_text())
    info["pairs"] = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
    info["liked"] = {**talk, "columns": {"messages": "messages", "kto_tag": "label"}}
    info["pictures"] = {**talk, "columns": {"messages": "messages", "images": "images"}}
    for name, content in contents.items():
        (data / f"{name}.json").write_text(json.dumps(content))
        info[name]["file_name"] = f"{name}.json"
    (data / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Name -> (its configuration, exit status, standard error)."""
    folder = corpus.write(tmp_path_factory.mktemp("stages"))
    write_preferences(folder / "data")
    where = {"model_name_or_path": str(folder / "model"), "dataset_dir": str(folder / "data")}
    adapter, rewards = str(folder / "sft"), str(folder / "rm")
    jobs = {**TRAINED, "predict": GENERATING | {"adapter_name_or_path": adapter}, **REFUSED}
    jobs["ppo"] = jobs["ppo"] | {"reward_model": rewards}
    configs = {
        name: {k: v for k, v in (where | SHARED | keys | {"output_dir": str(folder / name)}).items() if v is not None}
        for name, keys in jobs.items()
    }
    ended = runs.train_many(1, list(configs.values()), plain=True)
    return {name: (configs[name], *end) for name, end in zip(configs, ended, strict=True)}


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(finished, name):
    config, status, stderr = finished[name]
    assert status == 0, stderr[-3000:]
    output = Path(config["output_dir"])
    losses = [row["loss"] for row in runs.rows(config, "trainer_log.jsonl") if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    adapter = config["finetuning_type"] == "lora"
    assert (output / ("adapter_model.safetensors" if adapter else "model.safetensors")).is_file()
    assert (output / "training_loss.png").is_file()


def test_what_was_trained_generates(finished):
    config, status, stderr = finished["predict"]
    assert status == 0, stderr[-3000:]
    assert len(runs.rows(config, "generated_predictions.jsonl")) == 2


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_ends_in_one_line(finished, name):
    if name == "package" and importlib.util.find_spec("badam"):
        pytest.skip("badam is installed")
    _, status, stderr = finished[name]
    assert status == 2 and SAID[name] in stderr and "Traceback" not in stderr, stderr[-3000:]


def test_ppo_is_handed_on_to_llamafactory(finished):
    """It has a version check of its own, which none of the versions that it can be imported with passes."""
    _, status, stderr = finished["ppo"]
    assert status == 2 and "trl" in stderr.splitlines()[-1] and "Traceback" not in stderr, stderr[-3000:]
