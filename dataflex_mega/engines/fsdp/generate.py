"""Answers of the model in training to prompts, sampled token by token; every rank must call it equally often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.types import GenerationSpec


def generate_answers(
    runner: FSDPModelRunner,
    prompts: Sequence[np.ndarray],
    uniforms: np.ndarray,
    spec: GenerationSpec,
    end_ids: Sequence[int],
    pad_id: int,
) -> list[np.ndarray]:
    """n prompts of token ids, [n, max_new_tokens] numbers in 0..1 -> n answers, the end token included where it was sampled.

    `end_ids`: tokens that end an answer. A number decides which token is sampled (the inverse of the cumulative
    distribution), so an answer depends on its own prompt and numbers and on nothing else in the batch. Dropout is off; the
    key-value cache is used, so each token costs a forward pass of one position. Ranks stop together, when no answer of any
    of them is open.
    """
    device = runner.device
    ids, mask = _left_pad(prompts, pad_id)
    ids, mask = ids.to(device), mask.to(device)
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = np.ones(len(prompts), dtype=bool)
    cache: Any = None
    with torch.no_grad(), runner.evaluation_mode():
        for turn in range(spec.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits, cache = _step(runner, ids, mask, positions[:, -ids.shape[1] :], cache)
            tokens = sample_tokens(logits, uniforms[:, turn], spec)
            for row in np.flatnonzero(is_open):
                answers[row].append(int(tokens[row]))
            is_open &= ~np.isin(tokens, np.asarray(end_ids, dtype=np.int64))
            num_open = runner.collectives.all_reduce_sum(torch.tensor(float(is_open.sum()), device=device))
            if not float(num_open):
                break
            ids = torch.from_numpy(tokens).to(device).unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [np.asarray(row, dtype=np.int64) for row in answers]


def _step(runner: FSDPModelRunner, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """([n, V] float32 logits of the next token on the CPU, the cache)."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if runner.records_routers(runner.module):
        inputs["output_router_logits"] = False
    with runner.autocast():
        outputs = runner.module(**inputs, past_key_values=cache, use_cache=True)
    return outputs.logits[:, -1].float().cpu(), outputs.past_key_values


def _left_pad(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts on the right of their rows: ([n, S] ids, [n, S] mask)."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def sample_tokens(logits: Tensor, numbers: np.ndarray, spec: GenerationSpec) -> np.ndarray:
    """[n, V] logits, [n] in 0..1 -> [n] tokens, of the top_k likeliest and of those the fewest that reach top_p."""
    probabilities = torch.softmax(logits.double() / spec.temperature, dim=1)
    ranked, tokens = rank_tokens(probabilities, spec.top_k)
    ranked = ranked / ranked.sum(1, keepdim=True)
    before = ranked.cumsum(1) - ranked
    ranked = torch.where(before < spec.top_p, ranked, 0.0)
    bounds = (ranked / ranked.sum(1, keepdim=True)).cumsum(1)
    ranks = (bounds <= torch.from_numpy(numbers).unsqueeze(1)).sum(1)
    last = (ranked > 0).sum(1) - 1  # rounding may put a number at the very end
    return tokens.gather(1, torch.minimum(ranks, last).unsqueeze(1)).squeeze(1).numpy()


def rank_tokens(probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[n, V] -> the highest `top_k` of each row, 0: all, and their tokens; of equal ones the lower token comes first."""
    vocabulary = probabilities.shape[1]
    if top_k and 2 * top_k < vocabulary:  # sorting a whole vocabulary takes longer than a small model's forward pass
        values, tokens = probabilities.topk(2 * top_k, dim=1)
        if not bool((values[:, -1] == values[:, top_k - 1]).any()):  # else topk may have left a lower token out
            tokens, order = tokens.sort(dim=1)
            values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
            return values[:, :top_k], tokens.gather(1, order)[:, :top_k]
    values, tokens = probabilities.sort(dim=1, descending=True, stable=True)
    return values[:, : top_k or vocabulary], tokens[:, : top_k or vocabulary]
