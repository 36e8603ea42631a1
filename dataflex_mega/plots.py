"""Plots of a finished run, from metrics.jsonl: the mixture, and the loss of each domain, over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex_mega.log_files import read_rows
from dataflex_mega.metrics import STEPS_FILE


def plot_run(folder: Path) -> list[Path]:
    """Write proportions.png and domain_loss.png into `folder` -> their paths, none with fewer than two logged steps."""
    rows = read_rows(folder / STEPS_FILE)
    if len(rows) < 2:
        return []
    return [_plot_proportions(rows, folder / "proportions.png"), _plot_losses(rows, folder / "domain_loss.png")]


def _smooth(values: list[float], width: int) -> list[float]:
    """At each position the mean of the last `width` values, fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _plot_proportions(rows: list[dict[str, Any]], target: Path) -> Path:
    figure, axes = _figure()
    steps = [row["step"] for row in rows]
    width = max(1, len(rows) // 20)
    for number, name in enumerate(rows[-1]["proportions"]):
        drawn = [row["drawn"][name] / max(sum(row["drawn"].values()), 1) for row in rows]
        planned = [row["proportions"][name] for row in rows]
        axes.plot(steps, planned, color=f"C{number}", label=name)
        axes.plot(steps, _smooth(drawn, width), color=f"C{number}", alpha=0.35, linestyle="--")
    axes.set(
        xlabel="step",
        ylabel="fraction of the samples",
        title="Mixture: planned (solid) and drawn (dashed)",
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(target, dpi=120)
    return target


def _plot_losses(rows: list[dict[str, Any]], target: Path) -> Path:
    figure, axes = _figure()
    width = max(1, len(rows) // 30)
    for number, name in enumerate(rows[-1]["proportions"]):
        points = [(row["step"], row["domain_loss"][name]) for row in rows if name in row["domain_loss"]]
        if points:
            losses = _smooth([loss for _, loss in points], width)
            axes.plot([step for step, _ in points], losses, color=f"C{number}", label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss by domain")
    axes.legend()
    figure.savefig(target, dpi=120)
    return target
