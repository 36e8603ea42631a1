"""One unit of work and what it leaves: a part, which the merge reads.

A part is NUMBER.tokens (blocks, each the documents of one domain: int32 lengths, then tokens), NUMBER.bad (a line a bad
row) and NUMBER.json, which says what is where. The last is renamed in when the others are on the disk, so a part that
has it is whole, and one that has not is made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.corpus.encode import Encoder, encoder
from dataflex_mega.corpus.sources import Piece, extract, read_rows

BLOCK_BYTES = 1 << 25  # tokens held back, over all domains, before they are written
ARRAY_BYTES = 128  # what numpy adds to each document held back
BATCH_CHARACTERS, BATCH_TEXTS = 1 << 19, 512  # tokenized at once


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: pieces of files, in order, into the part of this number."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(piece.size for piece in self.pieces)

    def stem(self, folder: Path) -> Path:
        """Path of its part without suffix."""
        return folder / f"{self.number:07d}"


@dataclass(frozen=True)
class Block:
    """Documents of one domain in a part, `offset` bytes into it."""

    domain: str
    documents: int
    tokens: int
    offset: int


@dataclass(frozen=True)
class Part:
    """What a finished unit left."""

    blocks: tuple[Block, ...]
    rows: tuple[int, ...]  # of each piece, bad ones too
    bad: int
    first_bad: tuple[int, int, str] | None  # piece, row of the piece, problem

    @property
    def tokens(self) -> int:
        """Of all domains."""
        return sum(block.tokens for block in self.blocks)


class PartWriter:
    """Collects documents and writes them in blocks; memory is bounded by BLOCK_BYTES and the longest document."""

    def __init__(self, stem: Path, dtype: str) -> None:
        self._stem, self._dtype = stem, np.dtype(dtype)
        self._tokens = stem.with_suffix(".tokens").open("wb")
        self._bad = stem.with_suffix(".bad").open("w", encoding="utf-8")
        self._held: dict[str, list[np.ndarray]] = {}
        self._size = 0
        self._blocks: list[Block] = []
        self._bad_rows, self._first_bad = 0, None

    def add(self, domain: str, tokens: np.ndarray) -> None:
        """One document."""
        self._held.setdefault(domain, []).append(tokens)
        self._size += tokens.nbytes + ARRAY_BYTES
        if self._size >= BLOCK_BYTES:
            self._flush()

    def refuse(self, piece: int, row: int, problem: str) -> None:
        """One bad row: number of its piece, its number in the piece, what is wrong."""
        self._bad.write(json.dumps([piece, row, problem], ensure_ascii=True) + "\n")
        self._first_bad = self._first_bad or (piece, row, problem)
        self._bad_rows += 1

    def _flush(self) -> None:
        for domain, documents in self._held.items():
            lengths = np.asarray([len(tokens) for tokens in documents], dtype=np.int32)
            self._blocks.append(Block(domain, len(documents), int(lengths.sum(dtype=np.int64)), self._tokens.tell()))
            self._tokens.write(lengths.tobytes())
            for tokens in documents:
                self._tokens.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._held, self._size = {}, 0

    def finish(self, rows: Sequence[int]) -> Part:
        """Write what is held, then the .json as the last act."""
        self._flush()
        part = Part(tuple(self._blocks), tuple(rows), self._bad_rows, self._first_bad)
        for stream in (self._tokens, self._bad):
            close_synced(stream)
        write_whole(self._stem.with_suffix(".json"), json.dumps(asdict(part)))
        return part

    def close(self) -> None:
        """Let go of the files of a part that was not finished."""
        self._tokens.close()
        self._bad.close()


def close_synced(stream: Any) -> None:
    """Close a file after its bytes are on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def write_whole(path: Path, text: str) -> None:
    """Write a file beside and rename it in, so that it is never seen half."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def read_part(stem: Path) -> Part | None:
    """A finished part, or None."""
    file = stem.with_suffix(".json")
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    first = found["first_bad"]
    return Part(
        tuple(Block(**block) for block in found["blocks"]),
        tuple(found["rows"]),
        found["bad"],
        (first[0], first[1], first[2]) if first else None,
    )


def make_part(unit: Unit, folder: Path, tokenizer: str, longest: int) -> tuple[int, Part]:
    """Read, tokenize and write one unit -> (its number, its part). Raises DataError where a file is broken."""
    code = encoder(tokenizer)
    writer = PartWriter(unit.stem(folder), code.dtype)
    try:
        rows = [_make_piece(number, piece, writer, code, longest) for number, piece in enumerate(unit.pieces)]
        return unit.number, writer.finish(rows)
    finally:
        writer.close()


def _make_piece(number: int, piece: Piece, writer: PartWriter, code: Encoder, longest: int) -> int:
    """Documents of one piece into the writer -> how many rows it has."""
    rows = 0
    batch: list[tuple[str, str]] = []
    characters = 0
    for rows, row in enumerate(read_rows(piece, longest), start=1):
        found = row.problem or extract(row.value, piece.source.rule)
        if isinstance(found, str):
            writer.refuse(number, rows - 1, found)
            continue
        batch.append(found)
        characters += len(found[0])
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            _write(batch, writer, code)
            batch, characters = [], 0
    _write(batch, writer, code)
    return rows


def _write(batch: list[tuple[str, str]], writer: PartWriter, code: Encoder) -> None:
    if batch:
        for (_, domain), tokens in zip(batch, code.encode([text for text, _ in batch]), strict=True):
            writer.add(domain, tokens)


def bad_rows(stem: Path) -> Iterator[tuple[int, int, str]]:
    """(piece, row of the piece, problem) of every bad row of a part."""
    with stem.with_suffix(".bad").open(encoding="utf-8") as stream:
        for line in stream:
            piece, row, problem = json.loads(line)
            yield piece, row, problem
