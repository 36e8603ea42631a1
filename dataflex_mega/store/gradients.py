"""The sharded gradient store: a row of projected gradient features for every sample of a pool, on disk.

A shard is a file that one rank writes and any rank maps. See store.layout for the files. Opening looks at the manifest
and at the sizes of the shards, whatever the number of samples; a block is checked against its checksum when it is first
read.
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
from dataflex_mega.store.files import MANIFEST, check_identity, read_json, write_beside
from dataflex_mega.store.layout import DIGEST, StoreLayout

VERSION = 1
WHAT = "gradient store"


def checksum(content: Any) -> bytes:
    """[16] bytes of a block's or a file's content."""
    return xxhash.xxh3_128_digest(content)


def to_disk(rows: Tensor) -> np.ndarray:
    """[n, width] -> its bfloat16 bit patterns, [n, width] little-endian uint16."""
    return rows.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().astype("<i2", copy=False)


def from_disk(bits: np.ndarray) -> Tensor:
    """The inverse of `to_disk`: [n, width] bfloat16, a copy."""
    return torch.from_numpy(np.array(bits, dtype="<i2").astype(np.int16, copy=False)).view(torch.bfloat16)


class GradientStore:
    """A complete store, read only.

    Args:
        folder: where it is.
        identity: what its rows must belong to, plain values by name; None takes any.

    Raises CheckpointError for a folder that is no complete store, belongs to something else, or lacks bytes.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        manifest = read_json(folder / MANIFEST, WHAT, VERSION)
        if manifest is None:
            raise CheckpointError(f"{WHAT}: {folder} has no {MANIFEST}")
        self.identity: dict[str, Any] = manifest["identity"]
        if identity is not None:
            check_identity(folder, self.identity, identity, WHAT)
        self.layout = layout_in(folder, manifest)
        self._sums_digests: list[str] | None = manifest["sums"]
        if self._sums_digests is None:
            raise CheckpointError(f"{WHAT}: {folder} is not finished; build it to the end")
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._checked: set[int] = set()
        for shard in range(self.layout.shards):
            self._check_size(shard)

    def _check_size(self, shard: int) -> None:
        sizes = {
            self.layout.shard_file(self.folder, shard): self.layout.shard_bytes(shard),
            self.layout.sums_file(self.folder, shard): len(self.layout.blocks_of(shard)) * DIGEST,
        }
        for path, wanted in sizes.items():
            if not path.is_file():
                raise CheckpointError(f"{WHAT}: {path} is missing")
            if path.stat().st_size != wanted:
                raise CheckpointError(f"{WHAT}: {path} has {path.stat().st_size} bytes, expected {wanted}")

    # -- reading ---------------------------------------------------------------------------------------------------

    def block(self, block: int) -> Tensor:
        """[n, width] bfloat16 rows of a block. Raises CheckpointError, naming the file, when a byte of it is wrong."""
        shard = self.layout.shard_of(block)
        rows, sums = self._map(shard)
        ids, first = self.layout.samples_of(block), self.layout.rows_of(shard).start
        bits = rows[ids.start - first : ids.stop - first]
        if block not in self._checked:
            place = block - self.layout.blocks_of(shard).start
            if checksum(bits.data) != sums[place].tobytes():
                raise CheckpointError(self._damaged(shard, block))
            self._checked.add(block)
        return from_disk(bits)

    def _damaged(self, shard: int, block: int) -> str:
        ids = self.layout.samples_of(block)
        return (
            f"{WHAT}: {self.layout.shard_file(self.folder, shard)} is damaged in the rows of samples "
            f"{ids.start}..{ids.stop - 1}"
        )

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._maps:
            path, sums = self.layout.shard_file(self.folder, shard), self.layout.sums_file(self.folder, shard)
            assert self._sums_digests is not None
            content = sums.read_bytes()
            if checksum(content).hex() != self._sums_digests[shard]:
                raise CheckpointError(f"{WHAT}: {sums} is damaged")
            rows = len(self.layout.rows_of(shard))
            mapped: Any = np.zeros((0, self.layout.width), dtype="<i2")
            if rows:
                mapped = np.memmap(path, dtype="<i2", mode="r", shape=(rows, self.layout.width))
            self._maps[shard] = (mapped, np.frombuffer(content, dtype=np.uint8).reshape(-1, DIGEST))
        return self._maps[shard]

    def share(self, rank: int, ranks: int) -> Iterator[tuple[range, Tensor]]:
        """(ids, [n, width] bfloat16 rows) of a rank's share, block after block."""
        for block in self.layout.share(rank, ranks):
            yield self.layout.samples_of(block), self.block(block)

    def fetch(self, ids: np.ndarray) -> Tensor:
        """[n] global ids -> [n, width] float32. Raises ValueError for an id that is not there."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.samples:
            raise ValueError(f"ids must be in 0..{self.layout.samples - 1}")
        found = torch.zeros(len(ids), self.layout.width)
        blocks = ids // self.layout.block
        for block in np.unique(blocks):
            places = np.flatnonzero(blocks == block)
            rows = self.block(int(block))
            found[places] = rows[torch.from_numpy(ids[places] - int(block) * self.layout.block)].float()
        return found

    def faults(self, rank: int = 0, ranks: int = 1) -> list[str]:
        """What is wrong with this rank's share, a line each; reads every byte of it."""
        found: list[str] = []
        for block in self.layout.share(rank, ranks):
            self._checked.discard(block)
            try:
                self.block(block)
            except CheckpointError as error:
                found.append(str(error))
        return list(dict.fromkeys(found))


def layout_in(folder: Path, manifest: Mapping[str, Any]) -> StoreLayout:
    """The layout that a manifest describes. Raises CheckpointError when it describes none."""
    try:
        found = StoreLayout(**{key: int(value) for key, value in manifest["layout"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{WHAT}: {folder / MANIFEST} cannot be read: {error}") from error
    if min(found.samples, found.width, found.shards, found.block) < 1:
        raise CheckpointError(f"{WHAT}: {folder / MANIFEST} describes an impossible layout")
    return found


def write_manifest(folder: Path, identity: Mapping[str, Any], layout: StoreLayout, sums: list[str] | None) -> None:
    """`sums`: of each shard's .sums file; None while the build is not finished."""
    sizes = {name: getattr(layout, name) for name in ("samples", "width", "shards", "block")}
    content = {"version": VERSION, "identity": dict(identity), "layout": sizes, "sums": sums}
    write_beside(folder / MANIFEST, json.dumps(content, indent=1).encode())
