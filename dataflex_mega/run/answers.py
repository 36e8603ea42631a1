"""predict_with_generate: an evaluation that also answers the prompts and compares the answers with those of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches
from dataflex_mega.data.media import media_kinds
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.engines.base import Engine
from dataflex_mega.llamafactory.similarity import METRICS, similarities
from dataflex_mega.run.session import Session
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.types import IGNORE_INDEX, GenerationSpec

PLAIN = {
    "num_beams": 1,
    "eval_num_beams": None,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
}  # what is not done here


def answers_prompts(session: Session, evaluation: Mapping[str, SamplePool]) -> bool:
    """Whether evaluations of the run do so."""
    asked = bool(session.config.llamafactory.get("predict_with_generate")) and session.args.finetuning.stage == "sft"
    return asked and not _obstacle(session, evaluation)


def _obstacle(session: Session, evaluation: Mapping[str, SamplePool]) -> str:
    """Why prompts cannot be answered while the model trains; empty when they can."""
    if session.config.engine != "fsdp":
        return f"engine: {session.config.engine} does not generate"
    has_media = any(media_kinds(domain.rows) for pool in evaluation.values() for domain in pool.domains)
    return "prompts with images, videos or audio are answered by the finished model" if has_media else ""


def notes_on_answers(session: Session, evaluation: Mapping[str, SamplePool]) -> list[str]:
    """What evaluations of a run do otherwise than the generation after it."""
    keys = session.config.llamafactory
    if not keys.get("predict_with_generate") or str(session.args.training.eval_strategy.value) == "no":
        return []
    obstacle = _obstacle(session, evaluation)
    if obstacle:
        return [
            f"predict_with_generate: answers are generated after training, evaluations before give the loss; {obstacle}"
        ]
    return [
        f"{key}: {keys[key]!r} acts on the answers after training; evaluations before sample token by token"
        for key, plain in PLAIN.items()
        if keys.get(key, plain) != plain
    ]


def answer_metrics(session: Session, share: PoolShare, engine: Engine) -> dict[str, float]:
    """METRICS of an evaluation set: the mean over its samples that have a prompt and an answer; nothing without any.

    Every rank answers its share. What is sampled depends on the seed and the sample, and takes nothing from the run's own
    random numbers.
    """
    tokenizer: Any = session.tokenizer
    stop_ids = sorted({*tokenizer.all_special_ids, tokenizer.eos_token_id})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64)
    for ids, count in lockstep_batches(share.local_ids(), share.batch_size, share.num_batches(), filler=FIRST_ID):
        samples = share.pool.fetch(ids)
        pairs = [split_last_answer(sample) for sample in samples]
        prompts = [
            sample.input_ids[:1] if pair is None else pair[0] for sample, pair in zip(samples, pairs, strict=True)
        ]
        spec = generation_spec(session.args.generating, max(len(prompt) for prompt in prompts))
        seed, length = session.args.training.seed, spec.max_new_tokens
        uniforms = np.stack([np.random.default_rng([seed, s.sample_id]).random(length) for s in samples])
        answers = engine.generate(prompts, uniforms, spec, stop_ids, pad_id)
        scored = [(a, pair[1]) for a, pair in zip(answers, pairs, strict=True) if count and pair is not None]
        if scored:
            values = similarities(tokenizer, *map(list, zip(*scored, strict=True)))
            sums += torch.tensor([*values.sum(axis=0), len(scored)], dtype=torch.float64)
    *totals, number = session.collectives.all_reduce_sum(sums).tolist()
    return {name: total / number for name, total in zip(METRICS, totals, strict=True)} if number else {}


def split_last_answer(sample: Sample) -> tuple[np.ndarray, np.ndarray] | None:
    """(all tokens before the last answer, that answer); None for a sample without one of them."""
    is_target = sample.labels != IGNORE_INDEX
    targets = np.flatnonzero(is_target)
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    before = np.flatnonzero(~is_target[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    return (sample.input_ids[:start], sample.labels[start:end]) if start else None


def generation_spec(generating: Any, prompt_length: int) -> GenerationSpec:
    """LLaMA-Factory's generating arguments. Without `do_sample` the likeliest token is taken."""
    new = generating.max_new_tokens
    length = new if new and new > 0 else max(1, generating.max_length - prompt_length)
    if not generating.do_sample or generating.temperature <= 0:
        return GenerationSpec(length, top_k=1)
    return GenerationSpec(length, generating.temperature, max(0, generating.top_k), generating.top_p)
