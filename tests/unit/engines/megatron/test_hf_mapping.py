"""Which slices make a Megatron parameter, against loops over heads and units."""

import pytest
import torch

from dataflex_mega.engines.hf_names import checkpoint_shapes
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.hf_mapping import (
    MappingRecipe,
    ShardPosition,
    TensorSlice,
    global_name,
    is_expert,
    join_groups,
    mapping_recipe,
    split_groups,
)
from dataflex_mega.errors import ConfigError
from tests.unit.engines.megatron import small

PREFIX = "decoder.layers.2."


def shape_of(name="llama"):
    return DecoderConfig.from_hf_config(small.configs()[name])


def made(shape, name, rank=0, size=1, rows=0):
    return mapping_recipe(shape, name, ShardPosition(rank, size, rows))


def values(config):
    """Every tensor of a model: numbers that say where they come from."""
    count = 0
    tensors = {}
    for name, shape in checkpoint_shapes(config).items():
        length = torch.Size(shape).numel()
        tensors[name] = torch.arange(count, count + length).view(shape)
        count += length
    return tensors


def put_together(tensors, found):
    parts = [tensors[s.name].narrow(s.dim, s.start, s.stop - s.start) for s in found.slices]
    return join_groups(parts, found.groups)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_has_for_each_group_its_queries_then_its_key_then_its_value(size, kind):
    shape, tensors = shape_of("qwen2"), values(small.configs()["qwen2"])
    q, k, v = (tensors[f"model.layers.2.self_attn.{p}_proj.{kind}"] for p in "qkv")
    rows = []
    for group in range(2):
        for head in (2 * group, 2 * group + 1):  # four query heads, two a group, eight rows each
            rows += [q[8 * head + i] for i in range(8)]
        rows += [k[8 * group + i] for i in range(8)] + [v[8 * group + i] for i in range(8)]
    found = [
        put_together(tensors, made(shape, f"{PREFIX}self_attention.linear_qkv.{kind}", r, size)) for r in range(size)
    ]
    assert torch.equal(torch.cat(found), torch.stack(rows)), "ranks hold whole groups, in order"
    assert len({len(part) for part in found}) == 1


