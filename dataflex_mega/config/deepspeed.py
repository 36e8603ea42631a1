"""A DeepSpeed configuration -> the keys with which this package lays out and trains the same run.

DeepSpeed itself is not used. The number of the ZeRO stage decides the layout, `auto` leaves a value to the configuration
of the run, a number is taken where the configuration has none, and what cannot be done is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_mega.config import deepspeed_schema as schema
from dataflex_mega.config.deepspeed_training import take_batch_sizes, take_gradients, take_optimizer, take_scheduler
from dataflex_mega.config.deepspeed_values import Ranks, Section, Translation, is_on
from dataflex_mega.config.launcher_keys import LauncherKeys, contradiction, show
from dataflex_mega.config.load import SUFFIXES, read_mapping
from dataflex_mega.errors import ConfigError, did_you_mean

KEY = "deepspeed"
STRATEGIES = ("", "shard_grad_op", "shard_grad_op", "full_shard")  # by ZeRO stage
NO_NVME = "NVMe offload is not there; device: cpu is"


def translate(value: Any, keys: LauncherKeys, ranks: Ranks, key: str = KEY) -> dict[str, Any]:
    """Add what a DeepSpeed configuration asks for to `keys` -> keys of Megatron, with `engine: megatron`.

    Args:
        value: the path of a JSON file, a JSON object as text, or a mapping.
        key: the key or variable that holds `value`, for messages.

    Raises:
        ConfigError: one line, for a file that cannot be read, a key that is unknown or not supported, and a value that the
            run's configuration contradicts.
    """
    config, label = read(value, key)
    work = Translation(label, keys, ranks)
    root = Section(label, "", config)
    _check_keys(root, work)
    _take_layout(root.section("zero_optimization"), work)
    _take_precision(root, work)
    take_gradients(root, work)
    take_batch_sizes(root, work)
    take_optimizer(root.section("optimizer"), work)
    take_scheduler(root.section("scheduler"), work)
    keys.notes.append(work.note)
    return work.megatron


def read(value: Any, key: str = KEY) -> tuple[dict[str, Any], str]:
    """(the configuration, a label for messages). Raises ConfigError naming `key` and the file."""
    if isinstance(value, Mapping):
        return dict(value), key
    if not isinstance(value, str | Path):
        raise ConfigError(f"{key}: expected the path of a JSON file or a mapping, found {value!r}")
    text = str(value).strip()
    try:
        if text.startswith("{"):
            loaded = json.loads(text)
            return loaded, key
        if not text.endswith(SUFFIXES) and Path(text).expanduser().is_file():
            raise ConfigError(f"{text}: expected a file that ends in .json")
        return read_mapping(text, key), f"{key}: {text}"
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(f"{key}: ") else f"{key}: {message}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key}: not JSON: {error.msg}") from error
    except RecursionError:
        name = "the text" if text.startswith("{") else text
        raise ConfigError(f"{key}: {name} is nested too deeply") from None


# -- keys --------------------------------------------------------------------------------------------------------------


def _check_keys(root: Section, work: Translation) -> None:
    """Raises ConfigError for unknown and refused keys; counts those that only tune DeepSpeed."""
    _refuse_unknown(root, schema.TOP_LEVEL)
    for name, known in schema.SECTIONS.items():
        section = root.at(name)
        if section is not None:
            _refuse_unknown(section, known)
    for key, instead in schema.REFUSED.items():
        if is_on(root.values.get(key)):
            raise ConfigError(f"{root.name(key)}: not supported; {instead}")
    zero = root.section("zero_optimization")
    for key, instead in schema.ZERO_REFUSED.items():
        if is_on(zero.values.get(key)):
            raise ConfigError(f"{zero.name(key)}: not supported; {instead}")
    for path, instead in schema.REFUSED_SIZES.items():
        outer, _, key = path.rpartition(".")
        section = root.at(outer) if outer else root
        if section is not None and section.integer(key, least=None, default=1) > 1:
            raise ConfigError(f"{section.name(key)}: {section.values[key]} is not supported; {instead}")
    if is_on(root.section("activation_checkpointing").values.get("cpu_checkpointing")):
        raise ConfigError(f"{root.name('activation_checkpointing.cpu_checkpointing')}: not supported; leave it out")
    tuning = [key for key in root.values if key in schema.TUNING]
    tuning += [key for key in ("activation_checkpointing",) if root.values.get(key)]
    tuning += [key for key in zero.values if key in schema.ZERO_TUNING]
    work.num_tuning = len(tuning)


def _refuse_unknown(section: Section, known: frozenset[str]) -> None:
    for key in section.values:
        if key not in known and key != schema.COMMENT:
            near = did_you_mean(str(key), known)
            raise ConfigError(f"{section.name(str(key))}: not a key of a DeepSpeed configuration{near}")


# -- layout ------------------------------------------------------------------------------------------------------------


def _take_layout(zero: Section, work: Translation) -> None:
    stage = zero.integer("stage", least=0, default=0)
    if stage > 3:
        raise ConfigError(f"{zero.name('stage')}: expected 0, 1, 2 or 3, found {stage}")
    optimizer, parameters = _offloads(zero, stage)
    for key in schema.GATHERS_WEIGHTS & set(zero.values):
        if zero.values[key] is False:
            work.clauses.append("the whole model is saved in any case")
    if work.ranks.engine == "megatron":
        _take_megatron_layout(zero, stage, (optimizer, parameters), work)
        return
    offload = optimizer or parameters
    words = STRATEGIES[stage] + " offload" * offload
    work.keys.take("fsdp", words, f"{zero.name('stage')}: {stage}")
    work.layout = f"fsdp: {words}{f' for ZeRO-{stage}' if stage < 3 else ''}" if words else "DistributedDataParallel"
    if offload and not parameters:
        work.clauses.append("parameters are offloaded too")
    if offload and _ratio(zero) < 1:
        work.clauses.append(f"everything is offloaded, not a share of {show(_ratio(zero))}")
    if offload and _pinned(zero) is False:
        work.take("fsdp_config", {"pin_memory": False}, f"{zero.name('offload_optimizer.pin_memory')}: false")


def _take_megatron_layout(zero: Section, stage: int, offloads: tuple[bool, bool], work: Translation) -> None:
    """ZeRO of any stage is Megatron's distributed optimizer; the model is shared by tensor and pipeline sizes."""
    optimizer, parameters = offloads
    if parameters:
        raise ConfigError(f"{zero.name('offload_param')}: engine: megatron does not do this; engine: fsdp does")
    if stage:
        work.take_megatron("use_distributed_optimizer", True, f"zero_optimization.stage: {stage}")
    if optimizer:
        work.take_megatron("optimizer_cpu_offload", True, "zero_optimization.offload_optimizer.device: cpu")
        share = _ratio(zero)
        work.take_megatron("optimizer_offload_fraction", share, f"zero_optimization.offload_optimizer.ratio: {share}")
    named = ", ".join(f"{key}: {show(value)}" for key, value in work.megatron.items())
    work.layout = f"{named} for ZeRO-{stage}" if named else "the optimizer is not distributed"
    if stage == 3:
        work.clauses.append("tensor and pipeline sizes share the model")


