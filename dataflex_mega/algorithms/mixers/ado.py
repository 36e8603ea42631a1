"""ADO, adaptive data optimization: draw what still learns fastest, by a scaling law fitted to every domain as it trains.

Jiang et al. 2024, "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws" (arXiv 2410.11820). For every
domain the loss after n samples is fitted as L(n) = exp(e) + exp(a) n^-alpha. After each step, with mu the initial
proportions and h the moving average (0.9) of the shares that were drawn:

    speed      s_i   = max(alpha_i, 0.05) (L_i(n) - exp(e_i)) / n                 minus the slope of L_i
    now        rho   ~ max(min_share, mu s h^(1/2) / sum)
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
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dataflex_mega.algorithms.base import Domains, Mixer
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.types import Clock, StepStats

Credit = Literal["share", "spread"]
GRID_A = [float(x) for x in range(-2, 6)]
GRID_E = [x / 2 for x in range(-4, 4)]
GRID_ALPHA = [x / 10 for x in range(8)]
HUBER = 1e-3
STEPS_A_POINT = 10  # a point weighs the steps it stands for over this: the official code keeps every tenth step
LARGEST_A, LARGEST_ALPHA, SMALLEST_ALPHA = 6.5, 0.8, 1e-3
SMALLEST_EXPONENT = 0.05  # of the speed
INSIDE = 0.1  # the smallest alpha to start from: with a flat law a and e cannot be told apart
FIRST_DAMPING, SMALLEST_DAMPING, LARGEST_DAMPING = 1e-3, 1e-12, 1e8
MOST_STEPS, CONVERGED, PATIENCE = (
    2000,
    1e-12,
    12,
)  # of a fit; a law is found after PATIENCE steps that gain less than that
TINY = 1e-18  # keeps the equations of a step solvable
MIN_POINTS = 16  # a domain with fewer is not fitted: three parameters would follow the noise, to the last bit of it
MAX_POINTS = 256
KEPT_SHARE, KEPT_POLICY = 0.9, 0.9


# -- the scaling law ---------------------------------------------------------------------------------------------------


def mismatch(laws: Tensor, log_n: Tensor, log_loss: Tensor, weight: Tensor, floor: float) -> Tensor:
    """[..., 3] laws (a, e, alpha), [T] points and their weights -> [...] what a fit minimises.

    `floor` is the smallest e without a penalty.
    """
    a, e, alpha = laws.unsqueeze(-2).unbind(-1)
    error = (torch.logaddexp(a - alpha * log_n, e) - log_loss).abs()
    huber = torch.where(error > HUBER, HUBER * (error - HUBER / 2), error**2 / 2)
    a, e, alpha = laws.unbind(-1)
    outside = (alpha - LARGEST_ALPHA).clamp(min=0) - alpha.clamp(max=SMALLEST_ALPHA)
    outside = outside + (a - LARGEST_A).clamp(min=0) + (floor - e).clamp(min=0)
    return (weight * huber).sum(-1) + outside


def descend(start: Tensor, points: tuple[Tensor, Tensor, Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """[m, 3] laws to start from -> ([m, 3] laws that minimise the Huber sum inside their range, [m] that sum).

    All m problems take their steps at once. A step is Levenberg and Marquardt's on squares that are weighted anew so that
    they touch the Huber loss from above; a parameter on an edge of its range stays there while its slope points outwards.

    Args:
        points: [m, T] each: log n, log loss, weight. A weight of 0 is no point.
        floor: the smallest e.
    """
    x, y, weight = points
    low, high = (torch.tensor(edge, dtype=torch.float64) for edge in _edges(floor))
    laws = start.clamp(min=low, max=high)
    damping = torch.full(start.shape[:1], FIRST_DAMPING, dtype=torch.float64)
    error, rise = _errors(laws, x, y)
    value, quiet = _huber(error, weight), torch.zeros(len(start), dtype=torch.int64)
    for _ in range(MOST_STEPS):
        new = (laws - _step(laws, (x, error, rise, weight), damping, (low, high))).clamp(min=low, max=high)
        new_error, new_rise = _errors(new, x, y)
        new_value = _huber(new_error, weight)
        taken = new_value <= value
        quiet = torch.where(taken & (value - new_value > CONVERGED * value), 0, quiet + 1)
        damping = torch.where(taken, damping / 5, damping * 5).clamp(SMALLEST_DAMPING, LARGEST_DAMPING)
        laws, value = torch.where(taken.unsqueeze(1), new, laws), torch.where(taken, new_value, value)
        kept = taken.unsqueeze(1)
        error, rise = torch.where(kept, new_error, error), torch.where(kept, new_rise, rise)
        if bool((quiet >= PATIENCE).all()):
            break
    return laws, value


def _edges(floor: float) -> tuple[list[float], list[float]]:
    """The range of (a, e, alpha), in which there is no penalty."""
    return [-math.inf, floor, SMALLEST_ALPHA], [LARGEST_A, math.inf, LARGEST_ALPHA]


def _errors(laws: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """([m, T] log of the law less log of the loss, [m, T] share of the falling part in the law, its slope in a)."""
    a, e, alpha = laws.unsqueeze(-2).unbind(-1)
    falling = a - alpha * x
    return torch.logaddexp(falling, e) - y, torch.sigmoid(falling - e)


def _huber(error: Tensor, weight: Tensor) -> Tensor:
    size = error.abs()
    return (weight * torch.where(size > HUBER, HUBER * (size - HUBER / 2), size**2 / 2)).sum(-1)


def _step(
    laws: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor], damping: Tensor, edges: tuple[Tensor, Tensor]
) -> Tensor:
    """[m, 3] what to take off the laws; `at`: log n, error, rise, weight, [m, T] each."""
    x, error, rise, weight = at
    slopes = torch.stack([rise, 1 - rise, -rise * x], dim=-1)  # [m, T, 3] of the error in a, e, alpha
    squares = weight * HUBER / error.abs().clamp(min=HUBER)
    weighted = (slopes * squares.unsqueeze(-1)).transpose(1, 2)
    gradient = (weighted @ error.unsqueeze(-1)).squeeze(-1)
    low, high = edges
    held = ((laws <= low) & (gradient > 0)) | ((laws >= high) & (gradient < 0))
    free = (~held).double()
    normal = (weighted @ slopes) * free.unsqueeze(1) * free.unsqueeze(2)
    diagonal = damping.unsqueeze(1) * normal.diagonal(dim1=1, dim2=2) + held.double() + TINY
    return torch.linalg.solve_ex(normal + torch.diag_embed(diagonal), gradient * free)[0]


def fit(n: Tensor, losses: Tensor, weight: Tensor, floor: float) -> Tensor:
    """Fit d domains at once.

    Args:
        n: [d, T] float64 samples seen, > 0.
        losses: [d, T] mean losses, > 0.
        weight: [d, T]; 0 where a domain has no such point.
        floor: the smallest e.

    Returns:
        [d, 3] float64 (a, e, alpha); NaN for a domain for which nothing finite is found.
    """
    x, y = n.log(), losses.log()
    axes = [torch.tensor(values, dtype=torch.float64) for values in (GRID_A, GRID_E, GRID_ALPHA)]
    grid, alphas = torch.cartesian_prod(*axes), len(GRID_ALPHA)
    at = [mismatch(grid, x_d, y_d, w_d, floor).view(-1, alphas) for x_d, y_d, w_d in zip(x, y, weight, strict=True)]
    best_of_alpha = torch.stack(at).argmin(dim=1)  # [d, alphas]: the best of all would lie in one valley
    starts = grid.view(-1, alphas, 3)[best_of_alpha, torch.arange(alphas)]  # [d, alphas, 3]
    starts[..., 2].clamp_(min=INSIDE)
    points = [part.repeat_interleave(alphas, dim=0) for part in (x, y, weight)]
    found, value = descend(starts.flatten(0, 1), (points[0], points[1], points[2]), floor)
    found, value = found.view(-1, alphas, 3), value.view(-1, alphas)
    value = torch.where(torch.isfinite(value) & torch.isfinite(found).all(-1), value, math.inf)
    best, number = value.min(dim=1)
    laws = found[torch.arange(len(found)), number]
    return torch.where(torch.isfinite(best).unsqueeze(1), laws, math.nan)


# -- the policy --------------------------------------------------------------------------------------------------------


def speeds(laws: Tensor, n: Tensor) -> Tensor:
    """[k, 3] laws, [k] samples seen -> [k] how much the loss falls with a sample; 0 where a law is NaN."""
    a, _, alpha = laws.unbind(1)
    found = alpha.clamp(min=SMALLEST_EXPONENT) * (a - alpha * n.log()).exp() / n
    return torch.nan_to_num(found, nan=0.0)


def preference(speed: Tensor, prior: Tensor, share: Tensor, credit: Credit, min_share: float) -> Tensor:
    """[k] rho, sums to 1: cut below at min_share, then over the sum. Without any speed the prior takes its place."""
    claimed = share if credit == "share" else share * (1 - share)
    raw = speed * prior * claimed.sqrt()
    rho = raw / raw.sum() if float(raw.sum()) > 0 else prior
    rho = rho.clamp(min=min_share)
    return rho / rho.sum()


# -- what was observed -------------------------------------------------------------------------------------------------


@dataclass
class History:
    """Points of `width` steps each, the last one maybe of fewer; never more than MAX_POINTS."""

    domains: int
    width: int = 1
    points: list[list[list[float]]] = field(default_factory=list)  # [[steps], [k] sum of n, [k] loss sum, [k] tokens]

    def add(self, n: list[float], loss: list[float], tokens: list[float]) -> None:
        """One step: [k] samples seen, [k] loss sums and [k] tokens."""
        step = [[1.0], n, loss, tokens]
        if self.points and self.points[-1][0][0] < self.width:
            self.points[-1] = _joined(self.points[-1], step)
            return
        if len(self.points) == MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self.width = [_joined(one, other) for one, other in pairs], 2 * self.width
        self.points.append(step)

    def of(self, domain: int) -> tuple[Tensor, Tensor, Tensor]:
        """[T] n, [T] mean loss and [T] weight of the points in which a domain has a usable loss."""
        rows = [
            (n[domain] / steps[0], loss[domain] / tokens[domain], steps[0] / STEPS_A_POINT)
            for steps, n, loss, tokens in self.points
            if tokens[domain] > 0 and loss[domain] > 0 and n[domain] > 0
        ]
        n, loss, weight = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).unbind(1)
        return n, loss, weight


def _joined(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    return [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(one, other, strict=True)]


@dataclass
class Ado(Mixer):
    """Proportions by the slope of scaling laws.

    Args:
        start_step: the step after which laws are fitted first and the proportions begin to move, >= 1.
        refit_every: steps from one fit to the next, >= 1.
        ignore_steps: steps at the beginning that no fit sees, 0 <= ignore_steps < start_step.
        min_share: what rho is cut at from below, at most 1/K.
        credit: "share": h^(1/2), as in the paper; "spread": (h (1 - h))^(1/2), as in the official code.
        count: the n of a domain's law: "all" samples seen so far, as in the official code, or the domain's "own".
        min_irreducible: the smallest e without a penalty. The paper's 0.5 is a loss of 1.65; domains that end below it,
            such as code, need a smaller one.
    """

    start_step: int = 1000
    refit_every: int = 1000
    ignore_steps: int = 500
    min_share: float = 0.01
    credit: Credit = "share"
    count: Literal["all", "own"] = "all"
    min_irreducible: float = 0.5
    _prior: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _share: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _mean: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _policy: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _seen: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _laws: list[list[float] | None] = field(default_factory=list, init=False, repr=False)  # [k] of (a, e, alpha)
    _history: History = field(default_factory=lambda: History(1), init=False, repr=False)

    def __post_init__(self) -> None:
        rules = {
            "start_step": (self.start_step >= 1, ">= 1"),
            "refit_every": (self.refit_every >= 1, ">= 1"),
            "ignore_steps": (0 <= self.ignore_steps < self.start_step, f">= 0 and < start_step ({self.start_step})"),
            "min_share": (0 <= self.min_share <= 1, "in 0..1/K"),
            "min_irreducible": (math.isfinite(self.min_irreducible), "finite"),
        }
        for key, (kept, rule) in rules.items():
            if not kept:
                raise ConfigError(f"mixer.ado.{key}: must be {rule}, found {getattr(self, key)}")

    def setup(self, domains: Domains) -> None:
        """Starts at the initial proportions. Raises ConfigError when min_share does not fit the number of domains."""
        if self.min_share * len(domains) > 1:
            found = f"found {self.min_share} with {len(domains)} datasets"
            raise ConfigError(f"mixer.ado.min_share: must be at most 1/K = {1 / len(domains):g}, {found}")
        self._prior = torch.tensor(domains.initial, dtype=torch.float64)
        self._prior /= self._prior.sum()
        self._share, self._mean, self._policy = self._prior.clone(), self._prior.clone(), self._prior.clone()
        self._seen = torch.zeros(len(domains), dtype=torch.float64)
        self._laws, self._history = [None] * len(domains), History(len(domains))

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Note the step; fit when it is time to; move the policy. A loss that is not finite counts as not drawn."""
        samples = stats.domain_samples.double().cpu()
        if float(samples.sum()) > 0:
            self._share = KEPT_SHARE * self._share + (1 - KEPT_SHARE) * samples / samples.sum()
        self._seen = self._seen + samples
        if step > self.ignore_steps:
            loss, tokens = stats.domain_loss.double().cpu(), stats.domain_tokens.double().cpu()
            usable = torch.isfinite(loss)
            loss, tokens = torch.where(usable, loss, 0.0), torch.where(usable, tokens, 0.0)
            self._history.add(self._n().tolist(), loss.tolist(), tokens.tolist())
        if step >= self.start_step and (step - self.start_step) % self.refit_every == 0:
            self._refit()
        if step >= self.start_step and any(law is not None for law in self._laws):
            self._move(step)

    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions until some domain has a law, then the policy."""
        return self._policy / self._policy.sum()

    def report(self) -> dict[str, Any]:
        """The laws (a, e, alpha), None for a domain without one, and the mean policy."""
        return {
            "scaling_laws": [None if x is None else list(x) for x in self._laws],
            "mean_policy": self._mean.tolist(),
        }

    def state(self) -> dict[str, Any]:
        """Counts, policies, laws and the points that they are fitted to."""
        tensors = {"share": self._share, "mean": self._mean, "policy": self._policy, "seen": self._seen}
        lists: dict[str, Any] = {name: value.tolist() for name, value in tensors.items()}
        return {**lists, "laws": list(self._laws), "width": self._history.width, "points": list(self._history.points)}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["share"]) != len(self._share):
            found = f"{len(state['share'])} domains, this run has {len(self._share)}"
            raise CheckpointError(f"the checkpoint's ado state is for {found}")
        named = (torch.tensor(state[name], dtype=torch.float64) for name in ("share", "mean", "policy", "seen"))
        self._share, self._mean, self._policy, self._seen = named
        self._laws = [None if law is None else list(law) for law in state["laws"]]
        self._history = History(len(self._share), int(state["width"]), list(state["points"]))

    def _n(self) -> Tensor:
        """[k] samples seen, of all domains together or each one's own."""
        return self._seen if self.count == "own" else self._seen.sum().expand(len(self._seen))

    def _refit(self) -> None:
        """Fit every domain with enough points; one that cannot be fitted keeps its law."""
        fitted = {d: rows for d in range(len(self._laws)) if len((rows := self._history.of(d))[0]) >= MIN_POINTS}
        if not fitted:
            return
        padded = [pad_sequence([rows[i] for rows in fitted.values()], True, fill) for i, fill in enumerate((1, 1, 0))]
        laws = fit(padded[0], padded[1], padded[2], self.min_irreducible)
        for domain, law in zip(fitted, laws, strict=True):
            if bool(torch.isfinite(law).all()):
                self._laws[domain] = law.tolist()

    def _move(self, step: int) -> None:
        """One step of the policy. A domain without a law has no speed: it keeps min_share of rho."""
        laws = torch.tensor([[math.nan] * 3 if law is None else law for law in self._laws], dtype=torch.float64)
        rho = preference(speeds(laws, self._n().clamp(min=1)), self._prior, self._share, self.credit, self.min_share)
        self._policy = KEPT_POLICY * self._mean + (1 - KEPT_POLICY) * rho
        self._mean = (1 - 1 / (step + 1)) * self._mean + rho / (step + 1)
