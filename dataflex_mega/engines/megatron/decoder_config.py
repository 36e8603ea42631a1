"""What a Hugging Face configuration says of a model, in Megatron's terms. Nothing of megatron-core is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dataflex_mega.engines.hf_names import MOE_MODEL_TYPES, SUPPORTED_MODEL_TYPES
from dataflex_mega.errors import ConfigError, did_you_mean

ROPE = ("default", "linear", "llama3")  # rotary embeddings that change frequencies only


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts of a model."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int  # of each expert's MLP
    normalizes_top_k: bool  # whether the chosen experts' probabilities are scaled to sum to 1
    is_moe_layer: tuple[int, ...]  # of each layer, 1 where it has experts and 0 where it is dense


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    init_std: float
    attention_dropout: float
    rotary_base: float
    rope_type: str
    sliding_window: int | None  # attention reaches that far back; None: to the start
    experts: ExpertsConfig | None
    hf_config: Any = field(repr=False, compare=False)  # the configuration itself

    @staticmethod
    def from_hf_config(config: Any, vocab_multiple: int = 1) -> DecoderConfig:
        """`vocab_multiple`: what the padded vocabulary is a multiple of. Raises ConfigError naming what is not
        supported."""
        kind = str(config.model_type)
        if kind not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(
                f"engine: megatron has no {kind!r} model{did_you_mean(kind, SUPPORTED_MODEL_TYPES)}; "
                f"it has {', '.join(SUPPORTED_MODEL_TYPES)}; engine: fsdp takes any"
            )
        _refuse(config)
        rope = _rope(config)
        heads = config.num_attention_heads
        return DecoderConfig(
            model_type=kind,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn_hidden_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            padded_vocab_size=-(-config.vocab_size // vocab_multiple) * vocab_multiple,
            max_positions=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=kind == "qwen2",
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            init_std=config.initializer_range,
            attention_dropout=config.attention_dropout,
            rotary_base=float(rope["rope_theta"]),
            rope_type=str(rope.get("rope_type", "default")),
            sliding_window=getattr(config, "sliding_window", None),
            experts=_experts(config) if kind in MOE_MODEL_TYPES else None,
            hf_config=config,
        )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters, also of configurations older than transformers 5."""
    parameters = getattr(config, "rope_parameters", None)
    return dict(parameters) if parameters else {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}


def _experts(config: Any) -> ExpertsConfig:
    if config.model_type == "mixtral":
        count = config.num_local_experts
        layers = (1,) * config.num_hidden_layers
        return ExpertsConfig(count, config.num_experts_per_tok, config.intermediate_size, True, layers)
    dense, every = set(config.mlp_only_layers or ()), config.decoder_sparse_step
    layers = tuple(int(i not in dense and (i + 1) % every == 0) for i in range(config.num_hidden_layers))
    return ExpertsConfig(
        getattr(config, "num_experts", None) or config.num_local_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        bool(config.norm_topk_prob),
        layers,
    )


def _refuse(config: Any) -> None:
    """Raise ConfigError for what a supported family can have and this engine has not."""
    name = f"engine: megatron, model {config.model_type}"
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{name}: the model is quantised; only full-precision weights can be trained")
    if config.hidden_act != "silu":
        raise ConfigError(f"{name}: hidden_act {config.hidden_act!r}; only silu is supported")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise ConfigError(f"{name}: {key}: true is not supported")
    rope = _rope(config)
    kind = str(rope.get("rope_type", "default"))
    if kind not in ROPE:
        raise ConfigError(f"{name}: rope_type {kind!r}; supported are {', '.join(ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"{name}: partial_rotary_factor {rope['partial_rotary_factor']}; only 1.0 is supported")


def inverse_frequencies(decoder: DecoderConfig) -> Any:
    """[head_dim / 2] float32 of a rotary embedding with scaling; None where megatron-core's own are right."""
    if decoder.rope_type == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[decoder.rope_type](decoder.hf_config, None)
    if scale != 1.0:
        raise ConfigError(
            f"engine: megatron, rope_type {decoder.rope_type!r}: attention factor {scale}; only 1.0 is supported"
        )
    return frequencies
