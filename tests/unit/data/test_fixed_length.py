"""Fixed-length rows against files that megatron-core's own builder wrote, and against plain concatenation."""

import sys
from unittest import mock

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.fixed_length import FixedLengthRows, fixed_length_domain
from dataflex_mega.data.manifest import Corpus, CorpusDomain, CorpusTokenizer
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import ConfigError, DataError

pytest.importorskip("megatron.core")
END = 7


def documents(count=50, seed=0):
    draw = np.random.default_rng(seed)
    return [[*draw.integers(8, 500, size=draw.integers(1, 40)).tolist(), END] for _ in range(count)]


def build(prefix, docs, dtype=np.uint16):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for doc in docs:
        builder.add_document(torch.tensor(doc), [len(doc)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("length", [2, 16, 333])
def test_rows_are_the_concatenation_of_the_documents(tmp_path, dtype, length):
    docs = documents()
    stream = [token for doc in docs for token in doc]
    rows = FixedLengthRows(build(tmp_path / "d", docs, dtype), length)
    assert len(rows) == len(stream) // length and rows.documents == 50 and rows.tokens == len(stream)
    assert rows.dropped == len(stream) - len(rows) * length
    joined = [token for inputs, _ in rows.fetch(np.arange(len(rows))) for token in inputs.tolist()]
    assert joined == stream[: len(stream) - rows.dropped]


def test_a_row_has_one_target_less_than_tokens_and_ends_of_documents_are_targets(tmp_path):
    rows = FixedLengthRows(build(tmp_path / "d", [[10, 11, END], [12, END], [13, 14, 15, END]]), 4)
    (inputs, labels), (more, _) = rows.fetch(np.array([0, 1]))
    assert inputs.tolist() == labels.tolist() == [10, 11, END, 12] and more.tolist() == [END, 13, 14, 15]
    assert inputs.dtype == labels.dtype == np.int64
    batch = collate(SamplePool([Domain("d", rows)]).fetch(np.array([0])), pad_id=0)
    assert batch.labels[0, :4].tolist() == [11, END, 12, -100]


def test_rows_come_in_the_order_asked_for_and_may_repeat(tmp_path):
    rows = FixedLengthRows(build(tmp_path / "d", documents()), 5)
    first, second, third = (inputs.tolist() for inputs, _ in rows.fetch(np.array([3, 0, 3])))
    assert first == third != second
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)}"):
        rows.fetch(np.array([len(rows)]))


def test_a_row_is_found_in_its_document(tmp_path):
    docs = documents()
    rows = FixedLengthRows(build(tmp_path / "d", docs), 13)
    owner = [(number, place) for number, doc in enumerate(docs) for place in range(len(doc))]
    assert [rows.locate(row) for row in range(len(rows))] == owner[::13][: len(rows)]


def test_files_that_several_builders_were_joined_into_are_one_stream(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    one, two = documents(20, 1), documents(30, 2)
    builder = IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=np.uint16)
    builder.add_index(str(build(tmp_path / "one", one)))
    builder.add_index(str(build(tmp_path / "two", two)))
    builder.finalize(str(tmp_path / "all.idx"))
    stream = [token for doc in one + two for token in doc]
    rows = FixedLengthRows(tmp_path / "all", 10)
    assert (
        np.concatenate([inputs for inputs, _ in rows.fetch(np.arange(len(rows)))]).tolist() == stream[: len(rows) * 10]
    )


def test_damaged_files_are_named(tmp_path):
    prefix = build(tmp_path / "d", documents())
    whole = (tmp_path / "d.bin").read_bytes()
    (tmp_path / "d.bin").write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=rf"d.bin has {len(whole) - 2} bytes, its .idx describes bytes 0 to {len(whole)}"
    ):
        FixedLengthRows(prefix, 8)
    (tmp_path / "d.bin").write_bytes(b"")
    with pytest.raises(DataError, match="d.bin is empty"):
        FixedLengthRows(prefix, 8)
    (tmp_path / "d.bin").write_bytes(whole)
    index = (tmp_path / "d.idx").read_bytes()
    for broken in (b"WRONGMAGI" + index[9:], index[:60]):
        (tmp_path / "d.idx").write_bytes(broken)
        with pytest.raises(DataError, match="d.idx cannot be read"):
            FixedLengthRows(prefix, 8)
    (tmp_path / "d.idx").unlink()
    with pytest.raises(DataError, match="d.idx not found"):
        FixedLengthRows(prefix, 8)


def test_a_gap_between_documents_is_named(tmp_path):
    docs = [[1, 2, END]] * 4
    build(tmp_path / "d", docs)
    index = bytearray((tmp_path / "d.idx").read_bytes())
    pointers = 34 + 4 * 4  # header, lengths
    index[pointers + 8 : pointers + 16] = np.int64(8).tobytes()  # document 1 begins a token later than 0 ends
    (tmp_path / "d.idx").write_bytes(bytes(index))
    with pytest.raises(DataError, match="document 0 is not followed by the next one"):
        FixedLengthRows(tmp_path / "d", 4)


def test_a_row_of_one_token_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cutoff_len: a row needs at least 2 tokens, found 1"):
        FixedLengthRows(tmp_path / "d", 1)


def test_without_megatron_core_the_extra_is_named(tmp_path):
    absent = mock.patch.dict(sys.modules, {"megatron.core.datasets.indexed_dataset": None})
    with absent, pytest.raises(ConfigError, match=r'pip install "dataflex_mega\[megatron\]"'):
        FixedLengthRows(tmp_path / "d", 8)


def test_a_domain_must_be_as_its_manifest_says_and_fill_a_row(tmp_path):
    docs = documents(5)
    build(tmp_path / "d", docs)
    tokens = sum(map(len, docs))
    entry = CorpusDomain("d", "d", 5, tokens, 1.0, "", "")
    corpus = Corpus(tmp_path, "uint16", CorpusTokenizer("", 512, END), (entry,), 5, 0, (), "")
    assert len(fixed_length_domain(corpus, entry, tokens).rows) == 1
    with pytest.raises(DataError, match=f"domain 'd' has {tokens} tokens, a row of cutoff_len has {tokens + 1}"):
        fixed_length_domain(corpus, entry, tokens + 1)
    with pytest.raises(DataError, match="its manifest says 6"):
        fixed_length_domain(corpus, CorpusDomain("d", "d", 6, tokens, 1.0, "", ""), 8)


@pytest.mark.parametrize("bad", [END + 50, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(tmp_path, bad):
    prefix = build(tmp_path / "d", [[1, 2, END], [3, bad, END], [4, END]], np.int32)
    rows = FixedLengthRows(prefix, 2, vocab_size=END + 1)
    assert len(rows.fetch(np.array([0, 1]))) == 2
    with pytest.raises(
        DataError, match=rf"d\.bin, row 2 of cutoff_len 2: token id {bad} is not below .* size {END + 1}"
    ):
        rows.fetch(np.array([0, 2]))
