"""Plots of a comparison: how the mixtures moved, what each domain learned, what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.compare.results import MACRO, OVERALL, Comparison, rows
from dataflex_mega.metrics import STEPS_FILE

COLUMNS = 3  # panels side by side
SMOOTHED = 30  # a loss curve shows means over 1/30 of the run


def draw(found: Comparison) -> list[Path]:
    """Write proportions.png, domain_loss.png and perplexity.png into the suite's output_dir -> those that there is data for.

    Proportions and training losses come from metrics.jsonl, which LLaMA-Factory's own loop does not write.
    """
    logs = {
        summary.method: [log for r in found.of(summary.method) if len(log := rows(r.folder / STEPS_FILE)) > 1]
        for summary in found.summaries
    }
    logs = {method: runs for method, runs in logs.items() if runs}
    folder = found.suite.output
    made = []
    if logs:
        made.append(_proportions(logs, folder / "proportions.png"))
        made.append(_losses(logs, folder / "domain_loss.png"))
    if found.summaries:
        made.append(_perplexity(found, folder / "perplexity.png"))
    return made


def _panels(count: int, share_y: bool) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(COLUMNS, count)
    down = -(-count // across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False, sharey=share_y).flatten().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _band(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, label: str) -> None:
    """The mean of one curve a seed, and the room between the lowest and the highest. All have the length of `x`."""
    columns = list(zip(*curves, strict=True))
    axes.plot(x, [sum(column) / len(column) for column in columns], color=color, label=label)
    if len(curves) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _proportions(logs: dict[str, list[Any]], target: Path) -> Path:
    figure, panels = _panels(len(logs), share_y=True)
    for axes, (method, runs) in zip(panels, logs.items(), strict=True):
        length = min(len(run) for run in runs)
        steps = [row["step"] for row in runs[0][:length]]
        for number, name in enumerate(runs[0][0]["proportions"]):
            _band(axes, steps, [[row["proportions"][name] for row in run[:length]] for run in runs], f"C{number}", name)
        axes.set(title=method, xlabel="step", ylabel="proportion", ylim=(0, None))
    panels[0].legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target


def _losses(logs: dict[str, list[Any]], target: Path) -> Path:
    names = list(next(iter(logs.values()))[0][0]["proportions"])
    figure, panels = _panels(len(names), share_y=False)
    for axes, name in zip(panels, names, strict=True):
        for number, (method, runs) in enumerate(logs.items()):
            curves = [binned_loss(run, name) for run in runs]
            places = [place for place in curves[0] if all(place in curve for curve in curves)]
            if places:
                x = [places_tokens(runs[0], place) for place in places]
                _band(axes, x, [[curve[place] for place in places] for curve in curves], f"C{number}", method)
        axes.set(title=name, xlabel="tokens of all domains", ylabel="training loss (nats a token)")
    panels[0].legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target


def binned_loss(run: Sequence[Any], name: str) -> dict[int, float]:
    """A run's lines -> piece of the run -> mean loss of a domain in it, by samples drawn; pieces without any left out."""
    width = max(1, len(run) // SMOOTHED)
    found = {}
    for start in range(0, len(run), width):
        seen = [
            (row["drawn"][name], row["domain_loss"][name])
            for row in run[start : start + width]
            if name in row["domain_loss"]
        ]
        weight = sum(count for count, _ in seen)
        if weight > 0:
            found[start // width] = sum(count * loss for count, loss in seen) / weight
    return found


def places_tokens(run: Sequence[Any], place: int) -> int:
    """Tokens that a run had trained on by the end of a piece."""
    width = max(1, len(run) // SMOOTHED)
    return sum(row["tokens"] for row in run[: (place + 1) * width])


def _perplexity(found: Comparison, target: Path) -> Path:
    names = [OVERALL, MACRO, *found.domains]
    figure, panels = _panels(len(names), share_y=False)
    for axes, name in zip(panels, names, strict=True):
        for number, summary in enumerate(found.summaries):
            spread = summary.perplexity[name]
            axes.errorbar([number], [spread.mean], yerr=spread.deviation, fmt="o", color=f"C{number}", capsize=5)
            places = [number + 0.2] * len(spread.values)
            axes.plot(places, spread.values, ".", color=f"C{number}", alpha=0.6, markersize=4)
        labels = [summary.method for summary in found.summaries]
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set(title=name, ylabel="perplexity", xlim=(-0.5, len(labels) - 0.5))
    figure.suptitle("Held-out perplexity: mean and standard deviation over seeds, dots are seeds")
    figure.savefig(target, dpi=120)
    return target
