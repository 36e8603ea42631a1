"""megatron-core's three configurations from the keys of a YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from dataflex_mega.engines.megatron import kernels
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.errors import ConfigError, did_you_mean

# Keys that only choose a faster kernel, and the library it comes from. Without it the same is computed, and that is said.
FUSIONS = {
    "bias_activation_fusion": "a CUDA device",
    "apply_rope_fusion": "Transformer Engine",
    "masked_softmax_fusion": "a CUDA device",
    "cross_entropy_loss_fusion": "a CUDA device",
    "moe_grouped_gemm": "Transformer Engine",
    "moe_shared_expert_overlap": "a CUDA device",
    "optimizer_cpu_offload": "a CUDA device",
}
# What the model's configuration says and a run may say otherwise, since no tensor changes its decoder.
FREE = {"hidden_dropout", "attention_dropout", "attention_softmax_in_fp32", "init_method_std"}
OVERLAPS = ("overlap_grad_reduce", "overlap_param_gather")


@dataclass(frozen=True)
class TrainingSettings:
    """What LLaMA-Factory's training keys say of the optimizer."""

    optimizer: str  # adam, sgd
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    precision: str  # fp32, bf16, fp16
    packs: bool = False  # whether rows may hold several samples


@dataclass(frozen=True)
class MegatronSettings:
    """What the engine is built from."""

    model: TransformerConfig
    ddp: DistributedDataParallelConfig
    optimizer: OptimizerConfig
    transformer_engine: bool
    # Whether TorchAttention is used in Transformer Engine's layers too: its own supports neither our packed rows nor context
    # parallelism as it is here.
    torch_attention: bool
    notes: tuple[str, ...]


def build_settings(
    keys: Any, layout: MegatronLayout, decoder: DecoderConfig, training: TrainingSettings
) -> MegatronSettings:
    """`keys`: config.megatron.MegatronArguments. Raises ConfigError for unsupported values."""
    transformer_engine = _transformer_engine(keys.transformer_impl)
    fused, notes = _fusions(keys, transformer_engine, layout, decoder)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[training.precision]
    precision = {"bf16": training.precision == "bf16", "fp16": training.precision == "fp16", "params_dtype": dtype}
    model = {
        **_sizes(decoder),
        **_parallel(keys, layout, dtype),
        **_experts(keys, decoder, fused),
        **{name: fused[name] for name in ("bias_activation_fusion", "apply_rope_fusion", "masked_softmax_fusion")},
        "cross_entropy_loss_fusion": fused["cross_entropy_loss_fusion"],
        "bf16": precision["bf16"],
        "fp16": precision["fp16"],
        "params_dtype": dtype,
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
    }
    ddp = {
        "grad_reduce_in_fp32": keys.accumulate_allreduce_grads_in_fp32 or training.precision == "bf16",
        "use_distributed_optimizer": keys.use_distributed_optimizer,
        "overlap_grad_reduce": fused["overlap_grad_reduce"],
        "overlap_param_gather": fused["overlap_param_gather"],
        "bucket_size": keys.ddp_bucket_size,
    }
    optimizer = {
        "optimizer": training.optimizer,
        "lr": training.lr,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_eps": training.eps,
        "sgd_momentum": 0.0,
        "clip_grad": max(0.0, training.max_grad_norm),
        "use_distributed_optimizer": keys.use_distributed_optimizer,
        "overlap_param_gather": fused["overlap_param_gather"],
        **precision,
    }
    if fused["optimizer_cpu_offload"]:
        optimizer.update(optimizer_cpu_offload=True, optimizer_offload_fraction=keys.optimizer_offload_fraction or 1.0)
    _add_further(
        keys, {TransformerConfig: model, DistributedDataParallelConfig: ddp, OptimizerConfig: optimizer}, decoder
    )
    _check_messages(model, layout)
    try:
        configs = TransformerConfig(**model), DistributedDataParallelConfig(**ddp), OptimizerConfig(**optimizer)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"engine: megatron-core refuses this configuration: {str(error).splitlines()[0]}") from error
    torch_attention = training.packs or layout.context > 1
    return MegatronSettings(
        *configs, transformer_engine=transformer_engine, torch_attention=torch_attention, notes=tuple(notes)
    )


def _transformer_engine(requested: str | None) -> bool:
    is_available = torch.cuda.is_available() and kernels.transformer_engine()
    if requested == "transformer_engine" and not is_available:
        raise ConfigError("transformer_impl: transformer_engine is not installed; leave the key out, or use local")
    return is_available and requested != "local"


def _fusions(
    keys: Any, transformer_engine: bool, layout: MegatronLayout, decoder: DecoderConfig
) -> tuple[dict[str, bool], list[str]]:
    """(key -> whether it is enabled, a note for each that was requested and is not possible)."""
    available = {"a CUDA device": torch.cuda.is_available(), "Transformer Engine": transformer_engine}
    on: dict[str, bool] = {}
    notes = []
    for key, library in FUSIONS.items():
        on[key] = bool(getattr(keys, key)) and available[library]
        if getattr(keys, key) and not on[key]:
            notes.append(f"{key}: needs {library}, which is not available; the same is computed without it")
    for key in OVERLAPS:
        on[key] = bool(getattr(keys, key)) and torch.cuda.is_available()
        if getattr(keys, key) and not on[key]:
            notes.append(f"{key}: needs a CUDA device, which is not available; communication does not overlap")
    if keys.moe_token_dispatcher_type == "alltoall" and not torch.cuda.is_available():
        notes.append(
            "moe_token_dispatcher_type: alltoall needs a CUDA device, which is not available; allgather does the same"
        )
    if keys.overlap_p2p_comm and layout.interleaved == 1:
        notes.append("overlap_p2p_comm: only interleaved stages overlap, and those do in any case")
    return on, notes + _notes_without_experts(keys, decoder)


