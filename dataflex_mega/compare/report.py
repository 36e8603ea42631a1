"""Writes a comparison as results.json, results.csv and report.md, and prints its table on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dataflex_mega.compare.results import MACRO, OVERALL, Comparison, MethodSummary, Spread
from dataflex_mega.compare.runner import OUTPUT_ONLY_KEYS
from dataflex_mega.files import atomic_write

TOKEN_TOLERANCE = 0.01  # the report warns of a larger relative difference in trained tokens
HIDDEN_KEYS = OUTPUT_ONLY_KEYS | {"seed", "output_dir"}


def write(comparison: Comparison, plots: Sequence[Path]) -> list[Path]:
    """Write the three files into the suite's output_dir -> their paths."""
    folder = comparison.suite.output_dir
    contents = {
        "results.json": json.dumps(as_dict(comparison), indent=1),
        "results.csv": as_csv(comparison),
        "report.md": as_markdown(comparison, plots),
    }
    for name, text in contents.items():
        atomic_write(folder / name, text)
    return [folder / name for name in contents]


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Plain values of every run and method, and the runs without a result."""
    return {
        "baseline": comparison.suite.baseline,
        "seeds": list(comparison.suite.seeds),
        "processes": comparison.suite.processes,
        "domains": comparison.domains,
        "methods": {summary.method: asdict(summary) for summary in comparison.summaries},
        "runs": [
            {
                "method": r.method,
                "seed": r.seed,
                "folder": str(r.folder),
                "loss": r.loss,
                "perplexity": {name: r.perplexity(name) for name in r.loss},
                "final": asdict(r.final_cost),
                "extra": asdict(r.extra_cost),
            }
            for r in comparison.results
        ],
        "missing": comparison.missing,
    }


def as_csv(comparison: Comparison) -> str:
    """One CSV line per method and seed."""
    names = [OVERALL, MACRO, *comparison.domains]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    costs = ["tokens", "seconds", "steps", "extra_tokens", "extra_seconds", "extra_steps"]
    writer.writerow(["method", "seed", *(f"perplexity_{name}" for name in names), *costs])
    for r in comparison.results:
        spent = [value for cost in (r.final_cost, r.extra_cost) for value in (cost.tokens, cost.seconds, cost.steps)]
        writer.writerow([r.method, r.seed, *(r.perplexity(name) for name in names), *spent])
    return stream.getvalue()


# -- cells -------------------------------------------------------------------------------------------------------------


def format_spread(value: Spread | None, sign: str = "", digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    """`12.34 +- 0.05`; without the deviation for one seed; `-` for None."""
    if value is None:
        return "-"
    text = f"{value.mean * factor:{sign}.{digits}f}"
    text += "" if value.deviation is None else f" +- {value.deviation * factor:.{digits}f}"
    return text + unit


def format_count(value: int | None) -> str:
    """`1,234`, `-` for None."""
    return "-" if value is None else f"{value:,}"


def cost_cells(summary: MethodSummary) -> list[str]:
    """The cells of COST_COLUMNS for one method."""
    return [
        format_count(summary.tokens),
        format_count(summary.extra_tokens),
        f"{summary.seconds:,.1f}",
        f"{summary.extra_seconds:,.1f}",
        format_spread(summary.overhead, sign="+", digits=1, factor=100, unit=" %"),
    ]


COST_COLUMNS = ("tokens", "extra tokens", "seconds", "extra seconds", "overhead")


def result_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, one row for each method) of the main table."""
    names = [OVERALL, MACRO, *comparison.domains]
    lines = [
        [s.method, str(len(s.seeds)), *(format_spread(s.perplexity[name]) for name in names)]
        for s in comparison.summaries
    ]
    return ["method", "seeds", *names], lines


