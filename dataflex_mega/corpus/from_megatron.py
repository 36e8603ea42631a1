"""A corpus manifest for .bin/.idx files that exist: those of Megatron-LM's preprocess_data.py. No token is copied.

Megatron calls the entries of an index sequences; a document is one sequence, or several where it was split into sentences.
Rows of a corpus run through all of them, so a manifest counts sequences, and the documents are told beside it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataflex_mega.corpus.document_tokenizer import document_tokenizer
from dataflex_mega.corpus.merge import DTYPE_CODES, INDEX_MAGIC, INDEX_VERSION
from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import ITEMSIZE, UNKNOWN_TOKENIZER, Corpus, CorpusDomain, CorpusTokenizer
from dataflex_mega.errors import ConfigError, DataError, did_you_mean
from dataflex_mega.files import atomic_write

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document borders
ENDING = "_text_document"  # of the names that preprocess_data.py gives
READ_BYTES = 1 << 24


@dataclass(frozen=True)
class MegatronPair:
    """A pair PREFIX.bin, PREFIX.idx, read once."""

    name: str
    prefix: Path
    dtype: str
    sequences: int
    documents: int
    tokens: int
    largest_id: int
    last_ids: frozenset[int]  # the last token of every sequence, at most two kinds of them
    bin_sha256: str
    idx_sha256: str


def describe(
    prefixes: Sequence[str], output: Path | None, tokenizer: str | None, overwrite: bool
) -> tuple[Corpus, list[str]]:
    """Write the manifest beside the files -> (the corpus, notes).

    Args:
        prefixes: PREFIX or NAME=PREFIX, with or without .bin or .idx.
        output: the folder of the files; None: the same.
        tokenizer: that made the ids; None: not checked, here and in training.
        overwrite: replace a manifest that is there.

    Raises DataError or ConfigError for files that are not what they should be, and for a manifest that is there.
    """
    pairs = [read_pair(*_split(text)) for text in prefixes]
    folder = pairs[0].prefix.parent
    for pair in pairs:
        if pair.prefix.parent.resolve() != (output or folder).resolve():
            raise ConfigError(
                f"--from-megatron: {pair.prefix} is not in {output or folder}; the manifest lies in the folder of its files"
            )
        if pair.dtype != pairs[0].dtype:
            raise DataError(f"{pair.prefix}.idx has {pair.dtype}, the first {pairs[0].dtype}; a corpus has one")
        if [other.name for other in pairs].count(pair.name) > 1:
            raise ConfigError(f"--from-megatron: two domains are called {pair.name!r}; NAME=PREFIX names one")
    if (folder / manifest.NAME).exists() and not overwrite:
        raise DataError(f"{folder / manifest.NAME} is there already; --overwrite replaces it")
    identity, notes = _identity(pairs, tokenizer)
    total = sum(pair.tokens for pair in pairs)
    domains = tuple(
        CorpusDomain(p.name, p.prefix.name, p.sequences, p.tokens, p.tokens / total, p.bin_sha256, p.idx_sha256)
        for p in pairs
    )
    files = [p.prefix.with_name(f"{p.prefix.name}.bin") for p in pairs]
    inputs = tuple({"path": str(file), "bytes": file.stat().st_size} for file in files)
    recipe = hashlib.sha256("".join(p.bin_sha256 + p.idx_sha256 for p in pairs).encode()).hexdigest()
    corpus = Corpus(folder, pairs[0].dtype, identity, domains, sum(p.sequences for p in pairs), 0, inputs, recipe)
    atomic_write(folder / manifest.NAME, corpus.to_json())
    for pair in pairs:
        if pair.documents != pair.sequences:
            notes.append(f"{pair.name}: {pair.documents} documents in {pair.sequences} sequences, which are counted")
    return corpus, notes


def _split(text: str) -> tuple[str, Path]:
    """`NAME=PREFIX` or PREFIX -> (name, prefix)."""
    name, equals, rest = text.partition("=")
    path = Path(rest if equals else text).expanduser()
    prefix = path.with_name(path.name.removesuffix(".bin").removesuffix(".idx"))
    return (name if equals else prefix.name.removesuffix(ENDING)) or prefix.name, prefix


def read_pair(name: str, prefix: Path) -> MegatronPair:
    """Read and check a pair. Raises DataError."""
    index, data = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    for file in (index, data):
        if not file.is_file():
            near = [p.name for p in prefix.parent.iterdir()] if prefix.parent.is_dir() else []
            raise DataError(f"--from-megatron: {file} not found{did_you_mean(file.name, near)}")
    content = index.read_bytes()
    if len(content) < HEADER.size or not content.startswith(INDEX_MAGIC):
        raise DataError(f"{index} is not an index of Megatron (MMIDIDX)")
    _, version, code, sequences, borders = HEADER.unpack_from(content)
    names = {number: dtype for dtype, number in DTYPE_CODES.items()}
    if version != INDEX_VERSION or code not in names:
        raise DataError(
            f"{index} has version {version}, dtype code {code}; read are version 1 of {', '.join(ITEMSIZE)}"
        )
    lists_end = HEADER.size + 12 * sequences + 8 * borders
    if len(content) < lists_end or sequences == 0:
        raise DataError(f"{index} is cut or empty: {len(content)} bytes, {sequences} sequences need {lists_end}")
    lengths = np.frombuffer(content, np.int32, sequences, HEADER.size).astype(np.int64)
    documents = np.frombuffer(content, np.int64, borders, HEADER.size + 12 * sequences)
    tokens, itemsize = int(lengths.sum()), ITEMSIZE[names[code]]
    pointers = np.frombuffer(content, np.int64, sequences, HEADER.size + 4 * sequences)
    _check_lists(index, lengths, pointers, documents, itemsize)
    modes = len(content) - lists_end  # a multimodal index ends with a byte for each sequence
    if modes not in (0, sequences):
        raise DataError(f"{index} has {len(content)} bytes, {sequences} sequences need {lists_end}")
    if data.stat().st_size != tokens * itemsize:
        raise DataError(f"{data} has {data.stat().st_size} bytes, {index.name} describes {tokens * itemsize}")
    digest, largest = hashlib.sha256(), 0
    for block in _blocks(data, names[code]):
        digest.update(block.tobytes())
        if int(block.min()) < 0:
            raise DataError(f"{data} has the id {int(block.min())}; ids are >= 0")
        largest = max(largest, int(block.max()))
    if tokens == 0:
        raise DataError(f"{data} has no tokens")
    last = np.memmap(data, names[code], "r")[np.cumsum(lengths)[lengths > 0] - 1]
    kinds = frozenset(int(token) for token in np.unique(last)[:2])
    return MegatronPair(
        name, prefix, names[code], sequences, len(np.unique(documents)) - 1, tokens, largest, kinds, digest.hexdigest(),
        hashlib.sha256(content).hexdigest(),
    )  # fmt: skip


def _check_lists(index: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, itemsize: int) -> None:
    """Raises DataError where the lists of an index contradict each other: rows would be other tokens than it says."""
    if (lengths < 0).any():
        first = int(np.flatnonzero(lengths < 0)[0])
        raise DataError(f"{index} is damaged: sequence {first} has the length {int(lengths[first])}")
    expected = (np.cumsum(lengths) - lengths) * itemsize
    if (pointers != expected).any():
        first = int(np.flatnonzero(pointers != expected)[0])
        raise DataError(
            f"{index} is damaged: sequence {first} begins at byte {int(pointers[first])}, after those before it that is "
            f"{int(expected[first])}"
        )
    ordered = len(documents) > 0 and documents[0] == 0 and (np.diff(documents) >= 0).all()
    if not ordered or documents[-1] != len(lengths):
        raise DataError(f"{index} is damaged: the documents must go from sequence 0 to {len(lengths)}, in order")


def _blocks(file: Path, dtype: str) -> Iterator[np.ndarray]:
    with file.open("rb") as stream:
        while data := stream.read(READ_BYTES):
            yield np.frombuffer(data, dtype)


def _identity(pairs: Sequence[MegatronPair], tokenizer: str | None) -> tuple[CorpusTokenizer, list[str]]:
    """What the manifest says of the tokenizer, and notes. Raises DataError for an id that it does not have."""
    largest, ends = max(pair.largest_id for pair in pairs), frozenset().union(*(pair.last_ids for pair in pairs))
    if tokenizer is None:
        note = "without --tokenizer only the largest id is compared with the model's vocabulary, not the tokenizer"
        return CorpusTokenizer(UNKNOWN_TOKENIZER, largest + 1, min(ends)), [note]
    identity = document_tokenizer(tokenizer).identity()
    for pair in pairs:
        if pair.largest_id >= identity.vocab_size:
            raise DataError(
                f"{pair.prefix}.bin has the id {pair.largest_id}; {tokenizer} has {identity.vocab_size} ids"
            )
    if ends == {identity.eod_token_id}:
        return identity, []
    return identity, [
        f"not every sequence ends with {identity.eod_token_id}, the end of a document (preprocess_data.py --append-eod)"
    ]
