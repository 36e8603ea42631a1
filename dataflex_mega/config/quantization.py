"""`quantization_bit`: what a model that is quantised when it is loaded can be trained with."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex_mega.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Method:
    """A library that quantises weights while they are loaded."""

    package: str
    bits: tuple[int, ...]
    sharded: tuple[int, ...]  # of these, those whose weights FSDP2 can share among ranks


METHODS = {
    "bnb": Method("bitsandbytes", (4, 8), (4,)),
}
# LLaMA-Factory's other names -> why not.
NOT_HERE = {
    "hqq": "transformers 5 does not load with it yet; use bnb",
    "eetq": "its kernels are for GPUs only and not tried; use bnb with quantization_bit: 8",
    **dict.fromkeys(
        ("gptq", "awq", "aqlm", "quanto", "mxfp4", "fp8"),
        "it is a format of checkpoints, which model_name_or_path names without quantization_bit",
    ),
}
ADAPTERS = ("lora", "oft")
# Key -> why a quantised model cannot have it. Refused when set to anything but false, 0 or nothing.
REFUSED = {
    "pissa_init": "it takes the adapter from the weights' singular vectors, which needs them unquantised",
    "resize_vocab": "the embedding of a quantised model keeps its size",
    "create_new_adapter": "it merges the old adapter into the weights, which are quantised",
    "quantization_device_map": "each process loads the model for its own device",
    "train_from_scratch": "random weights are not quantised",
    "use_dora": "LLaMA-Factory takes a quantised model for one that DoRA cannot be computed on",
}


def check_quantization(keys: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key that a quantised model does not go with, naming both."""
    bits = keys.get("quantization_bit")
    if not bits:
        return
    given, method = f"quantization_bit: {bits}", _method_of(keys)
    if bits not in method.bits:
        allowed = ", ".join(map(str, method.bits))
        raise ConfigError(f"quantization_bit: quantization_method {_name_of(keys)} takes {allowed}, found {bits!r}")
    tuning = keys.get("finetuning_type", "lora")
    if tuning not in ADAPTERS:
        raise ConfigError(f"finetuning_type: {tuning} trains weights that {given} quantises; use lora or oft")
    for key, why in REFUSED.items():
        if keys.get(key):
            raise ConfigError(f"{key}: {keys[key]!r} does not go with {given}; {why}")
    adapters = keys.get("adapter_name_or_path")
    if len(adapters.split(",") if isinstance(adapters, str) else adapters or ()) > 1:
        raise ConfigError(f"adapter_name_or_path: {given} takes one adapter, found {adapters!r}; merge them first")
    if importlib.util.find_spec(method.package) is None:
        raise ConfigError(f"{given}: the package {method.package} is not installed: pip install {method.package}")


def check_sharding(keys: Mapping[str, Any]) -> None:
    """Raises ConfigError for quantised weights that FSDP2 cannot share among ranks."""
    bits = keys.get("quantization_bit")
    if bits and bits not in _method_of(keys).sharded:
        raise ConfigError(
            f"quantization_bit: with fsdp, weights are quantised to 4 bits with bnb, found {bits} with {_name_of(keys)}; "
            "leave fsdp out, or use quantization_bit: 4"
        )


def _name_of(keys: Mapping[str, Any]) -> str:
    return str(keys.get("quantization_method") or "bnb")


def _method_of(keys: Mapping[str, Any]) -> Method:
    name = _name_of(keys)
    if name in NOT_HERE:
        raise ConfigError(f"quantization_method: {name} is not for quantization_bit; {NOT_HERE[name]}")
    if name not in METHODS:
        raise ConfigError(
            f"quantization_method: expected {' or '.join(METHODS)}, found {name!r}{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]
