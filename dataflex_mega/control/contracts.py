"""What algorithms return is checked where it is used, and what they raise ends in one line.

A result that breaks the contract of algorithms.base is a TrainingFault that names role, class and method, what was expected
and what came. All calls of an algorithm's methods by the controller go through this module; mixture_sampler's too. The
checks cost arithmetic on [n] numbers that are at hand; those of weights, which come at every step, are in `weight_checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Algorithm, DomainInfo, Mixer, Reorder, Selector
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import TrainingFault, UserCall, UserError
from dataflex_mega.log import get_logger
from dataflex_mega.types import SignalTable, StepLossWeights, StepStats, UpdateContext

TOLERANCE = 1e-6  # of sums of proportions, as in data.sampler


def label(algorithm: Algorithm, method: str = "") -> str:
    """`selector loss`, or of one that is not of this package `selector my.module:Thing`; with `.method`."""
    cls = type(algorithm)
    package, _, module = cls.__module__.rpartition(".")
    is_built_in = package.startswith("dataflex_mega.algorithms")
    name = module if is_built_in else f"{cls.__module__}:{cls.__qualname__.rpartition('.')[2]}"
    return f"{algorithm.role} {name}" + (f".{method}" if method else "")


def describe(value: Any) -> str:
    """A value in a message: `a tensor [7] of float32`, `None`, `a list`."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else f"a {type(value).__name__}"


# -- all roles -----------------------------------------------------------------------------------------------------------


def setup(algorithm: Algorithm, domains: DomainInfo) -> None:
    """Hand over the domains."""
    with UserCall(label(algorithm, "setup")):
        algorithm.setup(domains)


def state_dict(algorithm: Algorithm) -> dict[str, Any]:
    """The algorithm's state, a dict."""
    who = label(algorithm, "state_dict")
    with UserCall(who):
        state = algorithm.state_dict()
    if not isinstance(state, dict):
        raise TrainingFault(f"{who} returned {describe(state)}, a dict was expected")
    return state


def load_state_dict(algorithm: Algorithm, state: dict[str, Any]) -> None:
    """Restore the algorithm's state."""
    with UserCall(label(algorithm, "load_state_dict")):
        algorithm.load_state_dict(state)


# -- selectors -----------------------------------------------------------------------------------------------------------


def local_scores(selector: Selector, table: SignalTable) -> Tensor:
    """The scores of this rank's candidates, [n] or [n, m] float32 on the CPU."""
    who = label(selector, "score")
    with UserCall(who):
        scores = selector.score(table)
    return _checked_scores(who, scores, len(table.sample_ids))


def gather_scores(selector: Selector, table: SignalTable, counts: list[int], collectives: Collectives) -> Tensor:
    """The scores of all ranks' candidates, [sum(counts)] or [sum(counts), m] float32. Every process must call it.

    Raises on every one of them when the scores of one break the contract.
    """
    scores: Tensor | None = None
    failure: UserError | TrainingFault | None = None
    try:
        scores = local_scores(selector, table)
    except (UserError, TrainingFault) as error:
        failure = error
    reports = collectives.all_gather_objects((failure and str(failure), None if scores is None else scores.shape[1:]))
    if failure is not None:
        raise failure
    assert scores is not None
    for rank, (text, width) in enumerate(reports):
        if text is not None:
            raise TrainingFault(f"rank {rank}: {text}")
        if width != scores.shape[1:]:
            both = f"{['n', *scores.shape[1:]]} here and {['n', *width]} on rank {rank}"
            raise TrainingFault(f"{label(selector, 'score')} returned scores of shapes that differ: {both}")
    gathered = collectives.all_gather_uneven(scores, counts)
    note_unscored(selector, gathered)
    return gathered


def note_unscored(selector: Selector, scores: Tensor) -> None:
    """Raises TrainingFault when every score is NaN; writes a line when some are. NaN means that a candidate has no score."""
    count = int(scores.isnan().sum())
    if not count:
        return
    who = label(selector, "score")
    if count == scores.numel():
        raise TrainingFault(f"{who} returned NaN for all {len(scores)} candidates; numbers were expected")
    rows = int(scores.isnan().flatten(1).any(dim=1).sum()) if scores.dim() > 1 else count
    get_logger().info("note: %s gave %d of %d candidates no score (NaN)", who, rows, len(scores))


def combine_updates(selector: Selector, ids: Tensor, scores: Tensor, context: UpdateContext) -> Tensor:
    """The scores that `select` gets."""
    who = label(selector, "combine_updates")
    with UserCall(who):
        combined = selector.combine_updates(ids, scores, context)
    return combined if combined is scores else _checked_scores(who, combined, len(ids))


