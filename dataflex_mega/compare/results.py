"""Reads the finished runs of a suite: perplexity, cost, and differences to the first method seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex_mega.compare import step_times
from dataflex_mega.compare.runner import is_finished
from dataflex_mega.compare.suite import Suite, TrainingRun, parse_names
from dataflex_mega.files import atomic_write
from dataflex_mega.log_files import read_rows
from dataflex_mega.metrics import STEPS_FILE

PERPLEXITY_FILE = "perplexity.json"
OVERALL, MACRO = "overall", "macro"


@dataclass(frozen=True)
class Cost:
    """The cost of one training. `tokens` carried loss; None for LLaMA-Factory's own loop, which does not count them."""

    tokens: int | None
    seconds: float
    steps: int


@dataclass(frozen=True)
class RunResult:
    """One method with one seed, finished and evaluated."""

    method: str
    seed: int
    folder: Path
    loss: dict[str, float]  # held-out mean loss by data set, and `overall` and `macro`
    final_cost: Cost  # of the last phase
    extra_cost: Cost  # of the phases before it

    @property
    def seconds(self) -> float:
        """Training seconds of all phases."""
        return self.final_cost.seconds + self.extra_cost.seconds

    def perplexity(self, name: str) -> float:
        """exp of the loss on one data set, or of `overall` or `macro`."""
        return math.exp(self.loss[name])


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the latter None for a single one."""

    mean: float
    deviation: float | None
    values: list[float]

    @staticmethod
    def from_values(values: Sequence[float]) -> Spread:
        """Mean and deviation of one value per seed."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, list(values))


@dataclass(frozen=True)
class MethodSummary:
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
    """All results of a suite."""

    suite: Suite
    domains: list[str]  # evaluation data sets
    results: list[RunResult]
    summaries: list[MethodSummary]
    missing: dict[str, str] = field(default_factory=dict)  # run -> the reason why it has no result

    def results_of(self, method: str) -> list[RunResult]:
        """The results of one method, by seed."""
        return [result for result in self.results if result.method == method]


Evaluate = Callable[[TrainingRun], dict[str, Any]]


def collect(suite: Suite, evaluate: Evaluate, failed: Mapping[str, str]) -> Comparison:
    """Read the finished runs.

    Args:
        evaluate: a final run -> perplexity.summary of its model; called once, its result is stored in the run's folder.
        failed: run -> the reason why it has no result, where that is known.
    """
    results, missing = [], {}
    for seed in suite.seeds:
        for method in suite.methods:
            phases = suite.phases_of(method, seed)
            unfinished = next((run for run in phases if not is_finished(run)), None)
            if unfinished is not None:
                missing[unfinished.key] = failed.get(unfinished.key, "not finished")
                continue
            results.append(_result(phases, evaluate))
    results.sort(key=lambda result: (suite.methods.index(result.method), suite.seeds.index(result.seed)))
    domains = parse_names(suite.runs[-1].config["eval_dataset"])
    baseline = {result.seed: result for result in results if result.method == suite.baseline}
    summaries = [
        summarize([result for result in results if result.method == method], baseline, domains)
        for method in suite.methods
        if any(result.method == method for result in results)
    ]
    return Comparison(suite, domains, results, summaries, missing)


def _result(phases: Sequence[TrainingRun], evaluate: Evaluate) -> RunResult:
    final = phases[-1]
    file = final.folder / PERPLEXITY_FILE
    if not file.is_file():
        atomic_write(file, json.dumps(evaluate(final), indent=1))
    saved = json.loads(file.read_text())
    loss = {name: saved["domains"][name]["loss"] for name in saved["domains"]}
    loss |= {OVERALL: saved[OVERALL]["loss"], MACRO: saved[MACRO]["loss"]}
    earlier = [read_cost(run.folder) for run in phases[:-1]]
    return RunResult(final.method, final.seed, final.folder, loss, read_cost(final.folder), sum_costs(earlier))


def read_cost(folder: Path) -> Cost:
    """The cost of one training, from its logs."""
    times = read_rows(folder / step_times.STEP_TIMES_FILE)
    steps = read_rows(folder / STEPS_FILE)
    tokens = sum(int(row["tokens"]) for row in steps) if steps else None
    return Cost(tokens, math.fsum(row["seconds"] for row in times), len(times))


def sum_costs(costs: Sequence[Cost]) -> Cost:
    """The sum; its tokens are None when some are unknown."""
    counts = [c.tokens for c in costs if c.tokens is not None]
    known = len(counts) == len(costs)
    return Cost(sum(counts) if known else None, math.fsum(c.seconds for c in costs), sum(c.steps for c in costs))


def summarize(results: Sequence[RunResult], baseline: Mapping[int, RunResult], domains: Sequence[str]) -> MethodSummary:
    """One method's seeds -> means, spreads, and differences to `baseline` with the same seed."""
    names = [*domains, OVERALL, MACRO]
    pairs = [(r, baseline[r.seed]) for r in results if r.seed in baseline and baseline[r.seed].method != r.method]
    gaps = {n: [r.perplexity(n) - b.perplexity(n) for r, b in pairs] for n in names} if pairs else {}
    final, extra = sum_costs([r.final_cost for r in results]), sum_costs([r.extra_cost for r in results])
    count = len(results)
    return MethodSummary(
        method=results[0].method,
        seeds=[r.seed for r in results],
        perplexity={name: Spread.from_values([r.perplexity(name) for r in results]) for name in names},
        difference={name: Spread.from_values(values) for name, values in gaps.items()},
        better={name: sum(gap < 0 for gap in values) for name, values in gaps.items()},
        tokens=None if final.tokens is None else round(final.tokens / count),
        extra_tokens=None if extra.tokens is None else round(extra.tokens / count),
        seconds=final.seconds / count,
        extra_seconds=extra.seconds / count,
        overhead=Spread.from_values([r.seconds / b.seconds - 1 for r, b in pairs]) if pairs else None,
    )
