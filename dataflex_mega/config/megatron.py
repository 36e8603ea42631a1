"""Megatron's keys, under the names that LLaMA-Factory users know them by, and the choice of the engine.

The names are those that LLaMA-Factory takes with USE_MCA=1 (mcore_adapter) and with USE_MEGATRON_BRIDGE=1, and a size
of 1 or a None leaves everything as it is. `fp8` is missing because LLaMA-Factory has a key of that name itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from dataflex_mega.config.engine_names import AUTO
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.coercion import coerce
from dataflex_mega.schema.constraints import Range, field_hints

ENGINE_VARIABLES = ("USE_MCA", "USE_MEGATRON_BRIDGE")
Positive = Range(ge=1)
ENGINE_KEYS = ("use_mca", "use_megatron_bridge")  # LLaMA-Factory's, each does what the variable of its name does


@dataclass(frozen=True)
class MegatronArguments:
    """The keys of the Megatron engine: parallel layout, precision, optimizer, and options of megatron-core."""

    tensor_model_parallel_size: Annotated[int, Positive] = field(
        default=1, metadata={"help": "ranks that share each layer's matrices"}
    )
    pipeline_model_parallel_size: Annotated[int, Positive] = field(
        default=1, metadata={"help": "ranks that share the layers, one stage each"}
    )
    virtual_pipeline_model_parallel_size: Annotated[int | None, Positive] = field(
        default=None, metadata={"help": "stages a rank holds, interleaved"}
    )
    context_parallel_size: Annotated[int, Positive] = field(
        default=1, metadata={"help": "ranks that share each sequence"}
    )
    expert_model_parallel_size: Annotated[int, Positive] = field(
        default=1, metadata={"help": "ranks that share the experts"}
    )
    expert_tensor_parallel_size: Annotated[int | None, Positive] = field(
        default=None, metadata={"help": "ranks that share each expert's matrices; None: as tensor"}
    )
    sequence_parallel: bool = field(
        default=False, metadata={"help": "share norms and dropout along the sequence among the tensor ranks"}
    )
    pipeline_model_parallel_layout: str | list[Any] | None = field(
        default=None, metadata={"help": "which layers each stage holds"}
    )
    account_for_embedding_in_pipeline_split: bool = field(
        default=False, metadata={"help": "count the embedding as a layer"}
    )
    account_for_loss_in_pipeline_split: bool = field(default=False, metadata={"help": "count the loss as a layer"})
    overlap_p2p_comm: bool = field(default=False, metadata={"help": "send between stages while computing"})
    variable_seq_lengths: bool = field(
        default=False, metadata={"help": "micro-batches of different lengths in the pipeline"}
    )
    recompute_granularity: Literal["full", "selective"] | None = field(
        default=None, metadata={"help": "what is computed again in backward"}
    )
    recompute_method: Literal["uniform", "block"] | None = field(
        default=None, metadata={"help": "how recomputed layers are grouped; None: `uniform` with `full`"}
    )
    recompute_num_layers: Annotated[int | None, Positive] = field(
        default=None, metadata={"help": "layers of a group; None: 1 with `full`"}
    )
    recompute_modules: list[str] | None = field(
        default=None, metadata={"help": "modules that selective recomputation covers"}
    )
    moe_layer_recompute: bool = field(default=False, metadata={"help": "recompute expert layers"})
    bias_activation_fusion: bool = field(default=False, metadata={"help": "one kernel for bias and activation"})
    apply_rope_fusion: bool = field(default=False, metadata={"help": "one kernel for rotary embeddings"})
    masked_softmax_fusion: bool = field(default=False, metadata={"help": "one kernel for mask and softmax"})
    cross_entropy_loss_fusion: bool = field(default=False, metadata={"help": "one kernel for the loss"})
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = field(
        default=None, metadata={"help": "how tokens reach experts"}
    )
    moe_grouped_gemm: bool = field(default=False, metadata={"help": "all experts of a rank in one matrix product"})
    moe_aux_loss_coeff: Annotated[float, Range(ge=0)] = field(
        default=0.0, metadata={"help": "weight of the load-balancing loss"}
    )
    moe_expert_capacity_factor: Annotated[float | None, Range(gt=0)] = field(
        default=None, metadata={"help": "tokens an expert takes, relative to the mean"}
    )
    moe_pad_expert_input_to_capacity: bool = field(
        default=False, metadata={"help": "pad every expert's input to its capacity"}
    )
    moe_token_drop_policy: Literal["probs", "position"] | None = field(
        default=None, metadata={"help": "which tokens are dropped over capacity"}
    )
    moe_shared_expert_overlap: bool = field(default=False, metadata={"help": "compute shared experts during dispatch"})
    moe_router_dtype: Literal["fp32", "fp64"] | None = field(default=None, metadata={"help": "precision of the router"})
    mtp_num_layers: int | None = field(default=None, metadata={"help": "layers that predict further tokens"})
    calculate_per_token_loss: bool = field(
        default=False, metadata={"help": "divide losses by tokens: is so in any case"}
    )
    transformer_impl: Literal["local", "transformer_engine"] | None = field(
        default=None, metadata={"help": "whose layers are used"}
    )
    fp8_recipe: str | None = field(default=None, metadata={"help": "how fp8 scales are chosen"})
    mixed_precision: str | None = field(default=None, metadata={"help": "Megatron-Bridge's name of a precision"})
    use_distributed_optimizer: bool = field(
        default=False, metadata={"help": "share optimizer state among data-parallel ranks"}
    )
    overlap_grad_reduce: bool = field(default=False, metadata={"help": "reduce gradients during backward"})
    overlap_param_gather: bool = field(default=False, metadata={"help": "gather parameters during forward"})
    delay_grad_reduce: bool = field(
        default=False, metadata={"help": "reduce all stages' gradients together: is so in any case"}
    )
    accumulate_allreduce_grads_in_fp32: bool = field(default=False, metadata={"help": "sum gradients in fp32"})
    check_for_nan_in_loss_and_grad: bool = field(
        default=False, metadata={"help": "look for NaN: is so in any case; see `on_non_finite`"}
    )
    ddp_average_in_collective: bool = field(default=False, metadata={"help": "average inside the collective"})
    ddp_bucket_size: Annotated[int | None, Positive] = field(
        default=None, metadata={"help": "parameters reduced at once"}
    )
    optimizer: Literal["adam", "sgd"] | None = field(default=None, metadata={"help": "Megatron's optimizer"})
    optimizer_cpu_offload: bool = field(default=False, metadata={"help": "keep optimizer state in host memory"})
    optimizer_offload_fraction: Annotated[float, Range(ge=0, le=1)] = field(
        default=0.0, metadata={"help": "share of the state that is kept there"}
    )
    sequence_packing: bool = field(default=False, metadata={"help": "several samples in a row"})
    use_packed_sequences: bool = field(default=False, metadata={"help": "the same, Megatron-Bridge's name"})
    save_hf_model: bool = field(default=False, metadata={"help": "also save in Hugging Face layout: is so in any case"})
    save_merged_model: bool = field(default=False, metadata={"help": "save LoRA merged into the model"})
    export_hf_on_finish: bool = field(
        default=False, metadata={"help": "save in Hugging Face layout at the end: is so in any case"}
    )
    ckpt_format: Literal["legacy", "torch_dist"] | None = field(
        default=None, metadata={"help": "layout of checkpoints"}
    )
    megatron_pretrained_checkpoint: str | None = field(
        default=None, metadata={"help": "start from this Megatron checkpoint"}
    )
    additional_configs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "further fields of Megatron's configuration"}
    )
    extra_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "the same, Megatron-Bridge's name"}
    )


# Values that leave everything as it is, beside each key's default.
NEUTRAL: dict[str, tuple[Any, ...]] = {"ckpt_format": ("torch_dist",), "optimizer_offload_fraction": (1.0,)}
# Key -> why it is not supported. Refused when it has any other value than its default.
REFUSED = {
    "mtp_num_layers": "the loss is that of the next token",
    "fp8_recipe": "use bf16: true",
    "ddp_average_in_collective": "gradients are summed and divided once, by the tokens of the whole step",
    "save_merged_model": "engine: fsdp supports LoRA",
}
# Key -> the note when it is set: its effect is always on.
NO_EFFECT = {
    "calculate_per_token_loss": "losses are divided by tokens in any case; loss_normalization: sample divides by samples",
    "check_for_nan_in_loss_and_grad": "every step is checked in any case; on_non_finite says what then",
    "delay_grad_reduce": "all pipeline stages start a reduction together in any case",
    "save_hf_model": "the model is saved in Hugging Face layout at the end in any case",
    "export_hf_on_finish": "the model is saved in Hugging Face layout at the end in any case",
}
PRECISIONS = {"bf16_mixed": "bf16", "bf16-mixed": "bf16", "16_mixed": "fp16", "16-mixed": "fp16", "fp32": "", "32": ""}


def parse(values: Mapping[str, Any]) -> MegatronArguments:
    """Type-checked. Raises ConfigError for a wrong value, and for what the Megatron engine does not do."""
    known, hints = {f.name: f for f in fields(MegatronArguments)}, field_hints(MegatronArguments)
    typed = {key: coerce(key, value, hints[key]) for key, value in values.items()}
    for key, value in typed.items():
        if key in REFUSED and value != known[key].default:
            raise ConfigError(f"{key}: {value!r} is not supported; {REFUSED[key]}")
    arguments = MegatronArguments(**typed)
    if arguments.ckpt_format == "legacy":
        raise ConfigError("ckpt_format: legacy cannot be read on another layout; use torch_dist")
    if arguments.overlap_param_gather and not arguments.use_distributed_optimizer:
        raise ConfigError("overlap_param_gather: needs use_distributed_optimizer: true")
    if arguments.mixed_precision is not None and arguments.mixed_precision not in PRECISIONS:
        near = did_you_mean(arguments.mixed_precision, list(PRECISIONS))
        raise ConfigError(
            f"mixed_precision: expected one of {', '.join(PRECISIONS)}, found {arguments.mixed_precision!r}{near}"
        )
    return arguments


def notes_of(arguments: MegatronArguments) -> list[str]:
    """Notes on keys that are set and have no effect, one line each."""
    return [f"{key}: {note}" for key, note in NO_EFFECT.items() if getattr(arguments, key)]


def keys_that_select_megatron(arguments: MegatronArguments) -> list[str]:
    """The keys that have another value than the one that leaves everything as it is."""
    selecting = []
    for f in fields(arguments):
        value = getattr(arguments, f.name)
        neutral = (f.default, *NEUTRAL.get(f.name, ()))
        if value not in neutral and not (f.name.endswith("parallel_size") and value == 1):
            selecting.append(f.name)
    return selecting


def engine_of_environment(environment: Mapping[str, str]) -> str | None:
    """USE_MCA or USE_MEGATRON_BRIDGE where it is set, as LLaMA-Factory reads it (1, y, true)."""
    for variable in ENGINE_VARIABLES:
        if environment.get(variable, "0").lower() in ("1", "y", "true"):
            return variable
    return None


def resolve_engine(engine: str, keys: Sequence[str], variable: str | None) -> str:
    """Which engine a run has.

    Args:
        engine: `auto` or the name of an engine.
        keys: what `keys_that_select_megatron` returned.
        variable: what `engine_of_environment` returned, or one of ENGINE_KEYS.

    Raises:
        ConfigError: `engine: fsdp` beside something that asks for Megatron.
    """
    if engine == "fsdp" and (keys or variable):
        asks = f"{keys[0]} is a key" if keys else f"{variable}=1 asks"
        raise ConfigError(f"engine: fsdp, but {asks} {'of' if keys else 'for'} the Megatron engine; drop one of them")
    if engine != AUTO:
        return engine
    return "megatron" if keys or variable else "fsdp"


def with_lf_keys(arguments: MegatronArguments, lf: Mapping[str, Any], engine: str) -> MegatronArguments:
    """Where that engine trains, with the values of LLaMA-Factory's keys that Megatron has under another name.

    Raises ConfigError where both are given and differ.
    """
    coefficient = lf.get("moe_aux_loss_coef")
    if not coefficient or engine != "megatron":
        return arguments
    if arguments.moe_aux_loss_coeff not in (0.0, coefficient):
        raise ConfigError(
            f"moe_aux_loss_coef: {coefficient}, but Megatron's moe_aux_loss_coeff is {arguments.moe_aux_loss_coeff}; drop "
            "one of them"
        )
    return replace(arguments, moe_aux_loss_coeff=coefficient)


def implied_lf_keys(arguments: MegatronArguments, lf: Mapping[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's keys that Megatron's keys imply. Raises ConfigError where both are given and differ."""
    implied: dict[str, Any] = {}
    if arguments.sequence_packing or arguments.use_packed_sequences:
        implied["packing"] = True
    if arguments.mixed_precision is not None and PRECISIONS[arguments.mixed_precision]:
        implied[PRECISIONS[arguments.mixed_precision]] = True
    for key, value in implied.items():
        if lf.get(key) not in (None, value):
            raise ConfigError(f"{key}: {lf[key]!r}, but Megatron's keys say {value!r}; drop one of them")
    return implied
