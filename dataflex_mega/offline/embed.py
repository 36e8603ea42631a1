"""Embeddings of a source, block by block, the blocks divided over processes; a killed build goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.errors import UserError
from dataflex_mega.offline.embeddings import Embeddings
from dataflex_mega.offline.encoders import Encoder
from dataflex_mega.offline.sample_sources import SampleSource

Progress = Callable[[int, int], None]  # (rows done, rows in all)


def embed(
    source: SampleSource, encoder: Encoder, folder: Path, parallel_info: ParallelInfo, dtype: str, block: int, progress: Progress
) -> Embeddings:
    """Write the embeddings of `source` into `folder`, or what is missing of them; every process calls it.

    What a process holds is a block of rows and the encoder, however many samples there are. Raises UserError on all
    processes, CheckpointError for a folder that belongs to something else.
    """
    collectives = TorchCollectives(parallel_info)
    identity = {"data": source.identity, **encoder.identity()}
    made = Embeddings(folder, identity, (len(source), encoder.size), dtype, block)
    missing = begin(made, collectives)
    done = len(source) - sum(len(made.rows(b)) for b in missing)
    progress(done, len(source))
    for turn in range(parallel_info.rank, len(missing), parallel_info.world_size):
        rows = made.rows(missing[turn])
        made.write(missing[turn], encoder(source.fetch(rows)), parallel_info.rank)
        # The others go on at about the same pace.
        done = min(done + len(rows) * parallel_info.world_size, len(source))
        progress(done, len(source))
    collectives.barrier()
    if missing and parallel_info.is_main:
        made.finish()
    collectives.barrier()
    return made


def begin(made: Embeddings, collectives: TorchCollectives) -> list[int]:
    """The blocks to be computed, found by the main process; none when the build was finished before."""
    missing: list[int] = []
    error = None
    if collectives.parallel_info.is_main:
        try:
            if not made.complete():
                made.begin()
                missing = made.missing()
                if not missing:  # killed between the last block and the end
                    made.finish()
        except UserError as found:
            error = found
    missing, error = collectives.broadcast_object((missing, error))
    if error is not None:
        raise error
    return missing
