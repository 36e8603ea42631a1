"""The loss form that a run's keys ask for."""

from __future__ import annotations

from typing import Any

from dataflex_mega.losses.asft import Anchored
from dataflex_mega.losses.base import LossForm
from dataflex_mega.losses.dft import DynamicFineTuning
from dataflex_mega.losses.eaft import EntropyAdaptive
from dataflex_mega.losses.label_smoothing import LabelSmoothing


def choose_form(training: Any, finetuning: Any) -> LossForm | None:
    """LLaMA-Factory's training and fine-tuning arguments -> the form; None: cross-entropy. Which keys exclude each other is
    checked in config.losses."""
    if finetuning.use_dft_loss:
        return DynamicFineTuning()
    if finetuning.use_eaft_loss:
        return EntropyAdaptive(finetuning.eaft_alpha)
    if finetuning.use_asft_loss:
        return Anchored(finetuning.asft_alpha)
    return LabelSmoothing(training.label_smoothing_factor) if training.label_smoothing_factor else None
