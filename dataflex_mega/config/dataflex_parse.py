"""The keys of config.dataflex_arguments, parsed: typed, checked against each other, turned into roles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dataflex_mega.plugins as plugins
from dataflex_mega.config import components, pipelines, proportions
from dataflex_mega.config.component_parameters import Spec
from dataflex_mega.config.components import ROLE_OF_TYPE
from dataflex_mega.config.dataflex_arguments import LIMITS, ROLES, RunArguments
from dataflex_mega.config.pipelines import Pipeline
from dataflex_mega.config.roles import ResolvedRoles, resolve_roles
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.coercion import coerce
from dataflex_mega.schema.constraints import field_hints

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
# The keys that have no effect without a role. The others are options of the engine, or always have an effect.
ROLE_KEYS = (
    "component_name", "warmup_step", "update_step", "update_times", "static_mix", "train_step", "freeze_gate",
    "early_stopping_min_delta", "mixture_sample_rule", "init_mixture_proportions", "init_mixture_proportions_file",
    "mixer_eval_dataset", "candidate_fraction", "score_reuse", *LIMITS, "reference_model", "reference_cache",
    "reference_dtype", "plugins", "pipeline", *ROLES,
)  # fmt: skip
ENGINE_OPTIONS = (
    "weight_scope", "loss_normalization", "on_non_finite", "resume_ignore", "score_batch_size", "prefetch", "tensorboard",
    "verify", "save_on_signal", "save_hf_checkpoints",
)  # fmt: skip
# Those of them that would change what is trained: refused in static training. DataFlex ignores the others and says so.
DYNAMIC_ONLY = {
    **dict.fromkeys((*ROLES, "pipeline"), "drop train_type or choose dynamic_*"),
    "static_mix": "choose train_type: dynamic_mix",
    "init_mixture_proportions": "choose train_type: dynamic_mix",
    "init_mixture_proportions_file": "choose train_type: dynamic_mix",
    **dict.fromkeys(LIMITS, "choose train_type: dynamic_mix"),
    "train_step": "use max_steps",
    "freeze_gate": "choose a dynamic train_type",
    "early_stopping_min_delta": "choose a dynamic train_type",
}
SIMILAR_KEYS = {"warmup_step": "; the learning rate's warm-up is warmup_steps", "train_step": "; or use max_steps"}


@dataclass(frozen=True)
class ParsedKeys:
    """The package's own keys of a configuration, typed and checked."""

    arguments: RunArguments
    roles: ResolvedRoles
    notes: tuple[str, ...]  # messages for the user, one line each


def parse(values: Mapping[str, Any], uses_own_loop: bool = False) -> ParsedKeys:
    """Type and check our keys of a configuration.

    `uses_own_loop`: static training runs in the package's own loop, as with engine: megatron, and uses the engine's options.

    Raises ConfigError naming the key for a wrong type, a value out of range, an algorithm or parameter that does not
    exist, keys that contradict each other, and keys that would have no effect.
    """
    hints = field_hints(RunArguments)
    typed = {key: coerce(key, value, hints[key]) for key, value in values.items()}
    typed["train_type"] = _train_type(typed)
    _read_initial_proportions(typed)
    if typed["train_type"] == "static":
        unused_keys = _check_static(typed, "train_type" in values)
        unused_keys += [] if uses_own_loop else _changed(typed, ENGINE_OPTIONS)
        notes = (f"static training does not use {', '.join(unused_keys)}",) if unused_keys else ()
        return ParsedKeys(RunArguments(**typed), ResolvedRoles(), notes)
    return _parse_dynamic(typed)


def _parse_dynamic(typed: dict[str, Any]) -> ParsedKeys:
    notes = []
    if typed.get("static_mix") and typed.get("selector") is None:
        notes = _static_mix_notes(typed)
        typed["update_step"] = 0  # so that the length of the run is train_step or epochs, as in DataFlex
    if typed.get("mixer_eval_dataset") is not None:
        notes.append("mixer_eval_dataset: no mixer reads it yet")
    plugins.load_modules(typed.get("plugins", []))
    if components.stands_for_packaged(typed.get("components_cfg_file")):
        file = typed.pop("components_cfg_file")
        notes.append(f"components_cfg_file: {file} is not here; the packaged file has its entries")
    pipeline = _read_pipeline(typed)
    component_notes = _set_run_keys(typed, pipeline)
    arguments = RunArguments(**typed)
    roles = resolve_roles(arguments, pipeline)
    renaming_notes = _check_roles(arguments, roles)
    return ParsedKeys(arguments, roles, (*notes, *component_notes, *roles.notes, *renaming_notes))


