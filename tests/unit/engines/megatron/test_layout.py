"""Layouts from keys, and what cannot be, in one line that names the key."""

from dataclasses import replace

import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.layout import MegatronLayout, check_layout, read_layout
from dataflex_mega.errors import ConfigError

T, P, V = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
E, ET = "expert_model_parallel_size", "expert_tensor_parallel_size"
SIZES = {
    "vocab_size": 100, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip


def keys(**given):
    return replace(MegatronArguments(), **given)


@pytest.mark.parametrize(
    ("given", "world", "expected", "words"),
    [
        ({}, 4, MegatronLayout(4), "DP4"),
        ({T: 2}, 8, MegatronLayout(8, 2, expert_tensor=2), "TP2 x DP4"),
        (
            {T: 2, P: 2, V: 3, "sequence_parallel": True}, 4,
            MegatronLayout(4, 2, 2, 3, expert_tensor=2, sequence_parallel=True),
            "TP2 x PP2 x DP1 x 3 chunks per stage, sequence parallel",
        ),
        ({"context_parallel_size": 2, P: 2}, 8, MegatronLayout(8, pipeline=2, context=2), "PP2 x CP2 x DP2"),
        ({E: 4, P: 2}, 8, MegatronLayout(8, pipeline=2, expert=4), "PP2 x EP4 x DP4"),
        ({T: 2, E: 2, ET: 2, "sequence_parallel": True}, 4,
         MegatronLayout(4, 2, expert=2, expert_tensor=2, sequence_parallel=True), "TP2 x EP2 x DP2, sequence parallel"),
    ],
)  # fmt: skip
def test_sizes_make_a_layout(given, world, expected, words):
    found = read_layout(keys(**given), world)
    assert (found, found.describe()) == (expected, words)


@pytest.mark.parametrize(
    ("given", "world", "message"),
    [
        ({T: 2}, 3, "tensor 2 x pipeline 1 = 2 does not divide the 3 processes of this run"),
        ({T: 2}, 1, "does not divide the 1 process of this run"),
        ({T: 2, P: 4}, 4, f"{T}, {P}: tensor 2 x pipeline 4 = 8 does not divide the 4 processes"),
        ({E: 3}, 4, f"{E}: experts 3 x expert tensor 1 x pipeline 1 does not divide the 4 processes"),
        ({"sequence_parallel": True}, 2, f"sequence_parallel: needs {T} > 1, found 1"),
        (
            {"context_parallel_size": 2, T: 2},
            2,
            f"{T}, {P}, context_parallel_size: tensor 2 x pipeline 1 x context 2 = 4",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_processes(given, world, message):
    with pytest.raises(ConfigError) as caught:
        read_layout(keys(**given), world)
    assert message in str(caught.value) and "\n" not in str(caught.value)


DENSE = LlamaConfig(**SIZES)
SPARSE = MixtralConfig(**SIZES, num_local_experts=4)


@pytest.mark.parametrize(
    ("config", "given", "world", "accumulation", "message"),
    [
        (DENSE, {T: 4}, 4, 1, f"{T}: 4 does not divide the model's 6 attention heads"),
        (DENSE, {T: 2}, 2, 1, f"{T}: 2 does not divide the model's 3 key-value heads"),
        (
            LlamaConfig(**{**SIZES, "intermediate_size": 97}),
            {T: 3},
            3,
            1,
            f"{T}: 3 does not divide the model's 97 units",
        ),
        (DENSE, {P: 4}, 4, 4, f"{P}: 4 stages of 1 chunks do not divide the model's 6 layers"),
        (DENSE, {P: 2, V: 2}, 2, 4, f"{P}: 2 stages of 2 chunks do not divide the model's 6 layers"),
        (DENSE, {V: 2}, 1, 4, f"{V}: needs {P} > 1, found 1"),
        (DENSE, {P: 2, V: 3}, 2, 3, f"gradient_accumulation_steps: 3 is no multiple of {P} 2"),
        (DENSE, {E: 2}, 2, 1, f"{E}: 2, but a llama has no experts"),
        (SPARSE, {E: 3}, 3, 1, f"{E}: 3 does not divide the model's 4 experts"),
        (SPARSE, {T: 3}, 3, 1, f"sequence_parallel: a mixture of experts with {T} > 1 needs it"),
        (SPARSE, {ET: 5}, 5, 1, f"{ET}: 5 does not divide the 96 units of an expert"),
        (SPARSE, {"moe_token_dispatcher_type": "flex"}, 1, 1, "moe_token_dispatcher_type: flex needs DeepEP"),
    ],
)
def test_a_model_that_cannot_be_cut_like_that(config, given, world, accumulation, message):
    with pytest.raises(ConfigError) as caught:
        check_layout(
            read_layout(keys(**given), world), DecoderConfig.from_hf_config(config), keys(**given), accumulation, 32
        )
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "world", "accumulation"),
    [({T: 3, "sequence_parallel": True}, 3, 1), ({P: 3}, 6, 1), ({P: 2, V: 3}, 4, 2), ({P: 3, V: 2}, 3, 6)],
)
def test_a_model_that_can_be_cut(given, world, accumulation):
    check_layout(
        read_layout(keys(**given), world), DecoderConfig.from_hf_config(DENSE), keys(**given), accumulation, 32
    )


def test_a_window_of_attention_shorter_than_the_rows_is_refused():
    config = LlamaConfig(**SIZES)
    config.sliding_window = 16
    shape = DecoderConfig.from_hf_config(config)
    check_layout(read_layout(keys(), 1), shape, keys(), 1, 16)
    with pytest.raises(ConfigError, match="cutoff_len: 17 is beyond the model's sliding_window of 16"):
        check_layout(read_layout(keys(), 1), shape, keys(), 1, 17)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "engine: megatron has no 'gpt2' model; it has llama, mistral"),
        (LlamaConfig(**SIZES, quantization_config={"bits": 4}), "the model is quantised"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu'; only silu is supported"),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias: true is not supported"),
        (
            Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}),
            "rope_type 'yarn'; supported are default, linear, llama3",
        ),
    ],
)
def test_a_model_that_megatron_has_not(config, message):
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.from_hf_config(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("multiple", "padded"), [(1, 100), (2, 100), (8, 104), (128, 128)])
def test_the_vocabulary_is_padded_to_a_multiple(multiple, padded):
    assert DecoderConfig.from_hf_config(DENSE, multiple).padded_vocab_size == padded
