"""The keys of LLaMA-Factory that change what is differentiated or what an evaluation gives, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.constraints import Range

RANGES = {
    "label_smoothing_factor": Range(ge=0, le=1),
    "eaft_alpha": Range(ge=0),
    "asft_alpha": Range(ge=0),
    "neftune_noise_alpha": Range(ge=0),
    "moe_aux_loss_coef": Range(ge=0),
}
# Each replaces the cross-entropy of a token, so a run has one of them.
FORMS = ("label_smoothing_factor", "use_dft_loss", "use_eaft_loss", "use_asft_loss")
STAGES = ("pt", "sft")  # whose loss is one of tokens


def check_losses(lf: Mapping[str, Any]) -> list[str]:
    """Notes on keys without effect. Raises ConfigError naming the keys and what to do."""
    for key, allowed in RANGES.items():
        error = allowed.error(lf.get(key))
        if error is not None:
            raise ConfigError(f"{key}: {error}")
    chosen = [key for key in FORMS if lf.get(key)]
    if len(chosen) > 1:
        raise ConfigError(f"{', '.join(chosen)}: each replaces the loss of a token; keep one of them")
    stage = str(lf.get("stage", "sft"))
    for key in (*chosen, *(["moe_aux_loss_coef"] if lf.get("moe_aux_loss_coef") else [])):
        if stage not in STAGES:
            raise ConfigError(f"{key}: needs stage: {' or '.join(STAGES)}, found {stage!r}")
    if lf.get("use_asft_loss"):
        _check_anchor(lf)
    if lf.get("moe_aux_loss_coef") and lf.get("use_reentrant_gc") and not lf.get("disable_gradient_checkpointing"):
        raise ConfigError(
            "moe_aux_loss_coef: re-entrant gradient checkpointing keeps no gradient of the routers; use_reentrant_gc: false"
        )
    if lf.get("compute_accuracy") and lf.get("predict_with_generate"):
        raise ConfigError("compute_accuracy, predict_with_generate: LLaMA-Factory takes one of them; drop the other")
    return _notes(lf)


def _check_anchor(lf: Mapping[str, Any]) -> None:
    """use_asft_loss needs the model before training, beside the one in training."""
    if lf.get("ref_model"):
        return
    if lf.get("train_from_scratch"):
        raise ConfigError("use_asft_loss: train_from_scratch leaves no model to stay near; name one by ref_model")
    if lf.get("pissa_init") and lf.get("finetuning_type", "lora") == "lora":
        raise ConfigError(
            "use_asft_loss: pissa_init moves weights into the adapter, so the model without it is another one; name the "
            "model by ref_model"
        )


def _notes(lf: Mapping[str, Any]) -> list[str]:
    if lf.get("compute_accuracy") and str(lf.get("eval_strategy", "no")) == "no":
        return ["compute_accuracy: has no effect: nothing is evaluated; eval_strategy says when"]
    return []
