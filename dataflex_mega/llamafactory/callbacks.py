"""Hugging Face callbacks, driven from our loop: LLaMA-Factory's log file, early stopping, the user's own.

The callbacks see the TrainerState and TrainerControl that Hugging Face's Trainer would show them, so those written for
it work here; what they ask for (log, evaluate, save, stop) is what the loop then does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError, UserCode
from dataflex_mega.llamafactory.args import LFArgs


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


class CallbackHooks:
    """What the loop asks at every step, answered by Hugging Face callbacks."""

    def __init__(
        self, args: LFArgs, parts: dict[str, Any], max_steps: int, user_callbacks: list[Any], min_delta: float
    ) -> None:
        """`parts`: model, processing_class, optimizer, lr_scheduler, as callbacks may ask for them; `user_callbacks`: those
        of the key `callbacks`."""
        from llamafactory.train.callbacks import LogCallback, ReporterCallback
        from transformers import EarlyStoppingCallback
        from transformers.trainer_callback import (
            CallbackHandler,
            DefaultFlowCallback,
            TrainerControl,
            TrainerState,
        )

        callbacks: list[Any] = [DefaultFlowCallback(), LogCallback()]
        patience = args.finetuning.early_stopping_steps
        if patience is not None:
            callbacks.append(EarlyStoppingCallback(patience, min_delta))
        callbacks += user_callbacks
        callbacks.append(ReporterCallback(args.model, args.data, args.finetuning, args.generating))
        self.args, self.control = args.training, TrainerControl()
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=self.args.process_index == 0)
        self.state.is_local_process_zero = self.args.local_process_index == 0
        self.state.compute_steps(self.args, max_steps)
        if patience is not None and self.args.metric_for_best_model is None:
            self.args.metric_for_best_model, self.args.greater_is_better = "loss", False
        self.handler = CallbackHandler(
            callbacks, parts["model"], parts["processing_class"], parts["optimizer"], parts["lr_scheduler"]
        )
        self.handler.on_init_end(self.args, self.state, self.control)

    def on_train_begin(self, step: int, epoch: float) -> None:
        """Training starts, or starts again, after `step` steps."""
        self.state.global_step, self.state.epoch = step, epoch
        self.control = self.handler.on_train_begin(self.args, self.state, self.control)

    def on_step_end(self, step: int, epoch: float, tokens: int) -> Any:
        """After an optimizer step -> TrainerControl: should_log, should_evaluate, should_save, should_training_stop."""
        finished = int(epoch + 1e-9) > int((self.state.epoch or 0.0) + 1e-9) or step == self.state.max_steps
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, tokens
        self.control = self.handler.on_step_end(self.args, self.state, self.control)
        if finished:  # an epoch is as many samples as the pool has, whichever they were
            self.control = self.handler.on_epoch_end(self.args, self.state, self.control)
        return self.control

    def on_log(self, logs: dict[str, float]) -> None:
        """Scalars under Hugging Face's names (loss, grad_norm, learning_rate, eval_loss)."""
        self.state.log_history.append(
            {**logs, "epoch": round(self.state.epoch or 0.0, 4), "step": self.state.global_step}
        )
        self.control = self.handler.on_log(self.args, self.state, self.control, dict(logs))

    def on_evaluate(self, metrics: dict[str, float]) -> Any:
        """After an evaluation -> the TrainerControl, in which early stopping may ask to stop."""
        metric = self.args.metric_for_best_model
        if metric is not None:
            value = metrics.get(metric if metric.startswith("eval_") else f"eval_{metric}")
            self._note_best(value)
        self.control = self.handler.on_evaluate(self.args, self.state, self.control, dict(metrics))
        return self.control

    def _note_best(self, value: float | None) -> None:
        best = self.state.best_metric
        better = value is not None and (best is None or (value > best) == bool(self.args.greater_is_better))
        if better:
            self.state.best_metric = value

    def on_save(self) -> None:
        """Call the callbacks' on_save, after a checkpoint was written."""
        self.control = self.handler.on_save(self.args, self.state, self.control)

    def on_train_end(self) -> None:
        """Training is over; the files of LLaMA-Factory and Hugging Face are written."""
        self.control = self.handler.on_train_end(self.args, self.state, self.control)
        if self.state.is_world_process_zero:
            self.state.save_to_json(str(Path(self.args.output_dir) / "trainer_state.json"))

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
            "callbacks": exported,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.log_history = list(state["log_history"])
        self.state.best_metric = state["best_metric"]
        for callback in self.handler.callbacks:
            saved = state["callbacks"].get(type(callback).__name__)
            for name, value in (saved or {}).get("attributes", {}).items():
                setattr(callback, name, value)
