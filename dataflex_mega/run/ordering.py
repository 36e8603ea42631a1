"""What orders the samples of a run: scores from files, the selector that computes them, schedules."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from dataflex_mega.config.pipelines import Pipeline
from dataflex_mega.config.reorder_arguments import ReorderArguments
from dataflex_mega.control.passes import OrderedPasses, OrderOptions
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.stages import ScoreSource, StageConfig
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.data.score_files import read_cached_selection, read_scores
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.scores import raw_scores
from dataflex_mega.run.roles import RunRoles, stage_schedule
from dataflex_mega.run.session import Session

PLAN_RENEWAL_STEPS = 4096  # between plans of an order that is never scored again


def ordered_passes(roles: RunRoles, pool: SamplePool) -> OrderedPasses | None:
    """The passes of a reorder: one over all samples, or with a mixer one for each domain."""
    pattern, reorder = roles.algorithms.reorder, roles.reorder
    if pattern is None or reorder is None:
        return None
    bounds = [0, len(pool)] if roles.algorithms.mixer is None else [int(end) for end in pool.offsets]
    return OrderedPasses(pattern, OrderOptions(reorder.low_first, reorder.window_size, reorder.seed), bounds)


def score_source(session: Session, roles: RunRoles, pool: SamplePool) -> ScoreSource:
    """What a reorder sorts by. Raises DataError or ConfigError for score files that do not fit the pool."""
    reorder = roles.reorder
    if reorder is None or roles.algorithms.reorder is None or not roles.algorithms.reorder.uses_scores:
        return ScoreSource()
    params, fixed = reorder.scores, None
    if roles.score_selector is None:
        if reorder.resolved_source == "cached_selection":
            path = str(params.cache_path)
            scores = read_cached_selection(path, params.metric_key, params.fill_value, len(pool))
        else:
            scores = _precomputed(session, reorder, pool)
        fixed = torch.from_numpy(scores.astype(np.float32))
    return ScoreSource(fixed, roles.score_selector, params.max_samples, params.seed)


def _precomputed(session: Session, reorder: ReorderArguments, pool: SamplePool) -> np.ndarray:
    """[N] float64, from the file or the dataset columns that the configuration names."""
    params = reorder.scores
    if params.score_path is not None:
        scores = read_scores(params.score_path, params.score_field)
        if len(scores) != len(pool):
            sizes = ", ".join(f"{name} {size}" for name, size in zip(pool.names, pool.sizes, strict=True))
            raise DataError(
                f"reorder.score_params.score_path: {params.score_path} has {len(scores)} scores for {len(pool)} samples "
                f"({sizes})"
            )
        return scores
    if session.config.dataflex.corpus_dir is not None:
        raise ConfigError("reorder.score_params.score_field: a corpus has no columns; use score_path")
    if not set(pool.names) <= set(session.args.data.dataset or []):
        raise ConfigError(
            "reorder.score_params.score_field: tokenized_path does not say which row of which dataset a sample is; use "
            "score_path"
        )
    pairs = zip(pool.names, pool.sizes, strict=True)
    return np.concatenate([raw_scores(session.args, name, params.score_field, size) for name, size in pairs])


def fingerprint(source: ScoreSource) -> dict[str, str]:
    """What a checkpoint remembers of scores that came from a file."""
    if source.fixed is None:
        return {}
    return {"scores": hashlib.sha256(source.fixed.numpy().tobytes()).hexdigest()[:16]}


def stage_config(session: Session, roles: RunRoles, source: ScoreSource, schedule: UpdateSchedule) -> StageConfig:
    """How and when the roles act. `schedule`: that of the keys warmup_step, update_step and update_times.

    Without a pipeline all roles share it; an order that is scored once begins with the run.
    """
    if roles.pipeline is not None:
        return _pipeline_stage_config(roles.pipeline, source, roles.reorder, schedule)
    reorder, keys = roles.reorder, session.config.dataflex
    if reorder is None:
        return StageConfig.shared(schedule)
    endless = UpdateSchedule(keys.warmup_step, keys.update_step, -1, repeat_cycles=False)
    once = UpdateSchedule(0, PLAN_RENEWAL_STEPS, -1, repeat_cycles=False)
    dynamic = reorder.kind == "dynamic"
    schedules = {
        "selector": endless,
        "mixer": UpdateSchedule(keys.warmup_step, keys.update_step, keys.update_times, repeat_cycles=False),
        "weighter": endless,
        "reorder": endless if dynamic else once,
    }
    return StageConfig(schedules, source, dynamic, reorder.reorder_every, reorder.consume_once)


def _pipeline_stage_config(
    pipeline: Pipeline, source: ScoreSource, reorder: ReorderArguments | None, schedule: UpdateSchedule
) -> StageConfig:
    """Every stage acts by its own steps."""
    schedules = {"selector": schedule}
    schedules |= {role: stage_schedule(stage) for role, stage in pipeline.role_stages.items()}
    if pipeline.weighter_stages:
        warmup_steps = min(stage.warmup_step for stage in pipeline.weighter_stages)
        schedules["weighter"] = UpdateSchedule(warmup_steps, 1, -1, repeat_cycles=False)
    selection = pipeline.role_stages.get("selector")
    return StageConfig(
        schedules,
        source,
        rescore=reorder is None or reorder.kind == "dynamic",
        score_every=1 if reorder is None else reorder.reorder_every,
        consume_once=reorder is None or reorder.consume_once,
        mode="draw" if selection is None else selection.mode,
        keep_ratio=1.0 if selection is None else selection.keep_ratio,
        max_score_age={role: stage.score_max_age for role, stage in pipeline.role_stages.items()},
    )
