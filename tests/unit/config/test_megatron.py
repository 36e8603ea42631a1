from dataclasses import fields

import pytest

from dataflex_mega.config.megatron import MegatronArguments, engine_of_environment, parse, resolve_engine
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
def test_a_key_that_asks_for_megatron_is_refused_by_name(key, value):
    with pytest.raises(
        ConfigError, match=f"^{key}: .* needs the Megatron engine, which this version does not have yet"
    ):
        parse({key: value})


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


def test_the_engine_is_fsdp_unless_megatron_is_asked_for():
    assert resolve_engine("auto", {}) == resolve_engine("fsdp", {"USE_MCA": "0"}) == "fsdp"
    with pytest.raises(ConfigError, match="^engine: megatron needs the Megatron engine"):
        resolve_engine("megatron", {})
    with pytest.raises(ConfigError, match="^USE_MEGATRON_BRIDGE=1 needs"):
        resolve_engine("fsdp", {"USE_MEGATRON_BRIDGE": "1"})


def test_which_variable_asks():
    assert engine_of_environment({"USE_MCA": "y"}) == ("USE_MCA", "megatron")
    assert engine_of_environment({"USE_MCA": "no"}) is None
