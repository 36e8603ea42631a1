"""A comparison as files: results.json, results.csv, report.md; and as a table on the terminal."""

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

from dataflex_mega.compare.results import MACRO, OVERALL, Comparison, Spread, Summary
from dataflex_mega.compare.runner import FREE, write_beside

UNEVEN = 0.01  # a difference in trained tokens from which the report warns
NOT_TOLD = FREE | {"seed", "output_dir"}


def write(found: Comparison, pictures: Sequence[Path]) -> list[Path]:
    """Write the three files into the suite's output_dir -> their paths."""
    folder = found.suite.output
    contents = {
        "results.json": json.dumps(as_dict(found), indent=1),
        "results.csv": as_csv(found),
        "report.md": as_markdown(found, pictures),
    }
    for name, text in contents.items():
        write_beside(folder / name, text)
    return [folder / name for name in contents]


def as_dict(found: Comparison) -> dict[str, Any]:
    """Plain values: every run, every method, what is missing."""
    return {
        "baseline": found.suite.baseline,
        "seeds": list(found.suite.seeds),
        "processes": found.suite.processes,
        "domains": found.domains,
        "methods": {summary.method: asdict(summary) for summary in found.summaries},
        "runs": [
            {
                "method": r.method,
                "seed": r.seed,
                "folder": str(r.folder),
                "loss": r.loss,
                "perplexity": {name: r.perplexity(name) for name in r.loss},
                "final": asdict(r.final),
                "extra": asdict(r.extra),
            }
            for r in found.results
        ],
        "missing": found.missing,
    }


def as_csv(found: Comparison) -> str:
    """One line for each method and seed."""
    names = [OVERALL, MACRO, *found.domains]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    costs = ["tokens", "seconds", "steps", "extra_tokens", "extra_seconds", "extra_steps"]
    writer.writerow(["method", "seed", *(f"perplexity_{name}" for name in names), *costs])
    for r in found.results:
        spent = [r.final.tokens, r.final.seconds, r.final.steps, r.extra.tokens, r.extra.seconds, r.extra.steps]
        writer.writerow([r.method, r.seed, *(r.perplexity(name) for name in names), *spent])
    return stream.getvalue()


# -- words -------------------------------------------------------------------------------------------------------------


def spread(value: Spread | None, sign: str = "", digits: int = 2, factor: float = 1.0, unit: str = "") -> str:
    """`12.34 +- 0.05`; without the second number for one seed; `-` for nothing."""
    if value is None:
        return "-"
    text = f"{value.mean * factor:{sign}.{digits}f}"
    text += "" if value.deviation is None else f" +- {value.deviation * factor:.{digits}f}"
    return text + unit


def number(value: int | None) -> str:
    """`1,234`, or `-` for an unknown one."""
    return "-" if value is None else f"{value:,}"


def cost_cells(summary: Summary) -> list[str]:
    """Tokens, seconds, overhead."""
    return [
        number(summary.tokens),
        number(summary.extra_tokens),
        f"{summary.seconds:,.1f}",
        f"{summary.extra_seconds:,.1f}",
        spread(summary.overhead, sign="+", digits=1, factor=100, unit=" %"),
    ]


COST_HEADS = ("tokens", "extra tokens", "seconds", "extra seconds", "overhead")


def result_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, one row for each method) of the main table."""
    names = [OVERALL, MACRO, *found.domains]
    lines = [[s.method, str(len(s.seeds)), *(spread(s.perplexity[name]) for name in names)] for s in found.summaries]
    return ["method", "seeds", *names], lines


def paired_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the differences to the first method."""
    names = [OVERALL, MACRO, *found.domains]
    lines = []
    for s in found.summaries:
        if s.difference:
            count = len(s.difference[OVERALL].values)
            cells = [f"{spread(s.difference[n], sign='+', digits=3)} ({s.better[n]}/{count})" for n in names]
            lines.append([s.method, *cells])
    return ["method", *names], lines


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; nothing in it may hold a vertical bar."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ruler, *lines])


