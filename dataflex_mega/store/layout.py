"""How the rows of a gradient store lie in its files: plain arithmetic, nothing is read or written.

    manifest.json               what the rows belong to; once the build is done also the checksum of every .sums file
    shard-00002-of-00004.bin    rows of consecutive samples, [n, width] little-endian bfloat16
    shard-00002-of-00004.sums   16 bytes a block: the XXH3-128 of the block's rows

Samples come in blocks of `block`; a shard has whole blocks, the last one of the pool may be short. Neither blocks nor what
is in them depends on the number of ranks, and shards laid end to end are the rows of all samples in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BLOCK = 256  # samples
DIGEST = 16  # bytes of a checksum
ITEM = 2  # bytes of a number


@dataclass(frozen=True)
class StoreLayout:
    """Where every block is."""

    samples: int  # N
    width: int  # numbers a sample
    shards: int
    block: int = BLOCK

    @property
    def blocks(self) -> int:
        """Of all shards."""
        return -(-self.samples // self.block)

    def blocks_of(self, shard: int) -> range:
        """The blocks of a shard."""
        return range(self.blocks * shard // self.shards, self.blocks * (shard + 1) // self.shards)

    def shard_of(self, block: int) -> int:
        """Which shard has a block."""
        shard = block * self.shards // self.blocks
        while block not in self.blocks_of(shard):
            shard += 1
        return shard

    def samples_of(self, block: int) -> range:
        """The global ids of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.samples))

    def rows_of(self, shard: int) -> range:
        """The global ids of a shard."""
        blocks = self.blocks_of(shard)
        return range(min(blocks.start * self.block, self.samples), min(blocks.stop * self.block, self.samples))

    def block_bytes(self, block: int) -> int:
        """Of the rows of a block."""
        return len(self.samples_of(block)) * self.width * ITEM

    def shard_bytes(self, shard: int) -> int:
        """Of a whole shard."""
        return len(self.rows_of(shard)) * self.width * ITEM

    def share(self, rank: int, ranks: int) -> range:
        """The blocks that a rank reads: contiguous, as even as whole blocks can be."""
        return range(self.blocks * rank // ranks, self.blocks * (rank + 1) // ranks)

    def shard_file(self, folder: Path, shard: int) -> Path:
        """The rows."""
        return folder / f"shard-{shard:05d}-of-{self.shards:05d}.bin"

    def sums_file(self, folder: Path, shard: int) -> Path:
        """The checksums."""
        return self.shard_file(folder, shard).with_suffix(".sums")
