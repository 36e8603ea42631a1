"""Embeddings on disk: a killed build resumes, a damaged block is computed again, another identity is refused."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from dataflex_mega.distributed.parallel_info import data_parallel
from dataflex_mega.errors import CheckpointError
from dataflex_mega.offline.embed import embed
from dataflex_mega.offline.embeddings import Embeddings, open_embeddings
from dataflex_mega.offline.encoders import EmbedInput

ALONE = data_parallel(0, 1, torch.device("cpu"))
ROWS, SIZE, BLOCK = 45, 6, 4


class Numbers:
    """Texts that are their own row numbers."""

    identity = {"file": "numbers"}

    def __len__(self):
        return ROWS

    def fetch(self, rows):
        return [EmbedInput(str(row)) for row in rows]


class Hashing:
    """A vector from a text alone; kills the process, as the system would, when it is asked the n-th time."""

    size = SIZE

    def __init__(self, dies_at=None, name="h"):
        self.calls, self.dies_at, self.name = 0, dies_at, name

    def identity(self):
        return {"model": self.name}

    def __call__(self, inputs):
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.stack([np.random.default_rng(int(item.text)).random(SIZE, dtype=np.float32) for item in inputs])


def build(folder, encoder=None, **options):
    given = {
        "parallel_info": ALONE,
        "dtype": "float32",
        "block_size": BLOCK,
        "progress": lambda done, total: None,
        **options,
    }
    return embed(Numbers(), encoder or Hashing(), folder, **given)


def whole():
    return Hashing()([EmbedInput(str(row)) for row in range(ROWS)])


def test_a_build_is_a_plain_array_that_numpy_maps(tmp_path):
    seen = []
    made = build(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert made.is_complete() and seen[0] == (0, ROWS) and seen[-1] == (ROWS, ROWS)
    found = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    assert found.shape == (ROWS, SIZE) and np.array_equal(found, whole())
    values, identity = open_embeddings(tmp_path)
    assert np.array_equal(values, whole())
    assert identity["data"] == {"file": "numbers"} and identity["model"] == "h" and identity["samples"] == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.npy", "manifest.json"]


def _dying(folder):
    build(folder, Hashing(dies_at=6))


def test_a_killed_build_goes_on_at_the_last_whole_block(tmp_path):
    process = mp.get_context("fork").Process(target=_dying, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="not finished; give the same"):
        open_embeddings(tmp_path)
    encoder = Hashing()
    build(tmp_path, encoder)
    assert encoder.calls == -(-ROWS // BLOCK) - 5, "five blocks were there"
    build(tmp_path / "at_once")
    assert (tmp_path / "embeddings.npy").read_bytes() == (tmp_path / "at_once" / "embeddings.npy").read_bytes()
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / "at_once" / "manifest.json").read_bytes()
    again = Hashing()
    build(tmp_path, again)
    assert again.calls == 0


def test_a_cut_record_or_a_damaged_block_is_made_again(tmp_path):
    made = Embeddings(tmp_path, {"data": Numbers.identity, "model": "h"}, (ROWS, SIZE), "float32", BLOCK)
    made.create_or_resume()
    for block in range(4):
        made.write_block(block, whole()[made.rows_of_block(block)], process=block % 2)
    record = tmp_path / "done-0001.jsonl"
    record.write_text(record.read_text()[:-10])  # block 3: killed while the line was written
    values = np.load(made.path, mmap_mode="r+")
    values[5] += 1  # block 1
    values.flush()
    assert made.missing_blocks() == [1, *range(3, 12)]
    encoder = Hashing()
    build(tmp_path, encoder)
    assert encoder.calls == 10 and np.array_equal(open_embeddings(tmp_path)[0], whole())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoder": Hashing(name="g")}, "model: h there, g here"),
        ({"dtype": "float16"}, "dtype: float32 there, float16 here"),
        ({"block_size": 8}, "block: 4 there, 8 here"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_name(tmp_path, options, said):
    build(tmp_path)
    with pytest.raises(CheckpointError, match=f"belongs to something else .{said}"):
        build(tmp_path, **options)


def test_half_precision_halves_the_file(tmp_path):
    build(tmp_path, dtype="float16")
    values, _ = open_embeddings(tmp_path)
    assert values.dtype == np.float16 and np.array_equal(values, whole().astype(np.float16))


def test_a_bare_array_is_read_and_anything_else_is_not(tmp_path):
    np.save(tmp_path / "a.npy", whole())
    values, identity = open_embeddings(tmp_path / "a.npy")
    assert np.array_equal(values, whole()) and set(identity) == {"file", "samples", "size"}
    np.save(tmp_path / "b.npy", np.arange(3))
    for path, said in ((tmp_path / "b.npy", r"expected \[N, D\] numbers"), (tmp_path / "no", "has no manifest.json")):
        with pytest.raises(CheckpointError, match=said):
            open_embeddings(path)


def test_what_a_process_holds_is_a_block(tmp_path):
    """The encoder never sees more than a block of rows."""
    sizes = []

    def counting(inputs):
        sizes.append(len(inputs))
        return Hashing()(inputs)

    encoder = SimpleNamespace(size=SIZE, identity=lambda: {"model": "h"})
    embed(Numbers(), _Called(encoder, counting), tmp_path, ALONE, "float32", BLOCK, lambda done, total: None)
    assert max(sizes) == BLOCK and sum(sizes) == ROWS


class _Called:
    def __init__(self, base, call):
        self.size, self.identity, self.call = base.size, base.identity, call

    def __call__(self, inputs):
        return self.call(inputs)
