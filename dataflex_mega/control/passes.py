"""A pass over samples in a pattern of their scores, which goes on where it stood after they are scored anew.

A pattern says which rank by score belongs at each of the T places of a pass (algorithms.base.Reorder). Served so far: the
samples of places 0 .. t-1. What is left, n samples, belongs at places t .. T-1 with T = t + n, and is put there in the
order of the ranks that the pattern has at these places: the lowest score where the lowest of them is, and so on. With the
same scores that is the pass as it was; with new scores, or with other samples allowed, the pattern keeps its place and only
who stands where changes. A sample that was served is not served again before its pass ends, whatever happens to scores and
to the pool meanwhile.

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
from dataflex_mega.errors import DataError


@dataclass(frozen=True)
class Direction:
    """How scores become places, beside the pattern."""

    ascending: bool = True  # from low to high scores; False: equal scores change their order too
    window: int = 0  # above 1: each block of so many places is shuffled
    seed: int = 42


def places(pattern: Reorder, count: int, direction: Direction) -> Tensor:
    """[count] int64: the rank at each place of a pass, with blocks of `window` places shuffled."""
    ranks = pattern.ranks(count, direction.seed)
    if direction.window > 1:
        mixed, rng = ranks.numpy().copy(), np.random.default_rng(direction.seed)
        for start in range(0, count, direction.window):
            rng.shuffle(mixed[start : start + direction.window])
        ranks = torch.from_numpy(mixed)
    return ranks


def arrange(pattern: Reorder, ids: Tensor, scores: Tensor | None, done: int, direction: Direction) -> Tensor:
    """The rest of a pass of which `done` samples are served.

    Args:
        ids: [n] int64, ascending: what is left.
        scores: [n], finite; equal ones stand in the order of their ids. None where the pattern reads none.

    Returns:
        [n] int64: the same ids in the order in which they are to be served.
    """
    if scores is not None and pattern.reads_scores:
        ids = ids[scores.sort(stable=True).indices]
        ids = ids if direction.ascending else ids.flip(0)
    left = places(pattern, done + len(ids), direction)[done:]
    return ids[left.argsort().argsort()]


def filled(scores: Tensor) -> Tensor:
    """[n] scores with those that are not finite at the median of the others (0 where there are no others)."""
    known = torch.isfinite(scores)
    if bool(known.all()):
        return scores
    ordered = scores[known].sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if len(ordered) else 0.0
    return torch.where(known, scores, middle)


@dataclass
class Ordering:
    """The passes of a run. `bounds`: [groups + 1] ids at which a group of samples begins, and the end of the last."""

    pattern: Reorder
    direction: Direction
    bounds: Sequence[int]
    scores: Tensor | None = field(default=None, init=False)  # [N] float32, finite
    pool: Tensor | None = field(default=None, init=False)  # [m] ids that may be served; None: all
    served: Tensor = field(init=False)  # [N] bool, in the pass that is under way
    done: list[int] = field(init=False)  # samples served by each group's pass
    passes: list[int] = field(init=False)  # passes begun before this one
    _rest: list[Tensor | None] = field(init=False)  # what is left of each pass in its order; None: not arranged yet

    def __post_init__(self) -> None:
        groups = len(self.bounds) - 1
        self.served = torch.zeros(self.bounds[-1], dtype=torch.bool)
        self.done, self.passes = [0] * groups, [0] * groups
        self._rest = [None] * groups

    def score(self, scores: Tensor, ids: Tensor | None = None) -> None:
        """[N] new scores, or [n] those of `ids` alone; see `filled`."""
        found = filled(scores.float())
        if ids is None or len(ids) == len(self.served):
            self.scores = found
        else:
            before = torch.full((len(self.served),), torch.nan) if self.scores is None else self.scores
            self.scores = filled(before.scatter(0, ids, found))
        self._rest = [None] * len(self._rest)

    def limit(self, pool: Tensor | None) -> None:
        """Serve only these ids from now on; duplicates count once. None: all."""
        self.pool = None if pool is None else pool.unique()
        self._rest = [None] * len(self._rest)

    def restart(self) -> None:
        """Begin every pass anew."""
        self.served = torch.zeros_like(self.served)
        self.done = [0] * len(self.done)
        self._rest = [None] * len(self._rest)

    def coming(self, counts: Sequence[int]) -> Tensor:
        """[n] ids, ascending, among which are the next `counts` of each group: what its pass has left, or where that is
        not enough all that it may serve."""
        groups = [(self._left(group), group, count) for group, count in enumerate(counts)]
        return torch.cat([left if len(left) >= count else self._allowed(group) for left, group, count in groups])

    def sizes(self) -> list[int]:
        """How many samples of each group may be served in a pass."""
        return [len(self._allowed(group)) for group in range(len(self.done))]

    def used(self, ids: Tensor) -> None:
        """These were trained on by other means, before the passes began: they are not served in them."""
        self.served[ids] = True
        self._rest = [None] * len(self._rest)

    def give_back(self, ids: Tensor) -> None:
        """These were taken and not trained on after all."""
        self.served[ids] = False
        for group in range(len(self.done)):
            here = (ids >= self.bounds[group]) & (ids < self.bounds[group + 1])
            self.done[group] = max(self.done[group] - int(here.sum()), 0)
        self._rest = [None] * len(self._rest)

    def take(self, group: int, count: int) -> Tensor:
        """[count] ids, the next of a group's pass; a pass that ends is followed by another. Raises DataError for an empty
        group."""
        parts = []
        while count > 0:
            rest = self._arranged(group)
            if len(rest) == 0:
                self._begin(group)
                continue
            parts.append(rest[:count])
            self.served[parts[-1]] = True
            self._rest[group] = rest[count:]
            self.done[group] += len(parts[-1])
            count -= len(parts[-1])
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _begin(self, group: int) -> None:
        if len(self._allowed(group)) == 0:
            raise DataError(f"reorder: no sample of group {group} is left to be ordered")
        self.served[self.bounds[group] : self.bounds[group + 1]] = False
        self.done[group] = 0
        self.passes[group] += 1
        self._rest[group] = None

    def _allowed(self, group: int) -> Tensor:
        first, end = self.bounds[group], self.bounds[group + 1]
        if self.pool is None:
            return torch.arange(first, end)
        return self.pool[(self.pool >= first) & (self.pool < end)]

    def _left(self, group: int) -> Tensor:
        allowed = self._allowed(group)
        return allowed[~self.served[allowed]]

    def _arranged(self, group: int) -> Tensor:
        rest = self._rest[group]
        if rest is None:
            ids = self._left(group)
            scores = None if self.scores is None else self.scores[ids]
            rest = arrange(self.pattern, ids, scores, self.done[group], self.direction)
            self._rest[group] = rest
        return rest

    # -- restart -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything but what follows from it."""
        tensors = {"scores": self.scores, "pool": self.pool}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return {**kept, "served": self.served.to(torch.uint8), "done": list(self.done), "passes": list(self.passes)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.scores, self.pool = state.get("scores"), state.get("pool")
        self.served = state["served"].bool()
        self.done, self.passes = list(state["done"]), list(state["passes"])
        self._rest = [None] * len(self._rest)
