"""Fixed-length rows over Megatron .bin/.idx files.

A domain is one stream of tokens: its documents in file order, each with its end-of-document token. Row r is the tokens
[r * length, (r + 1) * length) of the stream, as in LLaMA-Factory's packed pre-training rows: it has length - 1 targets
and may hold ends and beginnings of documents. The sampler decides which row a step draws, so there is no shuffled index and
no precomputed blend, and a mixture can change at any step.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.data.manifest import Corpus, CorpusDomain
from dataflex_mega.data.pool import Domain
from dataflex_mega.errors import ConfigError, DataError

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document borders
INDEX_MAGIC, DTYPES = b"MMIDIDX\x00\x00", (4, 5, 8)  # int32, int64, uint16
PROBES = 1024  # documents whose position in the stream is checked when a file is opened


class FixedLengthRows:
    """Rows of one length over one memory-mapped .bin/.idx pair.

    A row is found in O(1) and read with one copy: documents lie in the .bin in the order of the .idx without gaps,
    as Megatron writes them and as is checked here, so a row is one slice. Only rows that are read are in memory.

    Args:
        prefix: path without .bin and .idx.
        length: tokens of a row, at least 2 (one target).
        vocab_size: all token ids must be below it; None: whatever they are.

    Raises:
        ConfigError: megatron-core is not installed, or length < 2.
        DataError: a file is missing, truncated, not in this format, or has gaps.
    """

    def __init__(self, prefix: str | Path, length: int, vocab_size: int | None = None) -> None:
        if length < 2:
            raise ConfigError(f"cutoff_len: a row needs at least 2 tokens, found {length}")
        self.prefix, self.length, self.vocab_size = Path(prefix), length, vocab_size
        self._dataset = _open(self.prefix)
        self._dtype = np.dtype(self._dataset.index.dtype)
        self._starts: np.ndarray = self._dataset.index.sequence_pointers  # [documents] int64 bytes, memory-mapped
        self.documents = len(self._starts)
        self.tokens = self._count_tokens()
        self.content: str | None = None  # what identifies all rows, when a manifest says it

    def __len__(self) -> int:
        return self.tokens // self.length

    @property
    def dropped(self) -> int:
        """Tokens at the end of the stream that fill no row."""
        return self.tokens % self.length

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n pairs (input_ids, labels) of [length] int64 arrays, equal, labels not yet shifted.

        Raises DataError for a token id outside the vocabulary, which only damaged or foreign files have.
        """
        pairs = []
        for row in np.asarray(rows, dtype=np.int64).tolist():
            if not 0 <= row < len(self):
                raise IndexError(f"{self.prefix}: row {row} of {len(self)}")
            offset = row * self.length * self._dtype.itemsize
            raw = self._dataset.bin_reader.read(self._dtype.type, self.length, offset)
            ids = raw.astype(np.int64)
            if self.vocab_size is not None and (ids.max() >= self.vocab_size or ids.min() < 0):
                bad = int(ids[(ids >= self.vocab_size) | (ids < 0)][0])
                raise DataError(
                    f"{self.prefix}.bin, row {row} of cutoff_len {self.length}: token id {bad} is not below the "
                    f"vocabulary's size {self.vocab_size}; the file is damaged or of another tokenizer"
                )
            pairs.append((ids, ids))
        return pairs

    def target_counts(self) -> np.ndarray:
        """[n] int64: length - 1 of every row; see data.targets."""
        return np.full(len(self), self.length - 1, dtype=np.int64)

    def locate(self, row: int) -> tuple[int, int]:
        """(document, token in it) at which a row begins; by binary search in the starts, O(log documents)."""
        byte = row * self.length * self._dtype.itemsize
        document = int(np.searchsorted(self._starts, byte, side="right")) - 1
        return document, (byte - int(self._starts[document])) // self._dtype.itemsize

    def _count_tokens(self) -> int:
        """Tokens of the stream. Raises DataError unless the documents fill the .bin file without gaps."""
        lengths, file = self._dataset.index.sequence_lengths, self.prefix.with_name(self.prefix.name + ".bin")
        size, item = file.stat().st_size, self._dtype.itemsize
        end = int(self._starts[-1]) + int(lengths[-1]) * item
        if int(self._starts[0]) != 0 or end != size:
            raise DataError(f"{file} has {size} bytes, its .idx describes bytes {int(self._starts[0])} to {end}")
        probes = np.unique(np.linspace(0, max(self.documents - 2, 0), num=PROBES).astype(np.int64))
        if self.documents > 1:
            gaps = self._starts[probes + 1] - self._starts[probes] - lengths[probes].astype(np.int64) * item
            if gaps.any():
                raise DataError(
                    f"{file}: document {int(probes[np.flatnonzero(gaps)[0]])} is not followed by the next one"
                )
        return size // item


def _open(prefix: Path) -> Any:
    """The IndexedDataset of megatron-core at `prefix`."""
    try:
        with warnings.catch_warnings():  # of training kernels that are not installed, which reading does not need
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError as error:
        raise ConfigError(
            f'corpus_dir: reading .bin/.idx needs megatron-core: pip install "dataflex_mega[megatron]" ({error})'
        ) from error
    for suffix in (".bin", ".idx"):
        file = prefix.with_name(prefix.name + suffix)
        if not file.is_file():
            raise DataError(f"{file} not found")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty")
    _check_index(prefix.with_name(prefix.name + ".idx"))
    try:
        return IndexedDataset(str(prefix), mmap=True)
    except AssertionError as error:
        raise DataError(f"{prefix}.idx cannot be read: its last document does not end where its data does") from error


def _check_index(file: Path) -> None:
    """Raises DataError for another format and a truncated index, on which megatron-core fails without naming the file."""
    with file.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(INDEX_MAGIC):
        raise DataError(f"{file} cannot be read: it does not begin as a Megatron index does")
    _, version, dtype, sequences, borders = HEADER.unpack(head)
    if version != 1 or dtype not in DTYPES:
        raise DataError(f"{file} cannot be read: version {version}, dtype code {dtype}")
    if sequences == 0:
        raise DataError(f"{file} has no documents")
    size, expected = file.stat().st_size, HEADER.size + 12 * sequences + 8 * borders  # lengths, offsets, borders
    if size < expected:
        raise DataError(f"{file} cannot be read: it has {size} bytes, {sequences} documents need {expected}")


def fixed_length_domain(corpus: Corpus, domain: CorpusDomain, length: int, key: str = "corpus_dir") -> Domain:
    """A pool domain over one of a corpus. Raises DataError when it fills no row or differs from its manifest."""
    rows = FixedLengthRows(corpus.prefix(domain), length, corpus.tokenizer.vocab_size)
    if (rows.documents, rows.tokens) != (domain.documents, domain.tokens):
        raise DataError(
            f"{key}: {rows.prefix}.idx has {rows.documents} documents and {rows.tokens} tokens, "
            f"its manifest says {domain.documents} and {domain.tokens}"
        )
    if len(rows) == 0:
        raise DataError(f"{key}: domain {domain.name!r} has {domain.tokens} tokens, a row of cutoff_len has {length}")
    rows.content = f"{corpus.dtype} {domain.bin_sha256} in rows of {length}"
    return Domain(domain.name, rows)
