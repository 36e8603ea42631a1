"""Keys of the wrong type, out of range, misspelt, or without an effect: one line with the key, before a model is built."""

import math

import pytest

from tests.support import corpus
from tests.support.bad_inputs import MIX, SELECT, SFT, WEIGHT, check_run, llamafactory, no_model  # noqa: F401

INF, NAN = math.inf, math.nan
CORPUS = {**MIX, "dataset": None, "dataset_dir": None}
SHARES = "init_mixture_proportions_file"

# name -> (keys, what the line must contain)
CASES = {
    # numbers
    "infinite rate": ({**SELECT, "learning_rate": INF}, ["learning_rate", "finite", "inf"]),
    "rate that is no number": ({**SELECT, "learning_rate": NAN}, ["learning_rate", "nan"]),
    "negative rate": ({**SELECT, "learning_rate": -1e-3}, ["learning_rate", ">= 0"]),
    "first beta": ({**MIX, "adam_beta1": 2.0}, ["adam_beta1", "2"]),
    "second beta": ({**MIX, "adam_beta2": 1.0}, ["adam_beta2", "1"]),
    "negative epsilon": ({**MIX, "adam_epsilon": -1e-8}, ["adam_epsilon"]),
    "negative decay": ({**MIX, "weight_decay": -0.1}, ["weight_decay"]),
    "negative norm": ({**MIX, "max_grad_norm": -1}, ["max_grad_norm"]),
    "endless run": ({**MIX, "max_steps": 10**30}, ["max_steps"]),
    "long run": ({**MIX, "max_steps": 10**15}, ["max_steps"]),
    "max_steps below -1": ({**MIX, "max_steps": -5}, ["max_steps", "-5"]),
    "max_steps in words": ({**MIX, "max_steps": "many"}, ["max_steps", "many"]),
    "max_steps and a half": ({**MIX, "max_steps": 2.5}, ["max_steps", "2.5"]),
    "max_steps true": ({**MIX, "max_steps": True}, ["max_steps", "True"]),
    "endless epochs": ({**MIX, "max_steps": None, "num_train_epochs": INF}, ["num_train_epochs"]),
    "batch of text": ({**MIX, "per_device_train_batch_size": "8x"}, ["per_device_train_batch_size", "8x"]),
    "negative batch": ({**MIX, "per_device_train_batch_size": -4}, ["per_device_train_batch_size", "-4"]),
    "no evaluation batch": ({**MIX, "per_device_eval_batch_size": 0}, ["per_device_eval_batch_size"]),
    "half a batch": ({**MIX, "gradient_accumulation_steps": 0.5}, ["gradient_accumulation_steps", "0.5"]),
    "negative length": ({**MIX, "cutoff_len": -1}, ["cutoff_len"]),
    "share above one": ({**MIX, "val_size": 1.5}, ["val_size", "1.5"]),
    "negative share": ({**MIX, "val_size": -0.1}, ["val_size"]),
    "no samples": ({**MIX, "max_samples": 0}, ["max_samples"]),
    "negative seed": ({**MIX, "seed": -1}, ["seed"]),
    "large seed": ({**MIX, "seed": 2**40}, ["seed"]),
    "never saved": ({**MIX, "save_strategy": "steps", "save_steps": 0}, ["save_steps", "> 0"]),
    "never evaluated": ({**MIX, "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 0}, ["eval_steps"]),
    "never logged": ({**MIX, "logging_steps": 0}, ["logging_steps"]),
    "keeps no checkpoint": ({**MIX, "save_total_limit": 0}, ["save_total_limit"]),
    "negative workers": ({**MIX, "dataloader_num_workers": -1}, ["dataloader_num_workers"]),
    "no timeout": ({**MIX, "ddp_timeout": 0}, ["ddp_timeout"]),
    "endless timeout": ({**MIX, "ddp_timeout": 10**12}, ["ddp_timeout"]),
    "warm-up share": ({**MIX, "warmup_ratio": 1.5}, ["warmup_ratio"]),
    "dropout of one": ({**MIX, "finetuning_type": "lora", "lora_dropout": 1.0}, ["lora_dropout"]),
    "rank zero": ({**MIX, "finetuning_type": "lora", "lora_rank": 0}, ["lora_rank"]),
    "patience zero": ({**MIX, "early_stopping_steps": 0}, ["early_stopping_steps"]),
    # our numbers
    "infinite parameter": ({**MIX, "mixer": {"name": "odm", "alpha": INF}}, ["mixer.odm.alpha"]),
    "parameter that is no number": ({**MIX, "mixer": {"name": "odm", "reward_scale": NAN}}, ["mixer.odm.reward_scale"]),
    "update_step in words": ({**MIX, "update_step": "often"}, ["update_step", "often"]),
    "update_step true": ({**MIX, "update_step": True}, ["update_step"]),
    "warmup_step infinite": ({**MIX, "warmup_step": INF}, ["warmup_step"]),
    "prefetch negative": ({**MIX, "prefetch": -1}, ["prefetch"]),
    "score batch zero": ({**SELECT, "score_batch_size": 0}, ["score_batch_size"]),
    "no candidates": ({**SELECT, "candidate_fraction": 0}, ["candidate_fraction"]),
    "floors above one": ({**MIX, "min_proportion": 0.5}, ["min_proportion"]),
    "cap above one": ({**MIX, "max_proportion": 1.5}, ["max_proportion"]),
    "endless proportion": ({**MIX, "init_mixture_proportions": [INF, 1, 1]}, ["init_mixture_proportions"]),
    "proportions in words": ({**MIX, "init_mixture_proportions": ["a", 1, 1]}, ["init_mixture_proportions"]),
    # types
    "output_dir a list": ({**MIX, "output_dir": ["a"]}, ["output_dir", "['a']"]),
    "dataset a mapping": ({**MIX, "dataset": {"code": 1}}, ["dataset"]),
    "dataset a number": ({**MIX, "dataset": 3}, ["dataset", "3"]),
    "dataset of commas": ({**MIX, "dataset": " , ,"}, ["dataset"]),
    "template a list": ({**WEIGHT, **SFT, "template": ["default"]}, ["template"]),
    "model a mapping": ({**MIX, "model_name_or_path": {"a": 1}}, ["model_name_or_path"]),
    "mixer a number": ({**MIX, "mixer": 3}, ["mixer"]),
    "mixer a list": ({**MIX, "mixer": ["odm"]}, ["mixer"]),
    "mixer without a name": ({**MIX, "mixer": {"alpha": 0.5}}, ["mixer.name"]),
    "mixer named by a number": ({**MIX, "mixer": {"name": 3}}, ["mixer"]),
    "parameters a list": ({**MIX, "mixer": {"name": "odm", "params": [1]}}, ["mixer"]),
    "plugins a mapping": ({**MIX, "plugins": {"a": 1}}, ["plugins"]),
    "callbacks a number": ({**MIX, "callbacks": 3}, ["callbacks"]),
    "packing in words": ({**WEIGHT, **SFT, "packing": "yes please"}, ["packing"]),
    "bf16 in words": ({**MIX, "bf16": "auto"}, ["bf16", "auto"]),
    "freeze_gate in words": ({**MIX, "freeze_gate": "router"}, ["freeze_gate"]),
    # words
    "schedule typo": ({**MIX, "lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "cosine"]),
    "attention typo": ({**MIX, "flash_attn": "fa22"}, ["flash_attn", "fa2"]),
    "rope typo": ({**MIX, "rope_scaling": "lineer"}, ["rope_scaling", "linear"]),
    "optimizer typo": ({**MIX, "optim": "adamw_tourch"}, ["optim", "adamw_torch"]),
    "tuning typo": ({**MIX, "finetuning_type": "ful"}, ["finetuning_type", "full"]),
    "stage typo": ({**MIX, "stage": "sftt"}, ["stage", "sft"]),
    "strategy typo": ({**MIX, "eval_strategy": "step"}, ["eval_strategy", "steps"]),
    "save typo": ({**MIX, "save_strategy": "epochs"}, ["save_strategy", "epoch"]),
    "tracker": ({**MIX, "report_to": "wandb"}, ["report_to", "wandb"]),
    "score_reuse typo": ({**SELECT, "score_reuse": "lattest"}, ["score_reuse", "latest"]),
    "on_non_finite typo": ({**MIX, "on_non_finite": "go on"}, ["on_non_finite"]),
    "dtype typo": ({**MIX, "reference_dtype": "float16"}, ["reference_dtype"]),
    "old word": ({**MIX, "nan_loss": "skip"}, ["on_non_finite"]),
    # without an effect
    "padding as a target": ({**WEIGHT, **SFT, "ignore_pad_token_for_loss": False}, ["ignore_pad_token_for_loss"]),
    "average of ranks": ({**MIX, "average_tokens_across_devices": False}, ["average_tokens_across_devices"]),
    "compile backend": ({**MIX, "torch_compile_backend": "inductor"}, ["torch_compile_backend"]),
    "compile mode": ({**MIX, "torch_compile_mode": "max-autotune"}, ["torch_compile_mode"]),
    "debug": ({**MIX, "debug": "underflow_overflow"}, ["debug"]),
    "memory metrics": ({**MIX, "skip_memory_metrics": False}, ["skip_memory_metrics"]),
    "best model unmeasured": ({**MIX, "load_best_model_at_end": True}, ["load_best_model_at_end", "eval_strategy"]),
    "candidates without a selector": ({**MIX, "candidate_fraction": 0.5}, ["candidate_fraction"]),
    "floor without a mixer": ({**SELECT, "min_proportion": 0.1}, ["min_proportion"]),
    "early stopping alone": ({**MIX, "early_stopping_steps": 2}, ["early_stopping_steps", "eval_strategy"]),
    "evaluation of nothing": ({**MIX, "eval_strategy": "steps"}, ["eval_strategy", "eval_dataset"]),
    # files and folders
    "model is a file": ({**MIX, "model_name_or_path": "ROOT/data/code.jsonl"}, ["model_name_or_path", "code.jsonl"]),
    "model of an empty path": ({**MIX, "model_name_or_path": ""}, ["model_name_or_path"]),
    "dataset_dir is a file": ({**MIX, "dataset_dir": "ROOT/data/code.jsonl"}, ["dataset_dir", "code.jsonl"]),
    "resume from a file": ({**MIX, "resume_from_checkpoint": "ROOT/data/code.jsonl"}, ["resume_from_checkpoint"]),
    "corpus is a file": ({**CORPUS, "corpus_dir": "ROOT/data/code.jsonl"}, ["corpus_dir"]),
    "corpus without manifest": ({**CORPUS, "corpus_dir": "ROOT/data"}, ["corpus_dir", "manifest"]),
    "proportions nowhere": ({**MIX, SHARES: "/nonexistent.json"}, [SHARES]),
    "proportions in a folder": ({**MIX, SHARES: "ROOT/data"}, [SHARES]),
    "proportions of rows": ({**MIX, SHARES: "ROOT/data/code.jsonl"}, [SHARES]),
    "components nowhere": ({**MIX, "components_cfg_file": "/nonexistent.yaml", "mixer": None, "train_type": "dynamic_mix",
                            "component_name": "odm"}, ["components_cfg_file", "/nonexistent.yaml"]),
    "output below a file": ({**MIX, "output_dir": "ROOT/data/code.jsonl/out"}, ["output_dir", "code.jsonl"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("no_model")
def test_a_bad_key_is_named_in_one_line(folder, name):
    keys, words = CASES[name]
    check_run(folder, name, keys, words)
