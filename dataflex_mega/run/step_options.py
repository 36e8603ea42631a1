"""The options of a training step, from the keys of a run and what its algorithms ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.losses.choice import choose_form
from dataflex_mega.run.preference import sample_loss


def build_step_options(config: RunConfig, args: Any, num_domains: int, requested: Mapping[str, Any]) -> StepOptions:
    """The same on both engines. `requested`: fields of StepOptions that algorithms ask for."""
    keys = config.dataflex
    return StepOptions(
        num_domains=num_domains,
        max_grad_norm=args.training.max_grad_norm,
        weight_scope=keys.weight_scope,
        normalization=keys.loss_normalization,
        on_non_finite=keys.on_non_finite,
        loss_form=choose_form(args.training, args.finetuning),
        moe_aux_loss_coef=float(args.model.moe_aux_loss_coef or 0.0),
        sample_loss=sample_loss(args),
        **requested,
    )
