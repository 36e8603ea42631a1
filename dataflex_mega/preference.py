"""The loss of a pair of answers, from the log-probabilities of the chosen and the rejected one.

With r = (log p_chosen - log p_rejected) - (the same of the reference model), b `beta`:

    sigmoid   -(1 - e) log sigmoid(b r) - e log sigmoid(-b r), e `label_smoothing`   DPO, arXiv 2305.18290; cDPO
    hinge     max(0, 1 - b r)                                                        SLiC, arXiv 2305.10425
    ipo       (r - 1 / (2 b))^2, of means over tokens                                IPO, arXiv 2310.12036
    orpo      -log p_chosen - b log sigmoid(log odds_chosen - log odds_rejected)     ORPO, arXiv 2403.07691; of means
    simpo     -log sigmoid(b (log p_chosen - log p_rejected) - gamma)                SimPO, arXiv 2405.14734; of means

`ftx` adds ftx times the chosen answer's mean token loss. `ld_alpha` weighs the targets of the longer answer beyond the
length of the shorter one (LD-DPO, arXiv 2409.06411), in the trained model only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import IGNORE_INDEX, Batch

LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
WITHOUT_REFERENCE = ("orpo", "simpo")
OF_MEANS = ("ipo", "orpo", "simpo")  # log-probabilities are divided by the number of targets
REPORT_NAMES = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
ORPO_NAMES = ("sft_loss", "odds_ratio_loss")


@dataclass(frozen=True)
class PairLoss:
    """objective.SampleLoss of batches that data.pairs.collate_pairs made."""

    kind: str = "sigmoid"  # of LOSSES
    beta: float = 0.1
    ftx: float = 0.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    ld_alpha: float | None = None

    @property
    def report_names(self) -> tuple[str, ...]:
        return (*REPORT_NAMES, *(ORPO_NAMES if self.kind == "orpo" else ()))

    @property
    def needs_reference(self) -> bool:
        """Whether batches must have `row_references`."""
        return self.kind not in WITHOUT_REFERENCE

    def counts(self, batch: Batch) -> Tensor:
        """1 for each pair of which both answers have a target token."""
        return (_halves((batch.labels != IGNORE_INDEX).sum(dim=1)) > 0).all(dim=0).long()

    def sums(self, token_losses: Tensor, batch: Batch) -> Tensor:
        counted = self.counts(batch) > 0
        # An answer without targets has the log-probability 0, whose odds are infinite and would spoil the gradient.
        chosen, rejected = (torch.where(counted, x, -1.0) for x in self._log_probabilities(token_losses, batch))
        losses = self._losses(chosen, rejected, batch)
        if self.ftx > 0:
            losses = losses + self.ftx * self._chosen_token_loss(chosen, batch)
        return torch.where(counted, losses, 0.0)

    def report(self, token_losses: Tensor, batch: Batch) -> Tensor:
        chosen, rejected = self._log_probabilities(token_losses, batch)
        rewards = self.beta * torch.stack([chosen, rejected])
        if self.needs_reference:
            rewards = rewards - self.beta * self._reference(batch)
        columns = [*rewards, (rewards[0] > rewards[1]).float(), rewards[0] - rewards[1], chosen, rejected]
        if self.kind == "orpo":
            token_loss = self._chosen_token_loss(chosen, batch)
            columns += [token_loss, (self.sums(token_losses, batch) - token_loss) / self.beta]
        return torch.stack(columns, dim=1)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _losses(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        difference = chosen - rejected
        if self.kind == "orpo":
            log_odds = difference - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
            return -chosen - self.beta * F.logsigmoid(log_odds)
        if self.kind == "simpo":
            return -F.logsigmoid(self.beta * difference - self.gamma)
        reference = self._reference(batch)
        ratio = difference - (reference[0] - reference[1])
        if self.kind == "hinge":
            return torch.relu(1 - self.beta * ratio)
        if self.kind == "ipo":
            return (ratio - 1 / (2 * self.beta)) ** 2
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(self.beta * ratio) - e * F.logsigmoid(-self.beta * ratio)

    def _log_probabilities(self, token_losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """([n] of the chosen answers, [n] of the rejected ones), differentiable."""
        weights = self._token_weights(batch)
        sums = (token_losses if weights is None else token_losses * weights).sum(dim=1)
        chosen, rejected = self._per_answer(_halves(-sums), batch)
        return chosen, rejected

    def _reference(self, batch: Batch) -> Tensor:
        """[2, n] log-probabilities under the reference model. Raises TrainingFault when the batch has none."""
        if batch.row_references is None:
            raise TrainingFault(f"pref_loss {self.kind} needs a reference model, and a batch has none")
        return self._per_answer(_halves(-batch.row_references), batch)

    def _per_answer(self, sums: Tensor, batch: Batch) -> Tensor:
        return sums / _lengths(batch) if self.kind in OF_MEANS else sums

    def _chosen_token_loss(self, chosen: Tensor, batch: Batch) -> Tensor:
        return -chosen if self.kind in OF_MEANS else -chosen / _lengths(batch)[0]

    def _token_weights(self, batch: Batch) -> Tensor | None:
        """[2n, S]: ld_alpha for targets beyond as many as the shorter answer has, else 1; None without ld_alpha."""
        if self.ld_alpha is None:
            return None
        is_target = batch.labels != IGNORE_INDEX
        shorter = _halves(is_target.sum(dim=1)).amin(dim=0).repeat(2)
        beyond = is_target.cumsum(dim=1) > shorter.unsqueeze(1)
        return torch.where(beyond, self.ld_alpha, 1.0)


def _halves(of_rows: Tensor) -> Tensor:
    """[2n] of rows -> [2, n]: the chosen, the rejected."""
    return of_rows.view(2, -1)


def _lengths(batch: Batch) -> Tensor:
    """[2, n] numbers of target tokens, at least 1."""
    return _halves((batch.labels != IGNORE_INDEX).sum(dim=1)).clamp(min=1)
