"""Which slices of which Hugging Face tensors make up a Megatron parameter: one description for both directions.

A parameter is identified by its global name: megatron-core's own, with the number of the layer in the whole model and of
the expert in the whole layer. Along its rows a parameter is one slice of a Hugging Face tensor, or several one after the
other:

    linear_qkv   for each key-value group: the query rows of its heads, its key rows, its value rows
    linear_fc1   gate rows, up rows
    the rest     one slice

Tensor parallelism splits rows (columns of linear_proj and linear_fc2): by groups for linear_qkv, gate and up separately for
linear_fc1. As megatron-core 0.16.1 reads them: get_query_key_value_tensors in transformer/attention.py, transformer/mlp.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.engines.hf_names import EXPERTS
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.errors import ConfigError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.linear_fc([12])\.weight")
_LOCAL_EXPERT = re.compile(r"(.+\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")  # one module an expert
_GROUPED_EXPERT = re.compile(r"(.+\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)")  # Transformer Engine's grouped linear


@dataclass(frozen=True)
class ShardPosition:
    """A parameter's place among the ranks that share it."""

    rank: int  # of tensor parallelism; of expert tensor parallelism for an expert's weights
    size: int
    rows: int  # of this rank's shard; says how far the vocabulary is padded


@dataclass(frozen=True)
class TensorSlice:
    """Entries start..stop-1 of a Hugging Face tensor along one dimension."""

    name: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class MappingRecipe:
    """How one rank's shard of a parameter is built from slices; all slices have the same columns."""

    slices: tuple[TensorSlice, ...]
    groups: int = 1  # each slice has so many blocks of rows; block 0 of every slice comes first, then block 1, ...
    sharded: bool = True  # False: every tensor-parallel rank holds all of it
    padded: bool = False  # zero rows may follow


def global_name(name: str, layer_offset: Callable[[int], int], first_expert: int) -> str:
    """A chunk's own parameter name -> the global one.

    Args:
        layer_offset: position in the chunk -> number in the model, from 0.
        first_expert: number in the layer of this rank's first expert.
    """
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        name = f"decoder.layers.{layer_offset(int(layer[1]))}.{layer[2]}"
    if expert := _LOCAL_EXPERT.fullmatch(name):
        return f"{expert[1]}.{first_expert + int(expert[2])}.{expert[3]}.weight"
    if expert := _GROUPED_EXPERT.fullmatch(name):
        return f"{expert[1]}.{first_expert + int(expert[3])}.{expert[2]}.weight"
    return name


def is_expert(name: str) -> bool:
    """Whether a global name is that of an expert's weights: other ranks share those than share the rest."""
    return ".mlp.experts." in name


def mapping_recipe(decoder: DecoderConfig, name: str, position: ShardPosition) -> MappingRecipe:
    """The slices of one rank's shard of a parameter. Raises ConfigError when the model cannot be sharded or converted so."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return _outside_layers(decoder, name, position)
    prefix, suffix = f"model.layers.{layer[1]}", layer[2]
    norm = _NORMS.get(suffix)
    if norm is not None:
        rows = decoder.head_dim if ".self_attn." in norm else decoder.hidden_size
        return MappingRecipe((TensorSlice(prefix + norm, 0, 0, rows),), sharded=False)
    expert = _EXPERT.fullmatch(suffix)
    if expert is not None:
        return _expert(decoder, prefix, expert, position)
    build = _LINEAR.get(suffix)
    if build is None:
        raise _unknown(decoder, name)
    return build(decoder, prefix, position)


def join_groups(parts: Sequence[Tensor], groups: int) -> Tensor:
    """[groups * n_i, ...] of each slice -> [groups * sum(n_i), ...], blocks of the slices alternating."""
    if groups == 1:
        return torch.cat(list(parts))
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def split_groups(values: Tensor, rows: Sequence[int], groups: int) -> list[Tensor]:
    """The inverse of `join`: [groups * sum(n_i), ...] -> [rows_i, ...] where rows_i = groups * n_i."""
    blocks = values.unflatten(0, (groups, -1)).split([count // groups for count in rows], dim=1)
    return [block.flatten(0, 1) for block in blocks]


def _outside_layers(decoder: DecoderConfig, name: str, position: ShardPosition) -> MappingRecipe:
    if name == "decoder.final_layernorm.weight":
        return MappingRecipe((TensorSlice("model.norm.weight", 0, 0, decoder.hidden_size),), sharded=False)
    if name == "embedding.word_embeddings.weight":
        source = "model.embed_tokens.weight"
    elif name == "output_layer.weight":
        source = "model.embed_tokens.weight" if decoder.tie_embeddings else "lm_head.weight"
    else:
        raise _unknown(decoder, name)
    start, stop = (min(end * position.rows, decoder.vocab_size) for end in (position.rank, position.rank + 1))
    return MappingRecipe((TensorSlice(source, 0, start, stop),), padded=True)


def _shard_range(
    total: int, position: ShardPosition, what: str, key: str = "tensor_model_parallel_size"
) -> tuple[int, int]:
    """First and last + 1 of this rank's shard of `total`."""
    if total % position.size:
        raise ConfigError(f"{key}: {position.size} does not divide the model's {total} {what}")
    shard = total // position.size
    return position.rank * shard, (position.rank + 1) * shard


