"""What a loss form is, and what it may use of the positions that it is given.

A form is a function of some positions and nothing else: it keeps no state and does not see the batch, so positions may be
handed to it in chunks, in any order. Sums, weights and denominators are those of `objective`, whatever the form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

import dataflex_mega.objective as objective
from dataflex_mega.types import IGNORE_INDEX


class TokenLosses(NamedTuple):
    """[b, S] each, 0 where there is no target; one and the same tensor without a form."""

    plain: Tensor  # cross-entropy: what algorithms, logs and evaluations see; without gradient where there is a form
    trained: Tensor  # what is differentiated


class Vocabulary(Protocol):
    """How a quantity over the vocabulary is computed from logits [..., V], or from one rank's shard of them."""

    def mean(self, logits: Tensor) -> Tensor:
        """[...] mean logit, differentiable."""
        ...

    def at(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[...] logit of each position's label, differentiable; any number where there is none."""
        ...

    def largest(self, logits: Tensor, count: int) -> Tensor:
        """[..., count] largest logits, without gradient; all of them where there are fewer."""
        ...


class WholeVocabulary:
    """Every rank has all logits of its positions."""

    def mean(self, logits: Tensor) -> Tensor:
        return logits.mean(dim=-1)

    def at(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)

    def largest(self, logits: Tensor, count: int) -> Tensor:
        return logits.detach().topk(min(count, logits.shape[-1]), dim=-1).values


@dataclass(frozen=True)
class TokenOutputs:
    """Any number of positions of a model's output."""

    logits: Tensor  # [..., V] float32 or float64, or a shard of the vocabulary
    labels: Tensor  # [...] int64, negative where there is no target
    cross_entropy: Tensor  # [...] differentiable; any finite number where there is no target
    reference_logits: Tensor | None = None  # as `logits`, of a frozen model; for forms with `needs_reference`
    vocabulary: Vocabulary = field(default_factory=WholeVocabulary)


class LossForm(ABC):
    """Positions -> what is differentiated of each."""

    reads_logits: ClassVar[bool] = True  # else the cross-entropy alone
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def token_losses(self, tokens: TokenOutputs) -> Tensor:
        """[...] differentiable; what it is where there is no target does not matter, but it must be finite."""


def form_losses(form: LossForm | None, logits: Tensor, labels: Tensor, reference_logits: Tensor | None) -> TokenLosses:
    """[b, S, V] logits, [b, S] shifted labels, [b, S, V] reference logits where the form needs them -> the losses."""
    if form is None:
        plain = objective.token_losses(logits, labels)
        return TokenLosses(plain, plain)
    logits = wide(logits)
    cross_entropy = objective.token_losses(logits, labels)
    reference = None if reference_logits is None else wide(reference_logits)
    trained = form.token_losses(TokenOutputs(logits, labels, cross_entropy, reference))
    return TokenLosses(cross_entropy.detach(), torch.where(labels == IGNORE_INDEX, 0.0, trained))


def wide(logits: Tensor) -> Tensor:
    """float32, or float64 as they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
