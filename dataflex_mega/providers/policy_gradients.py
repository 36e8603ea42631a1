"""Policy gradients of a run's target prompts: answers of the current model, their rewards, directions for gradient scores.

The answers to a prompt are divided over ranks, so that the prompt's gradient is one ordinary backward pass of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import PolicyGradientSignal
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.errors import DataError
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.providers.context import CandidateScope, SignalContext
from dataflex_mega.providers.gradients import gradient_scorer
from dataflex_mega.providers.registry import EngineInfo, Provider, provides
from dataflex_mega.signals import rewards
from dataflex_mega.types import IGNORE_INDEX

GENERATED_TOKENS = 16384  # positions of prompts and answers that are generated together: 2 GB of keys and values at 8B


@provides(
    PolicyGradientSignal,
    scope="candidates",
    requires={Capability.POLICY_GRADIENTS, Capability.GENERATION},
    needs_targets=True,
    stages=("sft",),
)
class PolicyGradientProvider(Provider):
    """`dot` and `norm2` of candidates with the policy gradients of the evaluation sets."""

    def __init__(self, context: SignalContext) -> None:
        super().__init__(context)
        self.reported: set[str] = set()

    def compute(self, request: PolicyGradientSignal, scope: CandidateScope) -> dict[str, Tensor]:
        scorer = gradient_scorer(self.context, request.adam, self.reported)
        reward = rewards.load_reward(request.reward)
        groups = self.context.target_groups()
        rollouts = [
            TargetRollouts(self.context, request, reward, scope.step, number, group).batches()
            for number, group in enumerate(groups)
        ]
        return scope.gradient_dots(scorer, scorer.policy_directions(rollouts))

    @classmethod
    def check(cls, request: PolicyGradientSignal, engine: EngineInfo, who: str) -> None:
        rewards.load_reward(request.reward)


def split_prompt_answer(sample: Sample, max_prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """A target sample -> (the last `max_prompt_length` tokens of its prompt, its answer): what comes before the first target
    token, and the target tokens. Raises DataError for a sample without one of them."""
    targets = np.flatnonzero(sample.labels != IGNORE_INDEX)
    if not len(targets) or targets[0] == 0:
        raise DataError(f"eval_dataset: row {sample.sample_id} has no prompt with an answer, which selector nice needs")
    return sample.input_ids[: targets[0]][-max_prompt_length:], sample.labels[targets]


@dataclass(frozen=True)
class TargetRollouts:
    """The answers to the prompts of one group of targets."""

    context: SignalContext
    request: PolicyGradientSignal
    reward: rewards.Reward
    step: int
    group_number: int
    group: SamplePool

    def batches(self) -> list[tuple[Any, Tensor]]:
        """A prompt's answers of this rank as a batch, and what their summed token losses are multiplied with, for each
        prompt; equally long on every rank."""
        columns, rows_per_prompt = self._answer_columns()
        samples: list[list[Sample]] = []
        all_rewards = torch.zeros(len(self.group), self.request.num_answers, dtype=torch.float64)
        prompts_per_batch = self._prompts_per_batch(rows_per_prompt)
        is_main = self.context.parallel_info.is_main
        progress = ProgressCounter("nice: prompts answered", len(self.group)) if is_main else None
        for first in range(0, len(self.group), prompts_per_batch):
            prompts = np.arange(first, min(first + prompts_per_batch, len(self.group)))
            targets = self.group.fetch(prompts)
            rollouts = self._answer(prompts, targets, rows_per_prompt, columns)
            local_rewards = self._rewards(targets, rollouts, len(columns))
            all_rewards[prompts[:, None], columns] = torch.tensor(local_rewards, dtype=torch.float64)
            samples += [rollouts[n * rows_per_prompt : (n + 1) * rows_per_prompt] for n in range(len(prompts))]
            if progress is not None:
                progress(int(prompts[-1]) + 1)
        weights = self.request.answer_weights(self.context.collectives.all_reduce_sum(all_rewards))
        return [self._weighted_batch(row, weights[prompt, columns]) for prompt, row in enumerate(samples)]

    def _prompts_per_batch(self, rows_per_prompt: int) -> int:
        """How many prompts are answered together, equal on every rank: a forward pass of one position of few rows costs
        hardly less than one of many, and keeps nothing for a backward pass."""
        targets = self.group.fetch(np.arange(len(self.group)))
        longest = max(len(split_prompt_answer(target, self.request.max_prompt_length)[0]) for target in targets)
        rows = GENERATED_TOKENS // (longest + self.request.generation.max_new_tokens)
        return max(1, max(rows, self.context.batch_size) // rows_per_prompt)

    def _answer_columns(self) -> tuple[np.ndarray, int]:
        """Which of a prompt's answers are this rank's, and how many a rank makes: as many as the one with the most."""
        rank, size = self.context.parallel_info.dp_rank, self.context.parallel_info.dp_size
        count = self.request.num_answers
        return np.arange(count * rank // size, count * (rank + 1) // size), -(-count // size)

    def _answer(self, prompts: np.ndarray, targets: list[Sample], rows: int, columns: np.ndarray) -> list[Sample]:
        """`rows` samples for each prompt: prompt and answer. Those beyond this rank's share are made and not counted."""
        request, tokenizer = self.request, self.context.tokenizer
        prompt_ids, uniforms = [], []
        for number, target in zip(prompts.tolist(), targets, strict=True):
            prompt, _ = split_prompt_answer(target, request.max_prompt_length)
            for row in range(rows):
                column = int(columns[row]) if row < len(columns) else 0
                seed = [request.seed, self.step, self.group_number, number, column]
                prompt_ids.append(prompt)
                uniforms.append(np.random.default_rng(seed).random(request.generation.max_new_tokens))
        stop_ids = sorted({*tokenizer.all_special_ids, tokenizer.eos_token_id})
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        answers = self.context.engine.generate(prompt_ids, np.stack(uniforms), request.generation, stop_ids, pad_id)
        return [_sample(targets[n // rows], p, a) for n, (p, a) in enumerate(zip(prompt_ids, answers, strict=True))]

    def _rewards(self, targets: list[Sample], rollouts: list[Sample], count: int) -> list[list[float]]:
        """[P][count] rewards of this rank's answers."""
        tokenizer = self.context.tokenizer
        rows = len(rollouts) // len(targets)
        texts: list[tuple[str, str, str]] = []
        for number, target in enumerate(targets):
            reference = split_prompt_answer(target, self.request.max_prompt_length)[1]
            for sample in rollouts[number * rows : number * rows + count]:
                answer = sample.labels[sample.labels != IGNORE_INDEX]
                prompt = sample.input_ids[: len(sample.input_ids) - len(answer)]
                decoded = (tokenizer.decode(t, skip_special_tokens=True) for t in (prompt, answer, reference))
                texts.append(tuple(decoded))
        prompts, answers, references = (list(part) for part in zip(*texts, strict=True)) if texts else ([], [], [])
        values = rewards.compute_rewards(self.reward, prompts, answers, references)
        return [values[n * count : (n + 1) * count] for n in range(len(targets))]

    def _weighted_batch(self, samples: list[Sample], answer_weights: Tensor) -> tuple[Any, Tensor]:
        weights = torch.zeros(len(samples), dtype=torch.float64)
        weights[: len(answer_weights)] = answer_weights
        return self.context.collate_unpacked(samples), weights


def _sample(target: Sample, prompt: np.ndarray, answer: np.ndarray) -> Sample:
    labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), answer])
    return replace(target, input_ids=np.concatenate([prompt, answer]), labels=labels, reference_losses=None)
