"""What candidates and samples of a run are compared with: the evaluation sets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from dataflex_mega.data.pool import SamplePool
from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.providers.registry import named, wants_targets
from dataflex_mega.signals.computer import TargetSets
from dataflex_mega.signals.sample_embeddings import MeanTargetEmbedding
from dataflex_mega.types import CutsTargets, EmbeddingSpec, NeedsBatchGradients, NeedsHidden

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


def groups(run: Opened) -> list[SamplePool]:
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
    return SamplePool([domain for one in sets for domain in one.domains]).partition(selector.task_boundaries)


def for_gradients(run: Build, engine: Any) -> TargetSets | None:
    """What gradient scores compare with."""
    found = groups(run)
    collate = partial(run.collate, pack_length=None)
    return TargetSets(found, partial(_gradient_scorer, run, engine, set()), collate) if found else None


def _gradient_scorer(run: Build, engine: Any, said: set[str], adam: bool) -> Any:
    """The backend's scorer; the first time with a line about what it computes with."""
    made = engine.gradient_scorer(adam)
    if hasattr(made, "choice") and made.choice.message not in said:
        said.add(made.choice.message)
        run.say(made.choice.message)
    return made


def hidden_spec(run: Build) -> EmbeddingSpec | None:
    """What the weighter compares of hidden states."""
    return run.roles.weighter.hidden if isinstance(run.roles.weighter, NeedsHidden) else None


def mean_of_targets(run: Build, engine: Any) -> MeanTargetEmbedding | None:
    """What hidden states are compared with."""
    size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
    sets, dp_rank, dp_size = list(run.evaluation.values()), run.parallel_info.dp_rank, run.parallel_info.dp_size
    return MeanTargetEmbedding(sets, run.collate, engine.embed, size, dp_rank, dp_size, run.collectives.all_reduce_sum) if sets else None
