"""Token losses of a reference model for the pool of a run: found, built when they are not there, checked."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.store.manifest import MANIFEST
from dataflex_mega.store.reference_losses import ReferenceLossCache, model_fingerprint
from dataflex_mega.types import Batch, NeedsReference

if TYPE_CHECKING:
    from dataflex_mega.run.build import Opened

FOLDER = "reference"  # in output_dir, when `reference_cache` names none


def find(run: Opened) -> ReferenceLossCache | None:
    """The cache that a run reads, not yet built or checked; None when no algorithm of the run asks for it.

    Raises ConfigError when one does and neither key is set, and CheckpointError when neither a model nor a cache is there.
    """
    roles = (run.roles.selector, run.scoring, run.roles.mixer, run.roles.weighter)
    if not any(isinstance(role, NeedsReference) for role in roles):
        if run.ours.reference_model or run.ours.reference_cache:
            run.say("note: reference_model and reference_cache are not used: no algorithm of this run asks for them")
        return None
    if run.ours.reference_model is None and run.ours.reference_cache is None:
        names = ", ".join(f"{kind} {spec['name']}" for kind, spec in run.specs.items())
        raise ConfigError(
            f"reference_model: missing; {names} compares losses with those of a reference model: set reference_model (a "
            "Hugging Face folder) or reference_cache (a folder that `dataflex-cli reference` wrote)"
        )
    return cache_of(run)


def cache_of(run: Opened) -> ReferenceLossCache:
    """The cache that a configuration names, whatever its state."""
    model = run.ours.reference_model
    folder = Path(run.ours.reference_cache or run.output / FOLDER).expanduser()
    source = None if model is None else Path(model).expanduser()
    identity = {
        "model": run_on_main(run.collectives, partial(_model_of, source, folder)),
        "data": run_on_main(run.collectives, run.pool.content_hash),
        "cutoff_len": run.args.data.cutoff_len,
    }
    return ReferenceLossCache(folder, identity, len(run.pool), run.ours.reference_dtype)


def ensure(run: Opened, cache: ReferenceLossCache) -> None:
    """Build what is missing, and check every block, the work divided over ranks. Raises CheckpointError for a cache that is
    another model's or data's, that cannot be finished without reference_model, or that is damaged."""
    if not run_on_main(run.collectives, cache.is_complete):
        if run.ours.reference_model is None:
            raise CheckpointError(f"reference_cache: {cache.folder} is not finished; set reference_model to finish it")
        build(run, cache, Path(run.ours.reference_model).expanduser())
    shares = run.collectives.all_gather_objects(cache.integrity_errors(run.parallel_info.rank, run.parallel_info.world_size))
    faults = [fault for share in shares for fault in share]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise CheckpointError(f"reference_cache: {faults[0]}{more}; remove {cache.folder} to build it again")


def _model_of(source: Path | None, folder: Path) -> str:
    """The fingerprint of the reference model; without one, of the model that the cache says it was made with."""
    if source is not None:
        if not (source / "config.json").is_file():
            raise ConfigError(f"reference_model: {source} is not a Hugging Face folder (no config.json)")
        return model_fingerprint(source)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"reference_cache: {folder} has no {MANIFEST}; set reference_model to build it there")
    try:
        return str(json.loads(manifest.read_text())["identity"]["model"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"reference_cache: {manifest} cannot be read: {error}") from error


# -- building ------------------------------------------------------------------------------------------------------------


def build(run: Opened, cache: ReferenceLossCache, source: Path) -> None:
    """Compute the blocks that are missing; rank r takes every world-th of them. The run's random numbers are untouched."""
    run_on_main(run.collectives, cache.create_or_resume)
    missing = run_on_main(run.collectives, cache.missing_blocks)
    devices = [run.parallel_info.device] if run.parallel_info.device.type == "cuda" else []
    run.say(f"reference: {len(missing)} of {cache.num_blocks} blocks to compute with {source} into {cache.folder}")
    with torch.random.fork_rng(devices):
        losses = forward(run, source)
        for done in range(0, len(missing), run.parallel_info.world_size):
            _turn(run, cache, missing[done : done + run.parallel_info.world_size], losses)
            run.say(f"reference: {min(done + run.parallel_info.world_size, len(missing))}/{len(missing)} blocks")
        del losses
        gc.collect()
        if devices:
            torch.cuda.empty_cache()
    run.collectives.barrier()
    run_on_main(run.collectives, cache.finalize)


def _turn(run: Opened, cache: ReferenceLossCache, blocks: list[int], losses: Callable[[Batch], Tensor]) -> None:
    """One block a rank. A rank without one computes the first once more and drops it: sharded layers are called together."""
    has_one = run.parallel_info.rank < len(blocks)
    ids = cache.ids_of_block(blocks[run.parallel_info.rank if has_one else 0])
    longest = max(len(cache.ids_of_block(block)) for block in blocks)
    size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
    collate = partial(run.collate, pack_length=None)
    found: list[Tensor] = []
    for batch_ids, count in lockstep_batches(ids, size, -(-longest // size)):
        samples = run.pool.fetch(batch_ids)
        rows = losses(collate([replace(sample, reference_losses=None) for sample in samples]))
        found += [row[: len(sample.input_ids)] for row, sample in zip(rows, samples, strict=True)][:count]
    if has_one:
        cache.write_block(blocks[run.parallel_info.rank], found)


def forward(run: Opened, source: Path) -> Callable[[Batch], Tensor]:
    """The reference model as a function: [b, S] token losses on the CPU, float32, no gradient.

    It is laid out as the training model is where that is sharded, and whole on every process otherwise.
    """
    from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout
    from dataflex_mega.engines.fsdp.runner import FSDPModelRunner

    layout = read_layout(run.config.llamafactory, run.parallel_info)
    if layout.mode == "ddp":
        layout = replace(layout, mode="single")  # nothing is trained, so nothing is reduced
    model = _load(run, source, layout.dtype)
    runner = FSDPModelRunner(parallelize(model, layout, run.parallel_info), layout, run.parallel_info)
    runner.module.eval()

    def losses(batch: Batch) -> Tensor:
        with torch.no_grad():
            return runner.token_losses(batch.to(runner.device)).cpu()

    return losses


def _load(run: Opened, source: Path, dtype: torch.dtype) -> Any:
    """The model in the precision that the run computes in. Raises ConfigError when its tokens are not the run's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = run.tokenizer_module["tokenizer"]
    trust = bool(run.args.model.trust_remote_code)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        raise ConfigError(f"reference_model: {source}: {str(error).strip().splitlines()[0]}") from error
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
