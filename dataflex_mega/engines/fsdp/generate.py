"""Answers of the model in training to prompts, drawn token by token; every rank must call it equally often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.types import SamplingSpec

if TYPE_CHECKING:
    from dataflex_mega.engines.fsdp.engine import FSDPEngine


def answers(
    engine: FSDPEngine,
    prompts: Sequence[np.ndarray],
    draws: np.ndarray,
    spec: SamplingSpec,
    ends: Sequence[int],
    pad: int,
) -> list[np.ndarray]:
    """n prompts of token ids, [n, max_new_tokens] numbers in 0..1 -> n answers, the end token included where it came.

    `ends`: tokens that end an answer. A number decides which token is drawn (the inverse of the cumulative distribution), so
    an answer depends on its own prompt and numbers and on nothing else in the batch. Dropout is off; caches are kept, so
    each token costs a forward pass of one position. Ranks stop together, when no answer of any of them is open.
    """
    device, module = engine.mesh.device, engine.module
    ids, mask = _padded(prompts, pad)
    ids, mask = ids.to(device), mask.to(device)
    made: list[list[int]] = [[] for _ in prompts]
    open_ = np.ones(len(prompts), dtype=bool)
    cache: Any = None
    module.eval()
    with torch.no_grad():
        for turn in range(spec.max_new_tokens):
            place = (mask.cumsum(1) - 1).clamp(min=0)
            logits, cache = _step(engine, ids, mask, place[:, -ids.shape[1] :], cache)
            drawn = draw(logits, draws[:, turn], spec)
            for row in np.flatnonzero(open_):
                made[row].append(int(drawn[row]))
            open_ &= ~np.isin(drawn, np.asarray(ends, dtype=np.int64))
            left = engine.collectives.sum(torch.tensor(float(open_.sum()), device=device))
            if not float(left):
                break
            ids = torch.from_numpy(drawn).to(device).unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    module.train()
    return [np.asarray(row, dtype=np.int64) for row in made]


def _step(engine: FSDPEngine, ids: Tensor, mask: Tensor, place: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """([n, V] float32 logits of the next token on the CPU, the cache)."""
    with engine.autocast():
        found = engine.module(
            input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        )
    return found.logits[:, -1].float().cpu(), found.past_key_values


def _padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts on the right of their rows: ([n, S] ids, [n, S] mask)."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def draw(logits: Tensor, numbers: np.ndarray, spec: SamplingSpec) -> np.ndarray:
    """[n, V] logits, [n] in 0..1 -> [n] tokens, of the top_k likeliest and of those the fewest that reach top_p."""
    probabilities = torch.softmax(logits.double() / spec.temperature, dim=1)
    ranked, tokens = probabilities.sort(dim=1, descending=True, stable=True)
    if spec.top_k:
        ranked, tokens = ranked[:, : spec.top_k], tokens[:, : spec.top_k]
    ranked = ranked / ranked.sum(1, keepdim=True)
    before = ranked.cumsum(1) - ranked
    ranked = torch.where(before < spec.top_p, ranked, 0.0)
    bounds = (ranked / ranked.sum(1, keepdim=True)).cumsum(1)
    place = (bounds <= torch.from_numpy(numbers).unsqueeze(1)).sum(1)
    last = (ranked > 0).sum(1) - 1  # rounding may put a number at the very end
    return tokens.gather(1, torch.minimum(place, last).unsqueeze(1)).squeeze(1).numpy()
