"""Rewards of what a model writes: numbers from prompts, answers and reference answers, all of them text.

A reward of one's own is any function (prompts, answers, references) -> as many finite numbers, named as
package.module:function. It is called on every process with that process's share of the answers.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from dataflex_mega.errors import ConfigError, TrainingFault, did_you_mean

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def overlap(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of the words of answer and reference, in lower case, as question answering is scored (SQuAD)."""
    return [
        _f1(answer.lower().split(), wanted.lower().split()) for answer, wanted in zip(answers, references, strict=True)
    ]


def _f1(words: list[str], wanted: list[str]) -> float:
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def exact(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where answer and reference are the same but for spaces at the ends, else 0."""
    return [float(answer.strip() == wanted.strip()) for answer, wanted in zip(answers, references, strict=True)]


def number(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the last number of the answer is the last number of the reference, as GSM8K is scored, else 0."""
    return [float(_last(a) is not None and _last(a) == _last(r)) for a, r in zip(answers, references, strict=True)]


def _last(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


REWARDS: dict[str, Reward] = {"overlap": overlap, "exact": exact, "number": number}


def load(name: str) -> Reward:
    """The function that a name stands for. Raises ConfigError when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        hint = did_you_mean(name, REWARDS) or f"; there is {', '.join(REWARDS)}, or package.module:function"
        raise ConfigError(f"reward: nothing is called {name!r}{hint}")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(f"reward: cannot import {module!r} of {name!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"reward: {module} has no function {function!r}")
    return cast(Reward, found)  # `rate` checks what it returns


def rate(reward: Reward, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """The rewards of answers. Raises TrainingFault for another number of them, or one that is not finite."""
    if not answers:
        return []
    found = [float(value) for value in reward(prompts, answers, references)]
    if len(found) != len(answers):
        raise TrainingFault(f"reward: {len(answers)} answers got {len(found)} rewards")
    bad = next((place for place, value in enumerate(found) if not math.isfinite(value)), None)
    if bad is not None:
        raise TrainingFault(f"reward: {found[bad]} for the answer {answers[bad]!r}")
    return found
