"""NICE: train on what moves the model towards higher rewards, where the goal is no loss but a score of its answers.

Wang et al. 2025, "NICE: Non-differentiable Evaluation Metric-based Data Selection for Instruction Tuning" (official code
JTWang2000/NICE). The current model answers the prompts of `eval_dataset` several times; rewards r_c of the answers y_c give
a policy gradient (REINFORCE) of each prompt v, and candidates are scored by LESS's cosine with it:

    g_v     = - gradient of  sum over c of  r_c log p(y_c | prompt v)
    score_i = max over sub-tasks s of  mean over v in s of  cos(G_i, g_v)

A step along -g_v raises the expected reward, so the highest scores help most. g_v is the gradient of a loss, as LESS's is:
with the reference answer as the only one and reward 1, NICE is LESS. G_i is Adam's update for candidate i, or its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Selector
from dataflex_mega.algorithms.requests import PolicyGradientSignal, Request
from dataflex_mega.algorithms.selectors._ranking import max_cosines, select_highest
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import GenerationSpec, SignalTable, UpdateContext


@dataclass
class Nice(Selector):
    """The candidates with the highest scores.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not.
        reward: what scores an answer: "overlap", "exact", "number", or a function of yours as package.module:function.
        mc_samples: answers to each prompt per selection.
        best: of these, only so many with the highest rewards count; None: all.
        baseline: "mean" subtracts the mean reward of a prompt's answers; "none" does not, as in the paper.
        max_new_tokens: length of an answer, at most.
        generation_temperature: > 0; below 1 the model stays closer to its most likely tokens.
        top_k: an answer's next token is sampled among the k most likely; 0: among all.
        top_p: and among the fewest most likely tokens whose probabilities sum to this.
        max_prompt_length: how many tokens of a prompt are used, the last ones.
        seed: of the answers.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    reward: str = "overlap"
    mc_samples: Annotated[int, Range(ge=1)] = 4
    best: Annotated[int | None, Range(ge=1)] = None
    baseline: Literal["none", "mean"] = "none"
    max_new_tokens: Annotated[int, Range(ge=1)] = 64
    generation_temperature: Annotated[float, Range(gt=0)] = 0.7
    top_k: Annotated[int, Range(ge=0)] = 50
    top_p: Annotated[float, Range(gt=0, le=1)] = 0.95
    max_prompt_length: Annotated[int, Range(ge=1)] = 4096
    seed: Annotated[int, Range(ge=0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best is not None and self.best > self.mc_samples:
            raise ConfigError(f"selector.nice.best: must be at most mc_samples, {self.mc_samples}, found {self.best}")

    def requests(self) -> tuple[Request, ...]:
        generation = GenerationSpec(self.max_new_tokens, self.generation_temperature, self.top_k, self.top_p)
        request = PolicyGradientSignal(
            adam=self.gradient_type == "adam",
            reward=self.reward,
            num_answers=self.mc_samples,
            max_prompt_length=self.max_prompt_length,
            seed=self.seed,
            generation=generation,
            answer_weights=self.answer_weights,
        )
        return (request,)

    def answer_weights(self, rewards: Tensor) -> Tensor:
        """[P, mc_samples] rewards -> the same shape: the factor of each answer's log-probability."""
        factors = rewards.double()
        if self.baseline == "mean":
            factors = factors - factors.mean(dim=1, keepdim=True)
        if self.best is not None and self.best < rewards.shape[1]:
            order = rewards.sort(dim=1, descending=True, stable=True).indices
            factors = factors.scatter(1, order[:, self.best :], 0.0)
        return factors

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1; 0 for a candidate without a gradient, and for all where no answer has a reward."""
        return max_cosines(table)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        return select_highest(scores, count, "selector.nice")
