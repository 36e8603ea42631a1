"""Scores of a pool's samples from files: arrays, JSON lists and lines, and the files that selections write."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dataflex_mega.json_text as json_text
from dataflex_mega.data.npy_files import map_array
from dataflex_mega.errors import ConfigError, DataError


def read_scores(path: str, key: str) -> np.ndarray:
    """[N] float64 from a .npy array, a .json list or mapping with `key` (also under `metric`), or a .jsonl file with
    `key` in every line. Raises DataError for anything else and for a number that is not finite."""
    file = _existing(path, "score_path")
    if file.suffix == ".npy":
        found: Any = _read_array(file)
    elif file.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(_read_text(file).splitlines(), 1) if line.strip()]
        found = [_lookup(_json(line, f"{file}, line {n}"), key, f"{file}, line {n}") for n, line in lines]
    else:
        content = _json(_read_text(file), str(file))
        found = content if isinstance(content, list) else _lookup(content, key, str(file))
    return _finite_array(found, str(file))


def read_cached_selection(path: str, metric_key: str, fill_value: float, size: int) -> np.ndarray:
    """[N] float64: the metric of a selection's file, `fill_value` for samples that are not in it."""
    file = _existing(path, "cache_path")
    content = _json(_read_text(file), str(file))
    indices, metrics = (content.get(key) if isinstance(content, dict) else None for key in ("indices", "metric"))
    if not isinstance(indices, list) or not isinstance(metrics, dict) or metric_key not in metrics:
        available = f"; it has {', '.join(metrics)}" if isinstance(metrics, dict) else ""
        raise DataError(f"{file}: expected indices and metric.{metric_key}{available}")
    values = _finite_array(metrics[metric_key], f"{file}: metric.{metric_key}")
    positions = np.asarray(indices)
    if positions.dtype.kind != "i" or len(positions) != len(values) or positions.min(initial=0) < 0:
        raise DataError(f"{file}: expected as many sample numbers as values, found {len(positions)} and {len(values)}")
    if positions.max(initial=0) >= size:
        raise DataError(f"{file}: sample {positions.max()} of a pool of {size}; it belongs to other data")
    dense = np.full(size, fill_value)
    dense[positions] = values
    return dense


def _existing(path: str, key: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"reorder.score_params.{key}: {path} not found")
    return file


def _read_array(file: Path) -> np.ndarray:
    """[N] of a .npy file, flattened. Raises DataError for another file, one that is cut, and one of objects."""
    values = map_array(file)
    if values.dtype.kind not in "fiu":
        raise DataError(f"{file}: expected an array of numbers, found one of {values.dtype}")
    return np.array(values).reshape(-1)


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}{json_text.read_problem(file, error)}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error


def _lookup(content: Any, key: str, where: str) -> Any:
    inner = content.get("metric") if isinstance(content, dict) else None
    for place in (content, inner):
        if isinstance(place, dict) and key in place:
            return place[key]
    raise DataError(f"{where}: no {key!r}")


def _finite_array(values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
    good = isinstance(values, list | np.ndarray) and all(_is_number(value) for value in values)
    if not good:
        bad = next(((n, v) for n, v in enumerate(values) if not _is_number(v)), (0, values))
        raise DataError(f"{where}: expected finite numbers, found {bad[1]!r} at place {bad[0]}")
    return np.asarray(values, np.float64)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float | np.number) and math.isfinite(value)
