"""Building a gradient store: a shard grows block by block, beside its place, and is renamed in when it is whole.

A build that was killed goes on after the last block whose rows match their checksum, on any number of ranks.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dataflex_mega.errors import CheckpointError
from dataflex_mega.store.files import MANIFEST, check_identity, read_json, sync_folder
from dataflex_mega.store.gradients import (
    VERSION,
    WHAT,
    checksum,
    layout_in,
    to_disk,
    write_manifest,
)
from dataflex_mega.store.layout import DIGEST, StoreLayout


def begin(folder: Path, identity: Mapping[str, Any], wanted: StoreLayout) -> StoreLayout:
    """Make the folder and say what it belongs to; one process calls it.

    A folder where a build has begun keeps its number of shards. Raises CheckpointError for a folder of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_json(folder / MANIFEST, WHAT, VERSION)
    if manifest is None:
        write_manifest(folder, identity, wanted, None)
        return wanted
    check_identity(folder, manifest["identity"], identity, WHAT)
    found = layout_in(folder, manifest)
    if (found.samples, found.width, found.block) != (wanted.samples, wanted.width, wanted.block):
        raise CheckpointError(f"{WHAT}: {folder} has {found}, this run makes {wanted}; name another folder")
    return found


def is_complete(folder: Path) -> bool:
    """Whether a build was finished here."""
    manifest = read_json(folder / MANIFEST, WHAT, VERSION)
    return manifest is not None and manifest["sums"] is not None


class ShardWriter:
    """One shard being written. One process has it at a time."""

    def __init__(self, folder: Path, layout: StoreLayout, shard: int) -> None:
        self.folder, self.layout, self.shard = folder, layout, shard
        self.blocks = layout.blocks_of(shard)
        self.next = self.blocks.start  # the block to be written next
        self._files: tuple[io.FileIO, io.FileIO] | None = None
        if all(path.is_file() for path in self._paths()):
            self.next = self.blocks.stop
        else:
            self._continue()

    @property
    def missing(self) -> range:
        """Blocks that are still to be written, in this order."""
        return range(self.next, self.blocks.stop)

    def _paths(self) -> tuple[Path, Path]:
        return self.layout.shard_file(self.folder, self.shard), self.layout.sums_file(self.folder, self.shard)

    def _continue(self) -> None:
        """Open what a former build left beside, cut to the blocks that are right."""
        files: list[io.FileIO] = []
        for path in self._paths():
            beside = path.with_name(path.name + ".part")
            if path.is_file():  # killed between the two renames
                path.replace(beside)
            beside.touch()
            files.append(io.FileIO(beside, "r+"))
        rows, sums = files
        good, length = 0, 0
        for block in self.blocks:
            content, digest = rows.read(self.layout.block_bytes(block)), sums.read(DIGEST)
            if not content or len(content) < self.layout.block_bytes(block) or checksum(content) != digest:
                break
            good, length = good + 1, length + len(content)
        for stream, size in ((rows, length), (sums, good * DIGEST)):
            stream.truncate(size)
            stream.seek(size)
        self.next += good
        self._files = (rows, sums)

    def write(self, rows: Tensor) -> None:
        """[n, width] rows of the block `next`. Raises ValueError for another shape, OSError when the disk is full."""
        wanted = (len(self.layout.samples_of(self.next)), self.layout.width)
        if tuple(rows.shape) != wanted or self.next >= self.blocks.stop:
            raise ValueError(f"block {self.next} has {wanted} numbers, given {tuple(rows.shape)}")
        assert self._files is not None
        content = to_disk(rows).data
        _write_all(self._files[0], content)
        _write_all(self._files[1], checksum(content))
        self.next += 1

    def close(self) -> None:
        """To disk; renamed in when all blocks are there."""
        if self._files is None:
            return
        for stream in self._files:
            os.fsync(stream.fileno())
            stream.close()
        self._files = None
        if self.next == self.blocks.stop:
            for path in self._paths():
                path.with_name(path.name + ".part").replace(path)
            sync_folder(self.folder)


def _write_all(stream: io.FileIO, content: Any) -> None:
    left = memoryview(content).cast("B")
    while len(left):
        left = left[stream.write(left) :]


def finish(folder: Path, identity: Mapping[str, Any], layout: StoreLayout) -> None:
    """Enter the checksums; one process calls it, after all shards are closed. Raises CheckpointError when one lacks."""
    sums = []
    for shard in range(layout.shards):
        path = layout.sums_file(folder, shard)
        if not path.is_file() or not layout.shard_file(folder, shard).is_file():
            raise CheckpointError(f"{WHAT}: {path.with_suffix('.bin')} is not there after the build")
        sums.append(checksum(path.read_bytes()).hex())
    write_manifest(folder, identity, layout, sums)