def _checked_scores(who: str, scores: Any, count: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.is_complex():
        raise TrainingFault(f"{who} returned {describe(scores)}, a tensor of {count} numbers was expected")
    if scores.dim() not in (1, 2) or len(scores) != count:
        expected = f"[{count}] or [{count}, m] was expected, one row for each candidate"
        raise TrainingFault(f"{who} returned {describe(scores)}; {expected}")
    return scores.detach().float().cpu()


def select(
    selector: Selector, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator
) -> Tensor:  # the arguments of Selector.select
    """[count] int64 positions in the scores; none twice, unless the selector has a parameter `replacement` that is true or
    there are fewer candidates."""
    who = label(selector, "select")
    with UserCall(who):
        positions = selector.select(scores, count, context, rng)
    num = len(scores)
    positions = _checked_integers(who, positions, f"a tensor of {count} integers")
    if positions.dim() != 1:
        raise TrainingFault(f"{who} returned {describe(positions)}, [{count}] was expected")
    if len(positions) != count:
        raise TrainingFault(f"{who} returned {len(positions)} ids, {count} were asked for")
    outside = positions[(positions < 0) | (positions >= num)]
    if len(outside):
        raise TrainingFault(f"{who} returned {int(outside[0])}; positions are 0 to {num - 1}, one for each candidate")
    if count <= num and not getattr(selector, "replacement", False):
        times = torch.bincount(positions, minlength=1)
        if int(times.max()) > 1:
            most = int(times.argmax())
            raise TrainingFault(
                f"{who} returned {count - int((times > 0).sum())} of {count} ids again, {most} {int(times[most])} times; a "
                "selector that repeats ids has a parameter `replacement` that is true"
            )
    return positions


def _checked_integers(who: str, values: Any, expected: str) -> Tensor:
    if (
        not isinstance(values, Tensor)
        or values.is_floating_point()
        or values.is_complex()
        or values.dtype == torch.bool
    ):
        raise TrainingFault(f"{who} returned {describe(values)}, {expected} was expected")
    return values.detach().long().cpu()


# -- mixers --------------------------------------------------------------------------------------------------------------


def proportions(mixer: Mixer, context: UpdateContext, rng: torch.Generator, num_domains: int) -> tuple[float, ...]:
    """[k] finite numbers >= 0 with sum 1."""
    who = label(mixer, "proportions")
    with UserCall(who):
        result = mixer.proportions(context, rng)
    values = _domain_numbers(who, result, num_domains)
    if abs(sum(values) - 1) > TOLERANCE:
        rule = f"proportions of step {context.step} must be {num_domains} finite numbers >= 0 with sum 1"
        raise TrainingFault(f"{who}: {rule}, found {list(values)}")
    return values


def loss_weights(mixer: Mixer, drawn: Sequence[float]) -> tuple[float, ...] | None:
    """[k] finite numbers >= 0, above 0 for some domain that is drawn; None without weights."""
    who = label(mixer, "loss_weights")
    with UserCall(who):
        result = mixer.loss_weights()
    if result is None:
        return None
    values = _domain_numbers(who, result, len(drawn))
    if not sum(w * p for w, p in zip(values, drawn, strict=True)) > 0:
        raise TrainingFault(f"{who} returned {list(values)}: 0 for every domain that is drawn")
    return values


def step_loss_weights(mixer: Mixer, num_domains: int) -> StepLossWeights | None:
    """The mixer's weights of the next step; None without."""
    who = label(mixer, "step_loss_weights")
    with UserCall(who):
        result = mixer.step_loss_weights()
    if result is None:
        return None
    if not isinstance(result, StepLossWeights):
        raise TrainingFault(f"{who} returned {describe(result)}, StepLossWeights or None was expected")
    if not sum(_domain_numbers(who, result.weights, num_domains)) > 0:
        raise TrainingFault(f"{who} returned weights that are all 0")
    return result


def observe(mixer: Mixer, stats: StepStats, drawn: tuple[float, ...], step: int) -> None:
    """Show the mixer a step."""
    with UserCall(label(mixer, "observe")):
        mixer.observe(stats, drawn, step)


def average_weights(mixer: Mixer, num_domains: int) -> tuple[int, Tensor] | None:
    """(number of updates, [k] mean weights of the run); None for a mixer without."""
    who = label(mixer, "average_weights")
    with UserCall(who):
        result = mixer.average_weights()
    if result is None:
        return None
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], int):
        raise TrainingFault(f"{who} returned {describe(result)}, (number of updates, weights) was expected")
    _domain_numbers(who, result[1], num_domains)
    return result


def report(mixer: Mixer) -> dict[str, Any]:
    """Further fields of a line of the mixer's log."""
    who = label(mixer, "report")
    with UserCall(who):
        fields = mixer.report()
    if not isinstance(fields, dict):
        raise TrainingFault(f"{who} returned {describe(fields)}, a dict was expected")
    return fields


def _domain_numbers(who: str, values: Any, num_domains: int) -> tuple[float, ...]:
    expected = f"{num_domains} finite numbers >= 0"
    if not isinstance(values, Tensor) or values.is_complex():
        raise TrainingFault(f"{who} returned {describe(values)}, a tensor of {expected} was expected")
    numbers = values.detach().double()
    if numbers.shape != (num_domains,) or not bool((torch.isfinite(numbers) & (numbers >= 0)).all()):
        raise TrainingFault(f"{who} must return {expected}, found {numbers.tolist()}")
    return tuple(numbers.tolist())


# -- reorders ------------------------------------------------------------------------------------------------------------


def rank_order(reorder: Reorder, count: int, seed: int) -> Tensor:
    """[count] int64, each of 0..count-1 once."""
    who = label(reorder, "rank_order")
    with UserCall(who):
        ranks = reorder.rank_order(count, seed)
    ranks = _checked_integers(who, ranks, f"a tensor of {count} integers")
    if ranks.shape != (count,):
        raise TrainingFault(f"{who} returned {describe(ranks)}, [{count}] was expected")
    inside = bool(((ranks >= 0) & (ranks < count)).all())
    if not inside or not bool((torch.bincount(ranks, minlength=count) == 1).all()):
        raise TrainingFault(f"{who} must return each of 0 to {count - 1} once, found {_first_numbers(ranks)}")
    return ranks


def _first_numbers(values: Tensor) -> str:
    numbers = values[:8].tolist()
    return str(numbers) if len(values) <= 8 else f"{str(numbers)[:-1]}, ...]"
