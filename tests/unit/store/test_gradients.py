"""The gradient store: reading gives what was written, builds resume to equal bytes, other stores and damage are named."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.errors import CheckpointError
from dataflex_mega.store import build
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout

IDENTITY = {"model": "abc", "data": {"code": "1"}, "projection": {"rows": 4, "seed": 0}}
LAYOUT = StoreLayout(num_samples=75, width=6, num_shards=3, block_size=8)


def rows(ids: range) -> torch.Tensor:
    return torch.stack([torch.sin(torch.arange(6.0) * (i + 1)) * 3 for i in ids])


def write(folder: Path, shards: range | list[int] = range(3), layout: StoreLayout = LAYOUT) -> list[int]:
    """The blocks that were computed."""
    made = build.create_or_resume(folder, IDENTITY, layout)
    computed = []
    for shard in shards:
        writer = build.ShardWriter(folder, made, shard)
        for block in writer.missing_blocks:
            writer.write(rows(made.ids_of_block(block)))
            computed.append(block)
        writer.close()
    return computed


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def built(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    assert write(folder) == list(range(10))
    build.finalize(folder, IDENTITY, LAYOUT)
    return folder


def test_every_sample_is_in_one_block_and_one_shard() -> None:
    for shards in (1, 2, 3, 7, 12):
        layout = StoreLayout(75, 6, shards, 8)
        assert [b for s in range(shards) for b in layout.blocks_of_shard(s)] == list(range(10))
        assert [i for s in range(shards) for i in layout.ids_of_shard(s)] == list(range(75))
        assert all(b in layout.blocks_of_shard(layout.shard_of_block(b)) for b in range(10))
        assert [b for r in range(4) for b in layout.blocks_of_rank(r, 4)] == list(range(10))


def test_rows_come_back_rounded_to_bfloat16_in_any_order(built: Path) -> None:
    store, ids = GradientStore(built, IDENTITY), np.random.default_rng(0).permutation(75)
    expected = rows(range(75)).bfloat16().float()
    assert torch.equal(store.fetch(ids), expected[torch.from_numpy(ids)])
    for ranks in (1, 2, 4, 16):
        parts = [(list(i), r) for rank in range(ranks) for i, r in store.iter_blocks(rank, ranks)]
        assert [i for part, _ in parts for i in part] == list(range(75))
        assert torch.equal(torch.cat([r for _, r in parts]).float(), expected)


def test_files_are_laid_out_as_documented(built: Path) -> None:
    """Read with NumPy alone: shards end to end are the rows, as the upper half of float32."""
    raw = b"".join((built / f"shard-{s:05d}-of-00003.bin").read_bytes() for s in range(3))
    bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
    found = bits.view(np.float32).reshape(75, 6)
    np.testing.assert_array_equal(found, rows(range(75)).bfloat16().float().numpy())
    assert sum((built / f"shard-{s:05d}-of-00003.sums").stat().st_size for s in range(3)) == 16 * 10


def test_a_shard_without_a_block_is_allowed(tmp_path: Path) -> None:
    layout = StoreLayout(num_samples=10, width=6, num_shards=4, block_size=8)
    write(tmp_path, range(4), layout)
    build.finalize(tmp_path, IDENTITY, layout)
    assert torch.equal(GradientStore(tmp_path).fetch(np.arange(10)), rows(range(10)).bfloat16().float())


@pytest.mark.parametrize("cut", ["rows", "sums", "between", "bytes", "renaming"])
def test_a_build_goes_on_after_its_last_whole_block(built: Path, tmp_path: Path, cut: str) -> None:
    folder = tmp_path / "other"
    layout = build.create_or_resume(folder, IDENTITY, LAYOUT)
    writer = build.ShardWriter(folder, layout, 0)
    for block in (0, 1):
        writer.write(rows(layout.ids_of_block(block)))
    writer.close()
    part, sums = folder / "shard-00000-of-00003.bin.part", folder / "shard-00000-of-00003.sums.part"
    if cut == "rows":  # a block that is half there
        part.write_bytes(part.read_bytes() + b"\1" * 40)
    elif cut == "sums":
        sums.write_bytes(sums.read_bytes()[:20])
    elif cut == "between":  # rows written, checksum not
        part.write_bytes(part.read_bytes() + b"\1" * layout.block_bytes(2))
    elif cut == "bytes":  # lost by the disk
        damaged = bytearray(part.read_bytes())
        damaged[layout.block_bytes(0) + 3] ^= 1
        part.write_bytes(damaged)
    else:
        writer = build.ShardWriter(folder, layout, 0)
        for block in writer.missing_blocks:
            writer.write(rows(layout.ids_of_block(block)))
        writer.close()
        (folder / "shard-00000-of-00003.sums").rename(sums)
    kept = {"rows": 2, "sums": 1, "between": 2, "bytes": 1, "renaming": 3}[cut]
    assert not build.is_complete(folder)
    with pytest.raises(CheckpointError, match="not finished"):
        GradientStore(folder)
    with pytest.raises(CheckpointError, match="shard-00000"):
        build.finalize(folder, IDENTITY, layout)
    assert write(folder, [1, 0, 2]) == [*range(3, 6), *range(kept, 3), *range(6, 10)]
    build.finalize(folder, IDENTITY, layout)
    assert content(folder) == content(built)


def test_a_build_continues_on_another_number_of_ranks_in_the_shards_it_began_with(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    write(folder, [1])
    assert build.create_or_resume(folder, IDENTITY, StoreLayout(75, 6, 5, 8)) == LAYOUT
    with pytest.raises(CheckpointError, match="width=6"):
        build.create_or_resume(folder, IDENTITY, StoreLayout(75, 7, 3, 8))


def slow_build(folder: Path, log: Path) -> None:
    layout = build.create_or_resume(folder, IDENTITY, LAYOUT)
    for shard in range(3):
        writer = build.ShardWriter(folder, layout, shard)
        for block in writer.missing_blocks:
            with log.open("a") as stream:
                stream.write(f"{block}\n")
            time.sleep(0.02)
            writer.write(rows(layout.ids_of_block(block)))
        writer.close()
    build.finalize(folder, IDENTITY, layout)


def test_kill_nine_costs_no_more_than_the_block_in_hand(built: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "other", tmp_path / "computed"
    context, kills = get_context("fork"), 0
    while True:
        process = context.Process(target=slow_build, args=(folder, log))
        process.start()
        begun = len(log.read_text().split()) if log.exists() else 0
        while process.is_alive() and kills < 4:
            if log.exists() and len(log.read_text().split()) >= begun + 2:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    computed = [int(line) for line in log.read_text().split()]
    assert kills >= 2 and sorted(set(computed)) == list(range(10))
    assert len(computed) - 10 <= kills, "one block at most for each kill"
    assert content(folder) == content(built)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "def"}, "model: abc there, def here"),
        ({"data": {"code": "2"}}, "data:"),
        ({"projection": {"rows": 4, "seed": 1}}, "projection:"),
        ({"cutoff_len": 32}, "cutoff_len: None there, 32 here"),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(built: Path, changes: Any, named: str) -> None:
    for opened in (GradientStore, lambda folder, identity: build.create_or_resume(folder, identity, LAYOUT)):
        with pytest.raises(CheckpointError, match=named):
            opened(built, {**IDENTITY, **changes})


def test_a_flipped_byte_is_named_by_whoever_reads_it(built: Path) -> None:
    path = built / "shard-00001-of-00003.bin"
    damaged = bytearray(path.read_bytes())
    damaged[LAYOUT.block_bytes(3) + 5] ^= 4
    path.write_bytes(damaged)
    store = GradientStore(built, IDENTITY)
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00003\.bin is damaged in the rows of samples 32\.\.39"):
        store.fetch(np.arange(75))
    assert torch.equal(store.fetch(np.arange(32)), rows(range(32)).bfloat16().float()), "the others can be read"
    faults = [fault for rank in range(2) for fault in store.integrity_errors(rank, 2)]
    assert len(faults) == 1 and "samples 32..39" in faults[0]


def test_a_truncated_or_missing_file_is_named_on_opening(built: Path) -> None:
    path = built / "shard-00002-of-00003.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(CheckpointError, match=rf"shard-00002-of-00003\.bin has {len(whole) - 2} bytes, expected"):
        GradientStore(built)
    path.write_bytes(whole)
    sums = built / "shard-00000-of-00003.sums"
    kept = sums.read_bytes()
    sums.write_bytes(bytes(len(kept)))
    with pytest.raises(CheckpointError, match=r"shard-00000-of-00003\.sums is damaged"):
        GradientStore(built).read_block(0)
    sums.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000-of-00003\.sums is missing"):
        GradientStore(built)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        GradientStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1, "identity": {}, "layout": {"samples": 0}, "sums": []}')
    with pytest.raises(CheckpointError, match="manifest.json"):
        GradientStore(tmp_path)


def test_opening_reads_no_row(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("a shard was mapped")

    monkeypatch.setattr(np, "memmap", forbidden)
    store = GradientStore(built, IDENTITY)
    with pytest.raises(AssertionError, match="mapped"):
        store.read_block(0)


def test_wrong_shapes_and_ids_are_refused(built: Path, tmp_path: Path) -> None:
    writer = build.ShardWriter(tmp_path, build.create_or_resume(tmp_path, IDENTITY, LAYOUT), 0)
    with pytest.raises(ValueError, match="block 0"):
        writer.write(torch.zeros(7, 6))
    with pytest.raises(ValueError, match=r"0\.\.74"):
        GradientStore(built).fetch(np.array([75]))
