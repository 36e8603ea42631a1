"""What metrics may know of a plan: plain values that a controller hands over after every new plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SelectionRecord:
    """What one selection chose, and how."""

    step: int  # optimizer steps done when it was made
    selected_ids: Tensor  # [m] int64
    scores: Tensor  # [m] float32, of the selected samples; where a selector gives several numbers, their mean
    quantiles: list[float]  # 0, 25, 50, 75, 100 % of the finite scores of all candidates; empty when there is none
    overlap: float  # fraction of the selected samples that the previous selection had chosen


@dataclass(frozen=True)
class OrderRecord:
    """What one ordered plan consists of."""

    step: int  # optimizer steps done when it was made
    end: int  # the first step after it
    num_scored: int  # samples that were scored for it
    mean_score: float | None  # of its samples; None where no scores are used
    passes: list[int]  # completed passes over the samples, one per domain with a mixer


@dataclass(frozen=True)
class LossCacheView:
    """The losses that are known of a pool. The tensors are the cache's own: read them, do not keep them."""

    losses: Tensor  # [N] float32, NaN where a loss was never measured
    measured_at_step: Tensor  # [N] int32, -1 where a loss was never measured


@dataclass(frozen=True)
class PlanReport:
    """What the roles did for the plan that was just made; None for a role that did nothing."""

    mixer: Mapping[str, Any] = field(default_factory=dict)  # what the mixer adds to its line of the weights file
    selection: SelectionRecord | None = None
    signal_name: str = "score"  # the signal that the selector reads: the name of its scores in DataFlex's files
    order: OrderRecord | None = None
    loss_cache: LossCacheView | None = None
