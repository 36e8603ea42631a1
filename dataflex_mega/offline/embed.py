"""Embeddings of a source, block by block, the blocks divided over processes; a killed build resumes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dataflex_mega.distributed.agreement import run_on_main, waited_lock
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.locks import FolderLock
from dataflex_mega.log import get_logger
from dataflex_mega.offline.embeddings import Embeddings
from dataflex_mega.offline.encoders import Encoder
from dataflex_mega.offline.sample_sources import SampleSource

Progress = Callable[[int, int], None]  # (rows done, rows in all)


def embed(
    source: SampleSource,
    encoder: Encoder,
    folder: Path,
    parallel_info: ParallelInfo,
    dtype: str,
    block_size: int,
    progress: Progress,
) -> Embeddings:
    """Write the missing embeddings of `source` into `folder`; every process calls it.

    A process holds a block of rows and the encoder, however many samples there are. Raises UserError on all processes,
    CheckpointError for a folder with another identity.
    """
    collectives = TorchCollectives(parallel_info)
    identity = {"data": source.identity, **encoder.identity()}
    embeddings = Embeddings(folder, identity, (len(source), encoder.size), dtype, block_size)
    if run_on_main(collectives, embeddings.is_complete):
        progress(len(source), len(source))
        return embeddings
    with waited_lock(collectives, FolderLock(folder), partial(get_logger().info, "%s")):
        _write_missing(source, encoder, embeddings, collectives, progress)
    return embeddings


def _write_missing(
    source: SampleSource,
    encoder: Encoder,
    embeddings: Embeddings,
    collectives: TorchCollectives,
    progress: Progress,
) -> None:
    parallel_info = collectives.parallel_info
    missing = run_on_main(collectives, lambda: create_or_resume(embeddings))
    done = len(source) - sum(len(embeddings.rows_of_block(block)) for block in missing)
    progress(done, len(source))
    for turn in range(parallel_info.rank, len(missing), parallel_info.world_size):
        rows = embeddings.rows_of_block(missing[turn])
        embeddings.write_block(missing[turn], encoder(source.fetch(rows)), parallel_info.rank)
        # An estimate: the other processes advance at about the same pace.
        done = min(done + len(rows) * parallel_info.world_size, len(source))
        progress(done, len(source))
    collectives.barrier()
    if missing:
        run_on_main(collectives, embeddings.finalize)
    collectives.barrier()


def create_or_resume(embeddings: Embeddings) -> list[int]:
    """The blocks still to be computed; none when the build was finished before. One process calls it."""
    if embeddings.is_complete():
        return []
    embeddings.create_or_resume()
    missing = embeddings.missing_blocks()
    if not missing:  # killed between the last block and the manifest
        embeddings.finalize()
    return missing