def _offloads(zero: Section, stage: int) -> tuple[bool, bool]:
    """Whether (optimizer state, parameters) are offloaded to the host."""
    found = []
    for name, old, least in (("offload_optimizer", "cpu_offload", 1), ("offload_param", "cpu_offload_params", 3)):
        section = zero.section(name)
        device = section.word("device", ("none", "cpu", "nvme"), "cpu" if is_on(zero.values.get(old)) else "none")
        if device == "nvme":
            raise ConfigError(f"{section.name('device')}: {NO_NVME}")
        if device == "cpu" and stage < least:
            allowed = "stage: 3" if least == 3 else "stage: 1, 2 or 3"
            raise ConfigError(f"{zero.name(name)}: needs {allowed}, found stage: {stage}")
        found.append(device == "cpu")
    return found[0], found[1]


def _ratio(zero: Section) -> float:
    return zero.section("offload_optimizer").number("ratio", 1.0)


def _pinned(zero: Section) -> bool | None:
    """True when either section asks for pinned memory, False when they only say no, None when they say nothing."""
    said = [zero.section(name).values.get("pin_memory") for name in ("offload_optimizer", "offload_param")]
    said = [value for value in said if value is not None]
    return None if not said else any(said)


# -- precision ---------------------------------------------------------------------------------------------------------


def _take_precision(root: Section, work: Translation) -> None:
    wanted = []
    for name, precision in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
        section = root.section(name)
        said = f"{section.name('enabled')}"
        enabled = section.values.get("enabled")
        if enabled in ("auto", None):
            continue
        if not isinstance(enabled, bool):
            raise ConfigError(f"{said}: expected auto, true or false, found {enabled!r}")
        if not enabled:
            work.keys.forbid_precision(precision, f"{said}: false")
            continue
        wanted.append(f"{said}: true")
        if work.keys.take_precision(precision, wanted[-1]):
            work.set_keys.append(f"{precision}: true")
    if len(wanted) > 1:
        raise ConfigError(contradiction(wanted[0], wanted[1]))
    masters = [root.section("fp16").values.get("fp16_master_weights_and_grads")]
    masters.append(root.section("bf16").values.get("bf16_master_weights_and_grads"))
    if any(map(is_on, masters)):
        work.clauses.append("main weights are float32")
    if work.keys.value("fp16"):
        _take_loss_scale(root.section("fp16"), work)


def _take_loss_scale(section: Section, work: Translation) -> None:
    """How the loss is scaled under fp16: keys of `fsdp_config`, which the FSDP engine acts on."""
    scale = section.number("loss_scale", 0.0)
    if scale < 0:
        raise ConfigError(f"{section.name('loss_scale')}: expected 0 or a positive number, found {show(scale)}")
    loss_scale: dict[str, Any] = {
        "initial_scale_power": section.integer("initial_scale_power", least=0, default=16),
        "loss_scale_window": section.integer("loss_scale_window", least=1, default=1000),
        "min_loss_scale": section.number("min_loss_scale", 1.0),
    }
    if scale:
        loss_scale = {"loss_scale": scale}
    if work.ranks.engine == "megatron":
        work.clauses.append("Megatron scales the loss as it does by default")
        return
    others = work.keys.taken.pop("fsdp_config", {})
    work.keys.taken["fsdp_config"] = {**others, **loss_scale}
    work.set_keys.append(", ".join(f"fsdp_config.{key}: {show(value)}" for key, value in loss_scale.items()))
    if not scale and section.integer("hysteresis", least=1, default=2) > 1:
        work.clauses.append("the scale is halved at the first overflow")
