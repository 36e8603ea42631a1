"""Plots of a comparison: proportions by step, training loss by domain, held-out perplexity by method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.compare.results import MACRO, OVERALL, Comparison
from dataflex_mega.log_files import read_rows
from dataflex_mega.metrics import STEPS_FILE

MAX_COLUMNS = 3  # panels side by side
NUM_BINS = 30  # a loss curve shows means over 1/30 of the run


def plot_comparison(comparison: Comparison) -> list[Path]:
    """Write proportions.png, domain_loss.png and perplexity.png into the suite's output_dir -> the paths that have data.

    Proportions and training losses come from metrics.jsonl, which LLaMA-Factory's own loop does not write.
    """
    logs = {
        summary.method: [
            log for r in comparison.results_of(summary.method) if len(log := read_rows(r.folder / STEPS_FILE)) > 1
        ]
        for summary in comparison.summaries
    }
    logs = {method: runs for method, runs in logs.items() if runs}
    folder = comparison.suite.output_dir
    paths = []
    if logs:
        paths.append(_plot_proportions(logs, folder / "proportions.png"))
        paths.append(_plot_losses(logs, folder / "domain_loss.png"))
    if comparison.summaries:
        paths.append(_plot_perplexity(comparison, folder / "perplexity.png"))
    return paths


def _panels(count: int, share_y: bool) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(MAX_COLUMNS, count)
    down = -(-count // across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=share_y).flatten().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _plot_band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    """Plot the mean of the seeds' curves and the band from the lowest to the highest. All have the length of `x`."""
    columns = list(zip(*curves, strict=True))
    axes.plot(x, [sum(column) / len(column) for column in columns], color=color, label=label)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _plot_proportions(logs: dict[str, list[Any]], target: Path) -> Path:
    figure, panels = _panels(len(logs), share_y=True)
    for axes, (method, runs) in zip(panels, logs.items(), strict=True):
        length = min(len(run) for run in runs)
        steps = [row["step"] for row in runs[0][:length]]
        for number, name in enumerate(runs[0][0]["proportions"]):
            _plot_band(
                axes, steps, [[row["proportions"][name] for row in run[:length]] for run in runs], f"C{number}", name
            )
        axes.set(title=method, xlabel="step", ylabel="proportion", ylim=(0, None))
    panels[0].legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target


def _plot_losses(logs: dict[str, list[Any]], target: Path) -> Path:
    names = list(next(iter(logs.values()))[0][0]["proportions"])
    figure, panels = _panels(len(names), share_y=False)
    for axes, name in zip(panels, names, strict=True):
        for number, (method, runs) in enumerate(logs.items()):
            curves = [bin_losses(run, name) for run in runs]
            bins = [index for index in curves[0] if all(index in curve for curve in curves)]
            if bins:
                x = [tokens_by_end_of_bin(runs[0], index) for index in bins]
                _plot_band(axes, x, [[curve[index] for index in bins] for curve in curves], f"C{number}", method)
        axes.set(title=name, xlabel="tokens of all domains", ylabel="training loss (nats per token)")
    panels[0].legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target


def bin_losses(run: Sequence[Any], name: str) -> dict[int, float]:
    """A run's log -> bin -> mean loss of a domain, weighted by its samples; bins without samples are left out."""
    width = max(1, len(run) // NUM_BINS)
    means = {}
    for start in range(0, len(run), width):
        seen = [
            (row["drawn"][name], row["domain_loss"][name])
            for row in run[start : start + width]
            if name in row["domain_loss"]
        ]
        weight = sum(count for count, _ in seen)
        if weight > 0:
            means[start // width] = sum(count * loss for count, loss in seen) / weight
    return means


def tokens_by_end_of_bin(run: Sequence[Any], index: int) -> int:
    """Tokens that a run had trained on by the end of bin `index`."""
    width = max(1, len(run) // NUM_BINS)
    return sum(row["tokens"] for row in run[: (index + 1) * width])


def _plot_perplexity(comparison: Comparison, target: Path) -> Path:
    names = [OVERALL, MACRO, *comparison.domains]
    figure, panels = _panels(len(names), share_y=False)
    for axes, name in zip(panels, names, strict=True):
        for number, summary in enumerate(comparison.summaries):
            spread = summary.perplexity[name]
            axes.errorbar([number], [spread.mean], yerr=spread.deviation, fmt="o", color=f"C{number}", capsize=5)
            positions = [number + 0.2] * len(spread.values)
            axes.plot(positions, spread.values, ".", color=f"C{number}", alpha=0.6, markersize=4)
        labels = [summary.method for summary in comparison.summaries]
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set(title=name, ylabel="perplexity", xlim=(-0.5, len(labels) - 0.5))
    figure.suptitle("Held-out perplexity: mean and standard deviation over seeds, dots are seeds")
    figure.savefig(target, dpi=120)
    return target
