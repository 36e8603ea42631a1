"""Hugging Face callbacks, driven from our loop: LLaMA-Factory's log file, early stopping, the user's own.

The callbacks see the TrainerState and TrainerControl that Hugging Face's Trainer would show them, so those written for
it work here; what they ask for (log, evaluate, save, stop) is what the loop then does.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, UserCode, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.callback_list import in_order, make_handler
from dataflex_mega.llamafactory.trackers import Trackers, without_secret_values
from dataflex_mega.log import get_logger
from dataflex_mega.types import without_timings


def load_callbacks(names: list[str]) -> list[Any]:
    """`package.module:Class` names -> instances, made without arguments. Raises ConfigError naming the bad one."""
    from transformers import TrainerCallback

    instances = []
    for name in names:
        module, _, attribute = name.partition(":")
        with UserCode(f"callbacks: {name!r} cannot be loaded"):
            try:
                cls = getattr(importlib.import_module(module), attribute)
            except (ModuleNotFoundError, AttributeError) as error:
                raise ConfigError(
                    f"callbacks: {name!r} cannot be loaded: {error}; expected package.module:Class"
                ) from error
        if not (isinstance(cls, type) and issubclass(cls, TrainerCallback)):
            raise ConfigError(f"callbacks: {name!r} is not a transformers.TrainerCallback")
        with UserCode(f"callbacks: {name!r} cannot be made without arguments"):
            instances.append(cls())
    return instances


# Events of Hugging Face's loop that have no counterpart here, and those that need an optimizer of torch's.
NEVER_CALLED = ("on_substep_end", "on_prediction_step", "on_predict", "on_push_begin")
AROUND_THE_UPDATE = ("on_pre_optimizer_step", "on_optimizer_step")


class CallbackHooks:
    """What the loop asks at every step, answered by Hugging Face callbacks in the order of Hugging Face's loop."""

    def __init__(
        self,
        args: LFArgs,
        parts: dict[str, Any],
        max_steps: int,
        user_callbacks: list[Any],
        min_delta: float,
        num_epochs: int = 0,
        trackers: Trackers | None = None,
    ) -> None:
        """`parts`: model, processing_class, optimizer, lr_scheduler, as callbacks may ask for them; `user_callbacks`: those
        of the key `callbacks`."""
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import TrainerControl, TrainerState

        watch_metric(args)
        args = without_secret_values(args)
        patience = args.finetuning.early_stopping_steps
        self._early_stopping = None if patience is None else EarlyStoppingCallback(patience, min_delta)
        self._user_callbacks = user_callbacks
        self._epoch_begins, self._epoch_ends = True, False  # whether the event comes next
        self.args, self.control = args.training, TrainerControl()
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=self.args.process_index == 0)
        self.state.is_local_process_zero = self.args.local_process_index == 0
        self.state.compute_steps(self.args, max_steps)
        self.state.num_train_epochs, self.state.train_batch_size = num_epochs, self.args.train_batch_size
        self.train_results: dict[str, float] = {}  # what Hugging Face writes into train_results.json
        self.evaluations: dict[int, dict[str, float]] = {}  # step -> the metrics of its evaluation, in this process
        self._evaluated: dict[str, float] = {}  # by the evaluation sets so far, of an evaluation with several
        self._loss_sum, self._num_losses = 0.0, 0  # of the steps of the whole run
        self._started, self._first_step = time.time(), 0  # of this process's part of it
        self.handler = make_handler(
            in_order(args, user_callbacks, self._early_stopping, trackers or Trackers(), parts),
            *(parts[name] for name in ("model", "processing_class", "optimizer", "lr_scheduler")),
        )
        self._attach_to_update(parts["optimizer"])
        self.handler.on_init_end(self.args, self.state, self.control)

    def _attach_to_update(self, optimizer: Any) -> None:
        """Call the events around an update from the optimizer; say which events of a user's callbacks never come."""
        unheard: list[str] = list(NEVER_CALLED)
        if isinstance(optimizer, torch.optim.Optimizer):
            if _overridden(self._user_callbacks, AROUND_THE_UPDATE):
                optimizer.register_step_pre_hook(lambda *_: self._call("on_pre_optimizer_step"))
                optimizer.register_step_post_hook(lambda *_: self._call("on_optimizer_step"))
        else:
            unheard += AROUND_THE_UPDATE
        missing = _overridden(self._user_callbacks, unheard)
        if missing and self.state.is_world_process_zero:
            get_logger().info("note: callbacks: %s are never called in a run with a role", ", ".join(missing))

    def _call(self, event: str, *arguments: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, *arguments)

    # -- events of the loop --------------------------------------------------------------------------------------

    def on_train_begin(self, step: int, epoch: float) -> bool:
        """Training starts, or starts again, after `step` steps -> whether it had ended there."""
        self.state.global_step, self.state.epoch = step, epoch
        self._started, self._first_step = time.time(), step
        self._call("on_train_begin")
        return self._early_stopping is not None and self._patience_is_over()

    def on_step_begin(self) -> None:
        """Before an optimizer step; the first of an epoch begins the epoch."""
        if self._epoch_begins:
            self._epoch_begins = False
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def on_step_end(self, step: int, epoch: float, tokens: int, loss: float | None = None) -> None:
        """After an optimizer step; `control` then says should_log, should_evaluate, should_save, should_training_stop."""
        # An epoch is as many samples as the pool has, whichever they were.
        self._epoch_ends = int(epoch + 1e-9) > int((self.state.epoch or 0.0) + 1e-9) or step == self.state.max_steps
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, tokens
        if loss is not None:
            self._loss_sum, self._num_losses = self._loss_sum + loss, self._num_losses + 1
        self._call("on_step_end")

    def on_epoch_end(self) -> bool:
        """After what a step asked for is done -> whether it was the last of an epoch or of the run."""
        if not (self._epoch_ends or self.control.should_training_stop):
            return False
        self._epoch_ends, self._epoch_begins = False, True
        self._call("on_epoch_end")
        return True

    def on_log(self, logs: dict[str, float]) -> None:
        """Scalars under Hugging Face's names (loss, grad_norm, learning_rate, eval_loss).

        Callbacks get all of them; the history keeps what a run repeats exactly, so neither times nor figures with a `/`,
        which are in metrics.jsonl.
        """
        kept = {name: value for name, value in without_timings(logs).items() if "/" not in name}
        self._write_history(kept)
        self._call("on_log", {**logs, "epoch": self.state.epoch or 0.0})

    def _write_history(self, row: dict[str, float]) -> None:
        self.state.log_history.append({**row, "epoch": self.state.epoch or 0.0, "step": self.state.global_step})

    def on_set_evaluated(self, metrics: dict[str, float]) -> None:
        """After one of several evaluation sets; `on_evaluate` comes after the last."""
        metrics = {**metrics, "epoch": self.state.epoch or 0.0}
        self._call("on_evaluate", metrics)
        self._evaluated.update(metrics)

    def on_evaluate(self, metrics: dict[str, float]) -> float | None:
        """After an evaluation -> the value that schedules and early stopping watch, None when nothing does.

        Callbacks compare with the best value of the evaluations before this one, and may add metrics. Raises ConfigError
        when there is no such metric.
        """
        from transformers import Trainer

        self.on_set_evaluated(metrics)
        found = self._end_evaluation()
        name = watched_metric(self.args)
        if name is None:
            return None
        if name not in found:
            raise ConfigError(_no_such_metric(self.args.metric_for_best_model, [n for n in found if n != "epoch"]))
        is_best = Trainer._determine_best_metric(self, metrics=found, trial=None)  # type: ignore[arg-type]  # args, state
        if self.args.save_strategy == "best":
            self.control.should_save = is_best
        return found[name]

    def _end_evaluation(self) -> dict[str, float]:
        """The metrics of all evaluation sets, with what callbacks have added."""
        found, self._evaluated = self._evaluated, {}
        self.evaluations[self.state.global_step] = found
        return found

    def on_extra_evaluation(self, metrics: dict[str, float]) -> None:
        """After an evaluation before the first step or after the last, which decides nothing: neither which model is the
        best nor, when a run goes on, how patient early stopping still is."""
        patience, stop = self._counter(), self.control.should_training_stop
        self.on_set_evaluated(metrics)
        self._end_evaluation()
        if self._early_stopping is not None and patience != self._counter():
            self._early_stopping.early_stopping_patience_counter = patience
            self.control.should_training_stop = stop

    def on_save(self) -> None:
        """Call the callbacks' on_save, after a checkpoint was written."""
        best = self.best_checkpoint()
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.state.stateful_callbacks = self._exported()  # type: ignore[assignment]  # as Trainer does
        self._call("on_save")

    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best evaluation that has one. Before on_save, that of this step counts as written."""
        step, known = self.state.best_global_step, self.state.best_model_checkpoint
        if step:
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            if step == self.state.global_step or folder.is_dir():
                return folder
        return None if known is None else Path(known)

    def on_train_end(self, num_samples: int = 0, last_acts: Callable[[], None] | None = None) -> None:
        """Training is over: its summary is logged, then come `last_acts`, then the callbacks' on_train_end; the file of
        Hugging Face is written. `num_samples`: drawn since on_train_begin."""
        self._summarize(num_samples)
        if last_acts is not None:
            last_acts()
        self._call("on_train_end")
        if self.state.is_world_process_zero:
            self.state.stateful_callbacks = self._exported()  # type: ignore[assignment]  # as Trainer does
            self.state.save_to_json(str(Path(self.args.output_dir) / "trainer_state.json"))

    def _summarize(self, num_samples: int) -> None:
        from transformers.trainer_utils import speed_metrics

        steps = self.state.global_step - self._first_step
        summary = speed_metrics("train", self._started, num_samples, steps)
        summary["total_flos"] = self.state.total_flos = self._total_flos()
        summary["train_loss"] = self._loss_sum / max(self._num_losses, 1)
        self.train_results = {**summary, "epoch": self.state.epoch or 0.0}
        self._write_history(summary)
        self._call("on_log", dict(self.train_results))

    def _total_flos(self) -> float:
        """Hugging Face's estimate, 6 x parameters without embeddings x tokens, padding left out; 0 for a model that does
        not count its parameters."""
        count = getattr(self.handler.model, "num_parameters", None)
        return 0.0 if count is None else 6.0 * count(exclude_embeddings=True) * self.state.num_input_tokens_seen

    # -- what the loop and the end of a run want to know ---------------------------------------------------------

    def stop_reason(self) -> str:
        """Why callbacks ended the run before its last step."""
        if self._early_stopping is not None and self._patience_is_over():
            return f"early stopping ({watched_metric(self.args)} did not improve {self._counter()} times)"
        names = ", ".join(type(callback).__name__ for callback in self._user_callbacks)
        return f"callback {names}" if names else "a callback"

    def _counter(self) -> int:
        return 0 if self._early_stopping is None else self._early_stopping.early_stopping_patience_counter

    def _patience_is_over(self) -> bool:
        callback = self._early_stopping
        return callback is not None and self._counter() >= callback.early_stopping_patience

    def best_metric(self) -> str:
        """`eval_loss 1.25`, the best value so far, for messages."""
        return f"{watched_metric(self.args)} {self.state.best_metric:.6g}"

    def plot_loss(self) -> None:
        """LLaMA-Factory's training_loss.png, from trainer_state.json."""
        from llamafactory.extras.ploting import plot_loss

        plot_loss(self.args.output_dir, keys=["loss", "eval_loss"])

    def save_arguments(self, folder: Path) -> None:
        """Write training_args.bin as Hugging Face's Trainer does; tools look for it beside a model. Nothing here reads it,
        since reading it means running what it holds. It has no secrets in it."""
        torch.save(self.args, folder / "training_args.bin")

    # -- restarts ------------------------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        """Name -> a callback that exports a state; a further one of the same class is `Name 2`."""
        from transformers.trainer_callback import ExportableState

        found: dict[str, Any] = {}
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                count = sum(type(other).__name__ == name for other in found.values())
                found[name if count == 0 else f"{name} {count + 1}"] = callback
        return found

    def _exported(self) -> dict[str, Any]:
        return {**{name: callback.state() for name, callback in self._stateful().items()},
                "TrainerControl": self.control.state()}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What survives a restart: the log history, the best evaluation and what callbacks export."""
        best = self.best_checkpoint()
        return {
            "log_history": self.state.log_history,
            "best_metric": self.state.best_metric,
            "best_global_step": self.state.best_global_step,
            "best_model_checkpoint": None if best is None else str(best),
            "epoch_begins": self._epoch_begins,
            "epoch_ends": self._epoch_ends,
            "losses": [self._loss_sum, self._num_losses],
            "callbacks": {name: callback.state() for name, callback in self._stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A best checkpoint that is no longer where it was is looked for in output_dir."""
        self.state.log_history = list(state["log_history"])
        self.state.best_metric = state["best_metric"]
        self.state.best_global_step = state.get("best_global_step")
        best = state.get("best_model_checkpoint")
        places = [] if best is None else [Path(self.args.output_dir) / Path(best).name, Path(best)]
        self.state.best_model_checkpoint = next((str(place) for place in places if place.is_dir()), None)
        self._epoch_begins, self._epoch_ends = state.get("epoch_begins", True), state.get("epoch_ends", False)
        self._loss_sum, self._num_losses = state.get("losses", (0.0, 0))
        for name, callback in self._stateful().items():
            for attribute, value in (state["callbacks"].get(name) or {}).get("attributes", {}).items():
                setattr(callback, attribute, value)


