"""LLaMA-Factory's keys `mix_strategy` and `interleave_probs`: the proportions of a run, and how long its epoch is.

LLaMA-Factory draws one random interleaving of the datasets and trains on that. Here its probabilities are proportions,
kept exactly in every stretch of steps, and its stopping rule is the expected length of that interleaving:

    interleave_under   min over domains of n_d / p_d: until the first of them is used up
    interleave_over    max over domains of n_d / p_d: until the last one is
    interleave_once    sum of n_d: each row once; a domain that is used up leaves its share to the others
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataflex_mega.config.dataflex_arguments import LIMITS, RunArguments
from dataflex_mega.config.roles import ResolvedRoles
from dataflex_mega.errors import ConfigError

STRATEGIES = ("interleave_under", "interleave_over", "interleave_once")
SUM_TOLERANCE = 1e-6
ROUNDING = 1e-9  # relative, of n_d / p_d


@dataclass(frozen=True)
class Interleaving:
    """What the two keys ask for. `probabilities`: [k], sum 1; None: all the same."""

    strategy: str  # of STRATEGIES
    probabilities: tuple[float, ...] | None
    sets_length: bool  # whether the proportions stay, so that they say how long an epoch is

    def epoch_samples(self, sizes: Sequence[int]) -> int:
        """[k] numbers of samples -> those of an epoch; all of them where the proportions move."""
        if not self.sets_length or self.strategy == "interleave_once" or len(sizes) == 1:
            return sum(sizes)
        shares = self.probabilities or (1 / len(sizes),) * len(sizes)
        draws = [size / share for size, share in zip(sizes, shares, strict=True) if share > 0]
        if self.strategy == "interleave_under":
            return max(1, math.floor(min(draws) * (1 + ROUNDING)))
        return math.ceil(max(draws) * (1 - ROUNDING))

    @property
    def draws_each_row_once(self) -> bool:
        """Whether no row is drawn again before all have been drawn."""
        return self.sets_length and self.strategy == "interleave_once"


def resolve(
    lf_values: Mapping[str, Any], arguments: RunArguments, roles: ResolvedRoles, notes: list[str]
) -> tuple[RunArguments, ResolvedRoles, Interleaving | None, list[str]]:
    """The keys, the roles with `mixer: static` where there is no mixer, what the two keys ask for, and `notes` with further
    ones.

    Raises ConfigError for probabilities that are none, and for keys that say something else of proportions or length.
    """
    strategy = lf_values.get("mix_strategy", "concat")
    given = _numbers(lf_values.get("interleave_probs"))
    if strategy not in STRATEGIES:
        if given is not None:
            raise ConfigError(
                f"interleave_probs: needs mix_strategy: {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}, found {strategy}"
            )
        return arguments, roles, None, notes
    probabilities = None if given is None else _checked(given, strategy)
    where = f"mix_strategy: {strategy}"
    _refuse_contradictions(where, probabilities, arguments, roles)
    mixer = roles.specs.get("mixer")
    stays = mixer is None or mixer["name"] == "static"
    if strategy == "interleave_once" and stays:
        _refuse_beside_once(where, arguments, roles)
    if probabilities is not None:
        arguments = replace(arguments, init_mixture_proportions=list(probabilities))
    if mixer is None:
        roles = replace(roles, specs={**roles.specs, "mixer": {"name": "static"}})
        notes = [*notes, f"{where}: the mixer static, which keeps the proportions in every stretch of steps"]
    elif not stays:
        notes = [
            *notes,
            f"{where}: mixer {mixer['name']} moves the proportions, so an epoch is as many samples as there are rows",
        ]
    return arguments, roles, Interleaving(strategy, probabilities, stays), notes


def _numbers(value: Any) -> list[float] | None:
    """`"0.5, 0.5"` or `[0.5, 0.5]` -> the numbers; None where there are none."""
    if value is None or value == "" or value == []:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ConfigError(f"interleave_probs: expected numbers between commas, found {value!r}") from None


def _checked(numbers: list[float], strategy: str) -> tuple[float, ...]:
    for number in numbers:
        if not (math.isfinite(number) and 0 <= number <= 1):
            raise ConfigError(f"interleave_probs: must be from 0 to 1, found {number:g}")
    total = math.fsum(numbers)
    if abs(total - 1) > SUM_TOLERANCE:
        raise ConfigError(f"interleave_probs: must sum to 1, found {', '.join(f'{x:g}' for x in numbers)}: {total:g}")
    if strategy != "interleave_under" and 0 in numbers:
        raise ConfigError(f"interleave_probs: 0 lets mix_strategy: {strategy} never end; leave that dataset out")
    return tuple(number / total for number in numbers)


def _refuse_contradictions(
    where: str, probabilities: tuple[float, ...] | None, arguments: RunArguments, roles: ResolvedRoles
) -> None:
    """Raises ConfigError for two keys that both say what is drawn, unless they say the same."""
    if arguments.init_mixture_proportions_file is not None:
        raise ConfigError(f"{where}: init_mixture_proportions_file gives proportions too; drop one")
    if arguments.mixture_sample_rule in ("stratified", "uniform"):
        raise ConfigError(
            f"{where}: mixture_sample_rule: {arguments.mixture_sample_rule} gives proportions too; drop one"
        )
    if roles.pipeline is not None and "mixer" not in roles.specs:
        raise ConfigError(f"{where}: a pipeline takes its mixer from pipeline.stages; add one there, or drop this")
    mixer = roles.specs.get("mixer") or {}
    others = {
        "init_mixture_proportions": arguments.init_mixture_proportions,
        **{f"mixer.{key}": mixer.get(key) for key in ("proportions", "initial_proportions")},
    }
    for key, numbers in others.items():
        if numbers is None:
            continue
        wanted = probabilities or (1 / len(numbers),) * len(numbers)
        total = math.fsum(numbers)
        same = len(numbers) == len(wanted) and all(
            math.isclose(x / total, p, rel_tol=1e-6) for x, p in zip(numbers, wanted, strict=True)
        )
        if not same:
            shown = "equal proportions" if probabilities is None else f"interleave_probs {list(probabilities)}"
            raise ConfigError(f"{key}: {numbers} contradicts {shown} of {where}; drop one")


def _refuse_beside_once(where: str, arguments: RunArguments, roles: ResolvedRoles) -> None:
    for role, why in (("selector", "draws its choice once each"), ("reorder", "serves each sample once per pass")):
        if role in roles.specs:
            raise ConfigError(f"{where}: does not go with a {role}, which {why}; drop one")
    for key in LIMITS:
        if getattr(arguments, key) is not None:
            raise ConfigError(f"{where}: every row is drawn, so {key} cannot hold; drop one")


def check_count(interleaving: Interleaving | None, names: Sequence[str], eval_names: Sequence[str]) -> None:
    """Raises ConfigError when there is not one probability for each dataset, and, as LLaMA-Factory wants it, for each
    evaluation set."""
    if interleaving is None or interleaving.probabilities is None:
        return
    count = len(interleaving.probabilities)
    for what, found in (("datasets", names), ("evaluation sets (eval_dataset)", eval_names)):
        if found and len(found) != count:
            raise ConfigError(f"interleave_probs: {count} numbers for {len(found)} {what}: {', '.join(found)}")
