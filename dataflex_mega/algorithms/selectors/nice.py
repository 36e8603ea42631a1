"""NICE: train on what moves the model towards higher rewards, where the goal is no loss but a score of what it writes.

Wang et al. 2025, "NICE: Non-differentiable Evaluation Metric-based Data Selection for Instruction Tuning" (official code
JTWang2000/NICE). The model of now answers the prompts of `eval_dataset` several times; rewards r_c of the answers y_c make a
policy gradient (REINFORCE) of each prompt v, and candidates are scored by LESS's cosine with it:

    g_v     = - gradient of  sum over c of  r_c log p(y_c | prompt v)
    score_i = max over sub-tasks s of  mean over v in s of  cos(G_i, g_v)

A step along -g_v raises the expected reward, so the highest scores help most. g_v is the gradient of a loss, as LESS's is:
with the reference answer as the only one and reward 1, NICE is LESS. G_i is Adam's update for candidate i, or its gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, SamplingSpec, SignalTable, UsesPolicy


@dataclass
class Nice(Selector, UsesPolicy):
    """The candidates with the highest scores.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not.
        reward: what scores an answer: "overlap", "exact", "number", or a function of yours as package.module:function.
        mc_samples: answers to each prompt at a selection.
        best: of these, only so many with the highest rewards count; None: all.
        baseline: "mean" subtracts the mean reward of a prompt's answers; "none" does not, as in the paper.
        max_new_tokens: length of an answer, at most.
        generation_temperature: > 0; below 1 the model keeps closer to what it finds likely.
        top_k: an answer's next token is one of so many likeliest; 0: any.
        top_p: and of the fewest likeliest whose probabilities add up to this.
        max_prompt_length: tokens of a prompt that are kept, the last ones.
        seed: of the answers.
        cache_dir: where step_N.json goes; None: output_dir/selections.
        proj_dim: stands in DataFlex's files; nothing is projected here, so it changes nothing.
        save_interval: the same.
        reward_model_backend: stands in DataFlex's files, whose code does not read it; `reward` says what scores answers.
        reward_backend_params: the same.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    reward: str = "overlap"
    mc_samples: int = 4
    best: int | None = None
    baseline: Literal["none", "mean"] = "none"
    max_new_tokens: int = 64
    generation_temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95
    max_prompt_length: int = 4096
    seed: int = 0
    cache_dir: str | None = None
    proj_dim: int | None = None
    save_interval: int | None = None
    reward_model_backend: str | None = None
    reward_backend_params: dict[str, object] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"policy_adam"})

    def __post_init__(self) -> None:
        for name in ("mc_samples", "best", "max_new_tokens", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"selector.nice.{name}: must be at least 1, found {value}")
        if self.best is not None and self.best > self.mc_samples:
            raise ConfigError(f"selector.nice.best: must be at most mc_samples, {self.mc_samples}, found {self.best}")
        if not (math.isfinite(self.generation_temperature) and self.generation_temperature > 0):
            raise ConfigError(f"selector.nice.generation_temperature: must be > 0, found {self.generation_temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"selector.nice: top_k must be >= 0 and top_p in 0..1, found {self.top_k} and {self.top_p}"
            )
        self.needs = frozenset({f"policy_{self.gradient_type}"})  # type: ignore[misc]  # of this instance

    def sampling(self) -> SamplingSpec:
        """How answers are drawn."""
        return SamplingSpec(self.max_new_tokens, self.generation_temperature, self.top_k, self.top_p)

    def factors(self, rewards: Tensor) -> Tensor:
        """[P, mc_samples] rewards -> the same shape: what the log-probability of each answer is multiplied with."""
        factors = rewards.double()
        if self.baseline == "mean":
            factors = factors - factors.mean(dim=1, keepdim=True)
        if self.best is not None and self.best < rewards.shape[1]:
            order = rewards.sort(dim=1, descending=True, stable=True).indices
            factors = factors.scatter(1, order[:, self.best :], 0.0)
        return factors

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient, and for all where no answer has a reward."""
        norm = table["norm2"].sqrt().unsqueeze(1)
        return torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"])).max(dim=1).values

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        if count > len(scores):
            raise DataError(f"selector.nice: {count} samples wanted, {len(scores)} candidates are there")
        ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
        return torch.sort(ranked, descending=True, stable=True).indices[:count]
