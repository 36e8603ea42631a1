"""What the keys of config.arguments come to: parsed, checked against each other, turned into roles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from dataflex_mega import plugins
from dataflex_mega.config import components, pipelines, proportions
from dataflex_mega.config.arguments import MOST, ROLES, RunArguments, check_proportions
from dataflex_mega.config.components import ROLE_OF_TYPE, Spec
from dataflex_mega.config.values import fit
from dataflex_mega.errors import ConfigError, did_you_mean

TRAIN_TYPES = (
    "static",
    "dynamic_select",
    "dynamic_mix",
    "dynamic_reorder",
    "dynamic_weight",
    pipelines.LEGO,
    "dynamic",
)
ALIASES = {"static_full": "static", "dynamic_weighting": "dynamic_weight"}
# The keys that mean nothing without a role; the other ones of ours are options of the engine or mean something always.
ROLE_KEYS = (
    "component_name", "warmup_step", "update_step", "update_times", "static_mix", "train_step", "freeze_gate",
    "early_stopping_min_delta", "mixture_sample_rule", "init_mixture_proportions", "init_mixture_proportions_file",
    "mixer_eval_dataset", "candidates", "rescore", *MOST, "reference_model", "reference_cache", "reference_dtype",
    "plugins", "pipeline", *ROLES,
)  # fmt: skip
ENGINE_OPTIONS = (
    "lookahead", "loss_normalization", "nan_loss", "resume_ignore", "score_batch_size", "prefetch", "tensorboard"
)  # fmt: skip
# Of those, the ones whose loss would change what is trained; DataFlex ignores the others in static training, and says so.
NOT_STATIC = {
    **dict.fromkeys((*ROLES, "pipeline"), "drop train_type or choose dynamic_*"),
    "static_mix": "choose train_type: dynamic_mix",
    "init_mixture_proportions": "choose train_type: dynamic_mix",
    "init_mixture_proportions_file": "choose train_type: dynamic_mix",
    **dict.fromkeys(MOST, "choose train_type: dynamic_mix"),
    "train_step": "use max_steps",
    "freeze_gate": "choose a dynamic train_type",
    "early_stopping_min_delta": "choose a dynamic train_type",
}
LOOKALIKES = {"warmup_step": "; the learning rate's warm-up is warmup_steps", "train_step": "; or use max_steps"}


def parse(values: Mapping[str, Any], own_loop: bool = False) -> tuple[RunArguments, list[str]]:
    """Our keys of a configuration -> (checked arguments, notes for the user).

    `own_loop`: static training is our own too, as with engine: megatron, and heeds the engine's options.

    Raises ConfigError naming the key for a wrong type, a value out of range, an algorithm or parameter that does not
    exist, keys that contradict each other, and keys that would have no effect.
    """
    annotations = {f.name: str(f.type) for f in fields(RunArguments)}
    typed = {key: fit(key, value, annotations[key]) for key, value in values.items()}
    typed["train_type"] = _train_type(typed)
    check_proportions("init_mixture_proportions", typed.get("init_mixture_proportions"))
    if typed.get("init_mixture_proportions_file") is not None and typed["train_type"] != "static":
        if typed.get("init_mixture_proportions") is not None:
            raise ConfigError("init_mixture_proportions_file: init_mixture_proportions is set too; drop one")
        if not proportions.is_manifest(typed["init_mixture_proportions_file"]):  # a corpus needs the datasets' names
            typed["init_mixture_proportions"] = proportions.read(typed["init_mixture_proportions_file"])
    if typed.get("init_mixture_proportions") is not None:
        total = math.fsum(typed["init_mixture_proportions"])
        typed["init_mixture_proportions"] = [x / total for x in typed["init_mixture_proportions"]]
    if typed["train_type"] == "static":
        idle = _check_static(typed, "train_type" in values) + ([] if own_loop else _set(typed, ENGINE_OPTIONS))
        return RunArguments(**typed), [f"static training does not use {', '.join(idle)}"] if idle else []
    notes = []
    if typed.get("static_mix") and typed.get("selector") is None:
        notes = _static_mix_notes(typed)
        typed["update_step"] = 0  # so that the length of the run is train_step or epochs, as in DataFlex
    if typed.get("mixer_eval_dataset") is not None:
        notes.append("mixer_eval_dataset: no mixer reads it yet")
    plugins.load(typed.get("plugins", []))
    if components.stands_for_packaged(typed.get("components_cfg_file")):
        notes.append(
            f"components_cfg_file: {typed.pop('components_cfg_file')} is not here; the packaged file has its entries"
        )
    notes += _lift(typed)
    _check_lego(typed)
    arguments = RunArguments(**typed)
    _check_roles(arguments)
    return arguments, notes


def _lift(typed: dict[str, Any]) -> list[str]:
    """Set the keys that the picked component carries as parameters, as DataFlex's files do. -> notes."""
    role, name = ROLE_OF_TYPE.get(typed["train_type"]), typed.get("component_name")
    path = typed.get("components_cfg_file")
    if typed["train_type"] == pipelines.LEGO:
        pipeline = pipelines.read(path, name, typed.get("pipeline"))
        keys, notes = pipeline.keys, list(pipeline.notes)
    elif role is None or name is None or typed.get("static_mix"):
        return []
    else:
        keys, notes = components.lifted(path, role, name)
    for key, value in keys.items():
        if typed.get(key, value) != value:
            raise ConfigError(
                f"{key}: {typed[key]!r} contradicts component_name {name!r}, which says {value!r}; drop one"
            )
        typed[key] = value
    return notes