def paired_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the differences to the first method."""
    names = [OVERALL, MACRO, *comparison.domains]
    lines = []
    for s in comparison.summaries:
        if s.difference:
            count = len(s.difference[OVERALL].values)
            cells = [f"{format_spread(s.difference[n], sign='+', digits=3)} ({s.better[n]}/{count})" for n in names]
            lines.append([s.method, *cells])
    return ["method", *names], lines


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table. No cell may contain a vertical bar."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])


def as_markdown(comparison: Comparison, plots: Sequence[Path]) -> str:
    """The text of report.md."""
    suite = comparison.suite
    first = suite.phases_of(suite.baseline, suite.seeds[0])[-1]
    parts = [
        f"# Comparison of {len(suite.methods)} methods",
        f"{len(suite.seeds)} seeds ({', '.join(map(str, suite.seeds))}), {first.num_steps} steps per run on "
        f"{suite.processes} process{'es' if suite.processes > 1 else ''}. The first method, `{suite.baseline}`, is "
        "the baseline.",
        *warning_lines(comparison),
        "## Held-out perplexity",
        "Mean over seeds +- standard deviation. `overall` weighs every token the same, `macro` every domain "
        "(geometric mean of their perplexities). Lower is better.",
        markdown_table(*result_rows(comparison)),
    ]
    header, lines = paired_rows(comparison)
    if lines:
        parts += [
            f"## Difference to `{suite.baseline}`, seed by seed",
            "Perplexity minus that of the baseline's run with the same seed, hence the same initial weights and random "
            "numbers; mean +- standard deviation of the differences, and the number of seeds in which it is lower.",
            markdown_table(header, lines),
        ]
    parts += [
        "## Cost",
        "Mean over seeds. `tokens` carried loss in the run that is compared; `extra` is the cost of the phases before it. "
        "Seconds include evaluation during training and exclude loading. `overhead` is the seconds of "
        f"all phases against `{suite.baseline}`'s, seed by seed.",
        markdown_table(["method", *COST_COLUMNS], [[s.method, *cost_cells(s)] for s in comparison.summaries]),
        "## What the methods change",
        "\n".join(f"- `{method}`: {describe_changes(comparison, method)}" for method in suite.methods),
    ]
    if plots:
        parts += ["## Pictures", "\n\n".join(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in plots)]
    return "\n\n".join(parts) + "\n"


def warning_lines(comparison: Comparison) -> list[str]:
    """The note above the tables: missing runs, unequal token counts, few seeds."""
    lines = [f"- no result of `{key}`: {why}" for key, why in comparison.missing.items()]
    counts = {s.method: s.tokens for s in comparison.summaries if s.tokens is not None}
    if counts and max(counts.values()) > (1 + TOKEN_TOLERANCE) * min(counts.values()):
        most, least = max(counts, key=lambda m: counts[m]), min(counts, key=lambda m: counts[m])
        lines.append(
            f"- the methods did not see the same number of tokens: `{most}` {counts[most]:,}, `{least}` "
            f"{counts[least]:,}; their samples differ in length"
        )
    if len(comparison.suite.seeds) < 3:
        lines.append("- fewer than three seeds: the spread says little")
    return ["**Note**\n\n" + "\n".join(lines)] if lines else []


def describe_changes(comparison: Comparison, method: str) -> str:
    """The keys in which a method differs from the first one, phase by phase."""
    suite, seed = comparison.suite, comparison.suite.seeds[0]
    base = suite.phases_of(suite.baseline, seed)[-1].config
    texts = []
    for run in suite.phases_of(method, seed):
        keys = [key for key in sorted({*run.config, *base} - HIDDEN_KEYS) if run.config.get(key) != base.get(key)]
        if method == suite.baseline and run.is_final:
            keys = [
                key for key in ("train_type", "component_name", "selector", "mixer", "weighter") if key in run.config
            ]
        text = "; ".join(f"{key} = {json.dumps(run.config.get(key))}" for key in keys) or "nothing"
        texts.append(f"{run.phase}: {text}" if run.phase else text)
    return " -> ".join(texts)


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the main table with the costs; without the columns of the domains when the terminal is too narrow for them."""
    table = terminal_table(comparison, domains=True)
    if console.measure(table).maximum > console.width:
        table = terminal_table(comparison, domains=False)
    console.print(table)


def terminal_table(comparison: Comparison, domains: bool) -> Table:
    """The table of `print_table`, one row per method."""
    header, lines = result_rows(comparison)
    shown = len(header) if domains else header.index(MACRO) + 1
    table = Table(title="held-out perplexity")
    for name in [*header[:shown], "tokens", "extra tokens", "overhead"]:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line, summary in zip(lines, comparison.summaries, strict=True):
        cells = cost_cells(summary)
        table.add_row(*line[:shown], cells[0], cells[1], cells[4])
    return table