def as_markdown(found: Comparison, pictures: Sequence[Path]) -> str:
    """The report for people."""
    suite = found.suite
    first = suite.of(suite.baseline, suite.seeds[0])[-1]
    parts = [
        f"# Comparison of {len(suite.methods)} methods",
        f"{len(suite.seeds)} seeds ({', '.join(map(str, suite.seeds))}), {first.steps} steps a run on "
        f"{suite.processes} process{'es' if suite.processes > 1 else ''}. The first method, `{suite.baseline}`, is what "
        "the others are compared with.",
        *warnings(found),
        "## Held-out perplexity",
        "Mean over seeds +- standard deviation. `overall` weighs every token the same, `macro` every domain "
        "(geometric mean of their perplexities). Lower is better.",
        markdown_table(*result_rows(found)),
    ]
    header, lines = paired_rows(found)
    if lines:
        parts += [
            f"## Difference to `{suite.baseline}`, seed by seed",
            "Perplexity less that of the run with the same seed, hence the same initial weights and random numbers; mean "
            "+- standard deviation of the differences, and in how many seeds it is lower.",
            markdown_table(header, lines),
        ]
    parts += [
        "## Cost",
        "Mean over seeds. `tokens` carried loss in the run that is compared; `extra` is what the phases before it took. "
        "Seconds are training only, evaluation during training included, loading left out. `overhead` is the seconds of "
        f"all phases against `{suite.baseline}`'s, seed by seed.",
        markdown_table(["method", *COST_HEADS], [[s.method, *cost_cells(s)] for s in found.summaries]),
        "## What the methods change",
        "\n".join(f"- `{method}`: {changes(found, method)}" for method in suite.methods),
    ]
    if pictures:
        parts += ["## Pictures", "\n\n".join(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in pictures)]
    return "\n\n".join(parts) + "\n"


def warnings(found: Comparison) -> list[str]:
    """What a reader must know before the numbers."""
    lines = [f"- no result of `{key}`: {why}" for key, why in found.missing.items()]
    counts = {s.method: s.tokens for s in found.summaries if s.tokens is not None}
    if counts and max(counts.values()) > (1 + UNEVEN) * min(counts.values()):
        most, least = max(counts, key=lambda m: counts[m]), min(counts, key=lambda m: counts[m])
        lines.append(
            f"- the methods did not see the same number of tokens: `{most}` {counts[most]:,}, `{least}` "
            f"{counts[least]:,}; their samples differ in length"
        )
    if len(found.suite.seeds) < 3:
        lines.append("- fewer than three seeds: the spread says little")
    return ["**Note**\n\n" + "\n".join(lines)] if lines else []


def changes(found: Comparison, method: str) -> str:
    """The keys in which a method differs from the first one, phase by phase."""
    suite, seed = found.suite, found.suite.seeds[0]
    base = suite.of(suite.baseline, seed)[-1].config
    texts = []
    for run in suite.of(method, seed):
        keys = [key for key in sorted({*run.config, *base} - NOT_TOLD) if run.config.get(key) != base.get(key)]
        if method == suite.baseline and run.final:
            keys = [
                key for key in ("train_type", "component_name", "selector", "mixer", "weighter") if key in run.config
            ]
        told = "; ".join(f"{key} = {json.dumps(run.config.get(key))}" for key in keys) or "nothing"
        texts.append(f"{run.phase}: {told}" if run.phase else told)
    return " -> ".join(texts)


def show(found: Comparison, console: Console) -> None:
    """The main table and the cost on the terminal; the domains are left to the report where it is too narrow for them."""
    table = terminal_table(found, domains=True)
    if console.measure(table).maximum > console.width:
        table = terminal_table(found, domains=False)
    console.print(table)


def terminal_table(found: Comparison, domains: bool) -> Table:
    """One row for each method."""
    header, lines = result_rows(found)
    shown = len(header) if domains else header.index(MACRO) + 1
    table = Table(title="held-out perplexity")
    for name in [*header[:shown], "tokens", "extra tokens", "overhead"]:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for line, summary in zip(lines, found.summaries, strict=True):
        cells = cost_cells(summary)
        table.add_row(*line[:shown], cells[0], cells[1], cells[4])
    return table
