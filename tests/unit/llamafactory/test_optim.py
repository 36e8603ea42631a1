"""Arguments of optimizers and schedules are tried on one number, before a model is built."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from dataflex_mega.engines.schedules import follows_evaluations
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.optim import build_scheduler, check_optimizer, check_schedule
from dataflex_mega.run.preflight import idle_patience, num_evaluations

STEPS = 20


def arguments(loraplus=None, patience=None, **keys):
    finetuning = SimpleNamespace(loraplus_lr_ratio=loraplus, loraplus_lr_embedding=1e-6, early_stopping_steps=patience)
    training = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **keys)
    return LFArgs(None, None, training, finetuning, None)


def check(args):
    check_schedule(args, check_optimizer(args), STEPS)


REFUSED = [
    ({"adam_beta1": 2.0}, "adam_beta1"),
    ({"adam_beta2": 1.0}, "adam_beta2"),
    ({"adam_beta1": -0.1}, "adam_beta1"),
    ({"adam_beta1": float("nan")}, "adam_beta1"),
    ({"adam_epsilon": -1e-8}, "adam_epsilon"),
    ({"learning_rate": float("inf")}, "learning_rate"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"weight_decay": float("nan")}, "weight_decay"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm"),
    ({"loraplus": -1.0}, "loraplus_lr_ratio"),
    ({"optim": "sgd", "optim_args": "momentun=0.9"}, "optim_args: sgd takes .*'momentun'.*did you mean 'momentum'"),
    ({"optim": "sgd", "optim_args": "momentum"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "momentum=high"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "nesterov=yess,momentum=0.9"}, "optim_args: nesterov"),
    ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args"),  # which needs a momentum
    ({"optim": "rmsprop", "optim_args": "alpha=-2"}, "optim_args"),
    ({"optim": "rmsprop", "optim_args": "weight_decay=0.1"}, "optim_args: weight_decay is set with"),
    ({"optim": "adamw_torch", "optim_args": "eps=1e-3"}, "optim_args: eps is set with the key adam_epsilon"),
    ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "optim_args: adamw_torch takes no arguments"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "x"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": -5}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs.*takes none"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "a"}}, "lr_scheduler_kwargs"),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}},
        "lr_scheduler_kwargs.*finite and >= 0",
    ),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2.0}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": "x"}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "low"}}, "lr_scheduler_kwargs"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_would_be_refused_after_the_model_is_built_names_its_key(keys, message):
    if keys.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        keys = {**keys, "eval_strategy": "steps"}
    with pytest.raises(ConfigError, match=message):
        check(arguments(**keys))


ALLOWED = [
    {},
    {"max_grad_norm": float("inf")},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
    {"optim": "rmsprop", "optim_args": "centered=yes"},
    {"optim": "adagrad", "optim_args": "eps=1e-5"},
    {"loraplus": 16.0},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    {"lr_scheduler_type": "warmup_stable_decay"},
    {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 30},
    {"lr_scheduler_type": "greedy", "eval_strategy": "steps"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "lr_scheduler_kwargs": {"patience": 1}},
]


@pytest.mark.parametrize("keys", ALLOWED)
def test_what_trains_is_let_through(keys):
    check(arguments(**keys))


@pytest.mark.parametrize(
    ("name", "follows"), [("reduce_lr_on_plateau", True), ("greedy", True), ("cosine", False), ("constant", False)]
)
def test_schedules_that_go_by_evaluations_are_told_from_the_rest(name, follows):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = build_scheduler(arguments(lr_scheduler_type=name, eval_strategy="steps"), optimizer, STEPS)
    assert follows_evaluations(scheduler) is follows


@pytest.mark.parametrize(
    ("keys", "epochs", "count"),
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, 1.0, 4),
        ({"eval_strategy": "steps", "eval_steps": 8}, 1.0, 3),  # 8, 16 and the last
        ({"eval_strategy": "steps", "eval_steps": 0.25}, 1.0, 4),
        ({"eval_strategy": "steps", "eval_steps": 50}, 1.0, 1),
        ({"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 11}, 1.0, 2),
        ({"eval_strategy": "epoch"}, 2.5, 3),
        ({"eval_strategy": "epoch", "eval_delay": 2}, 2.5, 2),
        ({}, 1.0, 0),
    ],
)
def test_evaluations_are_counted(keys, epochs, count):
    assert num_evaluations(arguments(**keys).training, STEPS, epochs) == count


def test_a_patience_that_is_never_exhausted_is_noted():
    keys = {"eval_strategy": "steps", "eval_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau"}
    assert len(idle_patience(arguments(patience=4, **keys), STEPS, 1.0)) == 2
    assert idle_patience(arguments(patience=3, **keys, lr_scheduler_kwargs={"patience": 2}), STEPS, 1.0) == []
