"""Parts -> one .bin/.idx pair a domain, in the order of the units, and the list of bad rows.

The layout is that of megatron-core's IndexedDatasetBuilder, byte for byte: a header, then lengths (int32), byte offsets
(int64) and document borders (int64), which its builder collects in Python lists. Here all three are streamed, so the
memory of a merge does not grow with the number of documents.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.corpus.parts import Block, Unit, bad_rows, close_synced, read_part, write_whole
from dataflex_mega.data.manifest import ITEMSIZE

MAGIC, INDEX_VERSION = b"MMIDIDX\x00\x00", 1
DTYPE_CODES = {"int32": 4, "uint16": 8}  # Megatron's numbers for them
COPY = 1 << 22  # bytes in memory while copying
DOCUMENTS = 1 << 18  # entries of the index in memory


@dataclass(frozen=True)
class Merged:
    """A finished pair."""

    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


class _Hashed:
    """A file written beside its name, hashed on the way, renamed in at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._beside = path, path.with_name(path.name + ".new")
        self._stream = self._beside.open("wb")
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha.update(data)

    def finish(self) -> str:
        """Name it -> its SHA-256."""
        close_synced(self._stream)
        self._beside.replace(self._path)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Let go of it unfinished, or do nothing when it is finished."""
        self._stream.close()


def merge_domain(units: Sequence[Unit], folder: Path, domain: str, prefix: Path, dtype: str) -> Merged:
    """Write PREFIX.bin and PREFIX.idx of one domain from all parts, or say what a former run wrote.

    Args:
        units: all units; their order is the order of the documents.
        folder: of the parts.
        domain: whose documents.
        prefix: path without suffix of what is written.
        dtype: of the tokens, a key of DTYPE_CODES.
    """
    stamp = folder / f"{prefix.name}.merged"
    if stamp.is_file():
        return Merged(**json.loads(stamp.read_text(encoding="utf-8")))
    tokens = _Hashed(prefix.with_name(prefix.name + ".bin"))
    index = _Hashed(prefix.with_name(prefix.name + ".idx"))
    try:
        blocks = list(_blocks(units, folder, domain))
        _copy_tokens(blocks, tokens, ITEMSIZE[dtype])
        _write_index(blocks, index, dtype)
        total = sum(block.documents for _, block in blocks), sum(block.tokens for _, block in blocks)
        merged = Merged(*total, tokens.finish(), index.finish())
    finally:
        tokens.close()
        index.close()
    write_whole(stamp, json.dumps(asdict(merged)))
    return merged


def _blocks(units: Sequence[Unit], folder: Path, domain: str) -> Iterator[tuple[Path, Block]]:
    """(file, block) of a domain in the order of the units."""
    for unit in units:
        stem = unit.stem(folder)
        part = read_part(stem)
        assert part is not None
        for block in part.blocks:
            if block.domain == domain:
                yield stem.with_suffix(".tokens"), block


def _copy_tokens(blocks: Sequence[tuple[Path, Block]], output: _Hashed, itemsize: int) -> None:
    for file, block in blocks:
        left = block.tokens * itemsize
        with file.open("rb") as stream:
            stream.seek(block.offset + 4 * block.documents)
            while left:
                data = stream.read(min(COPY, left))
                if not data:
                    raise OSError(f"{file} ends in the middle of a block")
                output.write(data)
                left -= len(data)


def _lengths(blocks: Sequence[tuple[Path, Block]]) -> Iterator[np.ndarray]:
    """Lengths of all documents, at most DOCUMENTS at a time, int32."""
    for file, block in blocks:
        for first in range(0, block.documents, DOCUMENTS):
            count = min(DOCUMENTS, block.documents - first)
            yield np.fromfile(file, dtype=np.int32, count=count, offset=block.offset + 4 * first)


def _write_index(blocks: Sequence[tuple[Path, Block]], output: _Hashed, dtype: str) -> None:
    documents = sum(block.documents for _, block in blocks)
    output.write(MAGIC + struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES[dtype], documents, documents + 1))
    for lengths in _lengths(blocks):
        output.write(lengths.tobytes())
    start = 0
    for lengths in _lengths(blocks):
        sizes = lengths.astype(np.int64) * ITEMSIZE[dtype]
        ends = start + np.cumsum(sizes)
        output.write((ends - sizes).tobytes())
        start = int(ends[-1])
    for first in range(0, documents + 1, DOCUMENTS):
        output.write(np.arange(first, min(first + DOCUMENTS, documents + 1), dtype=np.int64).tobytes())


# -- bad rows ----------------------------------------------------------------------------------------------------------


def place(unit: Unit, piece: int, row: int, rows_before: int) -> dict[str, Any]:
    """Where a row is: {"file", "line"} counted from 1 for lines, {"file", "row"} counted from 0 for other formats."""
    source = unit.pieces[piece].source
    number = rows_before + row
    if source.kind in ("json", "parquet"):
        return {"file": source.path, "row": number}
    return {"file": source.path, "line": number + 1}


def write_bad_rows(units: Sequence[Unit], folder: Path, output: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """A line {"file", "line" or "row", "problem"} for every bad row -> problem -> (how many, the first place)."""
    before: dict[int, int] = {}  # source number -> its rows in the units so far
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    beside = output.with_name(output.name + ".new")
    with beside.open("w", encoding="utf-8") as stream:
        for unit in units:
            part = read_part(unit.stem(folder))
            assert part is not None
            first = _first_rows(unit, part.rows, before)
            for piece, row, problem in bad_rows(unit.stem(folder)):
                where = place(unit, piece, row, first[piece])
                stream.write(json.dumps({**where, "problem": problem}, ensure_ascii=False) + "\n")
                kind = problem.partition(":")[0]
                count, earliest = found.get(kind, (0, where))
                found[kind] = (count + 1, earliest)
        stream.flush()
    beside.replace(output)
    return found


def _first_rows(unit: Unit, rows: Sequence[int], before: dict[int, int]) -> list[int]:
    """Number of the first row of each piece of a unit in its file; `before` is moved on."""
    first = []
    for piece, count in zip(unit.pieces, rows, strict=True):
        first.append(before.get(piece.number, 0))
        before[piece.number] = first[-1] + count
    return first
