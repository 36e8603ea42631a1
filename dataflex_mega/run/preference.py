"""The stage of pairs of answers: its loss from LLaMA-Factory's keys, and a model without dropout."""

from __future__ import annotations

from torch import nn

from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.objective import TOKEN_SUM, SampleLoss
from dataflex_mega.preference import PairLoss


def has_pairs(args: LFArgs) -> bool:
    """Whether a sample is a pair of answers."""
    return args.finetuning.stage == "dpo"


def sample_loss(args: LFArgs) -> SampleLoss:
    """What the loss of a sample of the run is."""
    return pair_loss(args) if has_pairs(args) else TOKEN_SUM


def pair_loss(args: LFArgs) -> PairLoss:
    """The loss that the pref_* keys name."""
    keys = args.finetuning
    return PairLoss(
        kind=keys.pref_loss,
        beta=keys.pref_beta,
        ftx=keys.pref_ftx,
        gamma=keys.simpo_gamma,
        label_smoothing=keys.dpo_label_smoothing,
        ld_alpha=keys.ld_alpha,
    )


def disable_dropout(model: nn.Module) -> None:
    """No dropout in training, as in LLaMA-Factory's: the reference log-probabilities have none either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