def watch_metric(args: LFArgs) -> None:
    """Choose what early stopping and the best checkpoint go by when the configuration does not say: the loss."""
    training = args.training
    watches = args.finetuning.early_stopping_steps is not None or training.save_strategy == "best"
    if watches and training.metric_for_best_model is None:
        training.metric_for_best_model, training.greater_is_better = "loss", False


def watched_metric(training: Any) -> str | None:
    """metric_for_best_model under the name that an evaluation gives it, `eval_loss`; None without one."""
    metric = training.metric_for_best_model
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"


def check_metric(args: LFArgs, available: list[str], user_callbacks: list[Any], direction_is_set: bool) -> None:
    """Raises ConfigError when early stopping or a schedule watches a metric that no evaluation will give.

    A user's callback may add metrics; then the first evaluation tells.

    Args:
        available: the metrics of an evaluation.
        direction_is_set: whether the configuration has greater_is_better; without it a perplexity is better when lower,
            while Hugging Face knows that of losses only.
    """
    watch_metric(args)
    training = args.training
    name = watched_metric(training)
    if name is None or str(training.eval_strategy.value) == "no":
        return
    if not direction_is_set and name.endswith("perplexity"):
        training.greater_is_better = False
    if name not in available and not _overridden(user_callbacks, ("on_evaluate",)):
        raise ConfigError(_no_such_metric(training.metric_for_best_model, available))


def _no_such_metric(metric: str, available: list[str]) -> str:
    near = did_you_mean(metric if metric.startswith("eval_") else f"eval_{metric}", available)
    return f"metric_for_best_model: no evaluation gives {metric!r}{near}; there are {', '.join(available)}"


def _overridden(callbacks: list[Any], events: Iterable[str]) -> list[str]:
    """`Class.event` for each of the events that a callback does something at."""
    from transformers import TrainerCallback

    return [
        f"{type(callback).__name__}.{event}"
        for callback in callbacks
        for event in events
        if getattr(type(callback), event, None) is not getattr(TrainerCallback, event)
    ]
