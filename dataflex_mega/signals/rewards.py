"""Rewards of generated answers: numbers from prompts, answers and reference answers, all of them text.

A user's own reward is any function (prompts, answers, references) -> as many finite numbers, named as
package.module:function. It is called on every process with that process's share of the answers.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from dataflex_mega.errors import ConfigError, TrainingFault, UserCall, did_you_mean

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def f1_overlap(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of the words of answer and reference, in lower case, as question answering is scored (SQuAD)."""
    pairs = zip(answers, references, strict=True)
    return [_f1(answer.lower().split(), reference.lower().split()) for answer, reference in pairs]


def _f1(words: list[str], reference: list[str]) -> float:
    common = sum((Counter(words) & Counter(reference)).values())
    return 2 * common / (len(words) + len(reference)) if common else 0.0


def exact_match(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where answer and reference are the same but for spaces at the ends, else 0."""
    return [float(answer.strip() == reference.strip()) for answer, reference in zip(answers, references, strict=True)]


def numeric_match(prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the last number of the answer is the last number of the reference, as GSM8K is scored, else 0."""
    pairs = zip(answers, references, strict=True)
    return [float(_last_number(a) is not None and _last_number(a) == _last_number(r)) for a, r in pairs]


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


REWARDS: dict[str, Reward] = {"overlap": f1_overlap, "exact": exact_match, "number": numeric_match}


def load_reward(name: str) -> Reward:
    """Look a reward up by its short name or import it by package.module:function. Raises ConfigError when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        hint = did_you_mean(name, REWARDS) or f"; there is {', '.join(REWARDS)}, or package.module:function"
        raise ConfigError(f"reward: nothing is called {name!r}{hint}")
    try:
        reward = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(f"reward: cannot import {module!r} of {name!r}: {error}") from error
    if not callable(reward):
        raise ConfigError(f"reward: {module} has no function {function!r}")
    return cast(Reward, reward)  # `compute_rewards` checks what it returns


def compute_rewards(
    reward: Reward, prompts: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> list[float]:
    """One reward per answer. Raises TrainingFault, which names the function, when it raises, when their number is another or
    one is not a finite number."""
    if not answers:
        return []
    who = f"reward {getattr(reward, '__module__', '')}:{getattr(reward, '__name__', type(reward).__name__)}"
    with UserCall(who):
        given = reward(prompts, answers, references)
    expected = f"{len(answers)} numbers were expected, one for each answer"
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TrainingFault(f"{who} returned {given!r}, {expected}")
    values = list(given)
    if len(values) != len(answers):
        raise TrainingFault(f"{who}: {len(answers)} answers got {len(values)} rewards")
    for value, answer in zip(values, answers, strict=True):
        if isinstance(value, (str, bytes)) or not hasattr(type(value), "__float__"):
            raise TrainingFault(f"{who} returned {value!r} for the answer {answer!r}, {expected}")
        if not math.isfinite(float(value)):
            raise TrainingFault(f"{who}: {float(value)} for the answer {answer!r}")
    return [float(value) for value in values]
