"""Megatron's keys: which of them select the engine, which have no effect, and which are refused."""

from dataclasses import fields

import pytest

from dataflex_mega.config.megatron import (
    MegatronArguments,
    engine_of_environment,
    implied_lf_keys,
    keys_that_select_megatron,
    notes_of,
    parse,
    resolve_engine,
    with_lf_keys,
)
from dataflex_mega.errors import ConfigError


def test_neutral_values_pass():
    given = {"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": 1, "sequence_parallel": False}
    assert parse(given).tensor_model_parallel_size == 1
    assert parse({}) == MegatronArguments()


def test_every_default_passes_its_own_check():
    assert parse({f.name: f.default for f in fields(MegatronArguments)}) == MegatronArguments()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_model_parallel_size", 2),
        ("pipeline_model_parallel_size", 4),
        ("context_parallel_size", 2),
        ("expert_model_parallel_size", 8),
        ("virtual_pipeline_model_parallel_size", 2),
        ("sequence_parallel", True),
        ("recompute_granularity", "full"),
        ("additional_configs", {"num_layers": 2}),
        ("moe_aux_loss_coeff", 0.01),
    ],
)
def test_a_key_of_megatrons_asks_for_its_engine(key, value):
    keys = keys_that_select_megatron(parse({key: value}))
    assert keys == [key]
    assert resolve_engine("auto", keys, None) == resolve_engine("megatron", keys, None) == "megatron"
    with pytest.raises(ConfigError, match=f"^engine: fsdp, but {key} is a key of the Megatron engine"):
        resolve_engine("fsdp", keys, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mtp_num_layers": 1}, "mtp_num_layers: 1 is not supported"),
        ({"save_merged_model": True}, "save_merged_model: True is not supported; engine: fsdp supports LoRA"),
        ({"ckpt_format": "legacy"}, "ckpt_format: legacy cannot be read on another layout; use torch_dist"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": False}, "overlap_param_gather: needs use_distr"),
        ({"mixed_precision": "bf16_mixd"}, "mixed_precision: expected one of bf16_mixed"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(given, message):
    with pytest.raises(ConfigError) as caught:
        parse(given)
    assert str(caught.value).startswith(message)


def test_what_is_done_anyway_is_said():
    assert notes_of(parse({})) == []
    said = notes_of(parse({"calculate_per_token_loss": True, "export_hf_on_finish": True}))
    assert [line.partition(":")[0] for line in said] == ["calculate_per_token_loss", "export_hf_on_finish"]


def test_megatrons_words_for_llamafactorys_keys():
    assert implied_lf_keys(parse({"mixed_precision": "bf16_mixed", "sequence_packing": True}), {}) == {
        "packing": True, "bf16": True
    }  # fmt: skip
    with pytest.raises(ConfigError, match="^bf16: False, but Megatron's keys say True"):
        implied_lf_keys(parse({"mixed_precision": "bf16_mixed"}), {"bf16": False})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tensor_model_parallel_size", "two", "expected a whole number, found 'two'"),
        ("tensor_model_parallel_size", 0, "must be >= 1, found 0"),
        ("tensor_model_parallel_size", 1.5, "expected a whole number, found 1.5"),
        ("transformer_impl", "te", "expected one of local, transformer_engine, or nothing, found 'te'"),
        ("sequence_parallel", "on", "expected true or false, found 'on'"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    with pytest.raises(ConfigError) as caught:
        parse({key: value})
    assert str(caught.value).startswith(f"{key}: {message}")


def test_every_key_is_documented():
    for f in fields(MegatronArguments):
        assert f.metadata["help"], f.name


def test_neutral_values_ask_for_nothing():
    assert keys_that_select_megatron(parse({"tensor_model_parallel_size": 1, "ckpt_format": "torch_dist"})) == []


def test_the_engine_is_fsdp_unless_megatron_is_asked_for():
    assert resolve_engine("auto", [], None) == resolve_engine("fsdp", [], None) == "fsdp"
    assert resolve_engine("megatron", [], None) == resolve_engine("auto", [], "USE_MCA") == "megatron"
    with pytest.raises(ConfigError, match="^engine: fsdp, but USE_MEGATRON_BRIDGE=1 asks for the Megatron engine"):
        resolve_engine("fsdp", [], "USE_MEGATRON_BRIDGE")


@pytest.mark.parametrize("value", ["1", "true", "Y", "y"])
def test_which_variable_asks(value):
    assert engine_of_environment({"USE_MCA": value}) == "USE_MCA"
    assert engine_of_environment({"USE_MCA": "0", "USE_MEGATRON_BRIDGE": value}) == "USE_MEGATRON_BRIDGE"
    assert engine_of_environment({"USE_MCA": "no", "USE_MEGATRON_BRIDGE": "false"}) is None


def test_llamafactorys_name_of_the_load_balancing_weight_is_megatrons():
    ours, both, theirs = {"moe_aux_loss_coef": 0.02}, {"moe_aux_loss_coef": 0.5}, parse({"moe_aux_loss_coeff": 0.02})
    assert with_lf_keys(parse({}), ours, "megatron").moe_aux_loss_coeff == 0.02
    assert with_lf_keys(parse({}), ours, "fsdp") == parse({})
    assert with_lf_keys(theirs, ours, "megatron") == with_lf_keys(theirs, {}, "megatron") == theirs
    with pytest.raises(
        ConfigError, match="^moe_aux_loss_coef: 0.5, but Megatron's moe_aux_loss_coeff is 0.02; drop one"
    ):
        with_lf_keys(theirs, both, "megatron")
