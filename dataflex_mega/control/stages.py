"""How and when the roles of a run act. A run without a pipeline is a pipeline whose roles share an update schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.control.schedule import UpdateSchedule

ROLES = ("selector", "mixer", "reorder", "weighter")


@dataclass(frozen=True)
class ScoreSource:
    """What samples are ordered by: `fixed` scores, or the scores that `selector` gives them at each reorder."""

    fixed: Tensor | None = None  # [N] float32
    selector: Selector | None = None
    max_samples: int | None = None  # score at most so many, drawn at random; the others take the median
    seed: int = 42


@dataclass(frozen=True)
class StageConfig:
    """The update schedule of every role, and what an update of it does."""

    schedules: Mapping[str, UpdateSchedule]
    source: ScoreSource = ScoreSource()
    rescore: bool = True  # False: samples are scored once
    score_every: int = 1  # of the reorder's updates
    consume_once: bool = True
    mode: Literal["draw", "filter"] = "draw"  # a selection is the samples of a window, or the pool from then on
    keep_ratio: float = 0.5  # of the pool, in a filter
    max_score_age: Mapping[str, int] = field(default_factory=dict)  # role -> how many steps old a loss may be
    is_shared: bool = False  # whether all roles act by one schedule

    @classmethod
    def shared(cls, schedule: UpdateSchedule) -> StageConfig:
        """All roles act by one schedule."""
        return cls(dict.fromkeys(ROLES, schedule), is_shared=True)
