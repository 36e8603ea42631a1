"""The training loop. It knows no process group, no model class and no algorithm: it moves plain data between the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from dataflex_mega.checkpoint import Checkpointer
from dataflex_mega.control.controller import DataController
from dataflex_mega.data.loader import Loader
from dataflex_mega.engines.base import Engine
from dataflex_mega.errors import CheckpointError, NotFinite, TrainingFault
from dataflex_mega.metrics import Metrics
from dataflex_mega.types import Batch, RunPosition, SamplingPlan, StepStats, TrainState

MAX_NAMED_SAMPLES = 8  # in the message about a loss that is not finite


class TrainerHooks(Protocol):
    """When to log, evaluate, save and stop: llamafactory.callbacks.CallbackHooks, which needs transformers.

    `control` is transformers' TrainerControl: its flags say what was asked for at the last event.
    """

    control: Any
    train_results: dict[str, float]  # after on_train_end: the summary of the training
    evaluations: dict[int, dict[str, float]]  # step -> the metrics of its evaluation

    def on_train_begin(self, step: int, epoch: float) -> bool: ...
    def on_step_begin(self) -> None: ...
    def on_step_end(self, step: int, epoch: float, tokens: int, loss: float | None = None) -> None: ...
    def on_epoch_end(self) -> bool: ...
    def on_log(self, logs: dict[str, float]) -> None: ...
    def on_set_evaluated(self, metrics: dict[str, float]) -> None: ...
    def on_evaluate(self, metrics: dict[str, float]) -> float | None: ...
    def on_extra_evaluation(self, metrics: dict[str, float]) -> None: ...
    def on_save(self) -> None: ...
    def best_checkpoint(self) -> Path | None: ...
    def best_metric(self) -> str: ...
    def stop_reason(self) -> str: ...
    def on_train_end(self, num_samples: int, last_acts: Callable[[], None]) -> None: ...
    def plot_loss(self) -> None: ...
    def save_arguments(self, folder: Path) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Trainer:
    """The parts of a run and the loop that joins them."""

    engine: Engine
    controller: DataController
    loader: Loader
    checkpointer: Checkpointer
    hooks: TrainerHooks
    metrics: Metrics
    max_steps: int
    global_batch_size: int  # samples of one optimizer step, over all ranks
    pool_size: int  # drawing that many samples is one epoch; those in the pool unless mix_strategy says otherwise
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluation_sets: Sequence[str] = ()  # names by which the metrics of several evaluation sets are told apart
    evaluates_at_start: bool = False
    evaluates_at_end: bool = False  # once, after the last step
    loads_best: bool = False  # whether the run ends with the model of its best checkpoint
    describe_sample: Callable[[int], str] = str  # sample id -> where it comes from, for messages
    # (plan, step) of a checkpoint with another global batch size -> the same plan, counted in batches of this run
    restate_plan: Callable[[SamplingPlan, int], SamplingPlan] | None = None
    on_loaded: Callable[[], None] | None = None  # before the first file of output_dir is changed
    position: RunPosition = field(default_factory=RunPosition)
    stop: Callable[[int, str], NoReturn] | None = None  # (step, its checkpoint): leave the run as a signal asked
    check_data: Callable[[bool], None] | None = None  # raises when data are not what they should be; True: waits for it
    phase_seconds: dict[str, float] = field(default_factory=dict, init=False)  # of the current step
    outcome: str = field(default="", init=False)  # of `fit`: `done: 40 steps`, or where and why it stopped before
    model_step: int = field(default=0, init=False)  # after `fit`: the step whose model the engine holds
    _best: str = field(default="", init=False)  # what became of the best model, for `outcome`
    _stop_requested: bool = field(default=False, init=False)
    _saved_step: int = field(default=-1, init=False)
    _learning_rate: float = field(default=0.0, init=False)
    _loss: float = field(default=0.0, init=False)  # mean over the tokens of the last step
    _last_logged: int = field(default=0, init=False)  # the step at which the window of the log ended

    def fit(self, resume: Path | None = None) -> TrainState:
        """Train to `max_steps`, from the start or from a checkpoint. Raises TrainingFault naming step and samples."""
        state = self._initial_state(resume)
        self._last_logged = state.step
        if self.on_loaded is not None:
            self.on_loaded()
        self.metrics.on_train_begin(state)
        stop = self.hooks.on_train_begin(state.step, state.samples_seen / self.pool_size)
        first_sample = state.samples_seen
        if self.evaluates_at_start and state.step < self.max_steps and not stop:
            self._evaluate(state, extra=True)
        if resume is not None:
            self._end_epoch(state)  # of the checkpoint's step, which was saved before
        while state.step < self.max_steps and not stop:
            self.hooks.on_step_begin()
            self.step(state)
            stop = self._run_callbacks(state)
            if self._stop_requested and self.stop is not None:
                self._leave(state, self.stop)
        if self.check_data is not None:
            self.check_data(True)
        self.hooks.on_train_end(state.samples_seen - first_sample, partial(self._do_last_acts, state))
        self.metrics.on_train_end(state)
        self.outcome = self._describe_end(state)
        return state

    def _describe_end(self, state: TrainState) -> str:
        if state.step >= self.max_steps:
            return f"done: {state.step} steps{self._best}"
        return f"stopped at step {state.step} of {self.max_steps}: {self.hooks.stop_reason()}{self._best}"

    def _do_last_acts(self, state: TrainState) -> None:
        """What comes between the summary of a training and its end."""
        self.model_step = state.step
        if self.loads_best:
            self._load_best(state)
        if self.evaluates_at_end:
            self._evaluate(state, extra=True)

    def _load_best(self, state: TrainState) -> None:
        """Bring the engine to the best checkpoint, unless it is gone or damaged: then the run keeps its last model."""
        best = self.hooks.best_checkpoint()
        if best is None:
            self._best = "; no evaluation has a checkpoint, so the model is that of the last step"
            return
        try:
            self.model_step = self.checkpointer.load_model(best, self.engine)
            self._best = f"; the model is the best, of step {self.model_step} ({self.hooks.best_metric()})"
        except CheckpointError as error:
            self._best = f"; the model is that of step {state.step}, because the best cannot be loaded: {error}"

    def _leave(self, state: TrainState, stop: Callable[[int, str], NoReturn]) -> None:
        """End the run after a step because a signal asked for it, with a checkpoint of that step."""
        if self.checkpointer.make_resumable() or self._saved_step != state.step:
            self._save(state)
        self.metrics.on_train_end(state)
        stop(state.step, f"checkpoint-{state.step}")

    def _save(self, state: TrainState) -> None:
        with self._timed("save"):
            extra = {"controller": self.controller.state_dict(), "hooks": self.hooks.state_dict()}
            self.checkpointer.save(state, self.engine, extra)
        self._saved_step = state.step
        self.hooks.on_save()

    def step(self, state: TrainState) -> None:
        """One optimizer step, with a new plan before it when the controller needs one. Changes `state`."""
        self.position.step = state.step + 1
        if self.controller.needs_new_plan(state):
            with self._timed("plan"):
                state.plan = self.controller.next_plan(state)
            self.metrics.on_plan(state, self.controller.plan_report(state))
        with self._timed("data"):
            end = self.controller.next_update_step(state.step, self.max_steps)
            micro_batches = self.loader.micro_batches(state.plan, state.step, end)
        stats = self._train_step(state, micro_batches)
        self._stop_requested, self._loss = stats.stop_requested, stats.mean_loss
        state.step += 1
        state.tokens_seen += stats.num_tokens
        state.samples_seen += self.global_batch_size
        self.controller.observe(stats, state)
        self.metrics.on_step_end(state, stats, self._learning_rate, self.phase_seconds)
        self.phase_seconds.clear()

    def _initial_state(self, resume: Path | None) -> TrainState:
        if resume is None:
            return TrainState(step=0, plan=self.controller.initial_plan())
        state, extra = self.checkpointer.restore(resume, self.engine)
        self.controller.load_state_dict(extra["controller"])
        self.hooks.load_state_dict(extra["hooks"])
        if self.restate_plan is not None:
            state.plan = self.restate_plan(state.plan, state.step)
        return state

    def _train_step(self, state: TrainState, micro_batches: list[Batch]) -> StepStats:
        self._learning_rate = self.engine.learning_rate()
        with self._timed("train"):
            try:
                return self.engine.train_step(micro_batches, self.controller.weight_fn(state))
            except NotFinite as fault:
                self.controller.check_weights(state)
                raise TrainingFault(
                    f"step {state.step + 1}: {fault}{self._describe(fault.sample_ids)}; parameters and checkpoints are "
                    "as before this step (on_non_finite: continue would skip it)"
                ) from fault

    def _describe(self, sample_ids: list[int]) -> str:
        """`; samples 3 (file, row), 7 (file, row) and 12 more`, or an empty string without samples."""
        if not sample_ids:
            return ""
        named = ", ".join(f"{i} ({self.describe_sample(i)})" for i in sample_ids[:MAX_NAMED_SAMPLES])
        others = len(sample_ids) - MAX_NAMED_SAMPLES
        return f"; samples {named} and {others} more" if others > 0 else f"; samples {named}"

    def _run_callbacks(self, state: TrainState) -> bool:
        """Log, evaluate and save as the hooks ask -> whether to stop."""
        self.hooks.on_step_end(state.step, state.samples_seen / self.pool_size, state.tokens_seen, self._loss)
        self._do_what_hooks_ask(state)
        self._end_epoch(state)
        return bool(self.hooks.control.should_training_stop)

    def _end_epoch(self, state: TrainState) -> None:
        """Where a step ends an epoch or the run, what the hooks ask for then."""
        if self.hooks.on_epoch_end():
            self._do_what_hooks_ask(state)

    def _do_what_hooks_ask(self, state: TrainState) -> None:
        """Log, evaluate and save, in the order of Hugging Face's loop."""
        if self.check_data is not None and (self.hooks.control.should_log or self.hooks.control.should_save):
            self.check_data(False)
        if self.hooks.control.should_log and state.step > self._last_logged:
            self._last_logged = state.step
            self.hooks.on_log(self.metrics.flush(state))
        if self.hooks.control.should_evaluate and self.evaluate is not None:
            self._evaluate(state)
        if self.hooks.control.should_save:
            self._save(state)
        control = self.hooks.control
        control.should_log = control.should_evaluate = control.should_save = False

    def _evaluate(self, state: TrainState, extra: bool = False) -> None:
        """Evaluate, set by set for the hooks. `extra`: neither the schedule nor the best model goes by it."""
        if self.evaluate is None:
            return
        with self._timed("evaluate"):
            results = self.evaluate()
        self.metrics.on_evaluate(state, results)
        *others, last = by_set(results, self.evaluation_sets)
        for part in others:
            self.hooks.on_log(part)
            self.hooks.on_set_evaluated(part)
        self.hooks.on_log(last)
        if extra:
            self.hooks.on_extra_evaluation(last)
            return
        watched = self.hooks.on_evaluate(last)
        if watched is not None:
            self.engine.adapt_learning_rate(watched)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self.position.phase = phase
        yield
        self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + time.perf_counter() - start


def by_set(results: dict[str, float], names: Sequence[str]) -> list[dict[str, float]]:
    """The metrics of each evaluation set, `eval_NAME_loss` and so on; those of no set go to the last."""
    if len(names) < 2:
        return [results]
    parts: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, value in results.items():
        owners = [name for name in names if key.startswith(f"eval_{name}_")]
        parts[max(owners, key=len, default=names[-1])][key] = value
    return list(parts.values())
