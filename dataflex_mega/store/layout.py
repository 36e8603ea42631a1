"""How the rows of a gradient store lie in its files: arithmetic only, nothing is read or written.

    manifest.json               the store's identity; once the build is done also the checksum of every .sums file
    shard-00002-of-00004.bin    rows of consecutive samples, [n, width] little-endian bfloat16
    shard-00002-of-00004.sums   16 bytes per block: the XXH3-128 of the block's rows

A block is `block_size` consecutive samples; the last one of the pool may be short. A shard has whole blocks. Neither blocks
nor their content depends on the number of ranks, and the concatenated shards are the rows of all samples in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE = 256  # samples
CHECKSUM_BYTES = 16
ITEM_BYTES = 2  # of a bfloat16 number


@dataclass(frozen=True)
class StoreLayout:
    """The blocks and shards of one store, and the names of their files."""

    num_samples: int  # N
    width: int  # numbers per sample
    num_shards: int
    block_size: int = BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        """Blocks of all shards."""
        return -(-self.num_samples // self.block_size)

    def blocks_of_shard(self, shard: int) -> range:
        """The blocks of a shard."""
        return range(self.num_blocks * shard // self.num_shards, self.num_blocks * (shard + 1) // self.num_shards)

    def blocks_of_rank(self, dp_rank: int, dp_size: int) -> range:
        """The blocks that a rank reads: contiguous, as evenly divided as whole blocks can be."""
        return range(self.num_blocks * dp_rank // dp_size, self.num_blocks * (dp_rank + 1) // dp_size)

    def shard_of_block(self, block: int) -> int:
        """The shard that holds a block."""
        shard = block * self.num_shards // self.num_blocks
        while block not in self.blocks_of_shard(shard):
            shard += 1
        return shard

    def ids_of_block(self, block: int) -> range:
        """The global ids of a block."""
        return range(block * self.block_size, min((block + 1) * self.block_size, self.num_samples))

    def ids_of_shard(self, shard: int) -> range:
        """The global ids of a shard."""
        blocks, size = self.blocks_of_shard(shard), self.block_size
        return range(min(blocks.start * size, self.num_samples), min(blocks.stop * size, self.num_samples))

    def block_bytes(self, block: int) -> int:
        """Bytes of a block's rows."""
        return len(self.ids_of_block(block)) * self.width * ITEM_BYTES

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's rows."""
        return len(self.ids_of_shard(shard)) * self.width * ITEM_BYTES

    def shard_file(self, folder: Path, shard: int) -> Path:
        """The file of a shard's rows."""
        return folder / f"shard-{shard:05d}-of-{self.num_shards:05d}.bin"

    def checksum_file(self, folder: Path, shard: int) -> Path:
        """The file of the checksums of a shard's blocks."""
        return self.shard_file(folder, shard).with_suffix(".sums")