def test_every_rank_has_gate_rows_then_up_rows_and_the_down_columns_that_go_with_them():
    shape, tensors = shape_of(), values(small.configs()["llama"])
    gate, up, down = (tensors[f"model.layers.2.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    for rank, units in enumerate([range(24), range(24, 48)]):
        fc1 = put_together(tensors, made(shape, PREFIX + "mlp.linear_fc1.weight", rank, 2))
        assert torch.equal(fc1, torch.stack([half[u] for half in (gate, up) for u in units]))
        fc2 = put_together(tensors, made(shape, PREFIX + "mlp.linear_fc2.weight", rank, 2))
        assert torch.equal(fc2, torch.stack([down[:, u] for u in units], dim=1))


def test_the_output_projection_is_cut_at_heads_also_where_heads_are_wider_than_the_residual():
    shape = shape_of("qwen3")  # 4 heads of 16 on 32 hidden units
    assert made(shape, PREFIX + "self_attention.linear_proj.weight", 1, 2) == MappingRecipe(
        (TensorSlice("model.layers.2.self_attn.o_proj.weight", 1, 32, 64),)
    )


def test_the_vocabulary_is_cut_with_its_padding_at_the_end():
    shape = shape_of()
    cuts = [made(shape, "embedding.word_embeddings.weight", r, 4, rows=16).slices[0] for r in range(4)]
    assert [(c.start, c.stop) for c in cuts] == [(0, 16), (16, 32), (32, 48), (48, 53)]
    beyond = made(shape, "output_layer.weight", 3, 4, rows=32)
    assert (beyond.slices[0].start, beyond.slices[0].stop) == (53, 53), "a rank of padding only"
    assert beyond.padded


def test_a_tied_output_layer_is_the_embedding():
    assert made(shape_of(), "output_layer.weight", rows=56).slices[0].name == "lm_head.weight"
    assert made(shape_of("llama-tied"), "output_layer.weight", rows=56).slices[0].name == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("local", "fused"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ],
)
def test_norms_go_by_the_names_of_local_and_of_fused_layers_and_every_rank_has_them_whole(local, fused):
    shape = shape_of()
    found = made(shape, PREFIX + local, 1, 2)
    assert found == made(shape, PREFIX + fused, 0, 2)
    assert not found.sharded and (found.slices[0].start, found.slices[0].stop) == (0, 32)


def test_query_and_key_norms_are_as_wide_as_a_head():
    found = made(shape_of("qwen3"), PREFIX + "self_attention.k_layernorm.weight")
    assert found == MappingRecipe((TensorSlice("model.layers.2.self_attn.k_norm.weight", 0, 0, 16),), sharded=False)


@pytest.mark.parametrize(
    ("name", "prefix", "gate", "up", "down", "units"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe", "w1", "w3", "w2", 48),
        ("qwen3_moe", "model.layers.2.mlp", "gate_proj", "up_proj", "down_proj", 24),
    ],
)
def test_experts_and_router_go_by_the_published_names(name, prefix, gate, up, down, units):
    shape = shape_of(name)
    fc1 = made(shape, PREFIX + "mlp.experts.3.linear_fc1.weight", 1, 2)
    assert [(s.name, s.start, s.stop) for s in fc1.slices] == [
        (f"{prefix}.experts.3.{half}.weight", units // 2, units) for half in (gate, up)
    ]
    assert made(shape, PREFIX + "mlp.experts.3.linear_fc2.weight").slices[0].name == f"{prefix}.experts.3.{down}.weight"
    assert made(shape, PREFIX + "mlp.router.weight") == MappingRecipe(
        (TensorSlice(f"{prefix}.gate.weight", 0, 0, 4),), sharded=False
    )


def test_global_names_count_layers_and_experts_over_the_whole_model():
    def named(name):
        return global_name(name, lambda position: position + 10, first_expert=4)

    assert named("embedding.word_embeddings.weight") == "embedding.word_embeddings.weight"
    assert named("decoder.layers.1.input_layernorm.weight") == "decoder.layers.11.input_layernorm.weight"
    one, grouped = "local_experts.3.linear_fc1.weight", "linear_fc1.weight3"
    expected = "decoder.layers.10.mlp.experts.7.linear_fc1.weight"
    assert named(f"decoder.layers.0.mlp.experts.{one}") == named(f"decoder.layers.0.mlp.experts.{grouped}") == expected
    assert is_expert(expected)
    assert not is_expert("decoder.layers.0.mlp.router.weight")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_split_undoes_join(groups):
    parts = [torch.randn(groups * n, 3) for n in (2, 1, 5)]
    whole = join_groups(parts, groups)
    assert whole.shape == (groups * 8, 3)
    for part, back in zip(parts, split_groups(whole, [len(p) for p in parts], groups), strict=True):
        assert torch.equal(part, back)


@pytest.mark.parametrize(
    ("name", "parameter", "size", "message"),
    [
        ("llama", "self_attention.linear_qkv.weight", 4, "4 does not divide the model's 2 key-value heads"),
        ("llama", "mlp.linear_fc1.weight", 5, "tensor_model_parallel_size: 5 does not divide the model's 48 units"),
        (
            "mixtral",
            "mlp.experts.0.linear_fc1.weight",
            5,
            "expert_tensor_parallel_size: 5 does not divide the model's 48",
        ),
        ("llama", "mlp.linear_fc1.bias", 1, "'decoder.layers.2.mlp.linear_fc1.bias' has no counterpart"),
        ("llama", "mlp.router.weight", 1, "'decoder.layers.2.mlp.router.weight' has no counterpart"),
        ("llama", "mlp.experts.0.linear_fc1.weight", 1, "has no counterpart in a Hugging Face llama"),
        ("mixtral", "mlp.experts.weight1", 1, "'decoder.layers.2.mlp.experts.weight1' has no counterpart"),
    ],
)
def test_what_cannot_be_cut_or_converted_is_refused_by_name(name, parameter, size, message):
    with pytest.raises(ConfigError) as caught:
        made(shape_of(name), PREFIX + parameter, 0, size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_parameter_outside_the_layers_is_refused():
    with pytest.raises(ConfigError, match="'embedding.position_embeddings.weight' has no counterpart"):
        made(shape_of(), "embedding.position_embeddings.weight")
