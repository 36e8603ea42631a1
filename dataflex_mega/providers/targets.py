"""What candidates and samples of a run are compared with: the evaluation sets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dataflex_mega.data.pool import Pool
from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.providers.registry import named, wants_targets
from dataflex_mega.signals.hidden import TargetMean
from dataflex_mega.signals.scorer import Targets
from dataflex_mega.types import CutsTargets, HiddenSpec, NeedsBatchGradients, NeedsHidden

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build, Opened


def check(run: Opened) -> None:
    """Raises UserError when an algorithm compares with target samples and there are none, ConfigError for tasks that do not
    fit them."""
    wanting = [f"selector {named(one)}" for one in run.measured if wants_targets(one)]
    if isinstance(run.roles.weighter, NeedsHidden | NeedsBatchGradients):
        wanting.append(f"weighter {run.specs['weighter']['name']}")
    if wanting and not run.evaluation:
        raise UserError(f"eval_dataset: {wanting[0]} needs target samples there (or val_size)")
    groups(run)


def groups(run: Opened) -> list[Pool]:
    """The tasks: the evaluation sets, or what a selector cuts them into."""
    sets, selector = list(run.evaluation.values()), run.roles.selector
    if not isinstance(selector, CutsTargets) or selector.task_boundaries is None:
        return sets
    samples = sum(len(one) for one in sets)
    if sum(selector.task_boundaries) != samples:
        name, total = run.specs["selector"]["name"], sum(selector.task_boundaries)
        raise ConfigError(
            f"selector.{name}.task_boundaries: the sizes sum to {total}, the evaluation sets have {samples} samples"
        )
    return Pool([domain for one in sets for domain in one.domains]).cut(selector.task_boundaries)


def for_gradients(run: Build, engine: Any) -> Targets | None:
    """What gradient scores compare with."""
    found = groups(run)
    collate = partial(run.collate, pack_length=None)
    return Targets(found, partial(_scorer, run, engine, set()), collate) if found else None


def _scorer(run: Build, engine: Any, said: set[str], adam: bool) -> Any:
    """The backend's scorer; the first time with a line about what it computes with."""
    made = run.backend.gradient_scorer(engine, adam)
    if hasattr(made, "choice") and made.choice.line not in said:
        said.add(made.choice.line)
        run.say(made.choice.line)
    return made


def hidden_spec(run: Build) -> HiddenSpec | None:
    """What the weighter compares of hidden states."""
    return run.roles.weighter.hidden if isinstance(run.roles.weighter, NeedsHidden) else None


def mean_of_targets(run: Build, engine: Any) -> TargetMean | None:
    """What hidden states are compared with."""
    size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
    sets, rank, ranks = list(run.evaluation.values()), run.mesh.dp_rank, run.mesh.dp_size
    return TargetMean(sets, run.collate, engine.embed, size, rank, ranks, run.ranks.sum) if sets else None
