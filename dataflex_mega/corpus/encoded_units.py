"""A unit of work and its result on disk, an encoded unit, which the merge reads.

An encoded unit is NUMBER.tokens (blocks, each the documents of one domain: int32 lengths, then tokens), NUMBER.bad (one line
per bad row) and NUMBER.json, the index of both. The index is written last, so a unit that has it is complete, and one that
has none is encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dataflex_mega.corpus.document_tokenizer import DocumentTokenizer, document_tokenizer
from dataflex_mega.corpus.input_files import FileSlice, extract, read_rows
from dataflex_mega.files import atomic_write, close_durably

BUFFER_BYTES = 1 << 25  # tokens in memory, over all domains, before they are written
ARRAY_OVERHEAD_BYTES = 128  # of each numpy array in the buffer
BATCH_CHARACTERS, BATCH_TEXTS = 1 << 19, 512  # tokenized at once


@dataclass(frozen=True)
class WorkUnit:
    """The input of one task of a worker: slices of files, in order."""

    number: int
    slices: tuple[FileSlice, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(file_slice.size for file_slice in self.slices)

    def stem(self, folder: Path) -> Path:
        """Path of the encoded unit's files without suffix."""
        return folder / f"{self.number:07d}"


@dataclass(frozen=True)
class DomainBlock:
    """Documents of one domain in NUMBER.tokens, beginning at byte `offset`."""

    domain: str
    documents: int
    tokens: int
    offset: int


@dataclass(frozen=True)
class EncodedUnit:
    """The index of a finished unit."""

    blocks: tuple[DomainBlock, ...]
    rows_per_slice: tuple[int, ...]  # bad ones too
    num_bad_rows: int
    first_bad_row: tuple[int, int, str] | None  # slice, row in the slice, problem

    @property
    def num_rows(self) -> int:
        """Rows of all slices, bad ones too."""
        return sum(self.rows_per_slice)

    @property
    def num_tokens(self) -> int:
        """Tokens of all domains."""
        return sum(block.tokens for block in self.blocks)


class EncodedUnitWriter:
    """Collects documents and writes them in blocks; memory is bounded by BUFFER_BYTES and the longest document."""

    def __init__(self, stem: Path, dtype: str) -> None:
        self._stem, self._dtype = stem, np.dtype(dtype)
        self._tokens = stem.with_suffix(".tokens").open("wb")
        self._bad = stem.with_suffix(".bad").open("w", encoding="utf-8")
        self._buffer: dict[str, list[np.ndarray]] = {}
        self._buffer_bytes = 0
        self._blocks: list[DomainBlock] = []
        self._num_bad_rows, self._first_bad_row = 0, None

    def add_document(self, domain: str, tokens: np.ndarray) -> None:
        """Add the tokens of one document."""
        self._buffer.setdefault(domain, []).append(tokens)
        self._buffer_bytes += tokens.nbytes + ARRAY_OVERHEAD_BYTES
        if self._buffer_bytes >= BUFFER_BYTES:
            self._flush()

    def add_bad_row(self, slice_index: int, row: int, problem: str) -> None:
        """Record a bad row by its slice in the unit and its number in the slice."""
        self._bad.write(json.dumps([slice_index, row, problem], ensure_ascii=True) + "\n")
        self._first_bad_row = self._first_bad_row or (slice_index, row, problem)
        self._num_bad_rows += 1

    def _flush(self) -> None:
        for domain, documents in self._buffer.items():
            lengths = np.asarray([len(tokens) for tokens in documents], dtype=np.int32)
            num_tokens = int(lengths.sum(dtype=np.int64))
            self._blocks.append(DomainBlock(domain, len(documents), num_tokens, self._tokens.tell()))
            self._tokens.write(lengths.tobytes())
            for tokens in documents:
                self._tokens.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._buffer, self._buffer_bytes = {}, 0

    def finish(self, rows_per_slice: Sequence[int]) -> EncodedUnit:
        """Write the buffer, then the index as the last act."""
        self._flush()
        encoded = EncodedUnit(tuple(self._blocks), tuple(rows_per_slice), self._num_bad_rows, self._first_bad_row)
        for stream in (self._tokens, self._bad):
            close_durably(stream)
        atomic_write(self._stem.with_suffix(".json"), json.dumps(asdict(encoded)))
        return encoded

    def close(self) -> None:
        """Close the files of a unit that was not finished."""
        self._tokens.close()
        self._bad.close()


def read_encoded_unit(stem: Path) -> EncodedUnit | None:
    """The index of a finished unit; None when there is none, or one of another version."""
    file = stem.with_suffix(".json")
    if not file.is_file():
        return None
    index = json.loads(file.read_text(encoding="utf-8"))
    try:
        first = index["first_bad_row"]
        return EncodedUnit(
            tuple(DomainBlock(**block) for block in index["blocks"]),
            tuple(index["rows_per_slice"]),
            index["num_bad_rows"],
            (first[0], first[1], first[2]) if first else None,
        )
    except KeyError:
        return None


def encode_unit(unit: WorkUnit, folder: Path, tokenizer: str, max_document_bytes: int) -> tuple[int, EncodedUnit]:
    """Read, tokenize and write one unit -> (its number, its index). Raises DataError where a file is broken."""
    encoder = document_tokenizer(tokenizer)
    writer = EncodedUnitWriter(unit.stem(folder), encoder.dtype)
    try:
        slices = enumerate(unit.slices)
        counts = [_encode_slice(index, part, writer, encoder, max_document_bytes) for index, part in slices]
        return unit.number, writer.finish(counts)
    finally:
        writer.close()


def _encode_slice(
    index: int, file_slice: FileSlice, writer: EncodedUnitWriter, encoder: DocumentTokenizer, max_document_bytes: int
) -> int:
    """Write the documents of one slice -> the number of its rows."""
    num_rows = 0
    batch: list[tuple[str, str]] = []  # (text, domain)
    characters = 0
    for num_rows, row in enumerate(read_rows(file_slice, max_document_bytes), start=1):
        document = row.problem or extract(row.value, file_slice.input_file.rule)
        if isinstance(document, str):
            writer.add_bad_row(index, num_rows - 1, document)
            continue
        batch.append(document)
        characters += len(document[0])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            _write_batch(batch, writer, encoder)
            batch, characters = [], 0
    _write_batch(batch, writer, encoder)
    return num_rows


def _write_batch(batch: list[tuple[str, str]], writer: EncodedUnitWriter, encoder: DocumentTokenizer) -> None:
    if batch:
        for (_, domain), tokens in zip(batch, encoder.encode([text for text, _ in batch]), strict=True):
            writer.add_document(domain, tokens)


def read_bad_rows(stem: Path) -> Iterator[tuple[int, int, str]]:
    """(slice, row in the slice, problem) of every bad row of an encoded unit."""
    with stem.with_suffix(".bad").open(encoding="utf-8") as stream:
        for line in stream:
            slice_index, row, problem = json.loads(line)
            yield slice_index, row, problem
