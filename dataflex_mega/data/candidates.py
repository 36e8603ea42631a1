"""Which samples a selection scores: a fraction of the pool at each update, which bounds what scoring costs.

The samples of each domain are taken in a random order, the next ones at each update, until each has been scored once;
then in another order. Which samples an update scores is a function of (seed, update) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.permutation import hash_key, permute
from dataflex_mega.errors import CheckpointError
from dataflex_mega.rng_streams import RngStream


@dataclass
class CandidateRotation:
    """The candidates of every update of a run, the same on every rank.

    Attributes:
        sizes: samples of each domain.
        fraction: of each domain, 0 < fraction <= 1; at least one sample.
        reuse_old_scores: whether a sample may be selected by its latest score, from whichever update.
    """

    sizes: Sequence[int]
    fraction: float
    seed: int
    reuse_old_scores: bool = False
    _latest: Tensor | None = field(default=None, init=False)  # [N] or [N, m] latest scores, NaN where there is none

    def num_in_domain(self, domain: int) -> int:
        """Candidates that an update takes from a domain."""
        return min(self.sizes[domain], max(1, round(self.fraction * self.sizes[domain])))

    def num_total(self) -> int:
        """Candidates that an update takes from all domains."""
        return sum(self.num_in_domain(domain) for domain in range(len(self.sizes)))

    def ids(self, update: int, min_per_domain: Sequence[int] | None = None) -> np.ndarray:
        """Sorted global ids to score at the update of this number.

        Args:
            min_per_domain: [k] samples that will be drawn from each domain; at least that many are candidates, where the
                domain has them.
        """
        candidates, offset = [], 0
        for domain, size in enumerate(self.sizes):
            count = self.num_in_domain(domain)
            updates_per_epoch = -(-size // count) if size else 1
            epoch, chunk = divmod(update, updates_per_epoch)
            count = min(size, max(count, int(min_per_domain[domain]) if min_per_domain is not None else 0))
            start = min(chunk * self.num_in_domain(domain), size - count)  # the last chunk overlaps the one before
            if count:
                key = hash_key(self.seed, RngStream.CANDIDATES, domain, epoch)
                candidates.append(np.sort(permute(np.arange(start, start + count), size, key)) + offset)
            offset += size
        return np.concatenate(candidates)

    def merge_scores(self, ids: np.ndarray, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of these ids -> (sorted [n] ids, their scores) of what may be selected: these, or all that have a score."""
        if not self.reuse_old_scores:
            return torch.from_numpy(ids), scores
        if self._latest is None:
            latest = torch.full((sum(self.sizes), *scores.shape[1:]), torch.nan)
        else:
            latest = self._latest.clone()
        finite = torch.nan_to_num(scores.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        latest[torch.from_numpy(ids)] = finite  # NaN is left to samples without a score
        self._latest = latest
        unscored = latest.flatten(1).isnan().any(dim=1) if latest.dim() > 1 else latest.isnan()
        scored_ids = torch.nonzero(~unscored).flatten()
        return scored_ids, latest[scored_ids]

    def state_dict(self) -> dict[str, Any]:
        """The latest scores, when they are reused; otherwise empty."""
        return {} if self._latest is None else {"scores": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the scores are of another number of samples."""
        latest = state.get("scores")
        if latest is not None and len(latest) != sum(self.sizes):
            raise CheckpointError(f"the checkpoint has scores of {len(latest)} samples, the pool has {sum(self.sizes)}")
        self._latest = latest