def _read_initial_proportions(typed: dict[str, Any]) -> None:
    """Set init_mixture_proportions, with sum 1, from the list or the file."""
    file = typed.get("init_mixture_proportions_file")
    if file is not None and typed["train_type"] != "static":
        if typed.get("init_mixture_proportions") is not None:
            raise ConfigError("init_mixture_proportions_file: init_mixture_proportions is set too; drop one")
        if not proportions.is_manifest(file):  # a corpus needs the datasets' names
            typed["init_mixture_proportions"] = proportions.read(file)
    if typed.get("init_mixture_proportions") is not None:
        total = math.fsum(typed["init_mixture_proportions"])
        typed["init_mixture_proportions"] = [x / total for x in typed["init_mixture_proportions"]]


def _read_pipeline(typed: Mapping[str, Any]) -> Pipeline | None:
    """The pipeline of `dynamic_lego`, whose stages are its roles: no key of a role goes beside it."""
    if typed["train_type"] != pipelines.LEGO:
        if typed.get("pipeline") is not None:
            raise ConfigError(f"pipeline: needs train_type: {pipelines.LEGO}, found {typed['train_type']}")
        return None
    path, name = typed.get("components_cfg_file"), typed.get("component_name")
    pipeline = pipelines.read_pipeline(path, name, typed.get("pipeline"))
    for key in (*ROLES, "static_mix"):
        if typed.get(key):
            raise ConfigError(f"{key}: train_type: {pipelines.LEGO} takes its roles from pipeline.stages; drop {key}")
    return pipeline


def _set_run_keys(typed: dict[str, Any], pipeline: Pipeline | None) -> list[str]:
    """Set the keys that the picked component carries as parameters, as DataFlex's files do. -> notes."""
    role, name = ROLE_OF_TYPE.get(typed["train_type"]), typed.get("component_name")
    if pipeline is not None:
        run_keys, notes = pipeline.run_keys, pipeline.notes
    elif role is None or name is None or typed.get("static_mix"):
        return []
    else:
        component = components.read_component(typed.get("components_cfg_file"), role, name)
        run_keys, notes = component.run_keys, component.notes
    for key, value in run_keys.items():
        if typed.get(key, value) != value:
            raise ConfigError(
                f"{key}: {typed[key]!r} contradicts component_name {name!r}, which says {value!r}; drop one"
            )
        typed[key] = value
    return list(notes)


def _train_type(values: Mapping[str, Any]) -> str:
    train_type = values.get("train_type")
    if train_type is None:
        on = any(values.get(role) is not None for role in ROLES) or values.get("static_mix")
        return "dynamic" if on else "static"
    name = ALIASES.get(train_type, train_type)
    if name not in TRAIN_TYPES:
        near = did_you_mean(train_type, [*TRAIN_TYPES, *ALIASES])
        raise ConfigError(f"train_type: expected one of {', '.join(TRAIN_TYPES)}, found {train_type!r}{near}")
    return name


