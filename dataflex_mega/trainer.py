"""The loop. It knows no process group, no model class and no algorithm: it moves plain data between the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dataflex_mega.errors import NotFinite, TrainingFault
from dataflex_mega.types import Batch, Plan, StepStats, TrainState, Weigh


class Engine(Protocol):
    """See engines.base.Engine; the part that the loop uses."""

    def train_step(self, micros: list[Batch], weigh: Weigh | None) -> StepStats: ...
    def learning_rate(self) -> float: ...


class Controller(Protocol):
    """See controller.Controller."""

    last_selection: Any

    def first_plan(self) -> Plan: ...
    def due(self, state: TrainState) -> bool: ...
    def plan_end(self, step: int, last: int) -> int: ...
    def next_plan(self, state: TrainState) -> Plan: ...
    def weigher(self, state: TrainState) -> Weigh | None: ...
    def observe(self, stats: StepStats, state: TrainState) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, saved: dict[str, Any]) -> None: ...


class Loader(Protocol):
    """See data.loader.Loader."""

    def micro_batches(self, plan: Plan, step: int, last_step: int | None = None) -> list[Batch]: ...
    def close(self) -> None: ...


class Checkpointer(Protocol):
    """See checkpoint.Checkpointer."""

    def save(self, state: TrainState, engine: Any, extra: dict[str, Any]) -> Path: ...
    def restore(self, path: Path, engine: Any) -> tuple[TrainState, dict[str, Any]]: ...


class Hooks(Protocol):
    """See llamafactory.callbacks.Hooks: what happens at which step."""

    def begin(self, step: int, epoch: float) -> None: ...
    def step_end(self, step: int, epoch: float, tokens: int) -> Any: ...
    def log(self, logs: dict[str, float]) -> None: ...
    def evaluated(self, metrics: dict[str, float]) -> Any: ...
    def saved(self) -> None: ...
    def end(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Metrics(Protocol):
    """See metrics.Metrics: what people see."""

    def begin(self, state: TrainState) -> None: ...
    def planned(self, state: TrainState, controller: Any) -> None: ...
    def step(self, state: TrainState, stats: StepStats, lr: float, seconds: dict[str, float]) -> None: ...
    def log(self, state: TrainState) -> dict[str, float]: ...
    def evaluated(self, state: TrainState, metrics: dict[str, float]) -> None: ...
    def end(self, state: TrainState) -> None: ...


@dataclass
class Trainer:
    """The parts of a run and the loop that joins them."""

    engine: Engine
    controller: Controller
    loader: Loader
    checkpointer: Checkpointer
    hooks: Hooks
    metrics: Metrics
    max_steps: int
    global_batch: int
    samples: int  # of the pool: an epoch is that many samples drawn
    evaluate: Callable[[], dict[str, float]] | None = None
    describe: Callable[[int], str] = str  # sample id -> where it comes from, for messages
    adopt: Callable[[Plan, int], Plan] | None = None  # the plan of a checkpoint with another global batch, restated
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    _rate: float = field(default=0.0, init=False)

    def fit(self, resume: Path | None = None) -> TrainState:
        """Train to `max_steps`, from the start or from a checkpoint. Raises TrainingFault naming step and samples."""
        state = self._start(resume)
        self.metrics.begin(state)
        self.hooks.begin(state.step, state.samples_seen / self.samples)
        stop = False
        while state.step < self.max_steps and not stop:
            self.advance(state)
            stop = self._follow(state)
        self.hooks.end()
        self.metrics.end(state)
        return state

    def advance(self, state: TrainState) -> None:
        """One optimizer step, with the re-planning before it when that is due."""
        if self.controller.due(state):
            with self._timed("plan"):
                state.plan = self.controller.next_plan(state)
            self.metrics.planned(state, self.controller)
        with self._timed("data"):
            end = self.controller.plan_end(state.step, self.max_steps)
            micros = self.loader.micro_batches(state.plan, state.step, end)
        stats = self._step(state, micros)
        state.step += 1
        state.tokens_seen += stats.tokens
        state.samples_seen += self.global_batch
        self.controller.observe(stats, state)
        self.metrics.step(state, stats, self._rate, self.seconds)
        self.seconds.clear()

    def _start(self, resume: Path | None) -> TrainState:
        if resume is None:
            return TrainState(step=0, plan=self.controller.first_plan())
        state, extra = self.checkpointer.restore(resume, self.engine)
        self.controller.restore(extra["controller"])
        self.hooks.load_state_dict(extra["hooks"])
        if self.adopt is not None:
            state.plan = self.adopt(state.plan, state.step)
        return state

    def _step(self, state: TrainState, micros: list[Batch]) -> StepStats:
        self._rate = self.engine.learning_rate()
        with self._timed("train"):
            try:
                return self.engine.train_step(micros, self.controller.weigher(state))
            except NotFinite as fault:
                where = ", ".join(f"{i} ({self.describe(i)})" for i in fault.sample_ids[:8])
                more = f" and {len(fault.sample_ids) - 8} more" if len(fault.sample_ids) > 8 else ""
                what = f"; samples {where}{more}" if where else ""
                raise TrainingFault(
                    f"step {state.step + 1}: {fault}{what}; parameters and checkpoints are as before this step "
                    "(nan_loss: continue would skip it)"
                ) from fault

    def _follow(self, state: TrainState) -> bool:
        """Log, evaluate and save as the hooks ask -> whether to stop."""
        epoch = state.samples_seen / self.samples
        wanted = self.hooks.step_end(state.step, epoch, state.tokens_seen)
        if wanted.should_log:
            self.hooks.log(self.metrics.log(state))
        if wanted.should_evaluate and self.evaluate is not None:
            with self._timed("evaluate"):
                found = self.evaluate()
            self.hooks.log(found)
            self.metrics.evaluated(state, found)
            wanted = self.hooks.evaluated(found)
        if wanted.should_save:
            with self._timed("save"):
                extra = {"controller": self.controller.state(), "hooks": self.hooks.state_dict()}
                self.checkpointer.save(state, self.engine, extra)
            self.hooks.saved()
        stop = bool(wanted.should_training_stop)
        wanted.should_log = wanted.should_evaluate = wanted.should_save = False
        return stop

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
