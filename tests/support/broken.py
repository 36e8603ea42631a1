"""Algorithms and callbacks that break their contracts, as a user's module has them."""

import os
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from dataflex_mega.algorithms.base import Selector, Weighter
from dataflex_mega.algorithms.requests import LossSignal


@dataclass
class OtherOnRankOne(Weighter):
    """Weights with mean 1 that are others on rank 1, as from a generator that each rank seeds differently."""

    def weights(self, samples, step, total_steps):
        weights = torch.ones_like(samples.loss_sum)
        if os.environ.get("RANK") == "1":
            weights[0], weights[1] = 0.5, 1.5
        return weights


@dataclass
class MeanSeven(Weighter):
    """Not divided by the mean."""

    def weights(self, samples, step, total_steps):
        return torch.full_like(samples.loss_sum, 7.0)


@dataclass
class Nan(Weighter):
    """0 / 0."""

    def weights(self, samples, step, total_steps):
        return torch.zeros_like(samples.loss_sum) / 0


@dataclass
class SameId(Selector):
    """The best candidate, for every place."""

    def requests(self):
        return (LossSignal(),)

    def score(self, table):
        return table["loss"]

    def select(self, scores, count, context, rng):
        return scores.argmax().repeat(count)


@dataclass
class Raises(SameId):
    """A mistake in the code."""

    def score(self, table):
        return table["los"]


class RaisesAtStep(TrainerCallback):
    """A mistake in the code of a callback."""

    def on_step_end(self, args, state, control, **kwargs):
        raise ZeroDivisionError("division by zero")
