"""Which samples a selection considers: a part of the pool at each update, so that a user can bound what scoring costs.

Each domain is walked through in a random order, a part at each update, until every sample has been considered once; then in
another order. Which part is a function of (seed, update) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.permutation import mix_key, permute
from dataflex_mega.errors import CheckpointError

STREAM = 3  # of random numbers; data.sampler and the controller have others


@dataclass
class Candidates:
    """The parts of one run, the same on every rank.

    Attributes:
        sizes: samples of each domain.
        share: of each domain, 0 < share <= 1; at least one sample.
        keeps: whether a sample may be chosen by a score of an earlier update ("incremental"), the latest it was given.
    """

    sizes: Sequence[int]
    share: float
    seed: int
    keeps: bool = False
    _known: Tensor | None = field(default=None, init=False)  # [N] or [N, m] latest scores, NaN where there is none

    def count(self, domain: int) -> int:
        """Samples of a domain that an update considers."""
        return min(self.sizes[domain], max(1, round(self.share * self.sizes[domain])))

    def total(self) -> int:
        """Samples that an update considers."""
        return sum(self.count(domain) for domain in range(len(self.sizes)))

    def ids(self, update: int, least: Sequence[int] | None = None) -> np.ndarray:
        """Sorted global ids to score at the update of this number.

        Args:
            least: [k] samples that will be drawn from each domain; a domain's part is as large as that, if it can be.
        """
        parts, offset = [], 0
        for domain, size in enumerate(self.sizes):
            count = self.count(domain)
            rounds = -(-size // count) if size else 1
            epoch, place = divmod(update, rounds)
            count = min(size, max(count, int(least[domain]) if least is not None else 0))
            start = min(place * self.count(domain), size - count)  # the last part of a round reaches back
            if count:
                key = mix_key(self.seed, STREAM, domain, epoch)
                parts.append(np.sort(permute(np.arange(start, start + count), size, key)) + offset)
            offset += size
        return np.concatenate(parts)

    def merge(self, ids: np.ndarray, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of these ids -> (sorted [n] ids, their scores) of what may be chosen: these, or all that have a score."""
        if not self.keeps:
            return torch.from_numpy(ids), scores
        known = (
            torch.full((sum(self.sizes), *scores.shape[1:]), torch.nan) if self._known is None else self._known.clone()
        )
        known[torch.from_numpy(ids)] = torch.nan_to_num(
            scores.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        self._known = known
        there = torch.nonzero(~known.flatten(1).isnan().any(dim=1) if known.dim() > 1 else ~known.isnan()).flatten()
        return there, known[there]

    def state(self) -> dict[str, Any]:
        """The latest scores, where they are kept."""
        return {} if self._known is None else {"scores": self._known}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Raises CheckpointError when the scores are of another number of samples."""
        known = state.get("scores")
        if known is not None and len(known) != sum(self.sizes):
            raise CheckpointError(f"the checkpoint has scores of {len(known)} samples, the pool has {sum(self.sizes)}")
        self._known = known
