"""The numbers that keep random draws apart which share a seed and a step. A changed value changes every run.

Two families are drawn in different ways, so a number may stand in both. Where one stands twice within a family, the keys
differ in length and cannot meet.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch


class RngStream:
    """Plain numbers and no Enum, in which equal values would be one member."""

    # Permutations of samples, keyed by data.permutation.hash_key(seed, stream, ...).
    POOL: Final = 1  # (domain, epoch) of the whole pool
    SELECTION: Final = 2  # (domain, first step, epoch) of selected samples
    BATCH_ORDER: Final = 3  # (step): a global batch
    CANDIDATES: Final = 3  # (domain, epoch): which part of the pool is scored

    # Generators seeded with (seed, step, stream).
    MIXER: Final = 1
    SELECTOR: Final = 2
    SCORE_SUBSET: Final = 3  # plus the seed of the score source: which samples are scored for an order
    TARGET_BATCH: Final = 11  # target samples that a step is compared with


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A generator that depends on (seed, step, stream) alone."""
    words = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
