"""Lay a Hugging Face model out over processes: alone, DistributedDataParallel, or FSDP2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.fsdp.language_model import trains_outside
from dataflex_mega.engines.fsdp.precision import LossScale
from dataflex_mega.engines.fsdp.quantized import float_unpacked, is_quantized, keep_packed, move_scales, packed_modules
from dataflex_mega.errors import ConfigError, did_you_mean

Mode = Literal["single", "ddp", "fsdp2"]


# LLaMA-Factory's key -> the argument of DistributedDataParallel.
DDP_KEYS = {
    "ddp_find_unused_parameters": "find_unused_parameters",
    "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers",
    "ddp_static_graph": "static_graph",
}


@dataclass(frozen=True)
class FSDPLayout:
    """The layout that Hugging Face's `fsdp` and `fsdp_config` keys, the precision keys and the world size ask for."""

    mode: Mode
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    reshard_after_forward: bool = True
    offload: bool = False
    layer_classes: tuple[str, ...] = ()  # empty: the model's own _no_split_modules
    ddp: Mapping[str, Any] = field(
        default_factory=dict
    )  # arguments of DistributedDataParallel; torch's where it has none
    notes: tuple[str, ...] = ()  # for the user
    pin_memory: bool = True  # of what is offloaded
    loss_scale: LossScale = field(default_factory=LossScale)  # under fp16

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward and backward computation."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


FSDP_WORDS = ("full_shard", "shard_grad_op", "offload", "auto_wrap", "no_shard")
ACTED_ON = (
    "version", "transformer_layer_cls_to_wrap", "reshard_after_forward", "activation_checkpointing", "cpu_offload",
    "offload_params", "pin_memory", "loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale",
)  # fmt: skip
# Keys of FSDP1 or of accelerate that fully_shard has no counterpart for; none changes what is computed.
WITHOUT_EFFECT = (
    "state_dict_type", "cpu_ram_efficient_loading", "auto_wrap_policy", "use_orig_params", "sync_module_states",
    "backward_prefetch", "forward_prefetch", "limit_all_gathers",
)  # fmt: skip


def read_layout(keys: dict[str, Any], parallel_info: ParallelInfo) -> FSDPLayout:
    """LLaMA-Factory / Hugging Face keys of the YAML -> layout. Raises ConfigError naming a key that is not understood."""
    precision = "bf16" if keys.get("bf16") else "fp16" if keys.get("fp16") else "fp32"
    if precision == "fp16" and parallel_info.device.type == "cpu":
        raise ConfigError("fp16: this machine has no device that trains in fp16; use bf16: true or neither")
    ddp = {argument: keys[key] for key, argument in DDP_KEYS.items() if keys.get(key) is not None}
    words = _fsdp_words(keys.get("fsdp"))
    config, notes = _fsdp_config(keys)
    sharded = any(word in ("full_shard", "shard_grad_op", "auto_wrap", "offload") for word in words)
    classes = config.get("transformer_layer_cls_to_wrap") or ()
    mode: Mode = "fsdp2" if sharded else "ddp" if parallel_info.world_size > 1 else "single"
    if ddp.get("static_graph") and mode == "ddp" and int(keys.get("gradient_accumulation_steps") or 1) > 1:
        raise ConfigError(
            "ddp_static_graph: needs gradient_accumulation_steps: 1, since gradients are reduced in the last backward pass "
            f"of a step only, found {keys['gradient_accumulation_steps']}"
        )
    unused = [key for key in DDP_KEYS if keys.get(key)] if mode != "ddp" else []
    if unused:
        where = "sharded parameters" if mode == "fsdp2" else "one process"
        notes = (*notes, f"{', '.join(unused)}: no effect on {where}, where there is no DistributedDataParallel")
    return FSDPLayout(
        mode=mode,
        precision=precision,
        reshard_after_forward=bool(config.get("reshard_after_forward", "shard_grad_op" not in words)),
        offload="offload" in words or bool(config.get("cpu_offload") or config.get("offload_params")),
        layer_classes=(classes,) if isinstance(classes, str) else tuple(classes),
        ddp=ddp,
        notes=notes,
        pin_memory=bool(config.get("pin_memory", True)) and parallel_info.device.type != "cpu",
        loss_scale=_loss_scale(config),
    )


