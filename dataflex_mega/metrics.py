"""What people see of a run: a progress bar, TensorBoard, files with one line per step, and DataFlex's own files.

The instance of the main rank writes; those of other ranks are silent. Training reads nothing of it back.
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

import dataflex_mega.gauges as gauges
from dataflex_mega.control.plan_report import LossCacheView, OrderRecord, PlanReport, SelectionRecord
from dataflex_mega.files import atomic_write
from dataflex_mega.log_files import move_aside, truncate_log
from dataflex_mega.progress import TrainingProgressBar
from dataflex_mega.types import SamplingPlan, StepStats, TrainState, without_timings

STEPS_FILE, ORDERS_FILE = "metrics.jsonl", "orders.jsonl"


@dataclass
class LogWindow:
    """Sums over the steps since the last log."""

    loss_sum: float = 0.0  # of the steps' mean losses
    num_steps: int = 0
    num_tokens: int = 0
    grad_norm: float = 0.0  # of the last step
    started: float = field(default_factory=time.perf_counter)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    domain_loss: Tensor | None = None  # [k], as in StepStats
    domain_tokens: Tensor | None = None
    domain_samples: Tensor | None = None
    report: dict[str, float] = field(default_factory=dict)  # sums over the steps, by the names of StepStats.report

    def add(self, stats: StepStats, phase_seconds: dict[str, float]) -> None:
        """Add one optimizer step."""
        self.loss_sum += stats.mean_loss
        self.num_steps += 1
        self.num_tokens += stats.num_tokens
        self.grad_norm = stats.grad_norm
        for phase, seconds in phase_seconds.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds
        for name, value in stats.report.items():
            self.report[name] = self.report.get(name, 0.0) + value
        for name in ("domain_loss", "domain_tokens", "domain_samples"):
            old, new = getattr(self, name), getattr(stats, name)
            setattr(self, name, new.clone() if old is None else old + new)

    def tokens_per_second(self) -> float:
        """Tokens of the window over the time since it began."""
        return self.num_tokens / max(time.perf_counter() - self.started, 1e-9)


@dataclass
class Metrics:
    """Receives the events of the loop and writes what people look at."""

    folder: Path
    domains: tuple[str, ...]
    max_steps: int
    is_writer: bool  # whether this is the main rank's, and files are wanted
    keep_history: bool = False  # whether rows are kept in memory, on every rank
    mixer_name: str | None = None  # None without a mixer
    selection_folder: Path | None = None  # where the ids and scores of each selection go
    scoreboard_folder: Path | None = None  # where the known losses of each plan's samples go
    tensorboard: Any = None  # torch.utils.tensorboard.SummaryWriter
    progress_bar: TrainingProgressBar | None = None
    mfu_per_token_rate: float | None = None  # see gauges; None where MFU is not known
    log_window: LogWindow = field(default_factory=LogWindow, init=False)
    last_stats: StepStats | None = field(default=None, init=False)
    learning_rate: float = field(default=0.0, init=False)
    plan_digest: str = field(default="", init=False)
    plan_figures: dict[str, float] = field(default_factory=dict, init=False)  # of the last selection and order
    history: list[dict[str, Any]] = field(default_factory=list, init=False)  # a row per step, as in metrics.jsonl
    evaluations: list[dict[str, float]] = field(default_factory=list, init=False)  # one per evaluation, with its step

    # -- events --------------------------------------------------------------------------------------------------

    def on_train_begin(self, state: TrainState) -> None:
        """Before the first step; drops what an earlier run logged or selected beyond `state.step`."""
        self.log_window = LogWindow()
        if self.is_writer or self.keep_history:
            self.plan_digest = state.plan.digest()[:16]
        if not self.is_writer:
            return
        truncate_log(self.folder / STEPS_FILE, state.step)
        for path in [self.folder / ORDERS_FILE, *self.folder.glob("*_weights.jsonl")]:
            # Its line "step" s is written before step s + 1, so an interrupted run may have left the one of state.step.
            truncate_log(path, state.step - 1)
        truncate_log(self.folder / "trainer_log.jsonl", state.step, key="current_steps")
        own_selections = self.folder / "selections"
        if own_selections.exists() and not own_selections.is_dir():
            move_aside(own_selections)
        if self.selection_folder == own_selections:  # another folder may be shared with other runs
            for path in own_selections.glob("step_*.json"):
                number = path.stem.removeprefix("step_")
                if number.isdecimal() and int(number) >= state.step:
                    path.unlink()
        if self.progress_bar is not None:
            self.progress_bar.start(state.step, self.max_steps)

    def on_plan(self, state: TrainState, report: PlanReport) -> None:
        """After a new plan, `state.plan`; `report` says what the roles did for it."""
        if self.is_writer or self.keep_history:
            self.plan_digest = state.plan.digest()[:16]
        self.plan_figures = {**self.plan_figures, **_plan_figures(report)}
        if not self.is_writer:
            return
        if self.mixer_name is not None and state.plan.phase == "train":
            row = {
                "step": state.step,
                "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "domain_names": list(self.domains),
                "domain_weights": list(state.plan.proportions),
                **report.mixer,
            }
            self._append(f"{self.mixer_name}_weights.jsonl", row)
        if self.scoreboard_folder is not None and report.loss_cache is not None:
            self._write_scoreboard(self.scoreboard_folder, state, report.loss_cache)
        if report.order is not None:
            self._log_order(report.order)
        if report.selection is not None:
            self._write_selection(report.selection, report.signal_name)

    def on_step_end(self, state: TrainState, stats: StepStats, lr: float, phase_seconds: dict[str, float]) -> None:
        """After every optimizer step; `lr` is the learning rate it was done with."""
        self.log_window.add(stats, phase_seconds)
        self.last_stats, self.learning_rate = stats, lr
        if not self.is_writer and not self.keep_history:
            return
        row = {**step_row(state, stats, lr, self.domains), "plan": self.plan_digest}
        if self.keep_history:
            self.history.append(row)
        if not self.is_writer:
            return
        self._append(STEPS_FILE, row)
        if self.progress_bar is not None:
            self.progress_bar.update(state.step, self._progress_fields(state.plan))

    def flush(self, state: TrainState) -> dict[str, float]:
        """End the window: write its scalars to TensorBoard -> those that callbacks get: Trainer's under its names, and ours
        under names with a `/`, `mix/DOMAIN` and so on."""
        window = self.log_window
        logs = {
            "loss": window.loss_sum / max(window.num_steps, 1),
            "grad_norm": window.grad_norm,
            "learning_rate": self.learning_rate,
            **{name: value / max(window.num_steps, 1) for name, value in window.report.items()},
        }
        seconds = {name: value / max(window.num_steps, 1) for name, value in window.phase_seconds.items()}
        weights = self._weight_scalars()
        rate = window.tokens_per_second()
        figures = {**self._domain_figures(state.plan), **self.plan_figures, **weights, **gauges.memory()}
        figures |= {"speed/tokens_per_second": rate, "speed/tokens_seen": float(state.tokens_seen)}
        if self.mfu_per_token_rate is not None:
            figures["speed/mfu"] = rate * self.mfu_per_token_rate
        if self.is_writer:
            self._scalars(state.step, {f"train/{name}": value for name, value in logs.items()})
            self._scalars(state.step, {"train/tokens_per_second": rate, "train/tokens_seen": state.tokens_seen})
            self._scalars(state.step, {f"seconds/{name}": value for name, value in seconds.items()})
            self._scalars(state.step, self._domain_scalars(state.plan))
            self._scalars(state.step, weights)
        self.log_window = LogWindow()
        return {**logs, **figures}

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After an evaluation; `metrics` are named as Trainer names them, `eval_loss`."""
        metrics = without_timings(metrics)
        if self.keep_history:
            self.evaluations.append({"step": float(state.step), **metrics})
        if not self.is_writer:
            return
        self._scalars(state.step, {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()})
        if self.progress_bar is not None:
            self.progress_bar.print_line("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def on_train_end(self, state: TrainState) -> None:
        """After the last step: close the progress bar and TensorBoard."""
        if self.progress_bar is not None:
            self.progress_bar.stop()
        if self.tensorboard is not None:
            self.tensorboard.close()

    # -- outlets -------------------------------------------------------------------------------------------------

    def _write_scoreboard(self, folder: Path, state: TrainState, cache: LossCacheView) -> None:
        """The cached losses of a plan's samples, in DataFlex's layout; null for a loss that was never measured."""
        plan = state.plan
        lists = (plan.ordered_ids, plan.selected_ids)
        ids = next((i for i in lists if i is not None), torch.arange(len(cache.losses)))
        losses = [None if math.isnan(loss) else loss for loss in cache.losses[ids].tolist()]
        content = {
            "indices": ids.tolist(),
            "metric": {"loss": losses},
            "computed_at_step": {"loss": int(cache.measured_at_step[ids].max())},
        }
        _write_atomically(folder / f"scoreboard_step_{state.step}.json", json.dumps(content))

    def _log_order(self, order: OrderRecord) -> None:
        row = {
            "step": order.step,
            "end": order.end,
            "scored": order.num_scored,
            "mean_score": order.mean_score,
            "passes": order.passes,
        }
        self._append(ORDERS_FILE, row)
        self._scalars(order.step, _order_figures(order))

    def _write_selection(self, selection: SelectionRecord, signal_name: str) -> None:
        """The selected ids and their scores, in DataFlex's layout."""
        assert self.selection_folder is not None
        content = {"indices": selection.selected_ids.tolist(), "metric": {signal_name: selection.scores.tolist()}}
        _write_atomically(self.selection_folder / f"step_{selection.step}.json", json.dumps(content, indent=4))
        self._scalars(selection.step, _selection_figures(selection))

    def _progress_fields(self, plan: SamplingPlan) -> dict[str, str]:
        """What the progress bar shows beside the step: mean loss and speed of the window, and the mixture."""
        window = self.log_window
        fields = {
            "loss": f"{window.loss_sum / window.num_steps:.4f}",
            "tok/s": f"{window.tokens_per_second():,.0f}",
        }
        if len(self.domains) > 1:
            fields["mix"] = " ".join(f"{n[:12]}:{p:.2f}" for n, p in zip(self.domains, plan.proportions, strict=True))
        return fields

    def _domain_scalars(self, plan: SamplingPlan) -> dict[str, float]:
        """Proportion, fraction drawn, loss and perplexity of every domain over the window, by TensorBoard tag."""
        scalars: dict[str, float] = {}
        w = self.log_window
        if w.domain_loss is None or w.domain_tokens is None or w.domain_samples is None:
            return scalars
        total = float(w.domain_samples.sum())
        for d, name in enumerate(self.domains):
            scalars[f"mix/proportion/{name}"] = plan.proportions[d]
            scalars[f"mix/drawn/{name}"] = float(w.domain_samples[d]) / total
            if w.domain_tokens[d] > 0:
                loss = float(w.domain_loss[d] / w.domain_tokens[d])
                scalars[f"domain/loss/{name}"] = loss
                if not w.report:  # a loss that is reported on is not one of tokens
                    scalars[f"domain/perplexity/{name}"] = math.exp(min(loss, 50.0))
        return scalars

    def _domain_figures(self, plan: SamplingPlan) -> dict[str, float]:
        """The same for callbacks: `mix/DOMAIN` the proportion, `drawn/DOMAIN`, `domain_loss/DOMAIN`."""
        figures = {f"mix/{name}": share for name, share in zip(self.domains, plan.proportions, strict=True)}
        parts = {"mix/drawn/": "drawn/", "domain/loss/": "domain_loss/"}
        for tag, value in self._domain_scalars(plan).items():
            for part, short in parts.items():
                if tag.startswith(part):
                    figures[short + tag.removeprefix(part)] = value
        return figures

    def _weight_scalars(self) -> dict[str, float]:
        weights = None if self.last_stats is None else self.last_stats.weights
        if weights is None:
            return {}
        return {"weight/entropy": weights.entropy, "weight/min": weights.minimum, "weight/max": weights.maximum}

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as stream:
            stream.write(json.dumps(row, default=lambda v: v.item()) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)


def _plan_figures(report: PlanReport) -> dict[str, float]:
    order = {} if report.order is None else _order_figures(report.order)
    return order if report.selection is None else {**order, **_selection_figures(report.selection)}


def _order_figures(order: OrderRecord) -> dict[str, float]:
    return {"order/scored": order.num_scored, "order/mean_score": order.mean_score or 0.0}


def _selection_figures(selection: SelectionRecord) -> dict[str, float]:
    quantiles = zip((0, 25, 50, 75, 100), selection.quantiles, strict=False)  # none when no score is finite
    return {
        "select/size": len(selection.selected_ids),
        "select/overlap": selection.overlap,
        **{f"select/score_q{percent}": value for percent, value in quantiles},
    }


def _write_atomically(target: Path, text: str) -> None:
    """Write a file that is either complete or absent; creates its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, text)


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
        "tokens": stats.num_tokens,
        "proportions": dict(zip(domains, state.plan.proportions, strict=True)),
        "drawn": by_name(stats.domain_samples),
        "domain_loss": {name: v for name, v in by_name(mean).items() if not math.isnan(v)},
        **stats.report,
    }
    if stats.weights is not None:
        row["weights"] = {"entropy": stats.weights.entropy, "min": stats.weights.minimum, "max": stats.weights.maximum}
    return row
