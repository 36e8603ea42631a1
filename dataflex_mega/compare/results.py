"""What the runs of a suite left behind -> numbers: perplexity, cost, and differences to the first method by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex_mega.compare import step_times as times
from dataflex_mega.compare.runner import is_finished, write_beside
from dataflex_mega.compare.suite import Run, Suite, listed
from dataflex_mega.metrics import STEPS_FILE

PERPLEXITY_FILE = "perplexity.json"
OVERALL, MACRO = "overall", "macro"


@dataclass(frozen=True)
class Cost:
    """Of one training. `tokens` are those that carried loss; None for LLaMA-Factory's own loop, which counts none."""

    tokens: int | None
    seconds: float
    steps: int


@dataclass(frozen=True)
class Result:
    """One method with one seed, finished and measured."""

    method: str
    seed: int
    folder: Path
    loss: dict[str, float]  # held-out mean loss by data set, and `overall` and `macro`
    final: Cost  # of the last phase
    extra: Cost  # of the phases before it

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return self.final.seconds + self.extra.seconds

    def perplexity(self, name: str) -> float:
        """exp of a loss."""
        return math.exp(self.loss[name])


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the latter None for a single one."""

    mean: float
    deviation: float | None
    values: list[float]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one number a seed."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, list(values))


@dataclass(frozen=True)
class Summary:
    """One method over its seeds."""

    method: str
    seeds: list[int]
    perplexity: dict[str, Spread]  # by data set, `overall`, `macro`
    difference: dict[str, Spread]  # of the perplexity to the first method's with the same seed; empty for the first
    better: dict[str, int]  # seeds with a lower perplexity than the first method's
    tokens: int | None  # of the last phase, mean over seeds
    extra_tokens: int | None  # of the phases before it
    seconds: float
    extra_seconds: float
    overhead: Spread | None  # seconds of all phases over the first method's, less 1, by seed


@dataclass(frozen=True)
class Comparison:
    """Everything that is reported."""

    suite: Suite
    domains: list[str]  # evaluation data sets
    results: list[Result]
    summaries: list[Summary]
    missing: dict[str, str] = field(default_factory=dict)  # run -> why there is no result

    def of(self, method: str) -> list[Result]:
        """By seed."""
        return [result for result in self.results if result.method == method]


Measure = Callable[[Run], dict[str, Any]]


def collect(suite: Suite, measure: Measure, failed: Mapping[str, str]) -> Comparison:
    """Read what is finished.

    Args:
        measure: a final run -> perplexity.summary of its model; asked once, the answer is kept in the run's folder.
        failed: run -> why it has no result, where that is known.
    """
    results, missing = [], {}
    for seed in suite.seeds:
        for method in suite.methods:
            phases = suite.of(method, seed)
            unfinished = next((run for run in phases if not is_finished(run)), None)
            if unfinished is not None:
                missing[unfinished.key] = failed.get(unfinished.key, "not finished")
                continue
            results.append(_result(phases, measure))
    results.sort(key=lambda result: (suite.methods.index(result.method), suite.seeds.index(result.seed)))
    domains = listed(suite.runs[-1].config["eval_dataset"])
    baseline = {result.seed: result for result in results if result.method == suite.baseline}
    summaries = [
        summarize([result for result in results if result.method == method], baseline, domains)
        for method in suite.methods
        if any(result.method == method for result in results)
    ]
    return Comparison(suite, domains, results, summaries, missing)


def _result(phases: Sequence[Run], measure: Measure) -> Result:
    final = phases[-1]
    file = final.folder / PERPLEXITY_FILE
    if not file.is_file():
        write_beside(file, json.dumps(measure(final), indent=1))
    found = json.loads(file.read_text())
    loss = {name: found["domains"][name]["loss"] for name in found["domains"]}
    loss |= {OVERALL: found[OVERALL]["loss"], MACRO: found[MACRO]["loss"]}
    before = [cost(run.folder) for run in phases[:-1]]
    return Result(final.method, final.seed, final.folder, loss, cost(final.folder), total(before))


def cost(folder: Path) -> Cost:
    """Of one training, from its lines a step."""
    took = rows(folder / times.FILE)
    steps = rows(folder / STEPS_FILE)
    tokens = sum(int(row["tokens"]) for row in steps) if steps else None
    return Cost(tokens, math.fsum(row["seconds"] for row in took), len(took))


def total(costs: Sequence[Cost]) -> Cost:
    """The sum; its tokens are None when some are unknown."""
    counts = [c.tokens for c in costs if c.tokens is not None]
    known = len(counts) == len(costs)
    return Cost(sum(counts) if known else None, math.fsum(c.seconds for c in costs), sum(c.steps for c in costs))


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; none when there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summarize(results: Sequence[Result], baseline: Mapping[int, Result], domains: Sequence[str]) -> Summary:
    """One method's seeds -> means, spreads, and what is paired with `baseline` by seed."""
    names = [*domains, OVERALL, MACRO]
    pairs = [(r, baseline[r.seed]) for r in results if r.seed in baseline and baseline[r.seed].method != r.method]
    gaps = {n: [r.perplexity(n) - b.perplexity(n) for r, b in pairs] for n in names} if pairs else {}
    first, rest = total([r.final for r in results]), total([r.extra for r in results])
    count = len(results)
    return Summary(
        method=results[0].method,
        seeds=[r.seed for r in results],
        perplexity={name: Spread.of([r.perplexity(name) for r in results]) for name in names},
        difference={name: Spread.of(values) for name, values in gaps.items()},
        better={name: sum(gap < 0 for gap in values) for name, values in gaps.items()},
        tokens=None if first.tokens is None else round(first.tokens / count),
        extra_tokens=None if rest.tokens is None else round(rest.tokens / count),
        seconds=first.seconds / count,
        extra_seconds=rest.seconds / count,
        overhead=Spread.of([r.seconds / b.seconds - 1 for r, b in pairs]) if pairs else None,
    )
