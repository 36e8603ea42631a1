"""ADO, adaptive data optimization: draw domains by how fast their loss falls, by scaling laws fitted during training.

Jiang et al. 2024, "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws" (arXiv 2410.11820). For every
domain the loss after n samples is fitted as L(n) = exp(e) + exp(a) n^-alpha. After each step, with mu the initial
proportions and h the moving average (0.9) of the drawn proportions:

    speed      s_i   = max(alpha_i, 0.05) (L_i(n) - exp(e_i)) / n                 minus the slope of L_i
    current    rho   ~ max(min_share, mu s h^(1/2) / sum)
    policy     p     = 0.9 pbar + 0.1 rho
    mean       pbar <- (1 - 1 / (t + 1)) pbar + rho / (t + 1)

t is the step of the run; pbar begins as mu. Before `start_step`, and until some domain has a fit, mu is drawn.

A fit minimises the Huber loss (delta 1e-3) between logarithms of losses, with the parameters in their range. (The official
code adds the distance from that range to the loss and, where points are many, leaves it.) Its points are means over
equally many steps, at most MAX_POINTS of them: when there are more, neighbours are joined, so memory and the time of a
fit stay bounded however long a run is. The official code filters the losses and takes every tenth step instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.types import StepStats, UpdateContext

Credit = Literal["share", "spread"]
GRID_A = [float(x) for x in range(-2, 6)]
GRID_E = [x / 2 for x in range(-4, 4)]
GRID_ALPHA = [x / 10 for x in range(8)]
HUBER = 1e-3
STEPS_PER_POINT = 10  # a point weighs the steps it stands for over this: the official code keeps every tenth step
LARGEST_A, LARGEST_ALPHA, SMALLEST_ALPHA = 6.5, 0.8, 1e-3
SMALLEST_EXPONENT = 0.05  # of the speed
MIN_START_ALPHA = 0.1  # the smallest initial alpha: a flat law does not determine a and e separately
FIRST_DAMPING, SMALLEST_DAMPING, LARGEST_DAMPING = 1e-3, 1e-12, 1e8
MAX_LM_STEPS = 2000  # of a fit
CONVERGED, PATIENCE = 1e-12, 12  # a fit ends after PATIENCE steps that gain a smaller fraction than CONVERGED
STATE_TENSORS = ("mean_share", "mean_policy", "policy", "seen")  # of length k, in `state_dict`
EPS = 1e-18  # keeps the equations of a step solvable
MIN_POINTS = 16  # a domain with fewer is not fitted: three parameters would follow the noise, to the last bit of it
MAX_POINTS = 256
EMA_SHARE, EMA_POLICY = 0.9, 0.9  # weight of the old value in a moving average


# -- the scaling law ---------------------------------------------------------------------------------------------------


def huber_objective(laws: Tensor, log_n: Tensor, log_loss: Tensor, weight: Tensor, floor: float) -> Tensor:
    """[..., 3] laws (a, e, alpha), [T] points and their weights -> [...] the objective of a fit.

    `floor` is the smallest e without a penalty.
    """
    a, e, alpha = laws.unsqueeze(-2).unbind(-1)
    error = (torch.logaddexp(a - alpha * log_n, e) - log_loss).abs()
    huber = torch.where(error > HUBER, HUBER * (error - HUBER / 2), error**2 / 2)
    a, e, alpha = laws.unbind(-1)
    penalty = (alpha - LARGEST_ALPHA).clamp(min=0) - alpha.clamp(max=SMALLEST_ALPHA)
    penalty = penalty + (a - LARGEST_A).clamp(min=0) + (floor - e).clamp(min=0)
    return (weight * huber).sum(-1) + penalty


def fit_levenberg_marquardt(
    start: Tensor, points: tuple[Tensor, Tensor, Tensor], floor: float
) -> tuple[Tensor, Tensor]:
    """[m, 3] initial laws -> ([m, 3] laws that minimise the Huber sum inside their range, [m] that sum).

    All m problems take their steps at once. A step is Levenberg and Marquardt's on squares that are reweighted so that they
    touch the Huber loss from above; a parameter on a bound of its range stays there while its slope points outwards.

    Args:
        points: [m, T] each: log n, log loss, weight. A weight of 0 marks a point that does not count.
        floor: the smallest e.
    """
    x, y, weight = points
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in parameter_bounds(floor))
    laws = start.clamp(min=low, max=high)
    damping = torch.full(start.shape[:1], FIRST_DAMPING, dtype=torch.float64)
    error, falling_share = _errors(laws, x, y)
    value, stalled_steps = _huber(error, weight), torch.zeros(len(start), dtype=torch.int64)
    for _ in range(MAX_LM_STEPS):
        step = _lm_step(laws, (x, error, falling_share, weight), damping, (low, high))
        new = (laws - step).clamp(min=low, max=high)
        new_error, new_falling_share = _errors(new, x, y)
        new_value = _huber(new_error, weight)
        accepted = new_value <= value
        stalled_steps = torch.where(accepted & (value - new_value > CONVERGED * value), 0, stalled_steps + 1)
        damping = torch.where(accepted, damping / 5, damping * 5).clamp(SMALLEST_DAMPING, LARGEST_DAMPING)
        value = torch.where(accepted, new_value, value)
        by_row = accepted.unsqueeze(1)
        laws, error = torch.where(by_row, new, laws), torch.where(by_row, new_error, error)
        falling_share = torch.where(by_row, new_falling_share, falling_share)
        if bool((stalled_steps >= PATIENCE).all()):
            break
    return laws, value


def parameter_bounds(floor: float) -> tuple[list[float], list[float]]:
    """The (low, high) bounds of (a, e, alpha), inside which there is no penalty."""
    return [-math.inf, floor, SMALLEST_ALPHA], [LARGEST_A, math.inf, LARGEST_ALPHA]


def _errors(laws: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """([m, T] log of the law minus log of the loss, [m, T] share of the falling term in the law, the slope in a)."""
    a, e, alpha = laws.unsqueeze(-2).unbind(-1)
    falling = a - alpha * x
    return torch.logaddexp(falling, e) - y, torch.sigmoid(falling - e)


def _huber(error: Tensor, weight: Tensor) -> Tensor:
    size = error.abs()
    return (weight * torch.where(size > HUBER, HUBER * (size - HUBER / 2), size**2 / 2)).sum(-1)


def _lm_step(
    laws: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor], damping: Tensor, bounds: tuple[Tensor, Tensor]
) -> Tensor:
    """[m, 3] the step to subtract from the laws; `at`: log n, error, falling share, weight, [m, T] each."""
    x, error, falling_share, weight = at
    # [m, T, 3]: of the error in a, e, alpha
    slopes = torch.stack([falling_share, 1 - falling_share, -falling_share * x], dim=-1)
    squares = weight * HUBER / error.abs().clamp(min=HUBER)
    weighted = (slopes * squares.unsqueeze(-1)).transpose(1, 2)
    gradient = (weighted @ error.unsqueeze(-1)).squeeze(-1)
    low, high = bounds
    at_bound = ((laws <= low) & (gradient > 0)) | ((laws >= high) & (gradient < 0))
    free = (~at_bound).double()
    normal = (weighted @ slopes) * free.unsqueeze(1) * free.unsqueeze(2)
    diagonal = damping.unsqueeze(1) * normal.diagonal(dim1=1, dim2=2) + at_bound.double() + EPS
    return torch.linalg.solve_ex(normal + torch.diag_embed(diagonal), gradient * free)[0]


def fit(n: Tensor, losses: Tensor, weight: Tensor, floor: float) -> Tensor:
    """Fit d domains at once.

    Args:
        n: [d, T] float64 samples seen, > 0.
        losses: [d, T] mean losses, > 0.
        weight: [d, T]; 0 where a domain has no such point.
        floor: the smallest e.

    Returns:
        [d, 3] float64 (a, e, alpha); NaN for a domain without a finite fit.
    """
    x, y = n.log(), losses.log()
    axes = [torch.tensor(values, dtype=torch.float64) for values in (GRID_A, GRID_E, GRID_ALPHA)]
    grid, alphas = torch.cartesian_prod(*axes), len(GRID_ALPHA)
    objectives = [huber_objective(grid, *domain, floor).view(-1, alphas) for domain in zip(x, y, weight, strict=True)]
    best_of_alpha = torch.stack(objectives).argmin(dim=1)  # [d, alphas]: the best of all would lie in one valley
    starts = grid.view(-1, alphas, 3)[best_of_alpha, torch.arange(alphas)]  # [d, alphas, 3]
    starts[..., 2].clamp_(min=MIN_START_ALPHA)
    points = [part.repeat_interleave(alphas, dim=0) for part in (x, y, weight)]
    laws, value = fit_levenberg_marquardt(starts.flatten(0, 1), (points[0], points[1], points[2]), floor)
    laws, value = laws.view(-1, alphas, 3), value.view(-1, alphas)
    value = torch.where(torch.isfinite(value) & torch.isfinite(laws).all(-1), value, math.inf)
    best_value, best_start = value.min(dim=1)
    best_laws = laws[torch.arange(len(laws)), best_start]
    return torch.where(torch.isfinite(best_value).unsqueeze(1), best_laws, math.nan)


# -- the policy --------------------------------------------------------------------------------------------------------


def speeds(laws: Tensor, n: Tensor) -> Tensor:
    """[k, 3] laws, [k] samples seen -> [k] decrease of the loss per sample; 0 where a law is NaN."""
    a, _, alpha = laws.unbind(1)
    speed = alpha.clamp(min=SMALLEST_EXPONENT) * (a - alpha * n.log()).exp() / n
    return torch.nan_to_num(speed, nan=0.0)


def preference(speed: Tensor, prior: Tensor, mean_share: Tensor, credit: Credit, min_share: float) -> Tensor:
    """[k] rho: at least min_share, then divided by its sum. The prior where no domain has a speed."""
    credited = mean_share if credit == "share" else mean_share * (1 - mean_share)
    raw = speed * prior * credited.sqrt()
    rho = raw / raw.sum() if float(raw.sum()) > 0 else prior
    rho = rho.clamp(min=min_share)
    return rho / rho.sum()


# -- observed losses ---------------------------------------------------------------------------------------------------


@dataclass
class LossHistory:
    """Points of `width` steps each, the last one possibly of fewer; never more than MAX_POINTS."""

    num_domains: int
    width: int = 1
    groups: list[list[list[float]]] = field(default_factory=list)  # [[steps], [k] sum of n, [k] loss sum, [k] tokens]

    def add(self, n: list[float], loss: list[float], tokens: list[float]) -> None:
        """Append one step: [k] samples seen, [k] loss sums and [k] tokens."""
        step = [[1.0], n, loss, tokens]
        if self.groups and self.groups[-1][0][0] < self.width:
            self.groups[-1] = merge_points(self.groups[-1], step)
            return
        if len(self.groups) == MAX_POINTS:
            pairs = zip(self.groups[::2], self.groups[1::2], strict=True)
            self.groups, self.width = [merge_points(one, other) for one, other in pairs], 2 * self.width
        self.groups.append(step)

    def points(self, domain: int) -> tuple[Tensor, Tensor, Tensor]:
        """[T] n, [T] mean loss and [T] weight of the points in which a domain has a usable loss."""
        rows = [
            (n[domain] / steps[0], loss[domain] / tokens[domain], steps[0] / STEPS_PER_POINT)
            for steps, n, loss, tokens in self.groups
            if tokens[domain] > 0 and loss[domain] > 0 and n[domain] > 0
        ]
        n, loss, weight = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).unbind(1)
        return n, loss, weight


def merge_points(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    """One point for the steps of both: the sums of their entries."""
    return [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(one, other, strict=True)]


@dataclass
class Ado(Mixer):
    """Proportions by the slope of scaling laws.

    Args:
        start_step: the step after which laws are fitted for the first time and the proportions begin to change, >= 1.
        refit_every: steps from one fit to the next, >= 1.
        ignore_steps: initial steps that no fit uses, 0 <= ignore_steps < start_step.
        min_share: lower bound of rho before it is divided by its sum, at most 1/K.
        credit: "share": h^(1/2), as in the paper; "spread": (h (1 - h))^(1/2), as in the official code.
        count: the n of a domain's law: "all" samples seen so far, as in the official code, or the domain's "own".
        min_irreducible: the smallest e without a penalty. The paper's 0.5 is a loss of 1.65; domains that end below it,
            such as code, need a smaller one.
    """

    start_step: Annotated[int, Range(ge=1)] = 1000
    refit_every: Annotated[int, Range(ge=1)] = 1000
    ignore_steps: Annotated[int, Range(ge=0)] = 500
    min_share: Annotated[float, Range(ge=0, le=1)] = 0.01
    credit: Credit = "share"
    count: Literal["all", "own"] = "all"
    min_irreducible: Annotated[float, Range()] = 0.5
    _prior: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _mean_share: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _mean_policy: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _policy: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _seen: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _laws: list[list[float] | None] = field(default_factory=list, init=False, repr=False)  # [k] of (a, e, alpha)
    _history: LossHistory = field(default_factory=lambda: LossHistory(1), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_steps >= self.start_step:
            bound = f"below start_step ({self.start_step})"
            raise ConfigError(f"mixer.ado.ignore_steps: must be {bound}, found {self.ignore_steps}")

    def setup(self, domains: DomainInfo) -> None:
        """Start at the initial proportions. Raises ConfigError when min_share does not fit the number of domains."""
        if self.min_share * len(domains) > 1:
            found = f"found {self.min_share} with {len(domains)} datasets"
            raise ConfigError(f"mixer.ado.min_share: must be at most 1/K = {1 / len(domains):g}, {found}")
        self._prior = torch.tensor(domains.initial_proportions, dtype=torch.float64)
        self._prior /= self._prior.sum()
        self._mean_share, self._mean_policy, self._policy = (self._prior.clone() for _ in range(3))
        self._seen = torch.zeros(len(domains), dtype=torch.float64)
        self._laws, self._history = [None] * len(domains), LossHistory(len(domains))

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Record the step, refit when due, update the policy. A loss that is not finite counts as not drawn."""
        samples = stats.domain_samples.double().cpu()
        if float(samples.sum()) > 0:
            self._mean_share = EMA_SHARE * self._mean_share + (1 - EMA_SHARE) * samples / samples.sum()
        self._seen = self._seen + samples
        if step > self.ignore_steps:
            loss, tokens = stats.domain_loss.double().cpu(), stats.domain_tokens.double().cpu()
            usable = torch.isfinite(loss)
            loss, tokens = torch.where(usable, loss, 0.0), torch.where(usable, tokens, 0.0)
            self._history.add(self._samples_seen().tolist(), loss.tolist(), tokens.tolist())
        if step >= self.start_step and (step - self.start_step) % self.refit_every == 0:
            self._refit()
        if step >= self.start_step and any(law is not None for law in self._laws):
            self._update_policy(step)

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions until some domain has a law, then the policy."""
        return self._policy / self._policy.sum()

    def report(self) -> dict[str, Any]:
        """The laws (a, e, alpha), None for a domain without one, and the mean policy."""
        return {
            "scaling_laws": [None if x is None else list(x) for x in self._laws],
            "mean_policy": self._mean_policy.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Sample counts, policies, laws, and the points that the laws are fitted to."""
        tensors = {name: getattr(self, f"_{name}") for name in STATE_TENSORS}
        lists: dict[str, Any] = {name: value.tolist() for name, value in tensors.items()}
        return {**lists, "laws": list(self._laws), "width": self._history.width, "groups": list(self._history.groups)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["mean_share"]) != len(self._mean_share):
            found = f"{len(state['mean_share'])} domains, this run has {len(self._mean_share)}"
            raise CheckpointError(f"the checkpoint's ado state is for {found}")
        named = (torch.tensor(state[name], dtype=torch.float64) for name in STATE_TENSORS)
        self._mean_share, self._mean_policy, self._policy, self._seen = named
        self._laws = [None if law is None else list(law) for law in state["laws"]]
        self._history = LossHistory(len(self._mean_share), int(state["width"]), list(state["groups"]))

    def _samples_seen(self) -> Tensor:
        """[k] samples seen, of all domains together or each one's own."""
        return self._seen if self.count == "own" else self._seen.sum().expand(len(self._seen))

    def _refit(self) -> None:
        """Fit every domain with enough points; one that cannot be fitted keeps its law."""
        fitted = {d: rows for d in range(len(self._laws)) if len((rows := self._history.points(d))[0]) >= MIN_POINTS}
        if not fitted:
            return
        padded = [pad_sequence([rows[i] for rows in fitted.values()], True, fill) for i, fill in enumerate((1, 1, 0))]
        laws = fit(padded[0], padded[1], padded[2], self.min_irreducible)
        for domain, law in zip(fitted, laws, strict=True):
            if bool(torch.isfinite(law).all()):
                self._laws[domain] = law.tolist()

    def _update_policy(self, step: int) -> None:
        """One step of the policy. A domain without a law has no speed: its rho is min_share."""
        laws = torch.tensor([[math.nan] * 3 if law is None else law for law in self._laws], dtype=torch.float64)
        speed = speeds(laws, self._samples_seen().clamp(min=1))
        rho = preference(speed, self._prior, self._mean_share, self.credit, self.min_share)
        self._policy = EMA_POLICY * self._mean_policy + (1 - EMA_POLICY) * rho
        self._mean_policy = (1 - 1 / (step + 1)) * self._mean_policy + rho / (step + 1)
