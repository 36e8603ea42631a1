"""What libraries would refuse, or never do, once the model is built: tried between the data and the model."""

from __future__ import annotations

from dataflex_mega.llamafactory.callbacks import check_metric
from dataflex_mega.run.data import RunData
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.session import Session

METRICS = ("loss", "perplexity")  # of each evaluation set


def check(session: Session, data: RunData, schedule: RunSchedule) -> None:
    """Raises ConfigError naming the key of a metric that no evaluation will give."""
    direction_is_set = session.config.llamafactory.get("greater_is_better") is not None
    check_metric(session.args, metric_names(list(data.evaluation)), session.callbacks, direction_is_set)


def metric_names(sets: list[str]) -> list[str]:
    """What an evaluation gives for evaluation sets of these names; one without a name is the only one."""
    return [f"eval_{name}_{metric}" if name else f"eval_{metric}" for name in sets for metric in METRICS]
