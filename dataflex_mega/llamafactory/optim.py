"""Optimizer and learning-rate schedule from LLaMA-Factory's keys. Refused names never get here (config/checks.py)."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.llamafactory.args import FAILURES, REFUSALS, LFArgs, first_line

ADAM_BETAS = ("adam_beta1", "adam_beta2")
FINITE = ("learning_rate", "weight_decay", "adam_epsilon")
LORAPLUS = ("loraplus_lr_ratio", "loraplus_lr_embedding")
# What transformers reads from optim_args and no key sets, and the keys that set the rest.
SETTABLE = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    ),
    "stable_adamw": ("max_lr",),
    **dict.fromkeys(("galore_adamw", "galore_adafactor"), ("rank", "update_proj_gap", "scale", "proj_type")),
    "apollo_adamw": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
}
OWN_KEYS = {
    "lr": "learning_rate", "weight_decay": "weight_decay", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon",
}  # fmt: skip
TRUTHS = (
    "true",
    "1",
    "yes",
    "false",
    "0",
    "no",
)  # as transformers reads them; what is not among them it takes for false
WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")  # schedules that do not look at lr_scheduler_kwargs


def build_optimizer(args: LFArgs, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that Hugging Face's Trainer or LLaMA-Factory would build, over possibly sharded parameters."""
    from llamafactory.train.trainer_utils import create_custom_optimizer
    from transformers import Trainer

    mini = getattr(args.finetuning, "use_adam_mini", False)
    with contextlib.redirect_stdout(io.StringIO()) if mini else contextlib.nullcontext():  # it prints every name
        custom = create_custom_optimizer(model, args.training, args.finetuning)  # type: ignore[arg-type]
    if custom is not None:
        if mini:
            custom.verbose = False  # type: ignore[attr-defined]
        # LoRA+ makes a group for each kind of parameter; torch reads no state that has several without any.
        custom.param_groups = [group for group in custom.param_groups if group["params"]]
        return custom
    try:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args.training, model)  # type: ignore[arg-type]
    except REFUSALS as error:  # for a model that has no layer of the names that are asked for
        given = f"optim_target_modules: {args.training.optim_target_modules}"
        raise ConfigError(f"{given}, optim: {_name_of(args.training.optim)}: {first_line(error)}") from error
    if "params" in kwargs:  # it has made the groups
        return cls(**_of_trained(kwargs))
    # Transformers' own rule for which parameters decay; the method uses nothing of the trainer it hangs on.
    decayed = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": args.training.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return cls([group for group in groups if group["params"]], **kwargs)


def _of_trained(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an optimizer without the parameters that are frozen."""
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in kwargs["params"]]
    return {**kwargs, "params": [group for group in groups if group["params"]]}


def build_scheduler(args: LFArgs, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate schedule over `steps` optimizer steps."""
    from llamafactory.train.trainer_utils import create_custom_scheduler
    from transformers import get_scheduler

    create_custom_scheduler(args.training, steps, optimizer)
    return get_scheduler(
        args.training.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.training.lr_scheduler_kwargs,
    )


def check_optimizer(args: LFArgs) -> torch.optim.Optimizer:
    """An optimizer over one number, of the class and with the arguments of the run's.

    Raises ConfigError naming the key that torch or transformers would refuse, or take no notice of.
    """
    from transformers import Trainer

    training = args.training
    for key in ADAM_BETAS:
        if not 0.0 <= getattr(training, key) < 1.0:
            raise ConfigError(f"{key}: must be >= 0 and < 1, found {getattr(training, key)}")
    values = {key: getattr(training, key) for key in FINITE}
    values |= {key: getattr(args.finetuning, key) for key in LORAPLUS if getattr(args.finetuning, key) is not None}
    for key, value in values.items():
        if not 0.0 <= value < math.inf:
            raise ConfigError(f"{key}: must be a finite number >= 0, found {value}")
    if not training.max_grad_norm >= 0:
        raise ConfigError(f"max_grad_norm: must be >= 0, found {training.max_grad_norm}")
    name = _name_of(training.optim)
    for key, value in _split_arguments(training.optim_args).items():
        _check_argument(name, key, value)
    with_targets = training.optim_target_modules is not None
    stand_in = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)) if with_targets else None
    if with_targets:
        training = copy.copy(training)
        training.optim_target_modules = "all-linear"
    try:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(training, stand_in)  # type: ignore[arg-type]
    except FAILURES as error:  # whatever transformers refuses it with
        raise ConfigError(f"optim {name}, optim_args {training.optim_args!r}: {first_line(error)}") from error
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "weight_decay": training.weight_decay}]
    try:
        return cls(**_of_trained(kwargs)) if "params" in kwargs else cls(groups, **kwargs)
    except FAILURES as error:
        raise ConfigError(f"optim {name}, optim_args {training.optim_args!r}: {first_line(error)}") from error


def _name_of(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _split_arguments(text: str | None) -> dict[str, str]:
    arguments = {}
    for part in (text or "").replace(" ", "").split(",") if text else []:
        key, equals, value = part.partition("=")
        if not (key and equals and value) or "=" in value:
            raise ConfigError(f"optim_args: expected key=value,key=value, found {text!r}")
        arguments[key] = value
    return arguments


def _check_argument(name: str, key: str, value: str) -> None:
    """Raises ConfigError for an argument that transformers would drop without a word."""
    known = SETTABLE.get(name, ())
    if key in OWN_KEYS and key not in known:
        raise ConfigError(f"optim_args: {key} is set with the key {OWN_KEYS[key]}")
    if key not in known:
        takes = ", ".join(known) if known else "no arguments"
        raise ConfigError(f"optim_args: {name} takes {takes}, found {key!r}{did_you_mean(key, known)}")
    if key in ("nesterov", "centered") and value.lower() not in TRUTHS:
        raise ConfigError(f"optim_args: {key} is true or false, found {value!r}")


def check_schedule(args: LFArgs, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Build the schedule on `optimizer`, which is not the run's, and look at its rates.

    Raises ConfigError naming lr_scheduler_kwargs where they are missing or wrong.
    """
    name, arguments = _name_of(args.training.lr_scheduler_type), args.training.lr_scheduler_kwargs
    if arguments and name in WITHOUT_ARGUMENTS:
        raise ConfigError(f"lr_scheduler_kwargs: lr_scheduler_type {name} takes none, found {arguments}")
    try:
        scheduler = build_scheduler(args, optimizer, steps)
        factors = [factor(step) for factor in getattr(scheduler, "lr_lambdas", ()) for step in _some_steps(args, steps)]
        rates = [float(factor) for factor in factors]
        if not factors:  # it goes by the results of evaluations
            scheduler.step(1.0)
            scheduler.step(2.0)
    except FAILURES as error:  # whatever the schedule's arithmetic raises for the values it was given
        given = f"{arguments}" if arguments else "none given"
        message = f"lr_scheduler_kwargs ({given}) of lr_scheduler_type {name}: {first_line(error)}"
        raise ConfigError(message) from error
    wrong = next((rate for rate in rates if not 0.0 <= rate < math.inf), None)
    if wrong is not None:
        raise ConfigError(
            f"lr_scheduler_kwargs {arguments} of lr_scheduler_type {name}: the learning rate becomes {wrong} times "
            "learning_rate; it must stay finite and >= 0"
        )


def _some_steps(args: LFArgs, steps: int) -> list[int]:
    warmup = args.training.get_warmup_steps(steps)
    chosen = {0, 1, warmup - 1, warmup, warmup + 1, *(steps * part // 16 for part in range(17)), steps - 1}
    return sorted(step for step in chosen if 0 <= step <= steps)
