"""Passes over samples in a pattern of their scores. A pass keeps its position when the samples are scored again.

A pattern says which rank by score belongs at each of the T positions of a pass (algorithms.base.Reorder). The samples of
positions 0 .. t-1 were served. The n remaining samples belong at positions t .. T-1 with T = t + n. They are put there in
the order of the ranks that the pattern has at these positions: the lowest score where the lowest of these ranks is, and so
on. With the same scores that is the same pass; with new scores, or with other samples allowed, the pattern keeps its
position and only the samples at its positions change. A served sample is not served again before its pass ends, whatever
happens to scores and to the pool meanwhile.

With a mixer every domain has a pass of its own, from which the mixture draws; without one there is one pass over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Reorder
from dataflex_mega.control import contracts
from dataflex_mega.errors import DataError


@dataclass(frozen=True)
class OrderOptions:
    """How scores become positions, beside the pattern."""

    ascending: bool = True  # from low to high scores; False: equal scores change their order too
    shuffle_block: int = 0  # above 1: each block of so many positions is shuffled
    seed: int = 42


def pattern_ranks(pattern: Reorder, count: int, options: OrderOptions) -> Tensor:
    """[count] int64: the rank at each position of a pass, with blocks of `shuffle_block` positions shuffled."""
    ranks = contracts.rank_order(pattern, count, options.seed)
    if options.shuffle_block > 1:
        shuffled, rng = ranks.numpy().copy(), np.random.default_rng(options.seed)
        for start in range(0, count, options.shuffle_block):
            rng.shuffle(shuffled[start : start + options.shuffle_block])
        ranks = torch.from_numpy(shuffled)
    return ranks


def arrange_remaining(
    pattern: Reorder, ids: Tensor, scores: Tensor | None, num_served: int, options: OrderOptions
) -> Tensor:
    """The rest of a pass of which `num_served` samples were served.

    Args:
        ids: [n] int64, ascending: the remaining samples.
        scores: [n], finite; samples with equal scores stand in the order of their ids. None where the pattern uses none.

    Returns:
        [n] int64: the same ids in the order in which they are served.
    """
    if scores is not None and pattern.uses_scores:
        ids = ids[scores.sort(stable=True).indices]
        ids = ids if options.ascending else ids.flip(0)
    ranks = pattern_ranks(pattern, num_served + len(ids), options)[num_served:]
    return ids[ranks.argsort().argsort()]


def fill_non_finite(scores: Tensor) -> Tensor:
    """[n] scores with those that are not finite at the median of the others (0 where there are no others)."""
    finite = torch.isfinite(scores)
    if bool(finite.all()):
        return scores
    ordered = scores[finite].sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if len(ordered) else 0.0
    return torch.where(finite, scores, median)


@dataclass
class OrderedPasses:
    """The passes of a run, one for each group of samples.

    Args:
        group_bounds: [groups + 1] the first id of each group, then the end of the last one.
    """

    pattern: Reorder
    options: OrderOptions
    group_bounds: Sequence[int]
    scores: Tensor | None = field(default=None, init=False)  # [N] float32, finite
    allowed_ids: Tensor | None = field(default=None, init=False)  # [m] ids that may be served; None: all
    is_served: Tensor = field(init=False)  # [N] bool, in the current pass
    num_served: list[int] = field(init=False)  # samples served by each group's current pass
    num_completed: list[int] = field(init=False)  # passes of each group before the current one
    _remaining: list[Tensor | None] = field(init=False)  # rest of each pass in its order; None: not arranged yet

    def __post_init__(self) -> None:
        groups = len(self.group_bounds) - 1
        self.is_served = torch.zeros(self.group_bounds[-1], dtype=torch.bool)
        self.num_served, self.num_completed = [0] * groups, [0] * groups
        self._remaining = [None] * groups

    def set_scores(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """[N] new scores, or [n] scores of `ids` alone; see `fill_non_finite`."""
        scores = fill_non_finite(scores.float())
        if ids is None or len(ids) == len(self.is_served):
            self.scores = scores
        else:
            before = torch.full((len(self.is_served),), torch.nan) if self.scores is None else self.scores
            self.scores = fill_non_finite(before.scatter(0, ids, scores))
        self._remaining = [None] * len(self._remaining)

    def restrict_to(self, ids: Tensor | None) -> None:
        """Serve only these ids from now on; duplicates count once. None: all."""
        self.allowed_ids = None if ids is None else ids.unique()
        self._remaining = [None] * len(self._remaining)

    def restart(self) -> None:
        """Begin every pass again, with no sample served."""
        self.is_served = torch.zeros_like(self.is_served)
        self.num_served = [0] * len(self.num_served)
        self._remaining = [None] * len(self._remaining)

    def upcoming_ids(self, counts: Sequence[int]) -> Tensor:
        """[n] ids, ascending, that hold the next `counts` of each group: the rest of its pass, or where that is not enough
        all that the group may serve."""
        groups = [(self._unserved_ids(group), group, count) for group, count in enumerate(counts)]
        return torch.cat([rest if len(rest) >= count else self._group_ids(group) for rest, group, count in groups])

    def sizes(self) -> list[int]:
        """How many samples of each group may be served in a pass."""
        return [len(self._group_ids(group)) for group in range(len(self.num_served))]

    def mark_served(self, ids: Tensor) -> None:
        """Record samples that were trained before the passes began: the current pass does not serve them."""
        self.is_served[ids] = True
        self._remaining = [None] * len(self._remaining)

    def return_unused(self, ids: Tensor) -> None:
        """Take back samples that were served and not trained."""
        self.is_served[ids] = False
        for group in range(len(self.num_served)):
            in_group = (ids >= self.group_bounds[group]) & (ids < self.group_bounds[group + 1])
            self.num_served[group] = max(self.num_served[group] - int(in_group.sum()), 0)
        self._remaining = [None] * len(self._remaining)

    def next_ids(self, group: int, count: int) -> Tensor:
        """The next [count] ids of a group; a pass that ends is followed by another. Raises DataError for an empty group."""
        served = []
        while count > 0:
            rest = self._arranged(group)
            if len(rest) == 0:
                self._begin_pass(group)
                continue
            served.append(rest[:count])
            self.is_served[served[-1]] = True
            self._remaining[group] = rest[count:]
            self.num_served[group] += len(served[-1])
            count -= len(served[-1])
        return torch.cat(served) if served else torch.zeros(0, dtype=torch.int64)

    def _begin_pass(self, group: int) -> None:
        if len(self._group_ids(group)) == 0:
            raise DataError(f"reorder: no sample of group {group} is left to be ordered")
        self.is_served[self.group_bounds[group] : self.group_bounds[group + 1]] = False
        self.num_served[group] = 0
        self.num_completed[group] += 1
        self._remaining[group] = None

    def _group_ids(self, group: int) -> Tensor:
        """[m] ids of a group that may be served."""
        first, end = self.group_bounds[group], self.group_bounds[group + 1]
        if self.allowed_ids is None:
            return torch.arange(first, end)
        return self.allowed_ids[(self.allowed_ids >= first) & (self.allowed_ids < end)]

    def _unserved_ids(self, group: int) -> Tensor:
        """[m] ids of a group that its current pass has not served."""
        ids = self._group_ids(group)
        return ids[~self.is_served[ids]]

    def _arranged(self, group: int) -> Tensor:
        """The rest of a group's pass in its order, arranged at most once."""
        rest = self._remaining[group]
        if rest is None:
            ids = self._unserved_ids(group)
            scores = None if self.scores is None else self.scores[ids]
            rest = arrange_remaining(self.pattern, ids, scores, self.num_served[group], self.options)
            self._remaining[group] = rest
        return rest

    # -- restart -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scores, allowed ids, and what was served; the order follows from them."""
        tensors = {"scores": self.scores, "allowed_ids": self.allowed_ids}
        return {
            **{name: tensor for name, tensor in tensors.items() if tensor is not None},
            "is_served": self.is_served.to(torch.uint8),
            "num_served": list(self.num_served),
            "num_completed": list(self.num_completed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.allowed_ids = state.get("scores"), state.get("allowed_ids")
        self.is_served = state["is_served"].bool()
        self.num_served, self.num_completed = list(state["num_served"]), list(state["num_completed"])
        self._remaining = [None] * len(self._remaining)