def _qkv(decoder: DecoderConfig, prefix: str, position: ShardPosition, kind: str) -> MappingRecipe:
    first, last = _shard_range(decoder.num_kv_heads, position, "key-value heads")
    heads = {"q": decoder.num_heads // decoder.num_kv_heads, "k": 1, "v": 1}  # of one group
    slices = (
        TensorSlice(f"{prefix}.self_attn.{p}_proj.{kind}", 0, first * n * decoder.head_dim, last * n * decoder.head_dim)
        for p, n in heads.items()
    )
    return MappingRecipe(tuple(slices), groups=last - first)


def _qkv_weight(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    return _qkv(decoder, prefix, position, "weight")


def _qkv_bias(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    return _qkv(decoder, prefix, position, "bias")


def _attention_out(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    first, last = _shard_range(decoder.num_heads, position, "attention heads")
    return MappingRecipe(
        (TensorSlice(f"{prefix}.self_attn.o_proj.weight", 1, first * decoder.head_dim, last * decoder.head_dim),)
    )


def _mlp_in(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    shard = _shard_range(decoder.ffn_hidden_size, position, "units of an MLP")
    return MappingRecipe(tuple(TensorSlice(f"{prefix}.mlp.{half}_proj.weight", 0, *shard) for half in ("gate", "up")))


def _mlp_out(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    return MappingRecipe(
        (
            TensorSlice(
                f"{prefix}.mlp.down_proj.weight", 1, *_shard_range(decoder.ffn_hidden_size, position, "units of an MLP")
            ),
        )
    )


def _router(decoder: DecoderConfig, prefix: str, position: ShardPosition) -> MappingRecipe:
    if decoder.experts is None:
        raise _unknown(decoder, f"{prefix.replace('model', 'decoder', 1)}.mlp.router.weight")
    block = EXPERTS[decoder.model_type][0]
    return MappingRecipe(
        (TensorSlice(f"{prefix}.{block}.gate.weight", 0, 0, decoder.experts.num_experts),), sharded=False
    )


def _expert(decoder: DecoderConfig, prefix: str, match: re.Match[str], position: ShardPosition) -> MappingRecipe:
    if decoder.experts is None:
        raise _unknown(decoder, f"{prefix.replace('model', 'decoder', 1)}.{match[0]}")
    block, gate, up, down = EXPERTS[decoder.model_type]
    shard = _shard_range(decoder.experts.ffn_hidden_size, position, "units of an expert", "expert_tensor_parallel_size")
    names = f"{prefix}.{block}.experts.{match[1]}"
    if match[2] == "1":
        return MappingRecipe(tuple(TensorSlice(f"{names}.{half}.weight", 0, *shard) for half in (gate, up)))
    return MappingRecipe((TensorSlice(f"{names}.{down}.weight", 1, *shard),))


def _unknown(decoder: DecoderConfig, name: str) -> ConfigError:
    return ConfigError(
        f"engine: megatron: parameter {name!r} has no counterpart in a Hugging Face {decoder.model_type}; "
        "turn off the Megatron option that adds it"
    )


# The names of norms with the local layers, then inside Transformer Engine's fused norm and linear layers.
_NORMS = {
    "input_layernorm.weight": ".input_layernorm.weight",
    "pre_mlp_layernorm.weight": ".post_attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": ".post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": ".self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": ".self_attn.k_norm.weight",
}
_LINEAR: dict[str, Callable[[DecoderConfig, str, ShardPosition], MappingRecipe]] = {
    "self_attention.linear_qkv.weight": _qkv_weight,
    "self_attention.linear_qkv.bias": _qkv_bias,
    "self_attention.linear_proj.weight": _attention_out,
    "mlp.linear_fc1.weight": _mlp_in,
    "mlp.linear_fc2.weight": _mlp_out,
    "mlp.router.weight": _router,
}
