"""Initial weights depend on the seed and the names of parameters alone."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from dataflex_mega.engines.named_init import NamedInit, reinitialise
from dataflex_mega.errors import ConfigError
from tests.unit.engines.megatron import small


def test_a_matrix_is_normal_noise_from_a_hash_of_seed_and_name():
    config = small.configs()["llama"]
    name = "model.layers.1.mlp.down_proj.weight"
    seed = int.from_bytes(hashlib.sha256(f"3:{name}".encode()).digest()[:8], "little", signed=True)
    expected = torch.randn(32, 48, generator=torch.Generator().manual_seed(seed)) * 0.2
    torch.testing.assert_close(NamedInit(config, 3).tensor(name), expected)


def test_norms_are_ones_and_biases_zeros_and_matrices_have_the_configured_spread():
    source = NamedInit(small.configs()["qwen2"], 0)
    assert (source.tensor("model.norm.weight") == 1).all()
    assert (source.tensor("model.layers.0.self_attn.q_proj.bias") == 0).all()
    values = torch.cat([source.tensor(n).flatten() for n, shape in source.shapes.items() if len(shape) == 2])
    assert values.mean().abs() < 0.005
    assert values.std() == pytest.approx(0.2, rel=0.02)


def test_tensors_differ_by_name_and_by_seed_and_leave_the_global_generator_alone():
    config = small.configs()["mixtral"]
    state = torch.get_rng_state()
    one, other = NamedInit(config, 0), NamedInit(config, 1)
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    drawn = [one.tensor(name.format(e)) for e in range(4)] + [other.tensor(name.format(0))]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(one.tensor(name.format(2)), NamedInit(config, 0).tensor(name.format(2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_is_cut_out_of_the_whole():
    source = NamedInit(small.configs()["llama"], 0)
    whole = source.tensor("lm_head.weight")
    assert torch.equal(source.read("lm_head.weight", 0, 5, 9), whole[5:9])
    assert torch.equal(source.read("lm_head.weight", 1, 5, 9), whole[:, 5:9])


@pytest.mark.parametrize("name", list(small.configs()))
def test_a_model_gets_the_weights_that_the_source_has(name):
    config = small.configs()[name]
    source = NamedInit(config, 4)
    model = small.hf_model(config, dtype=torch.bfloat16)
    reinitialise(model, 4)
    tensors = dict(model.named_parameters())
    assert all(torch.isfinite(t).all() for t in tensors.values())
    if name == "mixtral":
        gate_up = tensors["model.layers.1.mlp.experts.gate_up_proj"]
        half = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
        assert torch.equal(gate_up[2, :48], source.tensor(half.format("w1")).bfloat16())
        assert torch.equal(gate_up[2, 48:], source.tensor(half.format("w3")).bfloat16())
    same = source.tensor("model.layers.3.self_attn.o_proj.weight").bfloat16()
    assert torch.equal(tensors["model.layers.3.self_attn.o_proj.weight"], same)
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_family_without_known_initialisation_is_refused():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    with pytest.raises(ConfigError, match=r"no weights by name for a 'gpt2' model.*llama, mistral"):
        reinitialise(AutoModelForCausalLM.from_config(config), 0)


def test_a_wrapped_model_is_refused():
    model = small.hf_model(small.configs()["llama"])
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="extra: not a parameter of a plain llama model"):
        reinitialise(model, 0)
