"""ODM, online data mixing: an adversarial bandit over domains whose reward is the training loss.

Albalak et al. 2023, "Efficient Online Data Mixing For Language Model Pre-Training" (arXiv 2312.02406), algorithm 1.
With K domains, E_t = min(1/K, sqrt(ln K / (K t))):

    reward      R_i <- alpha R_i + (1 - alpha) L_i / q_i      for domains with tokens in the step, others keep R_i
    policy      pi  =  (1 - K E_t) softmax(E_{t-1} R) + E_t

L_i is the mean token loss of domain i over all micro-batches and ranks of the step, q_i the probability that the step
shows it. The paper draws one domain per step, so its q_i is pi_i. Here a step mixes domains: n draws show domain i with
probability 1 - (1 - pi_i)^n, which is nearly 1 for all of them. Dividing by pi_i nevertheless would reward a domain for
rare draws, and the mixture would swing from one domain to the next. The paper's official code contains three further
rules, available here as variants; see `Odm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range, RelativeWeights
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.types import StepStats, UpdateContext

Variant = Literal["paper", "exp3", "smoothed_mean", "group"]
Importance = Literal["inclusion", "proportion"]
EXP3_SCALE = 0.1  # the official Exp3 divides losses by 10
LARGEST_EXPONENT = 700.0  # exp of it is finite in float64; a policy is decided long before


def exploration_rate(num_domains: int, step: int, floor: float = 0.0) -> float:
    """E_t, at least `floor`: the proportion that every domain has at least. 1/K for step 0."""
    if step == 0:
        return 1 / num_domains
    return max(floor, min(1 / num_domains, math.sqrt(math.log(num_domains) / (num_domains * step))))


def updated_rewards(rewards: Tensor, losses: Tensor, seen: Tensor, variant: Variant, alpha: float) -> Tensor:
    """[K] float64 rewards after one step; [K] losses, NaN for domains without tokens; [K] probability of being seen."""
    if variant == "paper":
        new = alpha * rewards + (1 - alpha) * losses / seen
    elif variant == "exp3":
        new = rewards + EXP3_SCALE * losses / seen
    else:
        new = alpha * rewards + (1 - alpha) * losses.clamp(max=LARGEST_EXPONENT).exp()
    return torch.where(torch.isfinite(new), new, rewards)


def observation_probability(proportions: Tensor, samples: Tensor, importance: Importance) -> Tensor:
    """[K] proportions, [K] samples of the step -> [K] probability that a step shows the domain. One domain is one draw."""
    draws = float(samples.sum()) if int((samples > 0).sum()) > 1 else 1.0
    if importance == "proportion" or draws == 1.0:
        return proportions
    return -torch.expm1(draws * torch.log1p(-proportions))


def bandit_policy(rewards: Tensor, rate: float, previous_rate: float, variant: Variant) -> Tensor:
    """[K] float64, sums to 1, each at least `rate`."""
    num_domains = len(rewards)
    if variant != "group":
        exploited = torch.softmax(previous_rate * rewards, dim=0)
    elif float(rewards.sum()) > 0:
        exploited = rewards / rewards.sum()
    else:
        exploited = torch.full_like(rewards, 1 / num_domains)
    mixed = (1 - num_domains * rate) * exploited + rate
    return mixed / mixed.sum()


@dataclass
class Odm(Mixer):
    """Online data mixing.

    Args:
        alpha: weight of the old reward in the new one, 0 <= alpha < 1.
        warmup_steps: steps on the initial proportions that update no reward. The step number t counts them.
        initial_proportions: [k], taken relative to their sum; None: the proportions the run starts with.
        reward_scale: losses are multiplied by it, > 0.
        min_exploration_rate: lower bound of E_t, at most 1/K. 0: the paper's.
        variant: "paper"; "exp3", sums R_i + (L_i / 10) / q_i with no forgetting; "smoothed_mean", a mean of exp(L_i)
            that is not divided by q_i; "group", that mean with shares in proportion to it in place of softmax. The
            last three are in the official code; its trainer calls "group".
        importance: the divisor of a loss in the first two variants. "inclusion": the probability that a step shows
            the domain; "proportion": pi_i even where a step shows every domain, as DataFlex does.
    """

    alpha: Annotated[float, Range(ge=0, lt=1)] = 0.9
    warmup_steps: Annotated[int, Range(ge=0)] = 0
    initial_proportions: Annotated[list[float] | None, RelativeWeights()] = None
    reward_scale: Annotated[float, Range(gt=0)] = 1.0
    min_exploration_rate: Annotated[float, Range(ge=0, le=1)] = 0.0
    variant: Variant = "paper"
    importance: Importance = "inclusion"
    _initial: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _rewards: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)  # the last one that updated rewards
    _previous_step: int = field(default=0, init=False, repr=False)  # the one before it

    def setup(self, domains: DomainInfo) -> None:
        """Raises ConfigError when a parameter does not fit the number of domains."""
        given = domains.initial_proportions if self.initial_proportions is None else self.initial_proportions
        if len(given) != len(domains):
            names = ", ".join(domains.names)
            raise ConfigError(
                f"mixer.odm.initial_proportions: {len(given)} numbers for {len(domains)} datasets ({names})"
            )
        if self.min_exploration_rate * len(domains) > 1:
            found = f"found {self.min_exploration_rate} with {len(domains)} datasets"
            raise ConfigError(f"mixer.odm.min_exploration_rate: must be at most 1/K = {1 / len(domains):g}, {found}")
        self._initial = torch.tensor(given, dtype=torch.float64)
        self._initial /= self._initial.sum()
        self._rewards = torch.zeros(len(domains), dtype=torch.float64)

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Update the rewards after the warm-up. A domain without tokens, or drawn at proportion 0, keeps its reward."""
        if step <= self.warmup_steps:
            return
        losses = self.reward_scale * stats.domain_loss.double().cpu() / stats.domain_tokens.double().cpu()
        drawn = torch.tensor(proportions, dtype=torch.float64)
        seen = observation_probability(drawn, stats.domain_samples.double().cpu(), self.importance)
        self._rewards = updated_rewards(self._rewards, losses, seen, self.variant, self.alpha)
        self._previous_step, self._step = self._step, step

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions until rewards were updated, then the policy."""
        if self._step == 0:
            return self._initial.clone()
        return bandit_policy(self._rewards, self._rate(self._step), self._rate(self._previous_step), self.variant)

    def report(self) -> dict[str, Any]:
        """DataFlex's fields of `odm_weights.jsonl`."""
        rate = self._rate(self._step)
        return {"estimated_rewards": self._rewards.tolist(), "exploration_rate": rate, "alpha": self.alpha}

    def state_dict(self) -> dict[str, Any]:
        """Rewards and the last two step numbers that updated them."""
        return {"rewards": self._rewards.tolist(), "step": self._step, "previous_step": self._previous_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["rewards"]) != len(self._rewards):
            found = f"{len(state['rewards'])} domains, this run has {len(self._rewards)}"
            raise CheckpointError(f"the checkpoint's odm rewards are for {found}")
        self._rewards = torch.tensor(state["rewards"], dtype=torch.float64)
        self._step, self._previous_step = int(state["step"]), int(state["previous_step"])

    def _rate(self, step: int) -> float:
        return exploration_rate(len(self._rewards), step, self.min_exploration_rate)
