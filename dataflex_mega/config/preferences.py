"""The stage of pairs of answers, `dpo`: what it takes, checked from the configuration alone."""

from __future__ import annotations

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.constraints import Range

STAGE = "dpo"
LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
WITHOUT_REFERENCE = ("orpo", "simpo")
REFUSED_LOSSES = {
    "kto_pair": "it compares a pair with the others of its micro-batch, so the loss would depend on how a batch is divided",
}
# LLaMA-Factory 0.9.5 names them, but beside trl 0.24 its trainer computes `sigmoid` for them.
NOT_BY_LLAMAFACTORY = ("hinge", "ipo")
RANGES = {
    "pref_beta": Range(gt=0),
    "pref_ftx": Range(ge=0),
    "simpo_gamma": Range(ge=0),
    "dpo_label_smoothing": Range(ge=0, le=0.5),
    "ld_alpha": Range(ge=0),
}
REFERENCE_KEYS = ("ref_model", "ref_model_adapters")
OURS = ("reference_model", "corpus_dir", "eval_corpus_dir")


def check_preferences(config: RunConfig) -> None:
    """Raises ConfigError naming the key, its value and what is allowed; nothing for other stages."""
    keys = config.llamafactory
    if keys.get("stage", "sft") != STAGE:
        return
    if config.engine != "fsdp":
        raise ConfigError(f"stage: dpo needs two rows a sample, which engine: {config.engine} lacks; use engine: fsdp")
    loss = str(keys.get("pref_loss", LOSSES[0]))
    if loss in REFUSED_LOSSES:
        raise ConfigError(f"pref_loss: {loss} is not there: {REFUSED_LOSSES[loss]}; use one of {', '.join(LOSSES)}")
    if loss not in LOSSES:
        raise ConfigError(f"pref_loss: expected one of {', '.join(LOSSES)}, found {loss!r}{did_you_mean(loss, LOSSES)}")
    for key, bounds in RANGES.items():
        problem = None if keys.get(key) is None else bounds.error(float(keys[key]))
        if problem is not None:
            raise ConfigError(f"{key}: {problem}")
    for key in OURS:
        if getattr(config.dataflex, key) is not None:
            instead = "ref_model names one" if key == "reference_model" else "dataset names rankings"
            raise ConfigError(f"{key}: not with stage: dpo; {instead}")
    if keys.get("ref_model_adapters") and not keys.get("ref_model"):
        raise ConfigError("ref_model_adapters: needs ref_model, the model that they belong to")
    if keys.get("compute_accuracy"):
        raise ConfigError("compute_accuracy: it is of tokens; stage: dpo gives rewards/accuracies in any case")
    if keys.get("dpo_label_smoothing") and loss != "sigmoid":
        raise ConfigError(f"dpo_label_smoothing: belongs to pref_loss: sigmoid, found pref_loss: {loss}")


def notes_on_preferences(config: RunConfig) -> list[str]:
    """What to say of keys that have no effect, or another one than a user of LLaMA-Factory may have seen."""
    keys = config.llamafactory
    if keys.get("stage", "sft") != STAGE:
        return []
    loss, notes = str(keys.get("pref_loss", LOSSES[0])), []
    if loss in NOT_BY_LLAMAFACTORY:
        notes.append(
            f"pref_loss: {loss} is computed as its name says; LLaMA-Factory 0.9.5 with trl 0.24 computes sigmoid"
        )
    if loss in WITHOUT_REFERENCE:
        notes += [f"{key}: pref_loss: {loss} has no reference model" for key in REFERENCE_KEYS if keys.get(key)]
    if float(keys.get("lora_dropout") or 0.0) > 0:
        notes.append("lora_dropout: stage: dpo trains without dropout, as LLaMA-Factory does")
    return notes
