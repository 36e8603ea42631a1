"""Settings by which a role does nothing in this run, known when the data and the length of the run are: notes, no errors,
since a short trial of a long run's configuration is such a run too."""

from __future__ import annotations

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.providers.registry import needs_targets
from dataflex_mega.run.data import RunData
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule


def notes_on_effects(config: RunConfig, roles: RunRoles, data: RunData, schedule: RunSchedule) -> list[str]:
    """A note for every role that cannot act, and for evaluation data that nobody reads."""
    names = {role: str(spec["name"]) for role, spec in roles.specs.items()}
    notes = [*_moving(names, roles, schedule), *_choosing(config, names, roles, data, schedule)]
    notes += _weighting(config, names, roles, schedule.partition)
    if "mixer" in names and names["mixer"] != "static" and len(data.pool.sizes) == 1:
        notes.append(f"mixer {names['mixer']}: there is one dataset, so its proportion is always 1")
    return notes + _evaluation(config, roles, data)


def _moving(names: dict[str, str], roles: RunRoles, schedule: RunSchedule) -> list[str]:
    """Roles that act at updates, where no update comes, or none after something was observed."""
    if roles.pipeline is not None:
        return []
    moving = [role for role in ("selector", "mixer") if role in names and names[role] != "static"]
    steps, update, notes = schedule.max_steps, schedule.update_schedule, []
    for role in moving:
        if update.warmup_steps >= steps:
            first = f"the first update comes after {update.warmup_steps} steps"
            notes.append(f"warmup_step: {first}, the run has {steps}: {role} {names[role]} never acts")
        elif role == "mixer" and update.warmup_steps == 0 and update.update_every >= steps and names[role] != "random":
            only = "the only update comes before the first step"
            notes.append(
                f"update_step: {update.update_every} of {steps} steps: {only}: {role} {names[role]} sees no loss"
            )
    return notes


def _choosing(
    config: RunConfig, names: dict[str, str], roles: RunRoles, data: RunData, schedule: RunSchedule
) -> list[str]:
    """A selector whose choice is everything there is."""
    selector = roles.algorithms.selector
    if selector is None or getattr(selector, "replacement", False):
        return []
    everything = f"selector {names['selector']} chooses every sample, whatever its score"
    if roles.pipeline is not None:
        stage = roles.pipeline.role_stages["selector"]
        whole = stage.mode == "filter" and stage.keep_ratio == 1
        return [f"pipeline.stages: keep_ratio: 1: {everything}"] if whole else []
    if "mixer" in names:  # whose quotas a selection fills
        return []
    steps, size = config.dataflex.update_step, schedule.partition.global_batch_size
    candidates = len(data.pool) if schedule.candidates is None else schedule.candidates.num_total()
    if steps * size < candidates:
        return []
    return [f"update_step: {steps} steps of {size} samples take all {candidates} that are scored: {everything}"]


def _weighting(config: RunConfig, names: dict[str, str], roles: RunRoles, partition: BatchPartition) -> list[str]:
    """A weight relative to the others of a batch, where there are no others."""
    weighter = roles.algorithms.weighter
    if weighter is None or roles.pipeline is not None or weighter.token_selection() is not None:
        return []
    whole_step = config.dataflex.weight_scope == "step"
    size = partition.global_batch_size if whole_step else partition.micro_batch_size * partition.dp_size
    if size > 1:
        return []
    return [
        f"weighter {names['weighter']}: it compares {size} sample at a time, whose weight is always 1; larger batches do"
    ]


def _evaluation(config: RunConfig, roles: RunRoles, data: RunData) -> list[str]:
    strategy = str(config.llamafactory.get("eval_strategy", "no"))
    read = any(needs_targets(algorithm) for _, algorithm in roles.active_algorithms())
    if not data.evaluation or strategy != "no" or read or config.llamafactory.get("do_predict"):
        return []
    key = "eval_dataset" if config.llamafactory.get("eval_dataset") else "val_size"
    return [f"{key}: evaluation data, but eval_strategy is no: nothing is evaluated"]
