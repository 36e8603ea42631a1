"""`train_type: dynamic_lego`: stages, each an algorithm of one role with its own update schedule, in DataFlex's layout.

    stages:
      - {family: selector, component: loss, mode: filter, keep_ratio: 0.5, warmup_step: 10, every: 200}
      - {family: mixer, component: odm, every: 50}
      - {family: reorder, component: dynamic_saw, every: 50}
      - {family: weighter, component: loss, warmup_step: 10}

Select, Mix and Reorder act in this order, at most one of each; the weights of all weighters multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dataflex_mega.config import components
from dataflex_mega.config.component_parameters import Spec, drop_unused
from dataflex_mega.config.components import SECTIONS
from dataflex_mega.config.reorder_arguments import ReorderArguments, read_reorder
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.coercion import coerce
from dataflex_mega.schema.constraints import Range, field_hints

LEGO = "dynamic_lego"
ACTING_ROLES = ("selector", "mixer", "reorder")
ONLY_FOR = {"mode": "selector", "keep_ratio": "selector", "allow_replacement": "mixer"}
UNUSED = {
    "seed": "data_seed names all random choices",
    "score_num_workers": "candidates are read by the loader of the run",
}


@dataclass(frozen=True)
class StageArguments:
    """The keys of one stage of a preset."""

    family: Literal["selector", "mixer", "reorder", "weighter"] = field(metadata={"help": "its role"})
    component: str | dict[str, Any] = field(
        metadata={"help": "an entry of the components file, or a specification as under the role's key"}
    )
    enabled: bool = field(default=True, metadata={"help": "false leaves the stage out"})
    warmup_step: Annotated[int, Range(ge=0)] = field(default=0, metadata={"help": "steps before it begins to act"})
    every: Annotated[int, Range(ge=1)] = field(
        default=1, metadata={"help": "steps from one of its decisions to the next"}
    )
    score_max_age: Annotated[int, Range(ge=0)] = field(
        default=0, metadata={"help": "how many steps old a shared loss may be"}
    )
    mode: Literal["filter", "draw"] = field(
        default="filter",
        metadata={
            "help": (
                "`filter`: what is chosen is the pool of the stages that follow. `draw`: it is what is trained until the "
                "next selection"
            )
        },
    )
    keep_ratio: Annotated[float, Range(gt=0, le=1)] = field(
        default=0.5, metadata={"help": "share of the pool that a filter keeps"}
    )
    allow_replacement: bool = field(
        default=False, metadata={"help": "DataFlex's; a row comes again when its domain is used up"}
    )


@dataclass(frozen=True)
class PipelineArguments:
    """The parameters of a pipeline preset in a components file."""

    stages: list[Any] = field(default_factory=list, metadata={"help": "the stages, in any order"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of the files of selections and of losses; None: in `output_dir`"}
    )
    score_batch_size: Annotated[int | None, Range(ge=1)] = field(
        default=None, metadata={"help": "as the key of the run"}
    )
    score_num_workers: int | None = field(default=None, metadata={"help": "DataFlex's; not used"})
    seed: int | None = field(default=None, metadata={"help": "DataFlex's; not used"})
    save_plans: bool = field(
        default=False, metadata={"help": "write `scoreboard_step_N.json`: the losses known of the samples of each plan"}
    )


@dataclass(frozen=True)
class Pipeline:
    """The stages of a preset, by role, parsed and checked."""

    arguments: PipelineArguments
    role_stages: dict[str, StageArguments]  # by family, the active ones of ACTING_ROLES
    weighter_stages: tuple[StageArguments, ...]
    specs: dict[str, Spec]  # by family, of role_stages; that of a reorder is its pattern's alone
    reorder: ReorderArguments | None
    weighter_specs: tuple[Spec, ...]
    run_keys: dict[str, Any]  # keys of the run that components carry as parameters
    notes: tuple[str, ...]

    def identity(self) -> list[dict[str, Any]]:
        """What decides when and how stages act."""
        decisive = ("family", "warmup_step", "every", "score_max_age", "mode", "keep_ratio")
        stages = (*self.role_stages.values(), *self.weighter_stages)
        return [{key: getattr(stage, key) for key in decisive} for stage in stages]


@dataclass
class _Builder:
    """Collects what components carry beside their parameters."""

    path: str | None  # of the components file
    run_keys: dict[str, Any]
    notes: list[str]

    def spec(self, stage: StageArguments) -> Spec:
        """The specification of a stage's component. Raises ConfigError for one that the file does not have."""
        assert stage.family in SECTIONS
        if not isinstance(stage.component, str):
            spec, notes = drop_unused(
                stage.family, components.flatten_spec(stage.family, stage.component), stage.family
            )
            self.notes.extend(notes)
            return spec
        known = components.entries(self.path, stage.family)
        if stage.component not in known:
            hint = f"{did_you_mean(stage.component, known)}; there is {', '.join(known) or 'none'}"
            raise ConfigError(f"pipeline.stages: no {stage.family} component {stage.component!r}{hint}")
        component = components.read_component(self.path, stage.family, stage.component)
        for key, value in component.run_keys.items():
            self.run_keys.setdefault(key, value)
        self.notes.extend(component.notes)
        return component.spec


