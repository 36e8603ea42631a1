"""The first stage of a run: its algorithms, built from their specifications and checked against the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dataflex_mega.algorithms.base import Algorithm, Selector, Weighter
from dataflex_mega.config.components import flatten_spec
from dataflex_mega.config.optimizers import other_than_adam
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.config.pipelines import Pipeline, StageArguments
from dataflex_mega.config.reorder_arguments import ReorderArguments
from dataflex_mega.control.controller import RoleSet
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.weighter_product import ProductWeighter, combine_weighters
from dataflex_mega.engines.capabilities import capabilities_of
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers.registry import EngineInfo, check_requests, needs_reference
from dataflex_mega.registry import build


@dataclass(frozen=True)
class RunRoles:
    """The algorithms of a run. Nothing is read or written to make them."""

    algorithms: RoleSet
    specs: Mapping[str, dict[str, Any]]  # role -> name and all parameters, defaults filled in; what a run is known by
    reorder: ReorderArguments | None  # how samples are scored and ordered
    pipeline: Pipeline | None
    score_selector: Selector | None  # whose scores a reorder sorts by, where they are measured

    @classmethod
    def from_config(cls, config: RunConfig, instances: Mapping[str, Algorithm] | None = None) -> RunRoles:
        """Build the algorithms; `instances` (role -> algorithm) are taken as they are.

        Raises ConfigError for wrong parameters, and for what the engine does not support.
        """
        reorder, pipeline = config.reorder, config.pipeline
        algorithms: dict[str, Any] = {}
        specs: dict[str, dict[str, Any]] = {}
        for role, spec in config.roles.items():
            algorithms[role] = (instances or {}).get(role) or build(role, spec)
            # With all defaults filled in, so that a run is the same however its YAML was written.
            specs[role] = {"name": spec["name"], **parameters_of(algorithms[role])}
        if reorder is not None:
            specs["reorder"].update(order=reorder.identity())
        if pipeline is not None:
            specs["pipeline"] = {"name": "pipeline", "stages": pipeline.identity()}
            if "weighter" in algorithms:
                specs["weighter"]["others"] = list(pipeline.weighter_specs[1:])
                algorithms["weighter"] = build_weighter(pipeline, algorithms["weighter"])
        roles = cls(RoleSet(**algorithms), specs, reorder, pipeline, build_score_selector(reorder))
        stage = str(config.llamafactory.get("stage", "sft"))
        engine = EngineInfo(config.engine, capabilities_of(config.engine), stage, other_than_adam(config.llamafactory))
        for role, algorithm in roles.active_algorithms():
            is_product = isinstance(algorithm, ProductWeighter)
            for member in [weighter for weighter, _ in algorithm.members] if is_product else [algorithm]:
                check_requests(role, member, engine)
        return roles

    def active_algorithms(self) -> list[tuple[str, Algorithm]]:
        """(role, algorithm) of each active one; the score selector of a reorder is a selector."""
        selectors = [("selector", one) for one in (self.algorithms.selector, self.score_selector) if one is not None]
        others = [(role, getattr(self.algorithms, role)) for role in ("mixer", "reorder", "weighter")]
        return [*selectors, *((role, one) for role, one in others if one is not None)]

    @property
    def needs_reference(self) -> bool:
        """Whether some algorithm reads losses of a reference model."""
        return any(needs_reference(algorithm) for _, algorithm in self.active_algorithms())


def parameters_of(algorithm: Any) -> dict[str, Any]:
    """The values that an algorithm was made with, except where it writes files."""
    return {f.name: getattr(algorithm, f.name) for f in fields(algorithm) if f.init and f.name != "cache_dir"}


def build_score_selector(reorder: ReorderArguments | None) -> Selector | None:
    """The selector whose scores a reorder sorts by, None when they come from a file. Raises ConfigError for one that
    computes nothing of a sample."""
    if reorder is None or reorder.resolved_source not in ("model_loss", "selector"):
        return None
    by_loss = reorder.resolved_source == "model_loss"
    selector = build("selector", "loss" if by_loss else flatten_spec("selector", reorder.scores.selector or {}))
    assert isinstance(selector, Selector)
    if not selector.requests():
        name = type(selector).__name__
        raise ConfigError(f"reorder.score_params.selector: {name} measures nothing of a sample to sort by")
    return selector


def stage_schedule(stage: StageArguments) -> UpdateSchedule:
    """When a stage of a pipeline acts."""
    return UpdateSchedule(stage.warmup_step, stage.every, -1, repeat_cycles=False)


def build_weighter(pipeline: Pipeline, first: Weighter) -> Weighter:
    """The weighter of a pipeline, a product where it has several; `first`: the one that is built already."""
    weighters = [first, *(build("weighter", spec) for spec in pipeline.weighter_specs[1:])]
    schedules = [stage_schedule(stage) for stage in pipeline.weighter_stages]
    return combine_weighters(list(zip(weighters, schedules, strict=True)))  # type: ignore[arg-type]  # all are weighters
