"""Hugging Face callbacks in our loop: the events of Hugging Face's own loop, in its order, and early stopping."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer as HFTrainer
from transformers import TrainerCallback, TrainingArguments

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.callbacks import CallbackHooks, check_metric
from dataflex_mega.trainer import Trainer

EVENTS = (
    "on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
    "on_log", "on_evaluate", "on_save", "on_epoch_end", "on_train_end",
)  # fmt: skip


class Recorder(TrainerCallback):
    """Writes down every event with the step, and asks to stop at `stop_at`."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at


def _record(name):
    def event(self, args, state, control, **kwargs):
        if kwargs.get("logs", {}).keys() & {"train_runtime"}:
            return  # a summary of the whole run, which Hugging Face's loop adds
        self.events.append((name, state.global_step))
        if name == "on_step_end" and state.global_step == self.stop_at:
            control.should_training_stop = True

    return event


for _name in EVENTS:
    setattr(Recorder, _name, _record(_name))


class Linear(torch.nn.Module):
    """A model with a loss, as Hugging Face's loop wants one."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}


def training_arguments(folder, **keys):
    common = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2,
    }  # fmt: skip
    return TrainingArguments(**{**common, **keys})


def hooks_for(arguments, callbacks=(), patience=None, max_steps=8, optimizer=None, min_delta=0.0):
    finetuning = SimpleNamespace(early_stopping_steps=patience, use_swanlab=False)
    args = LFArgs(SimpleNamespace(), SimpleNamespace(), arguments, finetuning, SimpleNamespace())
    parts = dict.fromkeys(("model", "processing_class", "lr_scheduler")) | {"optimizer": optimizer}
    return CallbackHooks(args, parts, max_steps, list(callbacks), min_delta)


class Parts:
    """The other parts of our loop, as little of them as it needs."""

    def __init__(self):
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def learning_rate(self):
        return 0.0

    def train_step(self, *_):
        self.optimizer.step()
        return SimpleNamespace(num_tokens=1, stop_requested=False, mean_loss=1.0)

    def needs_new_plan(self, _):
        return False

    def next_update_step(self, step, last):
        return last

    def flush(self, _):
        return {"loss": 1.0}

    def micro_batches(self, *_):
        return []

    def save(self, *_):
        return None

    def __getattr__(self, name):
        return lambda *_: {} if name == "state_dict" else None


def ours(hooks, parts, max_steps, losses=None):
    evaluations = iter(losses or [1.0] * 100)
    loop = Trainer(
        parts, parts, parts, parts, hooks, parts, max_steps=max_steps, global_batch_size=4, pool_size=12,
        evaluate=lambda: {"eval_loss": next(evaluations)},
    )  # fmt: skip
    return loop, loop.fit()


@pytest.mark.parametrize(
    ("keys", "stop_at"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}, None),
        ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 3}, None),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}, None),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 4),
        ({"eval_strategy": "steps", "eval_steps": 4, "logging_first_step": True}, 2),
    ],
)
def test_the_events_are_those_of_hugging_faces_loop(tmp_path, keys, stop_at):
    rows: Any = [{"x": torch.ones(2)}] * 12
    theirs = Recorder(stop_at)
    arguments = training_arguments(tmp_path / "theirs", max_steps=8, **keys)
    HFTrainer(Linear(), arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[theirs]).train()

    mine, parts = Recorder(stop_at), Parts()
    arguments = training_arguments(tmp_path / "ours", max_steps=8, **keys)
    loop, state = ours(hooks_for(arguments, [mine], optimizer=parts.optimizer), parts, 8)
    assert mine.events == theirs.events
    assert loop.outcome == (
        "done: 8 steps" if stop_at is None else f"stopped at step {stop_at} of 8: callback Recorder"
    )
    assert state.step == (stop_at or 8)


# losses, patience, least improvement -> the evaluation after which training stops; counted by hand
STOPPING = [
    ([5.0, 4.0, 3.0, 2.0, 1.0], 3, 0.0, None),
    ([5.0, 4.0, 4.1, 4.2, 4.3], 3, 0.0, 5),
    ([5.0, 6.0, 4.0, 4.5, 4.5, 1.0], 2, 0.0, 5),
    ([5.0, 4.9, 4.8, 4.7, 4.6], 2, 0.15, 3),  # less than 0.15 better than the evaluation before, twice
    ([5.0, float("nan"), float("nan"), 4.0], 2, 0.0, 3),
    ([5.0, 5.0, 5.0], 1, 0.0, 2),
]


@pytest.mark.parametrize(("losses", "patience", "min_delta", "stops"), STOPPING)
def test_training_stops_after_so_many_evaluations_without_improvement(tmp_path, losses, patience, min_delta, stops):
    arguments = training_arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    hooks = hooks_for(arguments, patience=patience, max_steps=len(losses), min_delta=min_delta)
    loop, state = ours(hooks, Parts(), len(losses), losses)
    assert state.step == (stops or len(losses))
    if stops in (None, len(losses)):
        assert loop.outcome == f"done: {len(losses)} steps"
    else:
        reason = f"early stopping (eval_loss did not improve {patience} times)"
        assert loop.outcome == f"stopped at step {stops} of {len(losses)}: {reason}"


def test_patience_and_the_best_value_survive_a_restart(tmp_path):
    arguments = training_arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps")
    first = hooks_for(arguments, patience=3)
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.6), start=1):
        first.on_step_begin()
        first.on_step_end(step, step / 100, 0)
        first.on_evaluate({"eval_loss": loss})
    assert (first.state.best_metric, first.state.best_global_step) == (2.0, 2)
    second = hooks_for(arguments, patience=3)
    second.load_state_dict(first.state_dict())
    assert not second.on_train_begin(4, 0.04)
    second.on_step_end(5, 0.05, 0)
    second.on_evaluate({"eval_loss": 2.1})
    assert second.control.should_training_stop and second.state.best_metric == 2.0
    third = hooks_for(arguments, patience=3)  # the run that has stopped has no step left
    third.load_state_dict(second.state_dict())
    assert third.on_train_begin(5, 0.05)
    patient = hooks_for(arguments, patience=4)
    patient.load_state_dict(second.state_dict())
    assert not patient.on_train_begin(5, 0.05)


@pytest.mark.parametrize(
    ("keys", "first", "second", "improved"),
    [
        ({}, 2.0, 1.0, True),
        ({"metric_for_best_model": "loss"}, 1.0, 2.0, False),
        ({"metric_for_best_model": "perplexity"}, 2.0, 1.0, True),
        ({"metric_for_best_model": "eval_perplexity", "greater_is_better": True}, 1.0, 2.0, True),
        ({"metric_for_best_model": "eval_loss", "greater_is_better": True}, 1.0, 2.0, True),
    ],
)
def test_which_direction_is_better(tmp_path, keys, first, second, improved):
    arguments = training_arguments(tmp_path, eval_strategy="steps", **keys)
    args = LFArgs(None, None, arguments, SimpleNamespace(early_stopping_steps=1), None)
    check_metric(args, ["eval_loss", "eval_perplexity"], [], "greater_is_better" in keys)
    hooks = hooks_for(arguments, patience=1)
    for value in (first, second):
        hooks.on_evaluate({"eval_loss": value, "eval_perplexity": value})
    assert hooks.control.should_training_stop is not improved
    assert hooks.state.best_metric == (second if improved else first)


class Accuracy(TrainerCallback):
    """Adds a metric to those of an evaluation."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_accuracy"] = 0.5


