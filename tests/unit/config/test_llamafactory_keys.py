"""Keys and values against the argument classes of the installed LLaMA-Factory."""

import dataclasses
import typing

import pytest

from dataflex_mega.config.checks import REQUIRED
from dataflex_mega.config.legacy import DROPPED, INTO_FSDP_CONFIG, OUR_RENAMED, RENAMED
from dataflex_mega.config.numbers import RANGES
from dataflex_mega.config.parse import MEGATRON_KEYS, OUR_KEYS, parse_config
from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.coercion import WORDS, alternatives, coerce_lenient, describe_type
from tests.unit.config.conftest import LF_KEYS, Other


@pytest.fixture(scope="module")
def keys():
    from dataflex_mega.llamafactory.args import argument_types

    return argument_types()


def test_none_of_our_names_is_llamafactorys(keys):
    assert not OUR_KEYS & set(keys)


def test_none_of_megatrons_names_is_llamafactorys(keys):
    assert not MEGATRON_KEYS & set(keys)


def test_the_small_table_of_the_other_tests_says_what_llamafactory_says(keys):
    for key, hint in LF_KEYS.items():
        known = tuple(
            member if typing.get_origin(member) or member in WORDS else Other for member in alternatives(keys[key])
        )
        if key == "fsdp":
            known = (list[Other], *known[1:])
        assert known == alternatives(hint), key


def test_every_annotation_can_be_read(keys):
    for key, annotation in keys.items():
        assert describe_type(annotation), key


def test_every_default_of_llamafactory_passes_the_check_unchanged(keys):
    from llamafactory.hparams import (
        DataArguments,
        FinetuningArguments,
        GeneratingArguments,
        ModelArguments,
        TrainingArguments,
    )

    checked = 0
    for cls in (ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments):
        for field in dataclasses.fields(cls):
            if field.init and field.default is not dataclasses.MISSING:
                assert coerce_lenient(field.name, field.default, keys[field.name]) == field.default, field.name
                checked += 1
    assert checked > 300


@pytest.mark.parametrize("table", [RANGES, REQUIRED])
def test_checked_keys_exist(keys, table):
    assert not set(table) - set(keys)


def test_old_keys_are_old_and_their_successors_exist(keys):
    assert not {*RENAMED, *OUR_RENAMED, *DROPPED, *INTO_FSDP_CONFIG, "group_by_length"} & set(keys)
    assert {new for new, _ in OUR_RENAMED.values()} <= OUR_KEYS
    assert {*RENAMED.values(), "train_sampling_strategy", "fsdp_config"} <= set(keys)


def test_a_dataflex_configuration_splits_into_llamafactorys_part_and_ours(keys):
    given = {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B", "trust_remote_code": True, "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 16, "lora_alpha": 8, "dataset": "a,b",
        "template": "qwen", "cutoff_len": 4096, "overwrite_cache": True, "preprocessing_num_workers": 16,
        "dataloader_num_workers": 0, "seed": 42, "output_dir": "out", "logging_steps": 10, "save_steps": 100,
        "plot_loss": True, "save_only_model": False, "overwrite_output_dir": True, "report_to": "none",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16, "learning_rate": 1e-4,
        "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
        "ddp_timeout": 180000000, "train_type": "dynamic_mix", "static_mix": True, "mixture_sample_rule": "mixture",
        "init_mixture_proportions": [0.7, 0.3], "train_step": 3,
    }  # fmt: skip
    found = parse_config(given, keys)
    assert set(given) - set(found.llamafactory) == {
        "train_type", "static_mix", "mixture_sample_rule", "init_mixture_proportions", "train_step"
    }  # fmt: skip
    assert found.roles["mixer"] == {"name": "static", "proportions": [0.7, 0.3]}
    assert found.dataflex.train_step == 3


def test_a_misspelt_llamafactory_key_is_an_error(keys):
    with pytest.raises(ConfigError, match="'gradient_acumulation_steps' .did you mean 'gradient_accumulation_steps'"):
        parse_config({"gradient_acumulation_steps": 4}, keys)
