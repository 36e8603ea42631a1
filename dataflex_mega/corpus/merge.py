"""Encoded units -> one .bin/.idx pair per domain, in the order of the units, and the list of bad rows.

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

from dataflex_mega.corpus.encoded_units import DomainBlock, WorkUnit, read_bad_rows, read_encoded_unit
from dataflex_mega.data.manifest import ITEMSIZE
from dataflex_mega.files import atomic_file, atomic_write, close_durably, replace_file

INDEX_MAGIC, INDEX_VERSION = b"MMIDIDX\x00\x00", 1
DTYPE_CODES = {"int32": 4, "uint16": 8}  # as in megatron-core
COPY_BYTES = 1 << 22  # in memory while copying
INDEX_ENTRIES = 1 << 18  # in memory while writing an index


@dataclass(frozen=True)
class MergedFiles:
    """The sizes and hashes of a finished .bin/.idx pair."""

    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str


class _HashedFile:
    """A file that is hashed while it is written and gets its name when it is finished."""

    def __init__(self, path: Path) -> None:
        # One name and not a unique one: what a killed run leaves is overwritten by the next, and the folder is locked.
        self._path, self._temporary = path, path.with_name(path.name + ".new")
        self._stream = self._temporary.open("wb")
        self._sha = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha.update(data)

    def finish(self) -> str:
        """Give the file its name -> its SHA-256."""
        close_durably(self._stream)
        replace_file(self._temporary, self._path)
        return self._sha.hexdigest()

    def close(self) -> None:
        """Close an unfinished file; does nothing after `finish`."""
        self._stream.close()


def merge_domain(units: Sequence[WorkUnit], folder: Path, domain: str, prefix: Path, dtype: str) -> MergedFiles:
    """Write PREFIX.bin and PREFIX.idx of one domain, unless a former run has finished them.

    Args:
        units: all units; their order is the order of the documents.
        folder: of the encoded units.
        domain: the domain whose documents are written.
        prefix: path of the pair without suffix.
        dtype: of the tokens, a key of DTYPE_CODES.
    """
    stamp = folder / f"{prefix.name}.merged"
    if stamp.is_file():
        return MergedFiles(**json.loads(stamp.read_text(encoding="utf-8")))
    tokens = _HashedFile(prefix.with_name(prefix.name + ".bin"))
    index = _HashedFile(prefix.with_name(prefix.name + ".idx"))
    try:
        blocks = list(_blocks_of_domain(units, folder, domain))
        _copy_tokens(blocks, tokens, ITEMSIZE[dtype])
        _write_index(blocks, index, dtype)
        totals = sum(block.documents for _, block in blocks), sum(block.tokens for _, block in blocks)
        merged = MergedFiles(*totals, tokens.finish(), index.finish())
    finally:
        tokens.close()
        index.close()
    atomic_write(stamp, json.dumps(asdict(merged)))
    return merged


def _blocks_of_domain(units: Sequence[WorkUnit], folder: Path, domain: str) -> Iterator[tuple[Path, DomainBlock]]:
    """(file, block) of a domain in the order of the units."""
    for unit in units:
        stem = unit.stem(folder)
        encoded = read_encoded_unit(stem)
        assert encoded is not None
        for block in encoded.blocks:
            if block.domain == domain:
                yield stem.with_suffix(".tokens"), block


def _copy_tokens(blocks: Sequence[tuple[Path, DomainBlock]], output: _HashedFile, itemsize: int) -> None:
    for file, block in blocks:
        remaining = block.tokens * itemsize
        with file.open("rb") as stream:
            stream.seek(block.offset + 4 * block.documents)
            while remaining:
                data = stream.read(min(COPY_BYTES, remaining))
                if not data:
                    raise OSError(f"{file} ends in the middle of a block")
                output.write(data)
                remaining -= len(data)


def _lengths(blocks: Sequence[tuple[Path, DomainBlock]]) -> Iterator[np.ndarray]:
    """Lengths of all documents, at most INDEX_ENTRIES at a time, int32."""
    for file, block in blocks:
        for first in range(0, block.documents, INDEX_ENTRIES):
            count = min(INDEX_ENTRIES, block.documents - first)
            yield np.fromfile(file, dtype=np.int32, count=count, offset=block.offset + 4 * first)


def _write_index(blocks: Sequence[tuple[Path, DomainBlock]], output: _HashedFile, dtype: str) -> None:
    documents = sum(block.documents for _, block in blocks)
    output.write(INDEX_MAGIC + struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES[dtype], documents, documents + 1))
    for lengths in _lengths(blocks):
        output.write(lengths.tobytes())
    start = 0
    for lengths in _lengths(blocks):
        sizes = lengths.astype(np.int64) * ITEMSIZE[dtype]
        ends = start + np.cumsum(sizes)
        output.write((ends - sizes).tobytes())
        start = int(ends[-1])
    for first in range(0, documents + 1, INDEX_ENTRIES):
        output.write(np.arange(first, min(first + INDEX_ENTRIES, documents + 1), dtype=np.int64).tobytes())


# -- bad rows ----------------------------------------------------------------------------------------------------------


def row_location(unit: WorkUnit, slice_index: int, row: int, rows_before: int) -> dict[str, Any]:
    """{"file", "line"} of a row, counted from 1, in files of lines; {"file", "row"}, counted from 0, in other formats."""
    input_file = unit.slices[slice_index].input_file
    number = rows_before + row
    if input_file.kind.rpartition(":")[2] in ("json", "parquet", "txt"):
        return {"file": input_file.path, "row": number}
    return {"file": input_file.path, "line": number + 1}


def write_bad_rows(units: Sequence[WorkUnit], folder: Path, output: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Write a line {"file", "line" or "row", "problem"} for every bad row -> problem -> (count, location of the first)."""
    rows_seen: dict[int, int] = {}  # number of an input file -> its rows in the units so far
    problems: dict[str, tuple[int, dict[str, Any]]] = {}
    with atomic_file(output) as stream:
        for unit in units:
            encoded = read_encoded_unit(unit.stem(folder))
            assert encoded is not None
            first_rows = _first_rows(unit, encoded.rows_per_slice, rows_seen)
            for slice_index, row, problem in read_bad_rows(unit.stem(folder)):
                location = row_location(unit, slice_index, row, first_rows[slice_index])
                line = json.dumps({**location, "problem": problem}, ensure_ascii=False) + "\n"
                stream.write(line.encode())
                kind = problem.partition(":")[0]
                count, first = problems.get(kind, (0, location))
                problems[kind] = (count + 1, first)
    return problems


def _first_rows(unit: WorkUnit, rows_per_slice: Sequence[int], rows_seen: dict[int, int]) -> list[int]:
    """The number in its file of the first row of each slice of a unit; updates `rows_seen`."""
    first_rows = []
    for file_slice, count in zip(unit.slices, rows_per_slice, strict=True):
        first_rows.append(rows_seen.get(file_slice.number, 0))
        rows_seen[file_slice.number] = first_rows[-1] + count
    return first_rows
