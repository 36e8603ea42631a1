"""Optimizer and learning-rate schedule from LLaMA-Factory's keys. Refused names never get here (config/checks.py)."""

from __future__ import annotations

from typing import Any

import torch

from dataflex_mega.llamafactory.args import LFArgs


def build_optimizer(args: LFArgs, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that Hugging Face's Trainer or LLaMA-Factory (LoRA+) would build, over possibly sharded parameters."""
    from llamafactory.train.trainer_utils import create_custom_optimizer
    from transformers import Trainer

    custom = create_custom_optimizer(model, args.training, args.finetuning)  # type: ignore[arg-type]
    if custom is not None:
        return custom
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args.training)
    # Transformers' own rule for which parameters decay; the method uses nothing of the trainer it hangs on.
    decayed = set(Trainer.get_decay_parameter_names(Trainer.__new__(Trainer), model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": args.training.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return cls([group for group in groups if group["params"]], **kwargs)


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
