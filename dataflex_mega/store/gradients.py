"""The sharded gradient store: projected gradient features of every sample of a pool, one row per sample, on disk.

One rank writes a shard and any rank maps it. See store.layout for the files. Opening reads the manifest and the sizes of the
shards, whatever the number of samples; a block is checked against its checksum when it is first read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import atomic_write
from dataflex_mega.store.layout import CHECKSUM_BYTES, StoreLayout
from dataflex_mega.store.manifest import MANIFEST, check_identity, read_manifest

VERSION = 1
WHAT = "gradient store"
# Field of StoreLayout -> its key in the manifest.
LAYOUT_KEYS = {"num_samples": "samples", "width": "width", "num_shards": "shards", "block_size": "block"}


def checksum(content: Any) -> bytes:
    """XXH3-128, 16 bytes, of a block's or a file's content."""
    return xxhash.xxh3_128_digest(content)


def to_bits(rows: Tensor) -> np.ndarray:
    """[n, width] -> the bit patterns of bfloat16, [n, width] little-endian int16."""
    return rows.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2", copy=False)


def from_bits(bits: np.ndarray) -> Tensor:
    """The bit patterns of `to_bits` -> [n, width] bfloat16, a copy."""
    return torch.from_numpy(np.array(bits, dtype="<i2").astype(np.int16, copy=False)).view(torch.bfloat16)


class GradientStore:
    """A complete store, read only.

    Args:
        folder: the folder of the store.
        identity: the expected model, data and projection, plain values by name; None accepts any.

    Raises CheckpointError for a folder without a complete store, with another identity, or with truncated files.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        manifest = read_manifest(folder / MANIFEST, WHAT, VERSION)
        if manifest is None:
            raise CheckpointError(f"{WHAT}: {folder} has no {MANIFEST}")
        self.identity: dict[str, Any] = manifest["identity"]
        if identity is not None:
            check_identity(folder, self.identity, identity, WHAT)
        self.layout = read_layout(folder, manifest)
        self._checksum_file_digests: list[str] | None = manifest["sums"]
        if self._checksum_file_digests is None:
            raise CheckpointError(f"{WHAT}: {folder} is not finished; build it to the end")
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._verified_blocks: set[int] = set()
        for shard in range(self.layout.num_shards):
            self._check_sizes(shard)

    def _check_sizes(self, shard: int) -> None:
        sizes = {
            self.layout.shard_file(self.folder, shard): self.layout.shard_bytes(shard),
            self.layout.checksum_file(self.folder, shard): len(self.layout.blocks_of_shard(shard)) * CHECKSUM_BYTES,
        }
        for path, expected in sizes.items():
            if not path.is_file():
                raise CheckpointError(f"{WHAT}: {path} is missing")
            if path.stat().st_size != expected:
                raise CheckpointError(f"{WHAT}: {path} has {path.stat().st_size} bytes, expected {expected}")

    # -- reading ---------------------------------------------------------------------------------------------------

    def read_block(self, block: int) -> Tensor:
        """[n, width] bfloat16 rows of a block. Raises CheckpointError that names the file when a byte of it is wrong."""
        shard = self.layout.shard_of_block(block)
        rows, checksums = self._map(shard)
        ids, first_id = self.layout.ids_of_block(block), self.layout.ids_of_shard(shard).start
        bits = rows[ids.start - first_id : ids.stop - first_id]
        if block not in self._verified_blocks:
            stored = checksums[block - self.layout.blocks_of_shard(shard).start]
            if checksum(bits.data) != stored.tobytes():
                raise CheckpointError(
                    f"{WHAT}: {self.layout.shard_file(self.folder, shard)} is damaged in the rows of samples "
                    f"{ids.start}..{ids.stop - 1}"
                )
            self._verified_blocks.add(block)
        return from_bits(bits)

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows [n, width], checksums [blocks, 16]) of a shard; the rows are memory-mapped."""
        if shard not in self._maps:
            path, checksum_path = (
                self.layout.shard_file(self.folder, shard),
                self.layout.checksum_file(self.folder, shard),
            )
            assert self._checksum_file_digests is not None
            content = checksum_path.read_bytes()
            if checksum(content).hex() != self._checksum_file_digests[shard]:
                raise CheckpointError(f"{WHAT}: {checksum_path} is damaged")
            num_rows = len(self.layout.ids_of_shard(shard))
            rows: Any = np.zeros((0, self.layout.width), dtype="<i2")
            if num_rows:
                rows = np.memmap(path, dtype="<i2", mode="r", shape=(num_rows, self.layout.width))
            self._maps[shard] = (rows, np.frombuffer(content, dtype=np.uint8).reshape(-1, CHECKSUM_BYTES))
        return self._maps[shard]

    def iter_blocks(self, dp_rank: int, dp_size: int) -> Iterator[tuple[range, Tensor]]:
        """(ids, [n, width] bfloat16 rows) of a rank's blocks, one after the other."""
        for block in self.layout.blocks_of_rank(dp_rank, dp_size):
            yield self.layout.ids_of_block(block), self.read_block(block)

    def fetch(self, ids: np.ndarray) -> Tensor:
        """[n] global ids -> [n, width] float32. Raises ValueError for an id outside the store."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.num_samples:
            raise ValueError(f"ids must be in 0..{self.layout.num_samples - 1}")
        fetched = torch.zeros(len(ids), self.layout.width)
        blocks = ids // self.layout.block_size
        for block in np.unique(blocks):
            positions = np.flatnonzero(blocks == block)
            rows = self.read_block(int(block))
            fetched[positions] = rows[torch.from_numpy(ids[positions] - int(block) * self.layout.block_size)].float()
        return fetched

    def integrity_errors(self, dp_rank: int = 0, dp_size: int = 1) -> list[str]:
        """The damaged files of a rank's blocks, one line each; reads every byte of them."""
        errors: list[str] = []
        for block in self.layout.blocks_of_rank(dp_rank, dp_size):
            self._verified_blocks.discard(block)
            try:
                self.read_block(block)
            except CheckpointError as error:
                errors.append(str(error))
        return list(dict.fromkeys(errors))


def read_layout(folder: Path, manifest: Mapping[str, Any]) -> StoreLayout:
    """The layout that a manifest describes. Raises CheckpointError when it describes none."""
    fields = {key: field for field, key in LAYOUT_KEYS.items()}
    try:
        layout = StoreLayout(**{fields[key]: int(value) for key, value in manifest["layout"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{WHAT}: {folder / MANIFEST} cannot be read: {error}") from error
    if min(layout.num_samples, layout.width, layout.num_shards, layout.block_size) < 1:
        raise CheckpointError(f"{WHAT}: {folder / MANIFEST} describes an impossible layout")
    return layout


def write_manifest(folder: Path, identity: Mapping[str, Any], layout: StoreLayout, digests: list[str] | None) -> None:
    """Write the manifest. `digests`: the checksum of each shard's .sums file; None while the build is not finished."""
    sizes = {key: getattr(layout, field) for field, key in LAYOUT_KEYS.items()}
    content = {"version": VERSION, "identity": dict(identity), "layout": sizes, "sums": digests}
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1))
