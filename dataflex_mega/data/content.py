"""What identifies the data of a run: a hash of every row of every domain.

The rows of a domain are hashed in blocks of a fixed number, which the ranks share, so the hash is the same on every number
of processes. A corpus brings the hash of its manifest, which `corpus_check` compares with its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from dataflex_mega.data.media import media_hash, media_of
from dataflex_mega.data.pool import RowSource, SamplePool

BLOCK_ROWS = 4096


@runtime_checkable
class BlockSource(Protocol):
    """Rows that can be read many at once; DatasetRows of LLaMA-Factory's datasets."""

    def read_block(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows first .. stop - 1 -> ([rows] lengths, [tokens] input_ids, [tokens] labels), int64."""
        ...


@runtime_checkable
class KnownContent(Protocol):
    """Rows whose `content` identifies all of them; FixedLengthRows of a corpus, by the hash in its manifest."""

    content: str | None


@runtime_checkable
class KeepsContent(Protocol):
    """Rows that can keep their hash, so that it is their `content` the next time."""

    def keep_content(self, digest: str) -> None:
        """Keep it, if that can be done."""
        ...


def content_hashes(
    pool: SamplePool, rank: int, world_size: int, gather: Callable[[Any], list[Any]]
) -> Mapping[str, str]:
    """Domain name -> a hash of all its rows, on every rank. `gather`: a rank's value -> those of all ranks."""
    hashes = {domain.name: domain.rows.content for domain in pool.domains if isinstance(domain.rows, KnownContent)}
    known = {name: content for name, content in hashes.items() if content is not None}
    if hashes:  # kept on a disk that not all ranks may share: only what all of them know is known
        views = gather(known)
        known = {name: content for name, content in views[0].items() if all(one.get(name) == content for one in views)}
    rows = {domain.name: domain.rows for domain in pool.domains if domain.name not in known}
    tasks = [(name, first) for name, source in rows.items() for first in range(0, len(source), BLOCK_ROWS)]
    own = {(name, first): block_hash(rows[name], first) for name, first in tasks[rank::world_size]}
    blocks = {task: digest for one in gather(own) for task, digest in one.items()}
    for name, source in rows.items():
        parts = [blocks[name, first] for first in range(0, len(source), BLOCK_ROWS)]
        known[name] = hashlib.sha256("".join([str(len(source)), *parts]).encode()).hexdigest()[:32]
        if rank == 0 and isinstance(source, KeepsContent):
            source.keep_content(known[name])
    return known


def block_hash(rows: RowSource, first: int) -> str:
    """XXH3-128 of the rows of one block: their lengths, their tokens, their labels, and their media where rows have any."""
    stop = min(first + BLOCK_ROWS, len(rows))
    if isinstance(rows, BlockSource):
        parts = rows.read_block(first, stop)
    else:
        pairs = rows.fetch(np.arange(first, stop))
        lengths = np.asarray([len(ids) for ids, _ in pairs], dtype=np.int64)
        parts = (lengths, np.concatenate([ids for ids, _ in pairs]), np.concatenate([labels for _, labels in pairs]))
    xxh = xxhash.xxh3_128()
    for part in parts:
        xxh.update(np.ascontiguousarray(part, dtype=np.int64).data)
    for media in media_of(rows, np.arange(first, stop)) or ():
        xxh.update(media_hash(media))
    return xxh.hexdigest()
