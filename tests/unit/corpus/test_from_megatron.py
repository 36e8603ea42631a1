"""Indices of Megatron-LM, written here byte by byte: what is described, and what contradicts itself."""

import struct

import numpy as np
import pytest

from dataflex_mega.corpus import from_megatron
from dataflex_mega.data import manifest
from dataflex_mega.data.fixed_length import fixed_length_domain
from dataflex_mega.errors import DataError

CODES = {np.uint16: 8, np.int32: 4}


def write(prefix, content, dtype=np.int32, **changes):
    """`content`: documents, each a list of sequences, lists of ids. `changes`: another value for a part of the index."""
    sequences = [sequence for document in content for sequence in document]
    ids = np.asarray([token for sequence in sequences for token in sequence], dtype)
    lengths = np.asarray([len(sequence) for sequence in sequences], np.int32)
    pointers = (np.cumsum(lengths.astype(np.int64)) - lengths) * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *map(len, content)]).astype(np.int64)
    parts = {
        "magic": b"MMIDIDX\x00\x00", "version": struct.pack("<Q", 1), "code": struct.pack("<B", CODES[dtype]),
        "count": struct.pack("<Q", len(lengths)), "borders": struct.pack("<Q", len(borders)),
        "lengths": lengths.tobytes(), "pointers": pointers.tobytes(), "documents": borders.tobytes(), "end": b"",
    }  # fmt: skip
    prefix.parent.mkdir(exist_ok=True)
    prefix.with_name(prefix.name + ".idx").write_bytes(b"".join({**parts, **changes}.values()))
    prefix.with_name(prefix.name + ".bin").write_bytes(ids.tobytes())
    return ids


@pytest.mark.parametrize("dtype", CODES)
def test_several_prefixes_of_uneven_documents_are_one_corpus_of_their_tokens(tmp_path, dtype):
    rng = np.random.default_rng(1)
    made = {}
    for name in ("web", "code", "books"):
        lengths = rng.integers(0, 9, (7, 3))
        made[name] = [[rng.integers(0, 500, n).tolist() for n in document] for document in lengths]
    ids = {name: write(tmp_path / f"{name}_text_document", documents, dtype) for name, documents in made.items()}
    prefixes = [str(tmp_path / "web_text_document"), f"code={tmp_path}/code_text_document.idx"]
    corpus, notes = from_megatron.describe(
        [*prefixes, f"{tmp_path}/books_text_document.bin"], None, None, overwrite=False
    )
    assert [(d.name, d.documents, d.tokens) for d in corpus.domains] == [(n, 21, len(t)) for n, t in ids.items()]
    assert sum("7 documents in 21 sequences" in note for note in notes) == 3
    assert sum(d.proportion for d in corpus.domains) == pytest.approx(1)
    read = manifest.read(tmp_path)
    assert read.dtype == np.dtype(dtype).name
    for entry in read.domains:
        rows = fixed_length_domain(read, entry, 8, "corpus_dir").rows
        fetched = np.concatenate([row for row, _ in rows.fetch(np.arange(len(rows)))])
        assert len(rows) == len(ids[entry.name]) // 8
        assert fetched.tolist() == ids[entry.name][: len(rows) * 8].tolist()


def test_an_index_with_a_mode_for_each_sequence_is_read(tmp_path):
    write(tmp_path / "a", [[[1, 2], [3]]], end=b"\0\1")
    assert from_megatron.read_pair("a", tmp_path / "a").tokens == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": np.asarray([5, -2, 3], np.int32).tobytes()}, "sequence 1 has the length -2"),
        ({"pointers": np.asarray([0, 12, 8], np.int64).tobytes()}, "sequence 1 begins at byte 12, .* 8"),
        ({"documents": np.asarray([0, 2, 1], np.int64).tobytes()}, "the documents must go from sequence 0 to 3"),
        ({"documents": np.asarray([1, 2, 3], np.int64).tobytes()}, "the documents must go"),
        ({"borders": struct.pack("<Q", 0), "documents": b""}, "the documents must go"),
        ({"code": struct.pack("<B", 7)}, "dtype code 7"),
        ({"version": struct.pack("<Q", 2)}, "version 2"),
        ({"count": struct.pack("<Q", 1 << 60)}, "is cut or empty"),
        ({"end": b"more"}, "has 98 bytes, 3 sequences need 94"),
        ({"magic": b"TNTIDX\x00\x00\x00"}, "MMIDIDX"),
    ],
)
def test_an_index_that_contradicts_itself_is_one_line(tmp_path, changes, words):
    write(tmp_path / "a", [[[1, 2], [3, 4]], [[5, 6]]], **changes)
    with pytest.raises(DataError, match=words) as caught:
        from_megatron.read_pair("a", tmp_path / "a")
    assert "a.idx" in str(caught.value) and "\n" not in str(caught.value)


def test_an_id_below_zero_is_named(tmp_path):
    write(tmp_path / "a", [[[1, -7]]])
    with pytest.raises(DataError, match=r"a.bin has the id -7"):
        from_megatron.read_pair("a", tmp_path / "a")
