"""Policy gradients of a run's target prompts: answers of the model of now, their rewards, directions for gradient scores.

The answers to a prompt are divided over ranks, so that the prompt's gradient is one ordinary backward pass of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.errors import DataError
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.signals import rewards
from dataflex_mega.types import IGNORE_INDEX, UsesPolicy

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build
    from dataflex_mega.signals.computer import Provider, SignalComputer


def provider(adam: bool) -> Callable[[Build, Any, Any], Provider]:
    """For providers.registry: `dot` and `norm2` of candidates with the policy gradients of the evaluation sets."""

    def make(run: Build, engine: Any, selector: Any) -> Provider:
        reward = rewards.load_reward(selector.reward)

        def signals(computer: SignalComputer, ids: np.ndarray) -> dict[str, Tensor]:
            assert computer.targets is not None, "checked when the run was built"
            gradients: Any = computer.targets.gradient_scorer(adam)  # the FSDP engine's, which alone has policy directions
            answered = [
                Answered(run, engine, selector, computer, reward, number, group).all()
                for number, group in enumerate(computer.targets.groups)
            ]
            return computer.gradient_dots(gradients, gradients.policy_directions(answered), ids)

        return signals

    return make


def split(sample: Sample, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """A target sample -> (the last `longest` tokens of its prompt, its answer): what comes before the first target token,
    and the target tokens. Raises DataError for a sample without one of them."""
    targets = np.flatnonzero(sample.labels != IGNORE_INDEX)
    if not len(targets) or targets[0] == 0:
        raise DataError(f"eval_dataset: row {sample.sample_id} has no prompt with an answer, which selector nice needs")
    return sample.input_ids[: targets[0]][-longest:], sample.labels[targets]


@dataclass
class Answered:
    """One group of targets, answered."""

    run: Build
    engine: Any
    selector: UsesPolicy
    computer: SignalComputer
    reward: rewards.Reward
    number: int  # of the group
    group: SamplePool

    def all(self) -> list[tuple[Any, Tensor]]:
        """A prompt's answers of this rank as a batch, and what their summed token losses are multiplied with, for each
        prompt; equally long on every rank."""
        mine, rows = self._columns()
        samples: list[list[Sample]] = []
        rated = torch.zeros(len(self.group), self.selector.mc_samples, dtype=torch.float64)
        together = max(1, self.computer.batch_size // rows)
        count = ProgressCounter("nice: prompts answered", len(self.group)) if self.run.parallel_info.is_main else None
        for first in range(0, len(self.group), together):
            places = np.arange(first, min(first + together, len(self.group)))
            targets = self.group.fetch(places)
            made = self._answers(places, targets, rows, mine)
            rated[places[:, None], mine] = torch.tensor(self._rewards(targets, made, len(mine)), dtype=torch.float64)
            samples += [made[n * rows : (n + 1) * rows] for n in range(len(places))]
            if count is not None:
                count(int(places[-1]) + 1)
        factors = self.selector.factors(self.run.collectives.all_reduce_sum(rated))
        return [self._weighed(row, factors[place, mine]) for place, row in enumerate(samples)]

    def _columns(self) -> tuple[np.ndarray, int]:
        """Which of a prompt's answers are this rank's, and how many a rank makes: as many as the one with the most."""
        dp_rank, dp_size, count = self.run.parallel_info.dp_rank, self.run.parallel_info.dp_size, self.selector.mc_samples
        return np.arange(count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size), -(-count // dp_size)

    def _answers(self, places: np.ndarray, targets: list[Sample], rows: int, mine: np.ndarray) -> list[Sample]:
        """`rows` samples for each prompt: prompt and answer. Those beyond this rank's share are made and not counted."""
        spec, tokenizer = self.selector.sampling(), self.run.tokenizer_module["tokenizer"]
        prompts, draws = [], []
        for place, target in zip(places.tolist(), targets, strict=True):
            prompt, _ = split(target, self.selector.max_prompt_length)
            for row in range(rows):
                column = int(mine[row]) if row < len(mine) else 0
                seed = [self.selector.seed, self.computer.step, self.number, place, column]
                prompts.append(prompt)
                draws.append(np.random.default_rng(seed).random(spec.max_new_tokens))
        ends = sorted({*tokenizer.all_special_ids, tokenizer.eos_token_id})
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        found = self.engine.generate(prompts, np.stack(draws), spec, ends, pad)
        return [_sample(targets[n // rows], p, a) for n, (p, a) in enumerate(zip(prompts, found, strict=True))]

    def _rewards(self, targets: list[Sample], made: list[Sample], count: int) -> list[list[float]]:
        """[P][count] rewards of this rank's answers."""
        tokenizer = self.run.tokenizer_module["tokenizer"]
        rows = len(made) // len(targets)
        texts: list[tuple[str, str, str]] = []
        for number, target in enumerate(targets):
            wanted = split(target, self.selector.max_prompt_length)[1]
            for sample in made[number * rows : number * rows + count]:
                answer = sample.labels[sample.labels != IGNORE_INDEX]
                prompt = sample.input_ids[: len(sample.input_ids) - len(answer)]
                texts.append(tuple(tokenizer.decode(t, skip_special_tokens=True) for t in (prompt, answer, wanted)))
        prompts, answers, references = (list(part) for part in zip(*texts, strict=True)) if texts else ([], [], [])
        found = rewards.compute_rewards(self.reward, prompts, answers, references)
        return [found[n * count : (n + 1) * count] for n in range(len(targets))]

    def _weighed(self, samples: list[Sample], factors: Tensor) -> tuple[Any, Tensor]:
        assert self.computer.targets is not None
        weights = torch.zeros(len(samples), dtype=torch.float64)
        weights[: len(factors)] = factors
        return self.computer.targets.collate(samples), weights


def _sample(target: Sample, prompt: np.ndarray, answer: np.ndarray) -> Sample:
    labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), answer])
    return replace(target, input_ids=np.concatenate([prompt, answer]), labels=labels, reference_losses=None)
