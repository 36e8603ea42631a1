"""Embeddings of a source, block by block, the blocks divided over processes; a killed build goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dataflex_mega.distributed.collectives import Collectives
from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.errors import UserError
from dataflex_mega.offline.embeddings import Embeddings
from dataflex_mega.offline.encoders import Encoder
from dataflex_mega.offline.sources import Source

Progress = Callable[[int, int], None]  # (rows done, rows in all)


def embed(
    source: Source, encoder: Encoder, folder: Path, mesh: Mesh, dtype: str, block: int, progress: Progress
) -> Embeddings:
    """Write the embeddings of `source` into `folder`, or what is missing of them; every process calls it.

    What a process holds is a block of rows and the encoder, however many samples there are. Raises UserError on all
    processes, CheckpointError for a folder that belongs to something else.
    """
    ranks = Collectives(mesh)
    identity = {"data": source.identity, **encoder.identity()}
    made = Embeddings(folder, identity, (len(source), encoder.size), dtype, block)
    missing = begin(made, ranks)
    done = len(source) - sum(len(made.rows(b)) for b in missing)
    progress(done, len(source))
    for turn in range(mesh.rank, len(missing), mesh.world):
        rows = made.rows(missing[turn])
        made.write(missing[turn], encoder(source.fetch(rows)), mesh.rank)
        # The others go on at about the same pace.
        done = min(done + len(rows) * mesh.world, len(source))
        progress(done, len(source))
    ranks.barrier()
    if missing and mesh.is_main:
        made.finish()
    ranks.barrier()
    return made


def begin(made: Embeddings, ranks: Collectives) -> list[int]:
    """The blocks to be computed, found by the main process; none when the build was finished before."""
    missing: list[int] = []
    error = None
    if ranks.mesh.is_main:
        try:
            if not made.complete():
                made.begin()
                missing = made.missing()
                if not missing:  # killed between the last block and the end
                    made.finish()
        except UserError as found:
            error = found
    missing, error = ranks.share_main((missing, error))
    if error is not None:
        raise error
    return missing
