"""What orders the samples of a run: scores from files, the selector that measures them, schedules."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.config.pipelines import Pipeline, StageArguments
from dataflex_mega.config.reorder_arguments import ReorderArguments, ScoreParams
from dataflex_mega.control.passes import OrderedPasses, OrderOptions
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.staged import ScoreSource, StageConfig
from dataflex_mega.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build

RENEWAL = 4096  # steps between plans of an order that is never scored anew


def scoring_selector(order: ReorderArguments | None) -> Selector | None:
    """The selector whose scores a reorder sorts by, None when they come from a file."""
    from dataflex_mega.config.components import flatten_spec
    from dataflex_mega.registry import build

    if order is None or order.resolved_source not in ("model_loss", "selector"):
        return None
    spec = "loss" if order.resolved_source == "model_loss" else flatten_spec("selector", order.scores.selector or {})
    made = build("selector", spec)
    assert isinstance(made, Selector)
    if not made.signals:
        raise ConfigError(
            f"reorder.score_params.selector: {type(made).__name__} measures nothing of a sample to sort by"
        )
    return made


def ordering_of(run: Build) -> OrderedPasses | None:
    """The passes of the run: one over all samples, or with a mixer one for each domain."""
    if run.roles.reorder is None or run.order is None:
        return None
    bounds = [0, len(run.pool)] if run.roles.mixer is None else [int(end) for end in run.pool.offsets]
    direction = OrderOptions(run.order.low_first, run.order.window_size, run.order.seed)
    return OrderedPasses(run.roles.reorder, direction, bounds)


def source_of(run: Build) -> ScoreSource:
    """What is sorted by."""
    if run.order is None or run.roles.reorder is None or not run.roles.reorder.uses_scores:
        return ScoreSource()
    params = run.order.scores
    fixed = None
    if run.scoring is None:
        found = _cached(params, len(run.pool)) if run.order.resolved_source == "cached_selection" else _precomputed(run, params)
        fixed = torch.from_numpy(found.astype(np.float32))
    return ScoreSource(fixed, run.scoring, params.max_samples, params.seed)


def fingerprint(source: ScoreSource) -> dict[str, str]:
    """What a checkpoint remembers of scores that came from a file."""
    if source.fixed is None:
        return {}
    return {"scores": hashlib.sha256(source.fixed.numpy().tobytes()).hexdigest()[:16]}


def weigher_of(pipeline: Pipeline, first: Any) -> Any:
    """The weighter of a pipeline, a product where it has several; `first`: the one that is built already."""
    from dataflex_mega.control.weighter_product import combine_weighters
    from dataflex_mega.registry import build

    made = [first, *(build("weighter", spec) for spec in pipeline.weighter_specs[1:])]
    return combine_weighters([(part, _update_schedule(stage)) for part, stage in zip(made, pipeline.weighter_stages, strict=True)])


def _update_schedule(stage: StageArguments) -> UpdateSchedule:
    return UpdateSchedule(stage.warmup_step, stage.every, -1, repeat_cycles=False)


def _pipeline_stage_config(pipeline: Pipeline, source: ScoreSource, order: ReorderArguments | None) -> StageConfig:
    """Every stage acts by its own steps."""
    schedules = {family: _update_schedule(stage) for family, stage in pipeline.role_stages.items()}
    if pipeline.weighter_stages:
        schedules["weighter"] = UpdateSchedule(min(stage.warmup_step for stage in pipeline.weighter_stages), 1, -1, repeat_cycles=False)
    selection = pipeline.role_stages.get("selector")
    return StageConfig(
        schedules,
        source,
        rescore=order is None or order.kind == "dynamic",
        score_every=1 if order is None else order.reorder_every,
        consume_once=order is None or order.consume_once,
        mode="draw" if selection is None else selection.mode,
        keep_ratio=1.0 if selection is None else selection.keep_ratio,
        max_score_age={family: stage.score_max_age for family, stage in pipeline.role_stages.items()},
    )


def stages_of(run: Build, source: ScoreSource) -> StageConfig:
    """How the roles act. Without a pipeline all together, by warmup_step and update_step, but for an order that is scored
    once: it begins with the run."""
    ours, order = run.ours, run.order
    if run.pipeline is not None:
        return _pipeline_stage_config(run.pipeline, source, order)
    endless = UpdateSchedule(ours.warmup_step, ours.update_step, -1, repeat_cycles=False)
    schedules = {"selector": endless, "mixer": UpdateSchedule(ours.warmup_step, ours.update_step, ours.update_times, False)}
    schedules["weighter"] = endless
    schedules["reorder"] = endless if order is None or order.kind == "dynamic" else UpdateSchedule(0, RENEWAL, -1, False)
    if order is None:
        return StageConfig(schedules, source)
    return StageConfig(schedules, source, order.kind == "dynamic", order.reorder_every, order.consume_once)


# -- scores from files -------------------------------------------------------------------------------------------------


def _precomputed(run: Build, params: ScoreParams) -> np.ndarray:
    if params.score_path is not None:
        found = read_scores(params.score_path, params.score_field)
        if len(found) != len(run.pool):
            sizes = ", ".join(f"{name} {size}" for name, size in zip(run.pool.names, run.pool.sizes, strict=True))
            raise DataError(
                f"reorder.score_params.score_path: {params.score_path} has {len(found)} scores for {len(run.pool)} samples "
                f"({sizes})"
            )
        return found
    if run.ours.corpus_dir is not None:
        raise ConfigError("reorder.score_params.score_field: a corpus has no columns; use score_path")
    from dataflex_mega.llamafactory.scores import raw_scores

    pairs = zip(run.pool.names, run.pool.sizes, strict=True)
    return np.concatenate([raw_scores(run.args, name, params.score_field, size) for name, size in pairs])


def read_scores(path: str, key: str) -> np.ndarray:
    """[N] float64 from a .npy array, a .json list or mapping with `key` (also under `metric`), or a .jsonl file with
    `key` in every line. Raises DataError for anything else and for a number that is not finite."""
    file = _existing(path, "score_path")
    if file.suffix == ".npy":
        found: Any = np.load(file, allow_pickle=False).reshape(-1)
    elif file.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line.strip()]
        found = [_key_of(_json(line, f"{file}, line {n}"), key, f"{file}, line {n}") for n, line in lines]
    else:
        content = _json(file.read_text("utf-8"), str(file))
        found = content if isinstance(content, list) else _key_of(content, key, str(file))
    return _finite(found, str(file))


def _cached(params: ScoreParams, size: int) -> np.ndarray:
    """[N] float64: the metric of a selection's file, `fill_value` for samples that are not in it."""
    file = _existing(str(params.cache_path), "cache_path")
    content = _json(file.read_text("utf-8"), str(file))
    indices, metrics = (content.get(key) if isinstance(content, dict) else None for key in ("indices", "metric"))
    if not isinstance(indices, list) or not isinstance(metrics, dict) or params.metric_key not in metrics:
        there = f"; it has {', '.join(metrics)}" if isinstance(metrics, dict) else ""
        raise DataError(f"{file}: expected indices and metric.{params.metric_key}{there}")
    values = _finite(metrics[params.metric_key], f"{file}: metric.{params.metric_key}")
    places = np.asarray(indices)
    if places.dtype.kind != "i" or len(places) != len(values) or places.min(initial=0) < 0:
        raise DataError(f"{file}: expected as many sample numbers as values, found {len(places)} and {len(values)}")
    if places.max(initial=0) >= size:
        raise DataError(f"{file}: sample {places.max()} of a pool of {size}; it belongs to other data")
    dense = np.full(size, params.fill_value)
    dense[places] = values
    return dense


def _existing(path: str, key: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"reorder.score_params.{key}: {path} not found")
    return file


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from error


def _key_of(content: Any, key: str, where: str) -> Any:
    inner = content.get("metric") if isinstance(content, dict) else None
    for place in (content, inner):
        if isinstance(place, dict) and key in place:
            return place[key]
    raise DataError(f"{where}: no {key!r}")


def _finite(values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
    good = isinstance(values, list | np.ndarray) and all(_is_number(value) for value in values)
    if not good:
        bad = next(((n, v) for n, v in enumerate(values) if not _is_number(v)), (0, values))
        raise DataError(f"{where}: expected finite numbers, found {bad[1]!r} at place {bad[0]}")
    return np.asarray(values, np.float64)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float | np.number) and math.isfinite(value)
