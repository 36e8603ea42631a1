"""How much a selection of a run chooses, out of what, and where its files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_mega.errors import ConfigError, UserError

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build


def candidates_of(run: Build) -> Any:
    """The parts of the pool that selections consider, or None for all of it.

    Raises UserError when there are fewer samples than one selection chooses.
    """
    from dataflex_mega.data.candidates import CandidateRotation
    from dataflex_mega.types import NeedsClusters

    if run.roles.selector is None:
        return None
    (key, steps), batch, share = _window(run), run.batch_partition.global_batch_size, run.ours.candidate_fraction
    window = batch * steps
    if window > len(run.pool):
        raise UserError(
            f"{key}: {steps} steps of {batch} samples need {window} chosen samples, the datasets have {len(run.pool)}; "
            f"at most {len(run.pool) // batch} steps are possible"
        )
    if share == 1:
        return None
    if run.ours.score_reuse == "latest" and isinstance(run.roles.selector, NeedsClusters):
        name = run.specs["selector"]["name"]
        raise ConfigError(
            f"score_reuse: latest: selector {name} compares samples that are clustered together; use none"
        )
    made = CandidateRotation(run.pool.sizes, share, run.data_seed, reuse_old_scores=run.ours.score_reuse == "latest")
    if run.roles.mixer is None and window > made.num_total():  # with a mixer, parts are as large as its quotas
        raise UserError(
            f"candidate_fraction: {share} of {len(run.pool)} samples are {made.num_total()}, but {steps} steps of {batch} samples need "
            f"{window}; at least {window / len(run.pool):.3g} is needed"
        )
    return made


def _window(run: Build) -> tuple[str, int]:
    """(key, steps) of how long the samples of one selection last; 0 for a filter, which keeps as many as it says."""
    if run.pipeline is None:
        return "update_step", run.ours.update_step
    stage = run.pipeline.role_stages["selector"]
    return "pipeline.stages: every", 0 if stage.mode == "filter" else stage.every


def files_of(run: Build) -> Path:
    """The folder of a selection's files."""
    own = getattr(run.roles.selector, "cache_dir", None)
    if own:
        return Path(own)
    shared = None if run.pipeline is None else run.pipeline.arguments.cache_dir
    if shared is None or run.roles.selector is None:
        return run.output / "selections"
    return Path(shared) / f"selector_{run.specs['selector']['name'].rpartition(':')[2]}"


def boards_of(run: Build) -> Path | None:
    """The folder of what is known of the losses at each plan, None when that is not wanted."""
    arguments = None if run.pipeline is None else run.pipeline.arguments
    if arguments is None or not arguments.save_plans:
        return None
    return run.output if arguments.cache_dir is None else Path(arguments.cache_dir)