def test_a_metric_that_no_evaluation_gives_is_refused_with_the_names_there_are(tmp_path):
    arguments = training_arguments(tmp_path, eval_strategy="steps", metric_for_best_model="accurcy")
    args = LFArgs(None, None, arguments, SimpleNamespace(early_stopping_steps=None), None)
    with pytest.raises(ConfigError, match="metric_for_best_model.*accurcy.*eval_code_loss, eval_code_perplexity"):
        check_metric(args, ["eval_code_loss", "eval_code_perplexity"], [], False)
    check_metric(args, ["eval_code_loss"], [Accuracy()], False)
    hooks = hooks_for(arguments, [Accuracy()])
    with pytest.raises(ConfigError, match=r"did you mean 'eval_accuracy'.*there are eval_code_loss, eval_accuracy"):
        hooks.on_evaluate({"eval_code_loss": 1.0})
    arguments.metric_for_best_model = "accuracy"
    assert hooks_for(arguments, [Accuracy()]).on_evaluate({"eval_code_loss": 1.0}) == 0.5


class Unheard(TrainerCallback):
    """Waits for events that this loop does not have."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise AssertionError

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        raise AssertionError


@pytest.mark.parametrize(("optimizer", "both"), [(None, True), (torch.optim.SGD([torch.zeros(1)]), False)])
def test_events_that_never_come_are_named_at_the_start(tmp_path, capsys, optimizer, both):
    hooks_for(training_arguments(tmp_path), [Unheard()], optimizer=optimizer)
    stderr = capsys.readouterr().err
    assert "Unheard.on_substep_end" in stderr
    assert ("Unheard.on_pre_optimizer_step" in stderr) is both


def test_an_old_state_is_read(tmp_path):
    hooks = hooks_for(training_arguments(tmp_path))
    hooks.load_state_dict({"log_history": [], "best_metric": None, "callbacks": {}})
    assert not hooks.on_train_begin(3, 0.0)
