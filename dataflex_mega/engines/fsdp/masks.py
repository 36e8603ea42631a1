"""Attention masks of packed rows: causal within a sample, as far back as each kind of layer looks.

A ready mask replaces all of transformers' own mask functions, so sliding windows and chunks are part of it. Distances are
those within a sample: what a layer sees of a sample does not depend on where in a row it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.types import Batch

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # as transformers names layers


@dataclass(frozen=True)
class AttentionKinds:
    """Which kinds of layers a model has, and how far back they look."""

    names: tuple[str, ...] = (FULL,)
    window: int | None = None  # of sliding attention: a token sees itself and window - 1 before it
    chunk: int | None = None  # of chunked attention: a token sees its own chunk of so many positions

    @classmethod
    def of(cls, config: Any) -> AttentionKinds:
        """From a Hugging Face configuration; a kind that is not known here counts as full attention."""
        if config is None:
            return cls()
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = (
            getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", None) in (None, True) else None
        )
        chunk = getattr(text, "attention_chunk_size", None)
        names = getattr(text, "layer_types", None)
        if not names:  # then all layers are of one kind
            names = [SLIDING if window is not None else CHUNKED if chunk is not None else FULL]
        return cls(tuple(sorted(set(names))), window, chunk)

    def mask(self, batch: Batch, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The `attention_mask` of a packed batch: one mask, or one for each kind where there are several."""
        masks = {name: self._mask_of(name, batch, dtype) for name in self.names}
        return masks if len(masks) > 1 else masks[self.names[0]]

    def _mask_of(self, name: str, batch: Batch, dtype: torch.dtype) -> Tensor:
        positions = batch.position_ids
        if name == SLIDING and self.window is not None:
            return attention_mask(batch.segment_ids, dtype, _distance(positions) < self.window)
        if name == CHUNKED and self.chunk is not None:
            chunks = positions // self.chunk
            return attention_mask(batch.segment_ids, dtype, chunks.unsqueeze(2) == chunks.unsqueeze(1))
        return attention_mask(batch.segment_ids, dtype)


def _distance(positions: Tensor) -> Tensor:
    """[b, S] -> [b, S, S], how far a key is before a query of the same sample."""
    return positions.unsqueeze(2) - positions.unsqueeze(1)


def attention_mask(segment_ids: Tensor, dtype: torch.dtype, within: Tensor | None = None) -> Tensor:
    """[b, S] -> [b, 1, S, S] additive mask: causal within a sample, blocked between samples.

    Padding attends to itself, because a row of a softmax that is blocked everywhere is not a number.

    Args:
        within: [b, S, S], what a query may see at most.
    """
    same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    length, device = segment_ids.shape[1], segment_ids.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    allowed = same & causal if within is None else same & causal & within
    allowed = allowed.unsqueeze(1)
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
