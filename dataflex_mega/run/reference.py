"""Token losses of a reference model for the pool of a run: found, built when they are not there, checked."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.distributed.agreement import run_on_main, waited_lock
from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.llamafactory.args import first_line
from dataflex_mega.llamafactory.model_checks import UNREADABLE, auto_class, check_positions, preview_model
from dataflex_mega.locks import FolderLock
from dataflex_mega.run import reference_model
from dataflex_mega.run.data import RunData
from dataflex_mega.run.preference import has_pairs
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.session import Session
from dataflex_mega.store.manifest import MANIFEST
from dataflex_mega.store.reference_losses import ReferenceLossCache
from dataflex_mega.types import Batch

FOLDER = "reference"  # in output_dir, when `reference_cache` names none


def find_cache(session: Session, roles: RunRoles, pool: SamplePool) -> ReferenceLossCache | None:
    """The cache that a run reads, not yet built or checked; None when no algorithm of the run asks for it.

    Raises ConfigError when one does and neither key is set, and CheckpointError when neither a model nor a cache is there.
    """
    keys = session.config.dataflex
    if not roles.needs_reference:
        if keys.reference_model or (keys.reference_cache and not has_pairs(session.args)):
            session.report(
                "note: reference_model and reference_cache are not used: no algorithm of this run asks for them"
            )
        return None
    if keys.reference_model is None and keys.reference_cache is None:
        names = ", ".join(f"{kind} {spec['name']}" for kind, spec in roles.specs.items())
        raise ConfigError(
            f"reference_model: missing; {names} compares losses with those of a reference model: set reference_model (a "
            "Hugging Face folder or a checkpoint) or reference_cache (a folder that `dataflex-cli reference` wrote)"
        )
    return configured_cache(session, pool)


def configured_cache(session: Session, pool: SamplePool) -> ReferenceLossCache:
    """The cache that a configuration names, whatever its state."""
    keys, collectives = session.config.dataflex, session.collectives
    folder = Path(keys.reference_cache or session.output_dir / FOLDER).expanduser()
    source = None if keys.reference_model is None else Path(keys.reference_model).expanduser()
    identity = {
        "model": run_on_main(collectives, partial(_model_of, source, folder)),
        "data": run_on_main(collectives, pool.content_hash),
        "cutoff_len": session.args.data.cutoff_len,
    }
    return ReferenceLossCache(folder, identity, len(pool), keys.reference_dtype)


def ensure_complete(session: Session, data: RunData, cache: ReferenceLossCache, source: Source | None = None) -> None:
    """Build what is missing, and check every block, the work divided over ranks. `source`: None: reference_model.

    Raises CheckpointError for a cache that is another model's or data's, that cannot be finished without reference_model, or
    that is damaged.
    """
    collectives, info = session.collectives, session.parallel_info
    if not run_on_main(collectives, cache.is_complete):
        if source is None and session.config.dataflex.reference_model is None:
            raise CheckpointError(f"reference_cache: {cache.folder} is not finished; set reference_model to finish it")
        with waited_lock(collectives, FolderLock(cache.folder), session.report):
            if not run_on_main(collectives, cache.is_complete):  # another job may have built it meanwhile
                build_cache(session, data, cache, source or _source_of_key(session))
    per_rank = collectives.all_gather_objects(cache.integrity_errors(info.rank, info.world_size))
    errors = [error for errors in per_rank for error in errors]
    if errors:
        more = f" and {len(errors) - 1} more" if len(errors) > 1 else ""
        raise CheckpointError(f"reference_cache: {errors[0]}{more}; remove {cache.folder} to build it again")


def _model_of(source: Path | None, folder: Path) -> str:
    """The fingerprint of the reference model; without one, of the model that the cache says it was made with."""
    if source is not None:
        return reference_model.fingerprint(source)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"reference_cache: {folder} has no {MANIFEST}; set reference_model to build it there")
    try:
        return str(json.loads(manifest.read_text())["identity"]["model"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"reference_cache: {manifest} cannot be read: {error}") from error


# -- building ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The reference model: how messages call it, and what makes the function of it that gives each sample's losses."""

    name: str
    open: Callable[[], Callable[[Batch], Tensor]]  # the function: a batch of n samples -> [n, ...] on the CPU


def _source_of_key(session: Session) -> Source:
    folder = Path(session.config.dataflex.reference_model or "").expanduser()

    def open_folder() -> Callable[[Batch], Tensor]:
        with reference_model.readable(session, folder) as model_folder:
            return reference_losses(session, model_folder)

    return Source(str(folder), open_folder)


