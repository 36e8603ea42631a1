"""Which algorithms a run has: `train_type`, `component_name`, our keys for the roles and `static_mix`, resolved once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dataflex_mega.config import components
from dataflex_mega.config.component_parameters import Spec, drop_unused
from dataflex_mega.config.components import ROLE_OF_TYPE
from dataflex_mega.config.dataflex_arguments import ROLES, RunArguments
from dataflex_mega.config.pipelines import Pipeline
from dataflex_mega.config.reorder_arguments import ReorderArguments, read_reorder
from dataflex_mega.errors import ConfigError


@dataclass(frozen=True)
class ResolvedRoles:
    """The specifications of the active roles."""

    specs: dict[str, Spec] = field(default_factory=dict)  # role -> flat specification; of a reorder only its pattern's
    reorder: ReorderArguments | None = None  # how samples are scored and ordered when there is a reorder
    pipeline: Pipeline | None = None  # of `dynamic_lego`
    notes: tuple[str, ...] = ()  # on parameters without an effect

    def all_specs(self) -> list[tuple[str, Spec]]:
        """(role, specification) of every algorithm, the further weighters of a pipeline included."""
        others = self.pipeline.weighter_specs[1:] if self.pipeline is not None else ()
        return [*self.specs.items(), *(("weighter", spec) for spec in others)]


def resolve_roles(arguments: RunArguments, pipeline: Pipeline | None) -> ResolvedRoles:
    """The roles of a run.

    Args:
        arguments: the keys.
        pipeline: that of `dynamic_lego`.

    Raises:
        ConfigError: a key and the picked component name different algorithms, or nothing is named.
    """
    if pipeline is not None:
        first = {"weighter": pipeline.weighter_specs[0]} if pipeline.weighter_specs else {}
        return ResolvedRoles({**pipeline.specs, **first}, pipeline.reorder, pipeline)
    specs, notes = _specs(arguments)
    reorder = None
    if "reorder" in specs:
        specs["reorder"], reorder = read_reorder(specs["reorder"])
        reorder, more = _without_unused(reorder)
        notes += more
    return ResolvedRoles(specs, reorder, None, tuple(notes))


def _specs(arguments: RunArguments) -> tuple[dict[str, Spec], list[str]]:
    picked = ROLE_OF_TYPE.get(arguments.train_type)
    specs: dict[str, Spec] = {}
    notes: list[str] = []
    for role in ROLES:
        component, role_key, name = None, getattr(arguments, role), arguments.component_name
        if role == picked and name is not None and not (role == "mixer" and arguments.static_mix):
            component = components.read_component(arguments.components_cfg_file, role, name).spec
        if role_key is not None:
            named = components.flatten_spec(role, role_key)
            role_key, more = drop_unused(role, {"name": (component or {}).get("name"), **named}, role)
            role_key = {key: value for key, value in role_key.items() if key in named}
            notes += more
        spec = components.merge_spec(role, role_key, component, name)
        if spec is not None:
            specs[role] = spec
    if arguments.static_mix:
        specs["mixer"] = _static_mixer(arguments, specs.get("mixer"))
    return specs, notes


def _static_mixer(arguments: RunArguments, spec: Spec | None) -> Spec:
    if spec is not None and spec["name"] != "static":
        raise ConfigError(f"static_mix: true keeps the proportions, but mixer: {spec['name']} moves them; drop one")
    if arguments.init_mixture_proportions is None or (spec or {}).get("proportions") is not None:
        return spec or {"name": "static"}
    return {"name": "static", "proportions": list(arguments.init_mixture_proportions)}


def _without_unused(reorder: ReorderArguments) -> tuple[ReorderArguments, list[str]]:
    """The same without parameters that have no effect in the selector whose scores it sorts by."""
    selector: Any = reorder.scores.selector
    if not selector:
        return reorder, []
    where = "reorder.score_params.selector"
    spec, notes = drop_unused("selector", components.flatten_spec("selector", selector), where)
    return replace(reorder, score_params={**(reorder.score_params or {}), "selector": spec}), notes