def _notes_without_experts(keys: Any, decoder: DecoderConfig) -> list[str]:
    """A line for each key of experts that was set for a model without them."""
    set_keys = [f.name for f in fields(keys) if f.name.startswith("moe_") and getattr(keys, f.name) != f.default]
    return [f"{key}: a {decoder.model_type} has no experts" for key in set_keys if decoder.experts is None]


def _sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "num_layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "num_attention_heads": decoder.num_heads,
        "num_query_groups": decoder.num_kv_heads,
        "kv_channels": decoder.head_dim,
        "ffn_hidden_size": decoder.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": decoder.rms_norm_eps,
        "qk_layernorm": decoder.qk_norm,
        "add_bias_linear": False,
        "add_qkv_bias": decoder.qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": decoder.attention_dropout,
        "attention_softmax_in_fp32": True,
        "init_method_std": decoder.init_std,
        "perform_initialization": False,  # every parameter is loaded or made from its name
    }


def _parallel(keys: Any, layout: MegatronLayout, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = layout.interleaved > 1
    whole = keys.recompute_granularity == "full"
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.interleaved if interleaved else None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": dtype,
        # Between two interleaved stages both neighbours are the same rank, and batched messages get mixed up.
        "overlap_p2p_comm": interleaved,  # megatron-core's other schedule has no overlap
        "batch_p2p_comm": not interleaved,
        "variable_seq_lengths": keys.variable_seq_lengths,
        "pipeline_model_parallel_layout": keys.pipeline_model_parallel_layout,
        "account_for_embedding_in_pipeline_split": keys.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": keys.account_for_loss_in_pipeline_split,
        "recompute_granularity": keys.recompute_granularity,
        "recompute_method": keys.recompute_method or ("uniform" if whole else None),
        "recompute_num_layers": keys.recompute_num_layers or (1 if whole else None),
        "recompute_modules": keys.recompute_modules,
        # Gradients are sums over tokens, divided at the end by the number of the whole step's tokens.
        "calculate_per_token_loss": True,
        # Gloo reads a tensor while it is being sent, so its memory cannot be given up before.
        "deallocate_pipeline_outputs": layout.pipeline > 1 and torch.cuda.is_available(),
        "gradient_accumulation_fusion": kernels.gradient_accumulation(),
    }


def _experts(keys: Any, decoder: DecoderConfig, fused: Mapping[str, bool]) -> dict[str, Any]:
    experts = decoder.experts
    if experts is None:
        # Not used, but megatron-core's default is refused beside variable_seq_lengths.
        return {"moe_token_dispatcher_type": "alltoall"}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": list(experts.is_moe_layer),
        "moe_router_pre_softmax": not experts.normalizes_top_k,
        "moe_router_dtype": keys.moe_router_dtype or "fp32",
        "moe_router_load_balancing_type": "aux_loss" if keys.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": keys.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": _dispatcher(keys.moe_token_dispatcher_type),
        "moe_grouped_gemm": fused["moe_grouped_gemm"],
        "moe_expert_capacity_factor": keys.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": keys.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": keys.moe_token_drop_policy or "probs",
        "moe_layer_recompute": keys.moe_layer_recompute,
        "moe_shared_expert_overlap": fused["moe_shared_expert_overlap"],
    }


def _dispatcher(requested: str | None) -> str:
    """How tokens reach experts; the result is the same, and without a CUDA device megatron-core has one way only."""
    if not torch.cuda.is_available():
        return "allgather"
    return requested or "alltoall"


def _check_messages(model: Mapping[str, Any], layout: MegatronLayout) -> None:
    if layout.interleaved > 1 and layout.pipeline == 2 and (model["batch_p2p_comm"] or not model["overlap_p2p_comm"]):
        raise ConfigError(
            "additional_configs: batch_p2p_comm with two interleaved stages gives wrong numbers without an error; leave it "
            "and overlap_p2p_comm out"
        )


def _add_further(keys: Any, targets: Mapping[type, dict[str, Any]], decoder: DecoderConfig) -> None:
    """Put additional_configs and extra_config, which come last, where a field has their name."""
    key_names, sizes = {f.name for f in fields(keys)}, _sizes(decoder).keys() - FREE
    for source in ("additional_configs", "extra_config"):
        for name, value in _mapping(source, getattr(keys, source)).items():
            plain = str(name).rpartition(".")[2]  # Megatron-Bridge writes model.name
            if plain in key_names:
                raise ConfigError(f"{source}: {plain} is a key of its own; write {plain}: {value}")
            if plain in sizes:
                raise ConfigError(f"{source}: {plain} follows from the model's configuration, which is converted by it")
            owners = [cls for cls in targets if plain in {f.name for f in fields(cls)}]
            if not owners:
                known = [f.name for cls in targets for f in fields(cls)]
                raise ConfigError(
                    f"{source}: {plain!r} is no field of Megatron's configuration{did_you_mean(plain, known)}"
                )
            for cls in owners:
                targets[cls][plain] = value


def _mapping(source: str, value: Any) -> dict[str, Any]:
    """A mapping, or JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source}: not JSON: {error.msg} in {value!r}") from error
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{source}: expected a mapping, found {value!r}")
    return value or {}
