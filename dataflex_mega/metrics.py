"""What people see of a run: a progress bar, TensorBoard, files of one line a step, and DataFlex's own files.

Only the main rank makes one that writes; the others hold a silent one. Nothing here is read back by training.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.checkpoint import truncate_log
from dataflex_mega.types import Plan, StepStats, TrainState

STEPS_FILE, ORDERS_FILE = "metrics.jsonl", "orders.jsonl"


@dataclass
class Window:
    """Sums since the last log."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    grad_norm: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    domain_loss: Tensor | None = None
    domain_tokens: Tensor | None = None
    domain_samples: Tensor | None = None

    def add(self, stats: StepStats, seconds: dict[str, float]) -> None:
        """One step."""
        self.loss += stats.mean_loss
        self.steps += 1
        self.tokens += stats.tokens
        self.grad_norm = stats.grad_norm
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        for name in ("domain_loss", "domain_tokens", "domain_samples"):
            old, new = getattr(self, name), getattr(stats, name)
            setattr(self, name, new.clone() if old is None else old + new)


@dataclass
class Metrics:
    """See the module. `tensorboard` and `bar` are None where they are not wanted."""

    folder: Path
    domains: tuple[str, ...]
    max_steps: int
    writes: bool
    mixer_name: str | None = None
    selection_folder: Path | None = None
    board_folder: Path | None = None  # where the losses known of each plan's samples go
    tensorboard: Any = None  # torch.utils.tensorboard.SummaryWriter
    bar: Any = None  # progress.Bar
    window: Window = field(default_factory=Window, init=False)
    last: StepStats | None = field(default=None, init=False)
    rate: float = field(default=0.0, init=False)
    plan_digest: str = field(default="", init=False)

    def begin(self, state: TrainState) -> None:
        """Before the first step; what an earlier run logged or chose beyond `state.step` is dropped."""
        self.window = Window()
        if not self.writes:
            return
        self.plan_digest = state.plan.digest()[:16]
        truncate_log(self.folder / STEPS_FILE, state.step)
        for path in [self.folder / ORDERS_FILE, *self.folder.glob("*_weights.jsonl")]:
            # Its line "step" s is written before step s + 1, so an interrupted run may have left the one of state.step.
            truncate_log(path, state.step - 1)
        truncate_log(self.folder / "trainer_log.jsonl", state.step, key="current_steps")
        own = self.folder / "selections"
        if self.selection_folder == own:  # another one may be shared with other runs
            for path in own.glob("step_*.json"):
                number = path.stem.removeprefix("step_")
                if number.isdecimal() and int(number) >= state.step:
                    path.unlink()
        if self.bar is not None:
            self.bar.begin(state.step, self.max_steps)

    # -- events --------------------------------------------------------------------------------------------------

    def planned(self, state: TrainState, controller: Any) -> None:
        """After a re-plan."""
        if not self.writes:
            return
        self.plan_digest = state.plan.digest()[:16]
        if self.mixer_name is not None and state.plan.phase == "train":
            row = {
                "step": state.step,
                "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "domain_names": list(self.domains),
                "domain_weights": list(state.plan.proportions),
                **controller.roles.mixer.report(),
            }
            self._append(f"{self.mixer_name}_weights.jsonl", row)
        if self.board_folder is not None:
            self._boarded(self.board_folder, state, controller.board)
        order = controller.last_order
        if order is not None and order.step == state.step:
            self._append(ORDERS_FILE, vars(order))
            self._scalars(state.step, {"order/scored": order.scored, "order/mean_score": order.mean_score or 0.0})
        selection = controller.last_selection
        if selection is not None and selection.step == state.step:
            self._selected(state, controller, selection)

    def _boarded(self, folder: Path, state: TrainState, board: Any) -> None:
        """What is known of the losses of a plan's samples, in DataFlex's layout; null for one that was never measured."""
        ids = next((i for i in (state.plan.order, state.plan.chosen) if i is not None), torch.arange(board.size))
        losses = [None if math.isnan(loss) else loss for loss in board.losses[ids].tolist()]
        content = {
            "indices": ids.tolist(),
            "metric": {"loss": losses},
            "computed_at_step": {"loss": int(board.measured[ids].max())},
        }
        _write_whole(folder / f"scoreboard_step_{state.step}.json", json.dumps(content))

    def _selected(self, state: TrainState, controller: Any, selection: Any) -> None:
        assert self.selection_folder is not None
        needs = sorted(controller.roles.selector.needs) or ["score"]
        content = {"indices": selection.chosen.tolist(), "metric": {needs[0]: selection.scores.tolist()}}
        _write_whole(self.selection_folder / f"step_{state.step}.json", json.dumps(content, indent=4))
        self._scalars(
            state.step,
            {
                "select/size": len(selection.chosen),
                "select/overlap": selection.overlap,
                **{f"select/score_q{q}": v for q, v in zip((0, 25, 50, 75, 100), selection.quantiles, strict=False)},
            },
        )

    def step(self, state: TrainState, stats: StepStats, lr: float, seconds: dict[str, float]) -> None:
        """After every step."""
        self.window.add(stats, seconds)
        self.last, self.rate = stats, lr
        if not self.writes:
            return
        self._append(STEPS_FILE, {**step_row(state, stats, lr, self.domains), "plan": self.plan_digest})
        if self.bar is not None:
            self.bar.step(state.step, self._bar_text(state.plan))

    def _bar_text(self, plan: Plan) -> dict[str, str]:
        spent = max(time.perf_counter() - self.window.started, 1e-9)
        parts = {"loss": f"{self.window.loss / self.window.steps:.4f}", "tok/s": f"{self.window.tokens / spent:,.0f}"}
        if len(self.domains) > 1:
            parts["mix"] = " ".join(f"{n[:12]}:{p:.2f}" for n, p in zip(self.domains, plan.proportions, strict=True))
        return parts

    def log(self, state: TrainState) -> dict[str, float]:
        """Scalars of the steps since the last call: to TensorBoard in full, to the callbacks under Trainer's names."""
        w = self.window
        spent = max(time.perf_counter() - w.started, 1e-9)
        logs = {"loss": w.loss / max(w.steps, 1), "grad_norm": w.grad_norm, "learning_rate": self.rate}
        if self.writes:
            self._scalars(state.step, {f"train/{name}": value for name, value in logs.items()})
            self._scalars(
                state.step, {"train/tokens_per_second": w.tokens / spent, "train/tokens_seen": state.tokens_seen}
            )
            self._scalars(state.step, {f"seconds/{name}": value / max(w.steps, 1) for name, value in w.seconds.items()})
            self._scalars(state.step, self._domain_scalars(state.plan))
            if self.last is not None and self.last.weights is not None:
                weights = self.last.weights
                ends = {"weight/min": weights.minimum, "weight/max": weights.maximum}
                self._scalars(state.step, {"weight/entropy": weights.entropy, **ends})
        self.window = Window()
        return logs

    def _domain_scalars(self, plan: Plan) -> dict[str, float]:
        found: dict[str, float] = {}
        w = self.window
        if w.domain_loss is None or w.domain_tokens is None or w.domain_samples is None:
            return found
        total = float(w.domain_samples.sum())
        for d, name in enumerate(self.domains):
            found[f"mix/proportion/{name}"] = plan.proportions[d]
            found[f"mix/drawn/{name}"] = float(w.domain_samples[d]) / total
            if w.domain_tokens[d] > 0:
                loss = float(w.domain_loss[d] / w.domain_tokens[d])
                found[f"domain/loss/{name}"] = loss
                found[f"domain/perplexity/{name}"] = math.exp(min(loss, 50.0))
        return found

    def evaluated(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After an evaluation."""
        if not self.writes:
            return
        self._scalars(state.step, {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()})
        if self.bar is not None:
            self.bar.note("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def end(self, state: TrainState) -> None:
        """After the last step."""
        if self.bar is not None:
            self.bar.end()
        if self.tensorboard is not None:
            self.tensorboard.close()

    # -- outlets -------------------------------------------------------------------------------------------------

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as stream:
            stream.write(json.dumps(row, default=lambda v: v.item()) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)


def _write_whole(target: Path, text: str) -> None:
    """A file that is there whole or not at all; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(target)


def step_row(state: TrainState, stats: StepStats, lr: float, domains: tuple[str, ...]) -> dict[str, Any]:
    """One line of metrics.jsonl. Losses are written in full precision: a resumed run is compared bit by bit."""

    def by_name(values: Tensor) -> dict[str, float]:
        return dict(zip(domains, values.tolist(), strict=True))

    mean = stats.domain_loss / stats.domain_tokens.clamp(min=1)
    mean = torch.where(stats.domain_tokens > 0, mean, torch.full_like(mean, torch.nan))
    row = {
        "step": state.step,
        "loss": stats.mean_loss,
        "objective": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": lr,
        "tokens": stats.tokens,
        "proportions": dict(zip(domains, state.plan.proportions, strict=True)),
        "drawn": by_name(stats.domain_samples),
        "domain_loss": {name: v for name, v in by_name(mean).items() if not math.isnan(v)},
    }
    if stats.weights is not None:
        row["weights"] = {"entropy": stats.weights.entropy, "min": stats.weights.minimum, "max": stats.weights.maximum}
    return row