def _changed(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that have another value than their default."""
    defaults = RunArguments()
    return [key for key in keys if key in values and values[key] != getattr(defaults, key)]


def _check_static(values: Mapping[str, Any], explicit: bool) -> list[str]:
    """Static training heeds none of the role keys, which are returned. Asked for, that is noted; derived, they were meant to
    do something."""
    unused_keys = _changed(values, ROLE_KEYS)
    if not explicit and unused_keys:
        key = unused_keys[0]
        raise ConfigError(
            f"{key}: has no effect without a role; set {', '.join(ROLES)} or train_type{SIMILAR_KEYS.get(key, '')}"
        )
    for key in unused_keys:
        if key in DYNAMIC_ONLY:
            raise ConfigError(f"{key}: has no effect with train_type: {values['train_type']}; {DYNAMIC_ONLY[key]}")
    return unused_keys


def _static_mix_notes(values: Mapping[str, Any]) -> list[str]:
    unused_keys = _changed(values, ("component_name", "update_step", "update_times"))
    return [f"static_mix: true keeps the proportions; {', '.join(unused_keys)} not used"] if unused_keys else []


def _check_roles(arguments: RunArguments, roles: ResolvedRoles) -> list[str]:
    """The roles exist, with these parameters, and the schedule lets them act -> notes on parameters with a former name."""
    picked, pipeline, specs = ROLE_OF_TYPE.get(arguments.train_type), roles.pipeline, roles.specs
    if picked is None and pipeline is None and arguments.component_name is not None:
        types = ", ".join(ROLE_OF_TYPE)
        raise ConfigError(
            f"component_name: {arguments.component_name!r} needs a train_type that says its role: {types}"
        )
    if picked is not None and picked not in specs:
        names = ", ".join(components.entries(arguments.components_cfg_file, picked))
        raise ConfigError(f"train_type: {arguments.train_type} needs component_name (one of {names}) or {picked}")
    if not specs:
        raise ConfigError(f"train_type: dynamic needs at least one of {', '.join(ROLES)}")
    from dataflex_mega.registry import validate  # not at the top: it imports torch

    notes = [note for role, spec in roles.all_specs() for note in validate(role, spec)]
    _check_mixture(arguments, specs.get("mixer"))
    _check_limits(arguments, specs)
    _check_candidates(arguments, specs.get("selector"))
    if pipeline is not None and arguments.candidate_fraction < 1 and pipeline.role_stages["selector"].mode == "filter":
        raise ConfigError("candidate_fraction: below 1 does not go with mode: filter, which compares the whole pool")
    moving = _moving_role(roles)
    if pipeline is None and moving is not None and arguments.update_step < 1:
        name = specs[moving]["name"]
        raise ConfigError(f"update_step: must be >= 1 for {moving} {name} to act, found {arguments.update_step}")
    return notes


def _moving_role(roles: ResolvedRoles) -> str | None:
    """A role that acts at updates."""
    if "selector" in roles.specs:
        return "selector"
    if "mixer" in roles.specs and roles.specs["mixer"]["name"] != "static":
        return "mixer"
    return "reorder" if roles.reorder is not None and roles.reorder.kind == "dynamic" else None


def _check_limits(arguments: RunArguments, specs: Mapping[str, Spec]) -> None:
    """Limits are those of a mixer's proportions, and epochs are counted in draws from the whole pool."""
    for key in LIMITS:
        if getattr(arguments, key) == []:
            raise ConfigError(f"{key}: expected a number, or one for each dataset, found []")
        if getattr(arguments, key) is not None and "mixer" not in specs:
            raise ConfigError(f"{key}: has no effect without a mixer; mixer: static draws in fixed proportions")
    for role, why in (("selector", "draws its choice once each"), ("reorder", "serves each sample once per pass")):
        if arguments.max_epochs is not None and role in specs:
            raise ConfigError(f"max_epochs: does not go with a {role}, which {why}; drop one")


def _check_candidates(arguments: RunArguments, selector: Spec | None) -> None:
    """A part of the pool can be considered, and is by a selector."""
    share = arguments.candidate_fraction
    if share == 1 and arguments.score_reuse == "latest":
        raise ConfigError(
            "score_reuse: latest has no effect with candidate_fraction: 1, where every update scores all samples"
        )
    if share < 1 and selector is None:
        raise ConfigError("candidate_fraction: has no effect without a selector")
    if share < 1 and selector is not None and selector["name"] == "delta_loss":
        raise ConfigError(
            "candidate_fraction: below 1 does not go with selector delta_loss, which compares the whole pool"
        )
    if share < 1 and selector is not None and selector["name"] == "less" and selector.get("mode") == "store":
        raise ConfigError(
            "candidate_fraction: below 1 does not go with a gradient store of the whole pool; use mode: streaming"
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
        numbers = (mixer or {}).get(key)
        if numbers is None or initial is None:
            continue
        same = len(numbers) == len(initial) and all(
            math.isclose(x / sum(numbers), y) for x, y in zip(numbers, initial, strict=True)
        )
        if not same:
            raise ConfigError(f"mixer.{key}: {numbers} differs from init_mixture_proportions {initial}; drop one")
