"""Building a gradient store: each shard grows block by block under a temporary name and is renamed when it is complete.

A build that was killed continues after the last block whose rows match their checksum, on any number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import close_durably, replace_file
from dataflex_mega.store.gradients import VERSION, WHAT, checksum, read_layout, to_bits, write_manifest
from dataflex_mega.store.layout import CHECKSUM_BYTES, StoreLayout
from dataflex_mega.store.manifest import MANIFEST, read_manifest, read_own_manifest

UNFINISHED = ".part"  # the suffix of a file that has not all blocks yet


def create_or_resume(folder: Path, identity: Mapping[str, Any], layout: StoreLayout) -> StoreLayout:
    """Create the folder with a manifest, or read the layout of an unfinished build, which keeps its number of shards.

    One process calls it. Raises CheckpointError for a folder with another identity or other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_own_manifest(folder, identity, WHAT, VERSION)
    if manifest is None:
        write_manifest(folder, identity, layout, None)
        return layout
    stored = read_layout(folder, manifest)
    if (stored.num_samples, stored.width, stored.block_size) != (layout.num_samples, layout.width, layout.block_size):
        raise CheckpointError(f"{WHAT}: {folder} has {stored}, this run makes {layout}; name another folder")
    return stored


def is_complete(folder: Path) -> bool:
    """Whether the store in this folder was built to the end."""
    manifest = read_manifest(folder / MANIFEST, WHAT, VERSION)
    return manifest is not None and manifest["sums"] is not None


class ShardWriter:
    """Writes the missing blocks of one shard. Only one process may write a shard at a time."""

    def __init__(self, folder: Path, layout: StoreLayout, shard: int) -> None:
        self.folder, self.layout, self.shard = folder, layout, shard
        self.blocks = layout.blocks_of_shard(shard)
        self.next_block = self.blocks.start
        self._streams: tuple[io.FileIO, io.FileIO] | None = None
        if all(path.is_file() for path in self._paths()):
            self.next_block = self.blocks.stop
        else:
            self._open_unfinished()

    @property
    def missing_blocks(self) -> range:
        """Blocks still to be written, in the order in which `write` takes them."""
        return range(self.next_block, self.blocks.stop)

    def _paths(self) -> tuple[Path, Path]:
        return self.layout.shard_file(self.folder, self.shard), self.layout.checksum_file(self.folder, self.shard)

    def _open_unfinished(self) -> None:
        """Open the files of a former build, truncated after the blocks that match their checksums."""
        streams: list[io.FileIO] = []
        for path in self._paths():
            unfinished = path.with_name(path.name + UNFINISHED)
            if path.is_file():  # killed between the two renames
                replace_file(path, unfinished)
            unfinished.touch()
            streams.append(io.FileIO(unfinished, "r+"))
        rows, checksums = streams
        num_valid, length = 0, 0
        for block in self.blocks:
            content, stored = rows.read(self.layout.block_bytes(block)), checksums.read(CHECKSUM_BYTES)
            if not content or len(content) < self.layout.block_bytes(block) or checksum(content) != stored:
                break
            num_valid, length = num_valid + 1, length + len(content)
        for stream, size in ((rows, length), (checksums, num_valid * CHECKSUM_BYTES)):
            stream.truncate(size)
            stream.seek(size)
        self.next_block += num_valid
        self._streams = (rows, checksums)

    def write(self, rows: Tensor) -> None:
        """Append the [n, width] rows of `next_block`. Raises ValueError for another shape, OSError when the disk is full."""
        expected = (len(self.layout.ids_of_block(self.next_block)), self.layout.width)
        if tuple(rows.shape) != expected or self.next_block >= self.blocks.stop:
            raise ValueError(f"block {self.next_block} has {expected} numbers, given {tuple(rows.shape)}")
        assert self._streams is not None
        content = to_bits(rows).data
        _write_all(self._streams[0], content)
        _write_all(self._streams[1], checksum(content))
        self.next_block += 1

    def close(self) -> None:
        """Flush the files to the disk and close them; a complete shard gets its final names."""
        if self._streams is None:
            return
        for stream in self._streams:
            close_durably(stream)
        self._streams = None
        if self.next_block == self.blocks.stop:
            for path in self._paths():
                replace_file(path.with_name(path.name + UNFINISHED), path)


def _write_all(stream: io.FileIO, content: Any) -> None:
    remaining = memoryview(content).cast("B")
    while len(remaining):
        remaining = remaining[stream.write(remaining) :]


def finalize(folder: Path, identity: Mapping[str, Any], layout: StoreLayout) -> None:
    """Enter the checksums into the manifest; one process calls it, after all shards are closed.

    Raises CheckpointError when a shard is missing.
    """
    digests = []
    for shard in range(layout.num_shards):
        path = layout.checksum_file(folder, shard)
        if not path.is_file() or not layout.shard_file(folder, shard).is_file():
            raise CheckpointError(f"{WHAT}: {path.with_suffix('.bin')} is not there after the build")
        digests.append(checksum(path.read_bytes()).hex())
    write_manifest(folder, identity, layout, digests)
