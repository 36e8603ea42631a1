"""Megatron's keys, under the names that LLaMA-Factory users know them by, and the choice of the engine.

The names are those that LLaMA-Factory takes with USE_MCA=1 (mcore_adapter) and with USE_MEGATRON_BRIDGE=1, and a size
of 1 or a None leaves everything as it is. `fp8` is missing because LLaMA-Factory has a key of that name itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex_mega.config.values import fit
from dataflex_mega.errors import ConfigError

Engine = Literal["fsdp", "megatron"]
ENGINE_VARIABLES = ("USE_MCA", "USE_MEGATRON_BRIDGE")
MISSING = "the Megatron engine, which this version does not have yet"


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MegatronArguments:
    """Keys of the Megatron engine."""

    tensor_model_parallel_size: int = _key(1, "ranks that share each layer's matrices")
    pipeline_model_parallel_size: int = _key(1, "ranks that share the layers, one stage each")
    virtual_pipeline_model_parallel_size: int | None = _key(None, "stages a rank holds, interleaved")
    context_parallel_size: int = _key(1, "ranks that share each sequence")
    expert_model_parallel_size: int = _key(1, "ranks that share the experts")
    expert_tensor_parallel_size: int | None = _key(None, "ranks that share each expert's matrices; None: as tensor")
    sequence_parallel: bool = _key(False, "share norms and dropout along the sequence among the tensor ranks")
    pipeline_model_parallel_layout: str | list[Any] | None = _key(None, "which layers each stage holds")
    account_for_embedding_in_pipeline_split: bool = _key(False, "count the embedding as a layer")
    account_for_loss_in_pipeline_split: bool = _key(False, "count the loss as a layer")
    overlap_p2p_comm: bool = _key(False, "send between stages while computing")
    variable_seq_lengths: bool = _key(False, "micro-batches of different lengths in the pipeline")
    recompute_granularity: Literal["full", "selective"] | None = _key(None, "what is computed again in backward")
    recompute_method: Literal["uniform", "block"] | None = _key(None, "how recomputed layers are grouped")
    recompute_num_layers: int | None = _key(None, "layers of a group")
    recompute_modules: list[str] | None = _key(None, "modules that selective recomputation covers")
    moe_layer_recompute: bool = _key(False, "recompute expert layers")
    bias_activation_fusion: bool = _key(False, "one kernel for bias and activation")
    apply_rope_fusion: bool = _key(False, "one kernel for rotary embeddings")
    masked_softmax_fusion: bool = _key(False, "one kernel for mask and softmax")
    cross_entropy_loss_fusion: bool = _key(False, "one kernel for the loss")
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = _key(None, "how tokens reach experts")
    moe_grouped_gemm: bool = _key(False, "all experts of a rank in one matrix product")
    moe_aux_loss_coeff: float = _key(0.0, "weight of the load-balancing loss")
    moe_expert_capacity_factor: float | None = _key(None, "tokens an expert takes, relative to the mean")
    moe_pad_expert_input_to_capacity: bool = _key(False, "pad every expert's input to its capacity")
    moe_token_drop_policy: Literal["probs", "position"] | None = _key(None, "which tokens are dropped over capacity")
    moe_shared_expert_overlap: bool = _key(False, "compute shared experts during dispatch")
    moe_router_dtype: Literal["fp32", "fp64"] | None = _key(None, "precision of the router")
    mtp_num_layers: int | None = _key(None, "layers that predict further tokens")
    calculate_per_token_loss: bool = _key(False, "divide by tokens and not by samples")
    transformer_impl: Literal["local", "transformer_engine"] | None = _key(None, "whose layers are used")
    fp8_recipe: str | None = _key(None, "how fp8 scales are chosen")
    mixed_precision: str | None = _key(None, "Megatron-Bridge's name of a precision")
    use_distributed_optimizer: bool = _key(False, "share optimizer state among data-parallel ranks")
    overlap_grad_reduce: bool = _key(False, "reduce gradients during backward")
    overlap_param_gather: bool = _key(False, "gather parameters during forward")
    delay_grad_reduce: bool = _key(False, "reduce gradients of all stages together")
    accumulate_allreduce_grads_in_fp32: bool = _key(False, "sum gradients in fp32")
    check_for_nan_in_loss_and_grad: bool = _key(False, "stop at NaN")
    ddp_average_in_collective: bool = _key(False, "average inside the collective")
    ddp_bucket_size: int | None = _key(None, "parameters reduced at once")
    optimizer: Literal["adam", "sgd"] | None = _key(None, "Megatron's optimizer")
    optimizer_cpu_offload: bool = _key(False, "keep optimizer state in host memory")
    optimizer_offload_fraction: float = _key(0.0, "share of the state that is kept there")
    sequence_packing: bool = _key(False, "several samples in a row")
    use_packed_sequences: bool = _key(False, "the same, Megatron-Bridge's name")
    save_hf_model: bool = _key(False, "also save in Hugging Face layout")
    save_merged_model: bool = _key(False, "save LoRA merged into the model")
    export_hf_on_finish: bool = _key(False, "save in Hugging Face layout at the end")
    ckpt_format: Literal["legacy", "torch_dist"] | None = _key(None, "layout of checkpoints")
    megatron_pretrained_checkpoint: str | None = _key(None, "start from this Megatron checkpoint")
    additional_configs: dict[str, Any] | str | None = _key(None, "further fields of Megatron's configuration")
    extra_config: dict[str, Any] | str | None = _key(None, "the same, Megatron-Bridge's name")


def parse(values: Mapping[str, Any]) -> MegatronArguments:
    """Type-checked. Raises ConfigError for a wrong value, and for any that asks for Megatron: it is not there yet."""
    known = {f.name: f for f in fields(MegatronArguments)}
    typed = {key: fit(key, value, str(known[key].type)) for key, value in values.items()}
    for key, value in typed.items():
        if key.endswith("_size") and isinstance(value, int) and value < 1:
            raise ConfigError(f"{key}: must be >= 1, found {value}")
        if value != known[key].default and not (key.endswith("parallel_size") and value == 1):
            raise ConfigError(f"{key}: {value!r} needs {MISSING}; leave the key out")
    return MegatronArguments(**typed)


def engine_of_environment(environment: Mapping[str, str]) -> tuple[str, Engine] | None:
    """(variable, engine) when USE_MCA or USE_MEGATRON_BRIDGE is on, as LLaMA-Factory reads it (1, y, true)."""
    for variable in ENGINE_VARIABLES:
        if environment.get(variable, "0").lower() in ("1", "y", "true"):
            return variable, "megatron"
    return None


def resolve_engine(engine: str, environment: Mapping[str, str]) -> Engine:
    """`auto`, `fsdp` or `megatron`, and the environment -> the engine. Raises ConfigError while it can only be FSDP."""
    asked = engine_of_environment(environment)
    if asked is not None:
        raise ConfigError(f"{asked[0]}={environment[asked[0]]} needs {MISSING}; unset it")
    if engine == "megatron":
        raise ConfigError(f"engine: megatron needs {MISSING}; use auto or fsdp")
    return "fsdp"