def read_pipeline(path: str | None, name: str | None, changes: str | Mapping[str, Any] | None) -> Pipeline:
    """The pipeline of a preset of a components file, or of the key `pipeline`, or of a preset with changes by that key.

    Raises ConfigError naming the stage and key.
    """
    arguments = _arguments(_parameters(path, name, changes))
    stages = [_stage(number, stage) for number, stage in enumerate(arguments.stages)]
    enabled = [stage for stage in stages if stage.enabled]
    notes = [f"pipeline.{key} is not used: {why}" for key, why in UNUSED.items() if getattr(arguments, key) is not None]
    role_stages = _role_stages(enabled, notes)
    weighter_stages = tuple(stage for stage in enabled if stage.family == "weighter")
    builder = _Builder(path, {}, notes)
    if arguments.score_batch_size is not None:
        builder.run_keys["score_batch_size"] = arguments.score_batch_size
    specs, reorder = {family: builder.spec(stage) for family, stage in role_stages.items()}, None
    if "reorder" in specs:
        specs["reorder"], reorder = read_reorder(specs["reorder"])
    weighter_specs = tuple(builder.spec(stage) for stage in weighter_stages)
    if not enabled:
        raise ConfigError("pipeline.stages: at least one must be present and enabled")
    notes += _unused_stage_keys(enabled)
    return Pipeline(
        arguments, role_stages, weighter_stages, specs, reorder, weighter_specs, builder.run_keys, tuple(notes)
    )


def preset_names(path: str | None) -> list[str]:
    """The presets of a components file."""
    return [str(name) for name in components.read_components(path).get(components.PIPELINES) or {}]


def _arguments(given: Mapping[str, Any]) -> PipelineArguments:
    hints = field_hints(PipelineArguments)
    _refuse_unknown("pipeline", given, hints)
    return PipelineArguments(**{key: coerce(f"pipeline.{key}", value, hints[key]) for key, value in given.items()})


def _unused_stage_keys(enabled: list[StageArguments]) -> list[str]:
    """Notes on keys of stages that change nothing."""
    of_step = [stage.every for stage in enabled if stage.family == "weighter" and stage.every > 1]
    return [
        *(f"weighter stage: every {every} is not used: weights are those of each step" for every in of_step),
        *(
            "mixer stage: allow_replacement is not used: no row comes twice before its domain is used up"
            for stage in enabled
            if stage.allow_replacement
        ),
    ]


def _parameters(path: str | None, name: str | None, changes: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(changes, str):
        if name is not None and name != changes:
            raise ConfigError(f"pipeline: {changes} differs from component_name {name!r}; drop one")
        name, changes = changes, None
    if name is None and changes is None:
        raise ConfigError(
            f"train_type: {LEGO} needs component_name (one of {', '.join(preset_names(path))}) or pipeline with stages"
        )
    preset: dict[str, Any] = {}
    if name is not None:
        data, where = components.read_components(path), path or "the packaged components file"
        if name not in preset_names(path):
            hint = f"{did_you_mean(name, preset_names(path))}; there is {', '.join(preset_names(path)) or 'none'}"
            raise ConfigError(f"component_name: no pipeline {name!r} in {where}{hint}")
        preset = components.flatten_spec("pipeline", components.resolve(data, where)[components.PIPELINES][name])
        preset.pop("name", None)
    changed = {} if changes is None else components.flatten_spec("pipeline", changes)
    return {**preset, **{key: value for key, value in changed.items() if key != "name"}}


def _stage(number: int, given: Any) -> StageArguments:
    where = f"pipeline.stages[{number}]"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a mapping with family and component, found {given!r}")
    hints = field_hints(StageArguments)
    _refuse_unknown(where, given, hints)
    for key in ("family", "component"):
        if key not in given:
            raise ConfigError(f"{where}.{key}: missing")
    stage = StageArguments(**{key: coerce(f"{where}.{key}", value, hints[key]) for key, value in given.items()})
    for key, family in ONLY_FOR.items():
        if key in given and stage.family != family:
            raise ConfigError(f"{where}.{key}: only for family {family}, found {stage.family}")
    return stage


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where}.{key}: unknown key{did_you_mean(str(key), known)}; it may have {', '.join(known)}"
            )


def _role_stages(enabled: list[StageArguments], notes: list[str]) -> dict[str, StageArguments]:
    """The stages of ACTING_ROLES by family, in its order."""
    given = [stage.family for stage in enabled if stage.family in ACTING_ROLES]
    for family in ACTING_ROLES:
        if given.count(family) > 1:
            raise ConfigError(f"pipeline.stages: {given.count(family)} of family {family}; at most one can be enabled")
    right = [family for family in ACTING_ROLES if family in given]
    if given != right:
        notes.append(f"pipeline.stages: {', '.join(given)} act in the order {', '.join(right)}")
    by_family = {stage.family: stage for stage in enabled}
    return {family: by_family[family] for family in right}
