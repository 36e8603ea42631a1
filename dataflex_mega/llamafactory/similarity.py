"""How near answers are to their references: LLaMA-Factory's own metric."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def similarities(tokenizer: Any, answers: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """n answers and n references, token ids -> [n, 4] METRICS in percent."""
    from llamafactory.train.sft.metric import ComputeSimilarity

    logging.getLogger("jieba").setLevel(logging.WARNING)  # it tells how long it takes to load
    meter: Any = ComputeSimilarity(tokenizer=tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pair = SimpleNamespace(predictions=_padded(answers, padding), label_ids=_padded(references, padding))
    meter(pair, compute_result=False)
    return np.array([meter.score_dict[name] for name in METRICS]).T


def _padded(rows: Sequence[np.ndarray], padding: int) -> np.ndarray:
    padded = np.full((len(rows), max(1, *(len(row) for row in rows))), padding, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
