"""A user's mistake ends with status 2 and one line that names the key, file or row, before a model is built."""

import json

import pytest

from tests.support import corpus, runs

SELECT = {"selector": {"name": "loss"}, "warmup_step": 1, "update_step": 1, "update_times": 2}
MIX = {"mixer": {"name": "odm"}, "warmup_step": 1, "update_step": 1, "update_times": -1}
WEIGHT = {"weighter": {"name": "loss"}}
SFT = {"stage": "sft", "dataset": "sft", "template": "default"}

# name -> (keys, what the line must contain)
CASES = {
    "train_type typo": ({"train_type": "dynamic_selct"}, ["train_type", "dynamic_selct", "dynamic_select"]),
    "our key typo": ({**SELECT, "warmupstep": 3}, ["warmupstep", "warmup_step"]),
    "their key typo": ({**SELECT, "laerning_rate": 0.1}, ["laerning_rate", "learning_rate"]),
    "component typo": ({"train_type": "dynamic_select", "component_name": "losss", "update_step": 1}, ["losss", "loss"]),
    "no component": ({"train_type": "dynamic_mix", "update_step": 1}, ["component_name", "odm"]),
    "component conflict": (
        {"train_type": "dynamic_mix", "component_name": "odm", "mixer": "random", "update_step": 1},
        ["mixer", "odm", "random"],
    ),
    "selector typo": ({**SELECT, "selector": "rndom"}, ["rndom", "random"]),
    "parameter typo": ({**SELECT, "selector": {"name": "loss", "focuss": "high"}}, ["focuss", "focus"]),
    "parameter type": ({**MIX, "mixer": {"name": "odm", "alpha": "high"}}, ["alpha", "high"]),
    "parameter range": ({**MIX, "mixer": {"name": "odm", "alpha": 1.5}}, ["alpha", "1.5"]),
    "strategy typo": ({"weighter": {"name": "loss", "strategy": "linuper"}}, ["strategy", "linuper", "linupper"]),
    "plug-in missing": ({"weighter": "no.such.module:Thing"}, ["no.such.module"]),
    "not an algorithm": ({"weighter": "json:JSONDecoder"}, ["JSONDecoder"]),
    "dataset unknown": ({**SELECT, "dataset": "code,pose"}, ["pose", "prose"]),
    "dataset twice": ({**MIX, "dataset": "code,code"}, ["code", "2 times"]),
    "evaluation set unknown": ({**MIX, "eval_dataset": "proze"}, ["proze", "prose"]),
    "dataset_dir missing": ({**MIX, "dataset_dir": "/nonexistent"}, ["dataset_info.json"]),
    "file missing": ({**MIX, "dataset": "code,gone"}, ["gone", "gone.jsonl"]),
    "broken line": ({**MIX, "dataset": "code,broken"}, ["broken.jsonl", "line 2"]),
    "empty file": ({**MIX, "dataset": "code,empty"}, ["empty", "empty.jsonl"]),
    "empty texts": ({**MIX, "dataset": "code,blank"}, ["blank"]),
    "no text": ({**MIX, "dataset": "code,keyless"}, ["keyless.jsonl", "line 1", "text"]),
    "too many proportions": ({**MIX, "init_mixture_proportions": [0.2] * 5}, ["init_mixture_proportions", "5", "3"]),
    "negative proportion": ({**MIX, "init_mixture_proportions": [1.5, -0.5, 0]}, ["init_mixture_proportions", "-0.5"]),
    "NaN proportion": ({**MIX, "init_mixture_proportions": [0.5, float("nan"), 0.5]}, ["init_mixture_proportions", "nan"]),
    "no proportion": ({**MIX, "init_mixture_proportions": [0, 0, 0]}, ["init_mixture_proportions"]),
    "mixer's own proportions": (
        {**MIX, "mixer": {"name": "static", "proportions": [0.5, 0.5]}}, ["mixer.proportions", "2", "3"],
    ),
    "sample rule": ({**MIX, "mixture_sample_rule": "mixtur"}, ["mixture_sample_rule", "mixtur", "mixture"]),
    "window too long": ({**SELECT, "update_step": 5000}, ["update_step", "5000"]),
    "no window": ({**SELECT, "update_step": 0}, ["update_step"]),
    "negative warm-up": ({**SELECT, "warmup_step": -1}, ["warmup_step", "-1"]),
    "model missing": ({**SELECT, "model_name_or_path": "/nonexistent/model"}, ["model_name_or_path", "/nonexistent/model"]),
    "not a model": ({**SELECT, "model_name_or_path": "DATA"}, ["model_name_or_path"]),
    "rate of words": ({**SELECT, "learning_rate": "fast"}, ["learning_rate", "fast"]),
    "no batch": ({**SELECT, "per_device_train_batch_size": 0}, ["per_device_train_batch_size", "0"]),
    "no accumulation": ({**SELECT, "gradient_accumulation_steps": 0}, ["gradient_accumulation_steps", "0"]),
    "fsdp typo": ({**SELECT, "fsdp": "full_shart"}, ["fsdp", "full_shart"]),
    "fp16 on a CPU": ({**SELECT, "fp16": True}, ["fp16"]),
    "two precisions": ({**SELECT, "fp16": True, "bf16": True}, ["fp16", "bf16"]),
    "deepspeed": ({**SELECT, "deepspeed": "ds.json"}, ["deepspeed"]),
    "optimizer that cannot be sharded": ({**SELECT, "optim": "adafactor", "fsdp": "full_shard"}, ["optim", "adafactor"]),
    "galore on LoRA": ({**SELECT, "use_galore": True, "finetuning_type": "lora"}, ["use_galore", "finetuning_type"]),
    "another stage": ({**WEIGHT, "stage": "kto"}, ["stage", "kto"]),
    "template unknown": ({**WEIGHT, **SFT, "template": "qwenn"}, ["qwenn"]),
    "packed flash attention": ({**WEIGHT, **SFT, "packing": True, "flash_attn": "fa2"}, ["flash_attn", "fa2", "sdpa"]),
    "streaming without an end": (
        {**MIX, "streaming": True, "max_steps": None, "train_step": 5}, ["streaming", "max_steps", "train_step"],
    ),
    "streaming a share": ({**MIX, "streaming": True, "val_size": 0.1}, ["val_size", "0.1"]),
    "streaming some": ({**MIX, "streaming": True, "max_samples": 5}, ["max_samples", "streaming"]),
    "streaming a broken line": ({**MIX, "streaming": True, "dataset": "broken"}, ["broken"]),
    "interleaving twice": (
        {**MIX, "mix_strategy": "interleave_over", "interleave_probs": "0.5,0.25,0.25",
         "init_mixture_proportions": [0.2, 0.4, 0.4]},
        ["init_mixture_proportions", "interleave_probs", "drop one"],
    ),
    "interleaving of two": (
        {**WEIGHT, "mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5"}, ["interleave_probs", "2", "3"],
    ),
    "weight_scope typo": ({**WEIGHT, "weight_scope": "stepp"}, ["weight_scope", "stepp", "step"]),
    "static with a role": ({**MIX, "train_type": "static"}, ["train_type", "mixer"]),
    "engine typo": ({**MIX, "engine": "megatrn"}, ["engine", "megatrn", "megatron"]),
    "fsdp on megatron": ({**MIX, "engine": "megatron", "fsdp": "full_shard"}, ["fsdp", "megatron"]),
    "tensor parallel": ({**MIX, "tensor_model_parallel_size": 2}, ["tensor_model_parallel_size"]),
    "callback unknown": ({**MIX, "callbacks": ["no.such:Thing"]}, ["callbacks", "no.such:Thing"]),
    "resume from nowhere": ({**MIX, "resume_from_checkpoint": "/nonexistent"}, ["resume_from_checkpoint", "/nonexistent"]),
    "held out too much": ({**MIX, "val_size": 100000}, ["val_size"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("bad"))
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    files = {
        "broken": '{"text": "fine"}\n{"text": "cut\n', "empty": "", "keyless": '{"body": "x"}\n', "gone": None,
        "blank": "".join('{"text": ""}\n' for _ in range(3)),
    }  # fmt: skip
    for name, content in files.items():
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
        if content is not None:
            (root / "data" / f"{name}.jsonl").write_text(content)
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


@pytest.fixture
def no_model(monkeypatch):
    """Building a model fails the test."""
    from dataflex_mega.run import fsdp_factory

    def built(*_):
        raise AssertionError("the model was built before the mistake was found")

    monkeypatch.setattr(fsdp_factory, "build_model", built)


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_status_two(folder, no_model, name):
    keys, words = CASES[name]
    config = runs.base(folder, output_dir=str(folder / "out" / name.replace(" ", "-")), **keys)
    if config["model_name_or_path"] == "DATA":
        config["model_name_or_path"] = str(folder / "data")
    status, stderr = runs.train_here(config)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in stderr


def test_files_and_overrides(folder, tmp_path, capsys, no_model):
    from dataflex_mega.train import main

    broken = tmp_path / "broken.yaml"
    broken.write_text("a: 1\nb: [1,\n")
    fine = tmp_path / "fine.yaml"
    fine.write_text("model_name_or_path: x\nmixer: odm\n")
    for arguments, word in [
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([str(broken)], "broken.yaml"),
        ([str(fine), "learning_rate"], "learning_rate"),
        ([str(fine), "mixr=odm"], "mixr"),
    ]:
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert word in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize(("key", "name"), [("dataset", "pose"), ("eval_dataset", "proze")])
def test_static_training_checks_its_datasets_first(folder, no_model, key, name):
    config = runs.base(
        folder, output_dir=str(folder / "out" / "static"), tensorboard=None, do_train=True, **{key: name}
    )
    status, stderr = runs.train_here(config)
    assert status == 2 and f"'{name}' is not in" in stderr and "prose" in stderr
