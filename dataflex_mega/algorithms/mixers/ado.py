"""ADO, adaptive data optimization: draw what still learns fastest, by a scaling law fitted to every domain as it trains.

Jiang et al. 2024, "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws" (arXiv 2410.11820). For every
domain the loss after n samples is fitted as L(n) = exp(e) + exp(a) n^-alpha. After each step, with mu the initial
proportions and h the moving average (0.9) of the shares that were drawn:

    speed      s_i   = max(alpha_i, 0.05) (L_i(n) - exp(e_i)) / n                 minus the slope of L_i
    now        rho   ~ max(min_share, mu s h^(1/2) / sum)
    policy     p     = 0.9 pbar + 0.1 rho
    mean       pbar <- (1 - 1 / (t + 1)) pbar + rho / (t + 1)

t is the step of the run; pbar begins as mu. Before `start_step`, and until some domain has a fit, mu is drawn.

A fit minimises the Huber loss (delta 1e-3) between logarithms of losses, with penalties that keep the parameters in their
range. Its points are means over equally many steps, at most MAX_POINTS of them: when there are more, neighbours are
joined, so memory and the time of a fit stay bounded however long a run is. The official code filters the losses and
takes every tenth step instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

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
NEAR_EDGE = 0.02  # of where a penalty sets in
INSIDE = 0.1  # the smallest alpha to start from
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


def descend(start: Tensor, free: list[bool], middle: float, value_of: Callable[[Tensor], Tensor]) -> Tensor:
    """[3] the law that L-BFGS reaches from [3] `start`; parameters that are not free stay as they are.

    What moves in place of a is the law's height at log n = `middle`: a and alpha would pull at one another.
    """
    origin = torch.stack([start[0] - start[2] * middle, start[1], start[2]])
    moves = torch.tensor(free)
    point = origin.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [point], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def law() -> Tensor:
        height, e, alpha = torch.where(moves, point, origin)
        return torch.stack([height + alpha * middle, e, alpha])

    def closure() -> Tensor:
        solver.zero_grad()
        value = value_of(law()) / HUBER
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[arg-type]  # a tensor is what its closure returns
    return law().detach()


def settle(start: Tensor, middle: float, floor: float, value_of: Callable[[Tensor], Tensor]) -> Tensor:
    """[3] the law that is reached from [3] `start`, also where a penalty sets in.

    L-BFGS stalls near such an edge, at a place that depends on the last bits of the losses, which differ with the number
    of processes. So a parameter near an edge is put on it and the others descend again.
    """
    found = descend(start, [True] * 3, middle, value_of)
    held, free = found.clone(), [True] * 3
    for place, edge in ((0, LARGEST_A), (1, floor), (2, LARGEST_ALPHA), (2, SMALLEST_ALPHA)):
        if abs(float(found[place]) - edge) < NEAR_EDGE:
            held[place], free[place] = edge, False
    if all(free):
        return found
    held = descend(held, free, middle if free[0] else 0.0, value_of)
    return held if float(value_of(held)) <= float(value_of(found)) else found


def fit(n: Tensor, losses: Tensor, weight: Tensor, floor: float) -> Tensor | None:
    """[T] float64 samples seen, losses > 0, weights -> [3] float64 (a, e, alpha); None when nothing finite is found."""
    log_n, log_loss = n.log(), losses.log()

    def value_of(laws: Tensor) -> Tensor:
        return mismatch(laws, log_n, log_loss, weight, floor)

    axes = [torch.tensor(x, dtype=torch.float64) for x in (GRID_A, GRID_E, GRID_ALPHA)]
    grid = torch.cartesian_prod(*axes)
    best_of_alpha = value_of(grid).view(-1, len(GRID_ALPHA)).argmin(dim=0)  # the best of all would lie in one valley
    starts = grid.view(-1, len(GRID_ALPHA), 3)[best_of_alpha, torch.arange(len(GRID_ALPHA))]
    starts[:, 2].clamp_(min=INSIDE)  # at alpha = 0, on an edge of the penalties, L-BFGS would hardly move
    found = torch.stack([settle(start, float(log_n.mean()), floor, value_of) for start in starts])
    values = value_of(found)
    values = torch.where(torch.isfinite(values) & torch.isfinite(found).all(1), values, math.inf)
    best = int(values.argmin())
    return found[best] if math.isfinite(float(values[best])) else None


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
        for domain in range(len(self._laws)):
            n, losses, weight = self._history.of(domain)
            law = fit(n, losses, weight, self.min_irreducible) if len(n) >= MIN_POINTS else None
            self._laws[domain] = self._laws[domain] if law is None else law.tolist()

    def _move(self, step: int) -> None:
        """One step of the policy. A domain without a law has no speed: it keeps min_share of rho."""
        laws = torch.tensor([[math.nan] * 3 if law is None else law for law in self._laws], dtype=torch.float64)
        rho = preference(speeds(laws, self._n().clamp(min=1)), self._prior, self._share, self.credit, self.min_share)
        self._policy = KEPT_POLICY * self._mean + (1 - KEPT_POLICY) * rho
        self._mean = (1 - 1 / (step + 1)) * self._mean + rho / (step + 1)
