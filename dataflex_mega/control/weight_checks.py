"""The contract of weighters: [n] finite numbers >= 0 with mean 1 over the samples of a step, equal on all ranks.

A weighter is called in every forward pass, so its checks must cost nothing that is noticed. On the CPU a call is checked at
once. On a GPU three numbers of each call stay on the device and are read after the step, when the device has been waited for
anyway. Whether all ranks have the same weights is seen from a hash of all weights so far: ranks compare it after each of the
first steps and then every `COMPARE_EVERY` steps, so weights that differ once are found whenever it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.control.contracts import describe, label
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import TrainingFault, UserCall
from dataflex_mega.types import SampleStats, TokenSelection

MEAN_TOLERANCE = 1e-3
COMPARE_FIRST, COMPARE_EVERY = 8, 32  # steps with weights after which ranks compare
PRIME = 1_000_003  # of the hash


def weights_of(weighter: Weighter, samples: SampleStats, step: int, total_steps: int) -> Tensor:
    """One call: [n] numbers, whatever they are."""
    who, count = label(weighter, "weights"), len(samples.sample_ids)
    with UserCall(who):
        weights = weighter.weights(samples, step, total_steps)
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TrainingFault(f"{who} returned {describe(weights)}, a tensor of {count} numbers was expected")
    if weights.shape != (count,):
        raise TrainingFault(f"{who} returned {describe(weights)}, [{count}] was expected, one for each sample")
    return weights.detach()


def reduced(weighter: Weighter, samples: SampleStats) -> SampleStats:
    """What a rank sends to the others: as many samples as it has."""
    who = label(weighter, "reduce")
    with UserCall(who):
        result = weighter.reduce(samples)
    if not isinstance(result, SampleStats):
        raise TrainingFault(f"{who} returned {describe(result)}, SampleStats were expected")
    for name, rows in result.gathered_fields().items():
        if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) != len(samples.sample_ids):
            expected = f"one row for each of {len(samples.sample_ids)} samples was expected"
            raise TrainingFault(f"{who} returned {describe(rows)} as {name}; {expected}")
    return result


def token_selection(weighter: Weighter) -> TokenSelection | None:
    """Which tokens the weighter trains; None: all."""
    who = label(weighter, "token_selection")
    with UserCall(who):
        selection = weighter.token_selection()
    if selection is not None and not isinstance(selection, TokenSelection):
        raise TrainingFault(f"{who} returned {describe(selection)}, TokenSelection or None was expected")
    if selection is not None and not 0 < selection.keep_ratio <= 1:
        raise TrainingFault(f"{who}: keep_ratio must be above 0 and at most 1, found {selection.keep_ratio}")
    return selection


@dataclass
class CheckedWeighter:
    """The weighter of a run with its checks; one instance per run and rank."""

    weighter: Weighter
    collectives: Collectives
    _calls: list[tuple[int, Tensor]] = field(default_factory=list, init=False)  # of this step: n, [3] numbers
    _hash: Tensor | None = field(default=None, init=False)  # int64, of all weights so far; None without a call
    _num_steps: int = field(default=0, init=False)  # steps with weights

    def reduce(self, samples: SampleStats) -> SampleStats:
        return reduced(self.weighter, samples)

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] checked weights. Raises TrainingFault; on a GPU what is wrong with their values comes in `end_step`."""
        weights = weights_of(self.weighter, samples, step, total_steps).to(samples.loss_sum)
        self._hash = _hash_of(weights, self._hash)
        # A loss that is not finite is the engine's affair, and no weighter can give it a sensible weight.
        numbers = torch.stack(
            [weights.sum(dtype=torch.float64), weights.min().double(), samples.loss_sum.sum().double()]
        )
        self._calls.append((len(weights), numbers))
        if weights.device.type == "cpu":
            self._check_call(numbers.tolist(), step)
        return weights

    def _check_call(self, numbers: list[float], step: int) -> None:
        total, lowest, losses = numbers
        if math.isfinite(losses) and not (lowest >= 0 and math.isfinite(total)):
            found = f"{lowest:g}" if lowest < 0 else "a weight that is NaN or infinite"
            raise TrainingFault(
                f"{label(self.weighter, 'weights')} must return finite numbers >= 0, found {found} at step {step + 1}"
            )

    def check_values(self, step: int) -> None:
        """The weights of the step after `step` steps, as far as it got. Raises TrainingFault."""
        calls = [(count, numbers.tolist()) for count, numbers in self._calls]
        self._calls.clear()
        for _, numbers in calls:
            self._check_call(numbers, step)
        count = sum(count for count, _ in calls)
        if count and all(math.isfinite(losses) for _, (_, _, losses) in calls):
            mean = sum(total for _, (total, _, _) in calls) / count
            if abs(mean - 1) > MEAN_TOLERANCE:
                raise TrainingFault(
                    f"{label(self.weighter, 'weights')} must have mean 1 over the samples of a step, found {mean:.6g} at "
                    f"step {step + 1}"
                )

    def end_step(self, step: int, last: bool) -> None:
        """After the step that followed `step` steps; every process must call it. `last`: whether it ends the run."""
        self._num_steps += 1
        if self._num_steps <= COMPARE_FIRST or self._num_steps % COMPARE_EVERY == 0 or last:
            self._compare(step)
        self.check_values(step)

    def _compare(self, step: int) -> None:
        """Compare the hashes of the data-parallel ranks. A stage of a pipeline that sees no losses has none."""
        if self._hash is None:
            return
        hashes = self.collectives.all_gather(self._hash.view(1)).tolist()
        others = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if others:
            ranks = ", ".join(map(str, others))
            raise TrainingFault(
                f"{label(self.weighter, 'weights')} returned other weights on data-parallel rank {ranks} than on rank 0, up "
                f"to step {step + 1}; all ranks must compute the same, so random numbers must follow from the step"
            )


def _hash_of(weights: Tensor, before: Tensor | None) -> Tensor:
    """[n] float32 and the hash so far -> int64 scalar; it depends on every bit and on the order."""
    bits = weights.float().contiguous().view(torch.int32).long()
    multipliers = torch.arange(1, 2 * len(bits), 2, device=bits.device) * PRIME
    mixed = (bits * multipliers).sum()
    return mixed if before is None else before * PRIME + mixed