def _loss_scale(config: dict[str, Any]) -> LossScale:
    """How the loss is scaled under fp16, in the words of DeepSpeed's `fp16`: a `loss_scale` above 0 is constant."""
    constant = config.get("loss_scale")
    try:
        if constant:
            return LossScale(start=float(constant), constant=True)
        default = LossScale()
        return LossScale(
            start=2.0 ** float(config.get("initial_scale_power", 16)),
            interval=int(config.get("loss_scale_window", default.interval)),
            floor=float(config.get("min_loss_scale", default.floor)),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"fsdp_config: a loss scale is not a number: {error}") from error


def _fsdp_words(value: Any) -> list[str]:
    """`fsdp: full_shard auto_wrap`, a list, or true -> its words."""
    if value is None or value is False:
        return []
    if value is True:
        return ["full_shard"]
    words = " ".join(map(str, value)).split() if isinstance(value, list) else str(value).split()
    for word in words:
        if word not in FSDP_WORDS:
            near = did_you_mean(word, FSDP_WORDS)
            raise ConfigError(f"fsdp: {word!r} is not supported{near}; allowed: {', '.join(FSDP_WORDS)}")
    return words


def _fsdp_config(keys: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(fsdp_config without the `fsdp_` that accelerate's files write, a note for each key without effect)."""
    config = keys.get("fsdp_config") or {}
    if not isinstance(config, dict):
        raise ConfigError(f"fsdp_config: expected a mapping, found {config!r}")
    plain = {str(key).removeprefix("fsdp_"): value for key, value in config.items()}
    for key in plain:
        if key not in ACTED_ON and key not in WITHOUT_EFFECT:
            known = (*ACTED_ON, *WITHOUT_EFFECT)
            raise ConfigError(
                f"fsdp_config: {key!r} is not known{did_you_mean(key, known)}; allowed: {', '.join(known)}"
            )
    if plain.get("activation_checkpointing") and keys.get("disable_gradient_checkpointing"):
        raise ConfigError("fsdp_config: activation_checkpointing is true, but so is disable_gradient_checkpointing")
    return plain, tuple(f"fsdp_config: {key} has no effect on FSDP2" for key in plain if key in WITHOUT_EFFECT)


def parallelize(model: nn.Module, layout: FSDPLayout, parallel_info: ParallelInfo) -> nn.Module:
    """The module to call in the forward pass. FSDP2 shards `model` in place; DDP wraps it."""
    keep_packed(model)
    if layout.mode == "fsdp2":
        return _shard(model, layout, parallel_info)
    model.to(parallel_info.device)
    if layout.mode == "ddp":
        ids = [parallel_info.device.index] if parallel_info.device.type == "cuda" else None
        options = {"find_unused_parameters": trains_outside(model), **layout.ddp}
        return DistributedDataParallel(model, device_ids=ids, **options)
    return model


def _shard(model: nn.Module, layout: FSDPLayout, parallel_info: ParallelInfo) -> nn.Module:
    low = layout.precision != "fp32"
    if is_quantized(model) and not packed_modules(model):
        method = getattr(model, "quantization_method", "another method")
        raise ConfigError(
            f"fsdp: weights quantised with {getattr(method, 'value', method)} cannot be shared among ranks"
        )
    if low:
        float_unpacked(model)  # parameters of one group must share a dtype; the policy casts when they are gathered
    options: dict[str, Any] = {
        "mesh": init_device_mesh(parallel_info.device.type, (parallel_info.world_size,)),
        "reshard_after_forward": layout.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(layout.dtype, torch.float32) if low else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(layout.pin_memory) if layout.offload else OffloadPolicy(),
    }
    names = set(layout.layer_classes or layer_class_names(model))
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        classes = sorted({type(m).__name__ for m in model.modules()})
        raise ConfigError(f"fsdp_config: no layer of class {sorted(names)} in the model; it has {', '.join(classes)}")
    bytes_options = {**options, "mp_policy": MixedPrecisionPolicy()}  # gathered as they are
    for layer in layers:
        for module in packed_modules(layer):
            fully_shard(module, **bytes_options)
        fully_shard(layer, **options)
    for module in packed_modules(model):
        if not isinstance(module, FSDPModule):
            fully_shard(module, **bytes_options)
    move_scales(model, parallel_info.device)
    fully_shard(model, **options)
    return model


def layer_class_names(model: nn.Module) -> list[str]:
    """The repeated blocks that a Hugging Face model declares as units."""
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if names:
            return list(names)
    return []


def unwrap(module: nn.Module) -> Any:
    """The Hugging Face or PEFT model inside."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def set_gradient_sync(module: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks only in the backward pass of the step's last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last
