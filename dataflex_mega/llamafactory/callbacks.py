"""Hugging Face callbacks, driven from our loop: LLaMA-Factory's log file, early stopping, the user's own.

The callbacks see the TrainerState and TrainerControl that Hugging Face's Trainer would show them, so those written for
it work here; what they ask for (log, evaluate, save, stop) is what the loop then does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, UserCall, UserCode, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.log import get_logger


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


def _make_handler(*arguments: Any) -> Any:
    """transformers' CallbackHandler, which names the callback that raises; a callback of the user's may."""
    from transformers.trainer_callback import CallbackHandler

    class NamingHandler(CallbackHandler):
        def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            every = self.callbacks
            try:
                for callback in every:
                    self.callbacks = [callback]
                    with UserCall(f"callback {type(callback).__module__}:{type(callback).__name__}.{event}"):
                        control = super().call_event(event, args, state, control, **kwargs)
            finally:
                self.callbacks = every
            return control

    return NamingHandler(*arguments)


class CallbackHooks:
    """What the loop asks at every step, answered by Hugging Face callbacks in the order of Hugging Face's loop."""

    def __init__(
        self, args: LFArgs, parts: dict[str, Any], max_steps: int, user_callbacks: list[Any], min_delta: float
    ) -> None:
        """`parts`: model, processing_class, optimizer, lr_scheduler, as callbacks may ask for them; `user_callbacks`: those
        of the key `callbacks`."""
        from llamafactory.train.callbacks import LogCallback, ReporterCallback
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import (
            DefaultFlowCallback,
            TrainerControl,
            TrainerState,
        )

        watch_metric(args)
        patience = args.finetuning.early_stopping_steps
        self._early_stopping = None if patience is None else EarlyStoppingCallback(patience, min_delta)
        stopping = [] if self._early_stopping is None else [self._early_stopping]
        callbacks = [  # in LLaMA-Factory's order
            DefaultFlowCallback(),
            *user_callbacks,
            LogCallback(),
            *stopping,
            ReporterCallback(args.model, args.data, args.finetuning, args.generating),
        ]
        self._user_callbacks = user_callbacks
        self._epoch_begins, self._epoch_ends = True, False  # whether the event comes next
        self.args, self.control = args.training, TrainerControl()
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=self.args.process_index == 0)
        self.state.is_local_process_zero = self.args.local_process_index == 0
        self.state.compute_steps(self.args, max_steps)
        self.handler = _make_handler(
            callbacks, parts["model"], parts["processing_class"], parts["optimizer"], parts["lr_scheduler"]
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

    def on_train_begin(self, step: int, epoch: float) -> bool:
        """Training starts, or starts again, after `step` steps -> whether it had ended there."""
        self.state.global_step, self.state.epoch = step, epoch
        self._call("on_train_begin")
        return self._early_stopping is not None and self._patience_is_over()

    def on_step_begin(self) -> None:
        """Before an optimizer step; the first of an epoch begins the epoch."""
        if self._epoch_begins:
            self._epoch_begins = False
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def on_step_end(self, step: int, epoch: float, tokens: int) -> None:
        """After an optimizer step; `control` then says should_log, should_evaluate, should_save, should_training_stop."""
        # An epoch is as many samples as the pool has, whichever they were.
        self._epoch_ends = int(epoch + 1e-9) > int((self.state.epoch or 0.0) + 1e-9) or step == self.state.max_steps
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, tokens
        self._call("on_step_end")

    def on_epoch_end(self) -> bool:
        """After what a step asked for is done -> whether it was the last of an epoch or of the run."""
        if not (self._epoch_ends or self.control.should_training_stop):
            return False
        self._epoch_ends, self._epoch_begins = False, True
        self._call("on_epoch_end")
        return True

    def on_log(self, logs: dict[str, float]) -> None:
        """Scalars under Hugging Face's names (loss, grad_norm, learning_rate, eval_loss)."""
        self.state.log_history.append(
            {**logs, "epoch": round(self.state.epoch or 0.0, 4), "step": self.state.global_step}
        )
        self._call("on_log", dict(logs))

    def on_evaluate(self, metrics: dict[str, float]) -> float | None:
        """After an evaluation -> the value that schedules and early stopping watch, None when nothing does.

        Callbacks compare with the best value of the evaluations before this one, and may add metrics. Raises ConfigError
        when there is no such metric.
        """
        from transformers import Trainer

        metrics = dict(metrics)
        self._call("on_evaluate", metrics)
        name = watched_metric(self.args)
        if name is None:
            return None
        if name not in metrics:
            raise ConfigError(_no_such_metric(self.args.metric_for_best_model, list(metrics)))
        Trainer._determine_best_metric(self, metrics=metrics, trial=None)  # type: ignore[arg-type]  # needs args, state
        return metrics[name]

    def on_save(self) -> None:
        """Call the callbacks' on_save, after a checkpoint was written."""
        best = self.state.best_global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{best}"
        if best and folder.is_dir():
            self.state.best_model_checkpoint = str(folder)
        self._call("on_save")

    def on_train_end(self) -> None:
        """Training is over; the files of LLaMA-Factory and Hugging Face are written."""
        self._call("on_train_end")
        if self.state.is_world_process_zero:
            self.state.save_to_json(str(Path(self.args.output_dir) / "trainer_state.json"))

    def stop_reason(self) -> str:
        """Why callbacks ended the run before its last step."""
        if self._early_stopping is not None and self._patience_is_over():
            count = self._early_stopping.early_stopping_patience_counter
            return f"early stopping ({watched_metric(self.args)} did not improve {count} times)"
        names = ", ".join(type(callback).__name__ for callback in self._user_callbacks)
        return f"callback {names}" if names else "a callback"

    def _patience_is_over(self) -> bool:
        callback = self._early_stopping
        return callback is not None and callback.early_stopping_patience_counter >= callback.early_stopping_patience

    def plot_loss(self) -> None:
        """LLaMA-Factory's training_loss.png, from trainer_state.json."""
        from llamafactory.extras.ploting import plot_loss

        plot_loss(self.args.output_dir, keys=["loss", "eval_loss"])

    def state_dict(self) -> dict[str, Any]:
        """What survives a restart: the log history and what callbacks export."""
        from transformers.trainer_callback import ExportableState

        exported = {type(c).__name__: c.state() for c in self.handler.callbacks if isinstance(c, ExportableState)}
        return {
            "log_history": self.state.log_history,
            "best_metric": self.state.best_metric,
            "best_global_step": self.state.best_global_step,
            "epoch_begins": self._epoch_begins,
            "epoch_ends": self._epoch_ends,
            "callbacks": exported,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.log_history = list(state["log_history"])
        self.state.best_metric = state["best_metric"]
        self.state.best_global_step = state.get("best_global_step")
        self._epoch_begins, self._epoch_ends = state.get("epoch_begins", True), state.get("epoch_ends", False)
        for callback in self.handler.callbacks:
            saved = state["callbacks"].get(type(callback).__name__)
            for name, value in (saved or {}).get("attributes", {}).items():
                setattr(callback, name, value)


def watch_metric(args: LFArgs) -> None:
    """Choose what early stopping watches when the configuration does not say: the loss."""
    training = args.training
    if args.finetuning.early_stopping_steps is not None and training.metric_for_best_model is None:
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
