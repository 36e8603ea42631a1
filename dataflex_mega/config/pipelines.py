"""`train_type: dynamic_lego`: stages, each an algorithm of one role with a clock of its own, in DataFlex's layout.

    stages:
      - {family: selector, component: loss, mode: filter, keep_ratio: 0.5, warmup_step: 10, every: 200}
      - {family: mixer, component: odm, every: 50}
      - {family: reorder, component: dynamic_saw, every: 50}
      - {family: weighter, component: loss, warmup_step: 10}

Select, Mix and Reorder act in this order, at most one of each; the weights of all weighters multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex_mega.config import components, orders
from dataflex_mega.config.components import SECTIONS, Spec
from dataflex_mega.config.values import fit
from dataflex_mega.errors import ConfigError, did_you_mean

LEGO = "dynamic_lego"
CHAIN = ("selector", "mixer", "reorder")
ONLY_FOR = {"mode": "selector", "keep_ratio": "selector", "allow_replacement": "mixer"}
IDLE = {
    "seed": "data_seed names all random choices",
    "score_num_workers": "candidates are read by the loader of the run",
}


@dataclass(frozen=True)
class StageArguments:
    """One stage."""

    family: Literal["selector", "mixer", "reorder", "weighter"] = field(metadata={"help": "its role"})
    component: str | dict[str, Any] = field(
        metadata={"help": "an entry of the components file, or a specification as under the role's own key"}
    )
    enabled: bool = field(default=True, metadata={"help": "false leaves the stage out"})
    warmup_step: int = field(default=0, metadata={"help": "steps before it begins to act, >= 0"})
    every: int = field(default=1, metadata={"help": "steps from one of its decisions to the next, >= 1"})
    score_max_age: int = field(default=0, metadata={"help": "how many steps old a shared loss may be, >= 0"})
    mode: Literal["filter", "draw"] = field(
        default="filter",
        metadata={
            "help": (
                "`filter`: what is chosen is the pool of the stages that follow. `draw`: it is what is trained until the "
                "next selection"
            )
        },
    )
    keep_ratio: float = field(default=0.5, metadata={"help": "share of the pool that a filter keeps, > 0 and <= 1"})
    allow_replacement: bool = field(
        default=False, metadata={"help": "DataFlex's; a row comes again when its domain is used up"}
    )

    def check(self, where: str, given: Mapping[str, Any]) -> None:
        """Raises ConfigError naming the key that is out of range or another family's."""
        for key, least in (("warmup_step", 0), ("every", 1), ("score_max_age", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{where}.{key}: must be >= {least}, found {getattr(self, key)}")
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"{where}.keep_ratio: must be > 0 and <= 1, found {self.keep_ratio}")
        for key, family in ONLY_FOR.items():
            if key in given and self.family != family:
                raise ConfigError(f"{where}.{key}: only for family {family}, found {self.family}")


@dataclass(frozen=True)
class PipelineArguments:
    """A preset's parameters."""

    stages: list[Any] = field(default_factory=list, metadata={"help": "the stages, in any order"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of the files of selections and of losses; None: in `output_dir`"}
    )
    score_batch_size: int | None = field(default=None, metadata={"help": "as the key of the run"})
    score_num_workers: int | None = field(default=None, metadata={"help": "DataFlex's; not used"})
    seed: int | None = field(default=None, metadata={"help": "DataFlex's; not used"})
    save_plans: bool = field(
        default=False, metadata={"help": "write `scoreboard_step_N.json`: the losses known of the samples of each plan"}
    )


@dataclass(frozen=True)
class Pipeline:
    """What a preset comes to."""

    arguments: PipelineArguments
    chain: dict[str, StageArguments]  # by family, those of CHAIN that are on
    weighters: tuple[StageArguments, ...]
    specs: dict[str, Spec]  # by family, of the chain
    weighing: tuple[Spec, ...]  # specifications of the weighters
    keys: dict[str, Any]  # keys of the run that components carry as parameters
    notes: tuple[str, ...]

    def identity(self) -> list[dict[str, Any]]:
        """What decides when and how stages act."""
        kept = ("family", "warmup_step", "every", "score_max_age", "mode", "keep_ratio")
        return [{key: getattr(stage, key) for key in kept} for stage in (*self.chain.values(), *self.weighters)]


def read(path: str | None, name: str | None, own: str | Mapping[str, Any] | None) -> Pipeline:
    """The pipeline of a preset of a components file, or of the key `pipeline`, or of a preset with changes by that key.

    Raises ConfigError naming the stage and key.
    """
    given = _parameters(path, name, own)
    types = {f.name: str(f.type) for f in fields(PipelineArguments)}
    _refuse_unknown("pipeline", given, types)
    arguments = PipelineArguments(**{key: fit(f"pipeline.{key}", value, types[key]) for key, value in given.items()})
    stages = [_stage(number, stage) for number, stage in enumerate(arguments.stages)]
    on = [stage for stage in stages if stage.enabled]
    notes = [f"pipeline.{key} is not used: {why}" for key, why in IDLE.items() if getattr(arguments, key) is not None]
    chain = _chain(on, notes)
    weighters = tuple(stage for stage in on if stage.family == "weighter")
    keys: dict[str, Any] = {}
    if arguments.score_batch_size is not None:
        keys["score_batch_size"] = arguments.score_batch_size
    specs = {family: _spec(path, stage, keys, notes) for family, stage in chain.items()}
    weighing = tuple(_spec(path, stage, keys, notes) for stage in weighters)
    if not on:
        raise ConfigError("pipeline.stages: at least one must be there and enabled")
    notes += [
        f"weighter stage: every {s.every} is not used: weights are those of each step" for s in weighters if s.every > 1
    ]
    notes += ["mixer stage: allow_replacement is not used: no row comes twice before its domain is used up"
              for s in on if s.allow_replacement]  # fmt: skip
    return Pipeline(arguments, chain, weighters, specs, weighing, keys, tuple(notes))


def names(path: str | None) -> list[str]:
    """The presets of a components file."""
    return [str(name) for name in components.read_components(path).get(components.PIPELINES) or {}]


def _parameters(path: str | None, name: str | None, own: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(own, str):
        if name is not None and name != own:
            raise ConfigError(f"pipeline: {own} differs from component_name {name!r}; drop one")
        name, own = own, None
    if name is None and own is None:
        raise ConfigError(
            f"train_type: {LEGO} needs component_name (one of {', '.join(names(path))}) or pipeline with stages"
        )
    preset: dict[str, Any] = {}
    if name is not None:
        data, where = components.read_components(path), path or "the packaged components file"
        if name not in names(path):
            hint = f"{did_you_mean(name, names(path))}; there is {', '.join(names(path)) or 'none'}"
            raise ConfigError(f"component_name: no pipeline {name!r} in {where}{hint}")
        preset = components.flat("pipeline", components.resolve(data, where)[components.PIPELINES][name])
        preset.pop("name", None)
    changes = (
        {} if own is None else {key: value for key, value in components.flat("pipeline", own).items() if key != "name"}
    )
    return {**preset, **changes}


def _stage(number: int, given: Any) -> StageArguments:
    where = f"pipeline.stages[{number}]"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a mapping with family and component, found {given!r}")
    types = {f.name: str(f.type) for f in fields(StageArguments)}
    _refuse_unknown(where, given, types)
    for key in ("family", "component"):
        if key not in given:
            raise ConfigError(f"{where}.{key}: missing")
    stage = StageArguments(**{key: fit(f"{where}.{key}", value, types[key]) for key, value in given.items()})
    stage.check(where, given)
    return stage


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{where}.{key}: unknown key{did_you_mean(str(key), known)}; it may have {', '.join(known)}"
            )


def _chain(on: list[StageArguments], notes: list[str]) -> dict[str, StageArguments]:
    """The stages of CHAIN by family, in its order."""
    given = [stage.family for stage in on if stage.family in CHAIN]
    for family in CHAIN:
        if given.count(family) > 1:
            raise ConfigError(f"pipeline.stages: {given.count(family)} of family {family}; at most one can be enabled")
    right = [family for family in CHAIN if family in given]
    if given != right:
        notes.append(f"pipeline.stages: {', '.join(given)} act in the order {', '.join(right)}")
    by_family = {stage.family: stage for stage in on}
    return {family: by_family[family] for family in right}


def _spec(path: str | None, stage: StageArguments, keys: dict[str, Any], notes: list[str]) -> Spec:
    """The specification of a stage's component; keys of the run that it carries go into `keys`."""
    assert stage.family in SECTIONS
    if not isinstance(stage.component, str):
        return components.flat(stage.family, stage.component)
    if stage.component not in components.entries(path, stage.family):
        found = components.entries(path, stage.family)
        hint = f"{did_you_mean(stage.component, found)}; there is {', '.join(found) or 'none'}"
        raise ConfigError(f"pipeline.stages: no {stage.family} component {stage.component!r}{hint}")
    more, said = components.lifted(path, stage.family, stage.component)
    for key, value in more.items():
        keys.setdefault(key, value)
    notes.extend(said)
    spec = components.pick(path, stage.family, stage.component)
    if stage.family == "reorder":
        orders.read(spec)
    return spec
