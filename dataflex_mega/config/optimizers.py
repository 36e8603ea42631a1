"""Which optimizers a dynamic run takes, on which layout, and why not the others.

An optimizer is a name under `optim`, or one of LLaMA-Factory's `use_` keys. It is here with the layouts on which it gives
the losses of one process: FSDP2 shows it a rank's part of each matrix, which some optimizers cannot compute with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex_mega.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer needs. `whole`: why it cannot work on shards; None when it can."""

    package: str = ""  # to install; "" when torch, transformers or LLaMA-Factory has it
    module: str = ""  # of the package
    whole: str | None = None
    needs_targets: bool = False  # optim_target_modules


_BNB_WHOLE = "bitsandbytes updates whole parameters, not shards"
_BNB = Optimizer("bitsandbytes", "bitsandbytes", _BNB_WHOLE)
_MEANS = "its row and column means are those of whole matrices"
_BNB_NAMES = (
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
_GALORE = ("galore-torch", "galore_torch")
_APOLLO = ("apollo-torch", "apollo_torch")
_PROJECTION = "it projects whole gradients with a random matrix"
PLAIN_ADAM = ("adamw_torch", "adamw_torch_fused")

NAMES: dict[str, Optimizer] = {
    **dict.fromkeys((*PLAIN_ADAM, "sgd", "rmsprop", "adagrad"), Optimizer()),
    "adafactor": Optimizer(whole=_MEANS),
    **dict.fromkeys(_BNB_NAMES, _BNB),
    "stable_adamw": Optimizer("torch-optimi", "optimi"),
    "galore_adamw": Optimizer(*_GALORE, needs_targets=True),
    "galore_adafactor": Optimizer(*_GALORE, whole=_MEANS, needs_targets=True),
    "apollo_adamw": Optimizer(*_APOLLO, whole=_PROJECTION, needs_targets=True),
}
_IN_BACKWARD = "it updates parameters during the backward pass, before gradients are clipped and summed over ranks"
_8BIT_GALORE = "its 8-bit state needs a GPU and was not tried; use galore_adamw"
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(
        (
            "lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
        ),
        _IN_BACKWARD,
    ),
    "galore_adamw_8bit": _8BIT_GALORE,
    **dict.fromkeys(
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "it evaluates another model than it trains and has no learning-rate schedule",
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao beside peft was not tried; use adamw_8bit"),
    "grokadamw": "its signal of over-fitting is not part of a checkpoint; use adamw_torch",
    **dict.fromkeys(("adamw_apex_fused", "adamw_anyprecision"), "it was not tried; use adamw_torch_fused"),
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), "its device is not supported; use adamw_torch_fused"),
}  # fmt: skip
KEYS: dict[str, Optimizer] = {
    "use_muon": Optimizer(),
    "use_galore": Optimizer(*_GALORE),
    "use_apollo": Optimizer(*_APOLLO, whole=_PROJECTION),
    "use_adam_mini": Optimizer("adam-mini", "adam_mini"),
    "use_badam": Optimizer("badam", "badam"),
}
# Key -> what `optim` may be beside it, adamw_torch and its fused form aside.
BESIDE = {"use_galore": ("adafactor",)}
BADAM = "which parameters train changes during a run, and a checkpoint does not hold which; use finetuning_type: freeze"


def check_optimizer_keys(keys: Mapping[str, Any]) -> None:
    """Raises ConfigError for an optimizer that there is not, that cannot be here, or that contradicts another key."""
    name = str(keys.get("optim") or PLAIN_ADAM[0])
    asked = [key for key in KEYS if keys.get(key)]
    if len(asked) + bool(keys.get("loraplus_lr_ratio")) > 1:
        both = ", ".join([*asked, *(["loraplus_lr_ratio"] if keys.get("loraplus_lr_ratio") else [])])
        raise ConfigError(f"{both}: each is an optimizer of its own; keep one of them")
    _check_name(name)
    _check_targets(keys, name)
    if keys.get("loraplus_lr_ratio") and NAMES[name].needs_targets:
        raise ConfigError(f"loraplus_lr_ratio, optim: {name}: each groups the parameters; keep one of them")
    for key in asked:
        _check_key(keys, key, name)
    optimizer = KEYS[asked[0]] if asked else NAMES[name]
    if optimizer.module and importlib.util.find_spec(optimizer.module) is None:
        what = f"{asked[0]}: true" if asked else f"optim: {name}"
        raise ConfigError(
            f"{what} needs the package {optimizer.package}, which is not installed: "
            f"pip install --no-deps {optimizer.package}"
        )


