"""How much a selection of a run chooses, out of what, and where its files go."""

from __future__ import annotations

from pathlib import Path

from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.providers.registry import needs_whole_pool
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.session import Session


def make_candidates(session: Session, roles: RunRoles, pool: SamplePool, batch_size: int) -> CandidateRotation | None:
    """The parts of the pool that selections score, or None for all of it.

    Raises UserError when there are fewer samples than one selection chooses.
    """
    selector, keys = roles.algorithms.selector, session.config.dataflex
    if selector is None:
        return None
    (key, steps), fraction = _selection_length(session, roles), keys.candidate_fraction
    num_selected = batch_size * steps
    if num_selected > len(pool):
        raise UserError(
            f"{key}: {steps} steps of {batch_size} samples need {num_selected} chosen samples, the datasets have "
            f"{len(pool)}; at most {len(pool) // batch_size} steps are possible"
        )
    if fraction == 1:
        return None
    reuse = keys.score_reuse == "latest"
    if reuse and needs_whole_pool(selector):
        name = roles.specs["selector"]["name"]
        raise ConfigError(
            f"score_reuse: latest: selector {name} compares samples that are clustered together; use none"
        )
    candidates = CandidateRotation(pool.sizes, fraction, session.data_seed, reuse_old_scores=reuse)
    if (
        roles.algorithms.mixer is None and num_selected > candidates.num_total()
    ):  # with a mixer, parts follow its quotas
        raise UserError(
            f"candidate_fraction: {fraction} of {len(pool)} samples are {candidates.num_total()}, but {steps} steps of "
            f"{batch_size} samples need {num_selected}; at least {num_selected / len(pool):.3g} is needed"
        )
    return candidates


def _selection_length(session: Session, roles: RunRoles) -> tuple[str, int]:
    """(key, steps) of how long the samples of one selection last; 0 for a filter, which keeps as many as it says."""
    if roles.pipeline is None:
        return "update_step", session.config.dataflex.update_step
    stage = roles.pipeline.role_stages["selector"]
    return "pipeline.stages: every", 0 if stage.mode == "filter" else stage.every


def selection_folder(session: Session, roles: RunRoles) -> Path:
    """The folder of a selection's files."""
    selector = roles.algorithms.selector
    if selector is not None and selector.cache_dir:
        return Path(selector.cache_dir)
    shared = None if roles.pipeline is None else roles.pipeline.arguments.cache_dir
    if shared is None or selector is None:
        return session.output_dir / "selections"
    return Path(shared) / f"selector_{str(roles.specs['selector']['name']).rpartition(':')[2]}"


def scoreboard_folder(session: Session, roles: RunRoles) -> Path | None:
    """The folder of the losses known at each plan, None when they are not saved."""
    arguments = None if roles.pipeline is None else roles.pipeline.arguments
    if arguments is None or not arguments.save_plans:
        return None
    return session.output_dir if arguments.cache_dir is None else Path(arguments.cache_dir)