def _check_lego(typed: Mapping[str, Any]) -> None:
    """The roles of a pipeline are its stages, and only those of a pipeline."""
    if typed["train_type"] != pipelines.LEGO:
        if typed.get("pipeline") is not None:
            raise ConfigError(f"pipeline: needs train_type: {pipelines.LEGO}, found {typed['train_type']}")
        return
    for key in (*ROLES, "static_mix"):
        if typed.get(key):
            raise ConfigError(f"{key}: train_type: {pipelines.LEGO} takes its roles from pipeline.stages; drop {key}")


def _train_type(values: Mapping[str, Any]) -> str:
    given = values.get("train_type")
    if given is None:
        on = any(values.get(role) is not None for role in ROLES) or values.get("static_mix")
        return "dynamic" if on else "static"
    name = ALIASES.get(given, given)
    if name not in TRAIN_TYPES:
        near = did_you_mean(given, [*TRAIN_TYPES, *ALIASES])
        raise ConfigError(f"train_type: expected one of {', '.join(TRAIN_TYPES)}, found {given!r}{near}")
    return name


def _set(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that have another value than their default."""
    defaults = RunArguments()
    return [key for key in keys if key in values and values[key] != getattr(defaults, key)]


def _check_static(values: Mapping[str, Any], explicit: bool) -> list[str]:
    """Static training heeds none of the role keys, which are returned. Asked for, that is noted; derived, they were meant to
    do something."""
    idle = _set(values, ROLE_KEYS)
    if not explicit and idle:
        key = idle[0]
        raise ConfigError(
            f"{key}: has no effect without a role; set {', '.join(ROLES)} or train_type{LOOKALIKES.get(key, '')}"
        )
    for key in idle:
        if key in NOT_STATIC:
            raise ConfigError(f"{key}: has no effect with train_type: {values['train_type']}; {NOT_STATIC[key]}")
    return idle


def _static_mix_notes(values: Mapping[str, Any]) -> list[str]:
    idle = _set(values, ("component_name", "update_step", "update_times"))
    return [f"static_mix: true keeps the proportions; {', '.join(idle)} not used"] if idle else []


def _check_roles(arguments: RunArguments) -> None:
    """The roles exist, with these parameters, and the schedule lets them do something."""
    roles = arguments.roles()
    wanted, pipeline = ROLE_OF_TYPE.get(arguments.train_type), arguments.stages()
    if wanted is None and pipeline is None and arguments.component_name is not None:
        types = ", ".join(ROLE_OF_TYPE)
        raise ConfigError(
            f"component_name: {arguments.component_name!r} needs a train_type that says its role: {types}"
        )
    if wanted is not None and roles[wanted] is None:
        names = ", ".join(components.entries(arguments.components_cfg_file, wanted))
        raise ConfigError(f"train_type: {arguments.train_type} needs component_name (one of {names}) or {wanted}")
    if not any(roles.values()):
        raise ConfigError(f"train_type: dynamic needs at least one of {', '.join(ROLES)}")
    from dataflex_mega.registry import validate  # here, since it imports torch

    for role, spec in [*roles.items(), *(("weighter", spec) for spec in (pipeline.weighing[1:] if pipeline else ()))]:
        if spec is not None:
            validate(role, spec)
    mixer = roles["mixer"]
    _check_mixture(arguments, mixer)
    _check_limits(arguments, roles)
    _check_candidates(arguments, roles["selector"])
    if pipeline is not None and arguments.candidates < 1 and pipeline.chain["selector"].mode == "filter":
        raise ConfigError("candidates: below 1 does not go with mode: filter, which compares the whole pool")
    order = arguments.order()
    moving = "selector" if roles["selector"] else "mixer" if mixer and mixer["name"] != "static" else None
    moving = moving or ("reorder" if order is not None and order.kind == "dynamic" else None)
    if pipeline is None and moving and arguments.update_step < 1:
        name = (roles[moving] or {})["name"]
        raise ConfigError(f"update_step: must be >= 1 for {moving} {name} to act, found {arguments.update_step}")


def _check_limits(arguments: RunArguments, roles: Mapping[str, Spec | None]) -> None:
    """Limits are those of a mixer's proportions, and epochs are counted in draws from the whole pool."""
    for key in MOST:
        if getattr(arguments, key) is not None and roles["mixer"] is None:
            raise ConfigError(f"{key}: has no effect without a mixer; mixer: static draws in fixed proportions")
    for role, why in (("selector", "draws its choice once each"), ("reorder", "serves each sample once a pass")):
        if arguments.max_epochs is not None and roles[role] is not None:
            raise ConfigError(f"max_epochs: does not go with a {role}, which {why}; drop one")


def _check_candidates(arguments: RunArguments, selector: Spec | None) -> None:
    """A part of the pool can be considered, and is by a selector."""
    share = arguments.candidates
    if not 0 < share <= 1:
        raise ConfigError(f"candidates: must be > 0 and <= 1, found {share}")
    if share == 1 and arguments.rescore == "incremental":
        raise ConfigError(
            "rescore: incremental has no effect with candidates: 1, where every update scores all samples"
        )
    if share < 1 and selector is None:
        raise ConfigError("candidates: has no effect without a selector")
    if share < 1 and selector is not None and selector["name"] == "delta_loss":
        raise ConfigError("candidates: below 1 does not go with selector delta_loss, which compares the whole pool")
    if share < 1 and selector is not None and selector["name"] == "less" and selector.get("mode") == "store":
        raise ConfigError(
            "candidates: below 1 does not go with a gradient store of the whole pool; use mode: streaming"
        )


def _check_mixture(arguments: RunArguments, mixer: Spec | None) -> None:
    """Initial proportions, the sampling rule and the mixer do not contradict each other."""
    rule, initial = arguments.mixture_sample_rule, arguments.init_mixture_proportions
    if rule in ("stratified", "uniform"):
        if initial is not None or arguments.init_mixture_proportions_file is not None:
            key = "init_mixture_proportions" if initial is not None else proportions.KEY
            raise ConfigError(f"{key}: has no effect with mixture_sample_rule: {rule}; use mixture")
        if mixer is not None and (mixer["name"] != "static" or mixer.get("proportions") is not None):
            raise ConfigError(
                f"mixture_sample_rule: {rule} fixes the proportions, mixer {mixer['name']} could not set them; use mixture"
            )
    for key in ("proportions", "initial_proportions"):
        own = (mixer or {}).get(key)
        if own is None or initial is None:
            continue
        same = len(own) == len(initial) and all(
            math.isclose(x / sum(own), y) for x, y in zip(own, initial, strict=True)
        )
        if not same:
            raise ConfigError(f"mixer.{key}: {own} differs from init_mixture_proportions {initial}; drop one")
