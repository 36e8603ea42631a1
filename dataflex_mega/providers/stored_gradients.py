"""A gradient store for a run: found, built or continued, read. Every process takes part in all of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dataflex_mega.algorithms.requests import StoredGradientSignal
from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.distributed.agreement import run_and_agree, run_on_main, waited_lock
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.locks import FolderLock
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.providers.context import CandidateScope, SignalContext
from dataflex_mega.providers.gradient_features import GradientFeatures
from dataflex_mega.providers.registry import Provider, provides
from dataflex_mega.store import build, search
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout
from dataflex_mega.store.manifest import MANIFEST

FOLDER = "gradient_store"  # in output_dir, when the selector names none


@provides(StoredGradientSignal, scope="candidates", requires={Capability.GRADIENT_FEATURES}, needs_targets=True)
class StoredGradientProvider(Provider):
    """`dot` and `norm2` of candidates from a store of the current model."""

    def compute(self, request: StoredGradientSignal, scope: CandidateScope) -> dict[str, Tensor]:
        context = self.context
        features = GradientFeatures(context, request.projection, request.adam)
        identity = features.identity()
        folder = store_path(context, request, identity)
        store = open_or_build(features, folder, identity, request.block_size)
        directions = features.directions(context.target_batches(context.target_groups()))
        dot, norm2 = run_and_agree(context.collectives, partial(search.dot_products_of, store, directions, scope.ids))
        if request.store_dir is None:
            run_on_main(context.collectives, partial(remove_stale_stores, folder))
        return {"dot": dot, "norm2": norm2}


def store_path(context: SignalContext, request: StoredGradientSignal, identity: Mapping[str, Any]) -> Path:
    """The folder of the store of a model: its first digits, in the folder that the request names."""
    base = Path(request.store_dir or context.output_dir / FOLDER).expanduser()
    return base / f"{identity['gradient']}-{identity['model'][:12]}"


def open_or_build(
    features: GradientFeatures, folder: Path, identity: Mapping[str, Any], block_size: int
) -> GradientStore:
    """The store in `folder`, built to the end when it is not whole. Raises CheckpointError for one of something else."""
    collectives = features.context.collectives
    is_complete = partial(build.is_complete, folder)
    if not run_on_main(collectives, is_complete):
        with waited_lock(collectives, FolderLock(folder), features.context.report):
            if not run_on_main(collectives, is_complete):  # another job may have built it meanwhile
                build_missing_blocks(features, folder, identity, block_size)
    return run_and_agree(collectives, partial(GradientStore, folder, identity))


def build_missing_blocks(
    features: GradientFeatures, folder: Path, identity: Mapping[str, Any], block_size: int
) -> None:
    """Compute the blocks that are missing. A shard is written by one process, whichever began it."""
    parallel, collectives = features.context.parallel_info, features.context.collectives
    layout: StoreLayout = run_on_main(
        collectives, partial(build.create_or_resume, folder, identity, features.layout(block_size))
    )
    local_shards = range(parallel.dp_rank, layout.num_shards, parallel.dp_size)
    writers = run_and_agree(collectives, lambda: [build.ShardWriter(folder, layout, shard) for shard in local_shards])
    todo = [(writer, block) for writer in writers for block in writer.missing_blocks]
    counts = collectives.all_gather_objects(len(todo))
    num_batches = -(-min(layout.block_size, layout.num_samples) // features.batch_size)
    show = parallel.is_main and sum(counts)
    progress = ProgressCounter(f"gradient store {folder.name}: blocks", sum(counts)) if show else None
    try:
        # A rank that has no block left computes block 0 and drops it.
        for turn, (batch, _) in enumerate(lockstep_batches(todo, 1, max(counts), filler=[(None, 0)])):
            writer, number = batch[0]
            rows = features.rows(np.asarray(layout.ids_of_block(number)), num_batches)
            if writer is not None:
                writer.write(rows)
            if progress is not None:
                progress(sum(min(turn + 1, each) for each in counts))
    finally:
        for writer in writers:
            writer.close()
    collectives.barrier()
    run_on_main(collectives, partial(build.finalize, folder, identity, layout))


def remove_stale_stores(folder: Path) -> None:
    """Remove the stores of former models beside this one, and nothing but stores."""
    for other in folder.parent.iterdir():
        if other != folder and (other / MANIFEST).is_file():
            shutil.rmtree(other)
