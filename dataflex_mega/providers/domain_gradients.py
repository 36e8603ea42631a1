"""What a mixer may ask of a run besides the sums of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dataflex_mega.errors import UserError
from dataflex_mega.signals.gradient_gram import DomainGradientGram
from dataflex_mega.types import NeedsGradients

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build, Opened


def check(run: Opened) -> None:
    """A mixer that compares gradients of domains has targets where it wants them. Raises UserError."""
    mixer = run.roles.mixer
    if isinstance(mixer, NeedsGradients) and mixer.against == "eval" and not run.evaluation:
        name = run.specs["mixer"]["name"]
        raise UserError(f"eval_dataset: mixer {name} with against: eval needs target samples there (or val_size)")


def domain_gram(run: Build, engine: Any) -> DomainGradientGram | None:
    """What compares the gradients of domains, where the mixer asks for it."""
    if not isinstance(run.roles.mixer, NeedsGradients):
        return None
    size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
    dp_rank, dp_size = run.parallel_info.dp_rank, run.parallel_info.dp_size
    targets, gram = list(run.evaluation.values()), engine.gradient_gram
    return DomainGradientGram(run.pool, targets, run.collate, gram, size, dp_rank, dp_size, run.data_seed)
