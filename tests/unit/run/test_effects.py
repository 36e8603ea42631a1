"""Notes on a selector whose choice is everything there is; the other notes are shown by whole runs."""

from types import SimpleNamespace
from typing import Any

import pytest

from dataflex_mega.run.effects import notes_on_effects

WHOLE = "selector loss chooses every sample, whatever its score"


def notes(update_step: int = 4, candidates: int | None = None, stage: Any = None, mixer: bool = False, **selector: Any):
    """The notes on a pool of 32 samples in batches of 8."""
    specs = {"selector": {"name": "loss"}} | ({"mixer": {"name": "static"}} if mixer else {})
    algorithms = SimpleNamespace(selector=SimpleNamespace(**selector), weighter=None)
    pipeline = None if stage is None else SimpleNamespace(role_stages={"selector": SimpleNamespace(**stage)})
    roles: Any = SimpleNamespace(
        specs=specs, algorithms=algorithms, pipeline=pipeline, active_algorithms=lambda: [], reorder=None
    )
    config: Any = SimpleNamespace(llamafactory={}, dataflex=SimpleNamespace(update_step=update_step, weight_scope=None))
    pool = range(32)
    data: Any = SimpleNamespace(pool=pool, evaluation={})
    schedule: Any = SimpleNamespace(
        partition=SimpleNamespace(global_batch_size=8, micro_batch_size=8, dp_size=1),
        candidates=None if candidates is None else SimpleNamespace(num_total=lambda: candidates),
        max_steps=100,
        update_schedule=SimpleNamespace(warmup_steps=1, update_every=update_step),
    )
    return notes_on_effects(config, roles, data, schedule)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [f"update_step: 4 steps of 8 samples take all 32 that are scored: {WHOLE}"]),
        (
            {"update_step": 2, "candidates": 16},
            [f"update_step: 2 steps of 8 samples take all 16 that are scored: {WHOLE}"],
        ),
        ({"update_step": 3}, []),
        ({"replacement": True}, []),
        ({"mixer": True}, []),
        ({"stage": {"mode": "filter", "keep_ratio": 1.0}}, [f"pipeline.stages: keep_ratio: 1: {WHOLE}"]),
        ({"stage": {"mode": "filter", "keep_ratio": 0.9}}, []),
        ({"stage": {"mode": "sample", "keep_ratio": 1.0}}, []),
    ],
)
def test_a_selector_that_chooses_everything_is_noted(keys: dict[str, Any], expected: list[str]) -> None:
    found = [note for note in notes(**keys) if "chooses" in note]
    assert found == expected
