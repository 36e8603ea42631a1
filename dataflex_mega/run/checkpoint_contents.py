"""What the checkpoints of a run hold beside the state of the training: the model for other programs, how it was built."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.checkpoint import Contents
from dataflex_mega.config.model_record import model_record
from dataflex_mega.llamafactory.callbacks import CallbackHooks
from dataflex_mega.run.session import Session

ADAPTERS = ("lora", "oft")  # values of finetuning_type that train an adapter
TRAINER_STATE = "trainer_state.json"


def contents_of(session: Session, hooks: CallbackHooks) -> Contents:
    """An adapter is always in a checkpoint, since it is small; a whole model as `save_hf_checkpoints` says."""
    training = session.args.training
    model_only = training.save_only_model and not training.load_best_model_at_end  # which reads the engine's state
    return Contents(
        resumable=not model_only,
        model=session.args.finetuning.finetuning_type in ADAPTERS or _wants_model(session),
        companions=partial(_write_companions, session, hooks),
        configuration=model_record(session.config),
    )


def _wants_model(session: Session) -> bool:
    wanted, training = session.config.dataflex.save_hf_checkpoints, session.args.training
    if wanted != "auto":
        return wanted == "always"
    chooses = training.load_best_model_at_end or str(training.save_strategy.value) == "best"
    return bool(training.save_only_model or chooses)


def _write_companions(session: Session, hooks: Any, folder: Path) -> None:
    """Tokenizer with chat template, processor, and Hugging Face's account of the training."""
    processor = session.tokenizer_module.get("processor")
    for part in (session.tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)
    hooks.state.save_to_json(str(folder / TRAINER_STATE))