def build_cache(session: Session, data: RunData, cache: ReferenceLossCache, source: Source) -> None:
    """Compute the blocks that are missing; rank r takes every world-th of them. The run's random numbers are untouched."""
    collectives, world_size = session.collectives, session.parallel_info.world_size
    run_on_main(collectives, cache.create_or_resume)
    missing = run_on_main(collectives, cache.missing_blocks)
    device = session.parallel_info.device
    devices = [device] if device.type == "cuda" else []
    session.report(
        f"reference: {len(missing)} of {cache.num_blocks} blocks to compute with {source.name} into {cache.folder}"
    )
    with torch.random.fork_rng(devices):
        losses = source.open()
        for done in range(0, len(missing), world_size):
            _compute_blocks(session, data, cache, missing[done : done + world_size], losses)
            session.report(f"reference: {min(done + world_size, len(missing))}/{len(missing)} blocks")
        del losses
        gc.collect()
        if devices:
            torch.cuda.empty_cache()
    collectives.barrier()
    run_on_main(collectives, cache.finalize)


def _compute_blocks(
    session: Session,
    data: RunData,
    cache: ReferenceLossCache,
    blocks: list[int],
    losses: Callable[[Batch], Tensor],
) -> None:
    """One block per rank. A rank without one repeats the first and drops it: sharded layers are called together."""
    rank, size = session.parallel_info.rank, session.score_batch_size
    has_block = rank < len(blocks)
    ids = cache.ids_of_block(blocks[rank if has_block else 0])
    longest = max(len(cache.ids_of_block(block)) for block in blocks)
    rows: list[Tensor] = []
    for batch_ids, count in lockstep_batches(ids, size, -(-longest // size)):
        samples = data.pool.fetch(batch_ids)
        plain = [replace(sample, reference_losses=None) for sample in samples]
        padded = losses(data.collate(plain, pack_length=None))
        rows += [row[: len(sample.input_ids)] for row, sample in zip(padded, samples, strict=True)][:count]
    if has_block:
        cache.write_block(blocks[rank], rows)


def reference_losses(session: Session, source: Path) -> Callable[[Batch], Tensor]:
    """The reference model as a function: [b, S] token losses on the CPU, float32, no gradient.

    It is laid out as the training model is where that is sharded, and whole on every process otherwise.
    """
    layout = read_layout(session.config.llamafactory, session.parallel_info)
    if layout.mode == "ddp":
        layout = replace(layout, mode="single")  # nothing is trained, so nothing is reduced
    model = _load(session, source, layout.dtype)
    runner = FSDPModelRunner(parallelize(model, layout, session.parallel_info), layout, session.parallel_info)
    runner.module.eval()

    def losses(batch: Batch) -> Tensor:
        with torch.no_grad():
            return runner.token_losses(batch.to(runner.device)).cpu()

    return losses


def _check_reference(session: Session, source: str) -> None:
    """Raises ConfigError for weights that are not those of its configuration, and rows longer than its positions."""
    from transformers import AutoConfig

    options = {"trust_remote_code": bool(session.args.model.trust_remote_code)}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except UNREADABLE as error:
        raise ConfigError(f"reference_model {source!r}: config.json: {first_line(error)}") from error
    preview = preview_model("reference_model", source, config, options)
    check_positions(int(session.args.data.cutoff_len), config, preview, f"reference_model {source!r}")


def _load(session: Session, source: Path, dtype: torch.dtype) -> Any:
    """The model in the precision that the run computes in. Raises ConfigError when its tokens are not the run's."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer

    tokenizer: Any = session.tokenizer
    trust, of_adapter = bool(session.args.model.trust_remote_code), reference_model.is_adapter(source)
    base = reference_model.base_of(source) if of_adapter else str(source)
    _check_reference(session, base)
    try:
        options: dict[str, Any] = {"dtype": torch.float32 if of_adapter else dtype, "trust_remote_code": trust}
        auto = auto_class(AutoConfig.from_pretrained(base, trust_remote_code=trust))
        model: Any = auto.from_pretrained(base, **options)
        if of_adapter:
            model = PeftModel.from_pretrained(model, str(source)).merge_and_unload().to(dtype)  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"reference_model {str(source)!r}: {first_line(error)}") from error
    entries = model.get_input_embeddings().weight.shape[0]
    if entries < len(tokenizer):
        raise ConfigError(
            f"reference_model: {source} knows {entries} tokens, the tokenizer of this run {len(tokenizer)}"
        )
    if (source / "tokenizer.json").is_file():
        theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=trust).get_vocab()
        ours = tokenizer.get_vocab()
        for token in sorted(set(theirs) & set(ours)):
            if theirs[token] != ours[token]:
                found = f"{token!r} is token {theirs[token]} there and {ours[token]} here"
                raise ConfigError(f"reference_model: {source} has another tokenizer than this run: {found}")
    return model