def other_than_adam(keys: Mapping[str, Any]) -> str | None:
    """How the optimizer was asked for; None for torch's AdamW, whose moments gradient scores can read."""
    asked = next((key for key in KEYS if keys.get(key)), None)
    name = str(keys.get("optim") or PLAIN_ADAM[0])
    return f"{asked}: true" if asked else None if name in PLAIN_ADAM else name


def check_layout(keys: Mapping[str, Any], mode: str) -> None:
    """Raises ConfigError for an optimizer that cannot work on a layout: single, ddp or fsdp2."""
    asked = next((key for key in KEYS if keys.get(key)), None)
    name = str(keys.get("optim") or PLAIN_ADAM[0])
    optimizer = KEYS[asked] if asked else NAMES[name]
    if asked in BESIDE and name in BESIDE[asked]:
        optimizer = NAMES[name]
    if mode == "fsdp2" and optimizer.whole is not None:
        what = f"{asked} with optim: {name}" if asked in BESIDE else asked or f"optim: {name}"
        raise ConfigError(
            f"{what} does not go with fsdp: {optimizer.whole}; use adamw_torch, use_muon, or leave fsdp out"
        )


def check_visible_gpus(keys: Mapping[str, Any], visible: int, processes: int) -> None:
    """Raises ConfigError where Adam-mini, which gathers from as many processes as it sees GPUs, would wait for others."""
    if keys.get("use_adam_mini") and visible > 1 and visible != processes:
        raise ConfigError(
            f"use_adam_mini: it takes the {visible} visible GPUs for the number of processes, which is {processes}; "
            "let CUDA_VISIBLE_DEVICES show as many"
        )


def _check_name(name: str) -> None:
    if name in NOT_HERE:
        raise ConfigError(f"optim: dynamic training does not take {name}; {NOT_HERE[name]}")
    if name not in NAMES:
        raise ConfigError(f"optim: there is no {name!r}{did_you_mean(name, NAMES)}; there are {', '.join(NAMES)}")


def _check_targets(keys: Mapping[str, Any], name: str) -> None:
    targets = keys.get("optim_target_modules")
    if NAMES[name].needs_targets and not targets:
        raise ConfigError(f"optim: {name} needs optim_target_modules: names of linear layers, or all-linear")
    tuning = str(keys.get("finetuning_type", "lora"))
    if targets and tuning in ("lora", "oft"):
        raise ConfigError(f"optim_target_modules: {name} projects the gradients of whole matrices; {_whole(tuning)}")
    if targets and not NAMES[name].needs_targets:
        taking = ", ".join(key for key, optimizer in NAMES.items() if optimizer.needs_targets)
        raise ConfigError(f"optim_target_modules: optim {name} takes none; {taking} do")


def _whole(tuning: str) -> str:
    return f"finetuning_type: full or freeze, not {tuning}"


def _check_key(keys: Mapping[str, Any], key: str, name: str) -> None:
    tuning = str(keys.get("finetuning_type", "lora"))
    beside = (*PLAIN_ADAM, *BESIDE.get(key, ()))
    if key == "use_badam":
        raise ConfigError(f"use_badam: dynamic training does not do this; {BADAM}")
    if name not in beside:
        raise ConfigError(f"optim: {name} beside {key}: true has no effect or none that was tried; leave optim out")
    if key == "use_adam_mini" and tuning != "full":
        raise ConfigError(f"use_adam_mini: it divides matrices by attention heads; finetuning_type: full, not {tuning}")
    if key in ("use_galore", "use_apollo") and tuning in ("lora", "oft"):
        raise ConfigError(f"{key}: it projects the gradients of whole matrices; {_whole(tuning)}")
    if keys.get(f"{key.removeprefix('use_')}_layerwise"):
        raise ConfigError(f"{key.removeprefix('use_')}_layerwise: dynamic training does not do this; {_IN_BACKWARD}")
    if keys.get("optim_args"):
        raise ConfigError(f"optim_args: {key}: true takes none; its own keys begin with {key.removeprefix('use_')}_")
