"""Token losses of a reference model for every sample of a pool, by global id, on disk.

    manifest.json       the identity of the losses; once the build is done also the SHA-256 of every block
    block-000012.bin    samples 12 * 256 .. 12 * 256 + 255

A block is little-endian: [n + 1] int64 offsets at which each sample's losses begin, counted in losses; the losses, float32
or bfloat16; the SHA-256 of all before it. A block file is complete or absent, so a build that was killed continues with
the absent ones. Nothing in a block depends on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import atomic_write
from dataflex_mega.store.manifest import MANIFEST, read_own_manifest

VERSION = 1
WHAT = "reference_cache"  # the key, at the beginning of errors
BLOCK_SIZE = 256  # samples
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_OPEN_BLOCKS = 512  # memory maps

Dtype = Literal["float32", "bfloat16"]
NUMPY_DTYPES: dict[str, Any] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}  # NumPy has no bfloat16


class ReferenceLossCache:
    """A folder of token losses, unfinished or complete.

    Args:
        folder: its path.
        identity: the model and data of the losses, plain values by name; a folder with another identity is refused.
        num_samples: N, of the pool.
        dtype: of the losses on disk.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_samples: int, dtype: Dtype = "float32") -> None:
        self.folder, self.num_samples, self.dtype = folder, num_samples, dtype
        self.identity = {**identity, "samples": num_samples, "dtype": dtype, "block": BLOCK_SIZE}
        self.num_blocks = -(-num_samples // BLOCK_SIZE)
        self._maps: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def ids_of_block(self, block: int) -> np.ndarray:
        """[n] int64 global ids of a block."""
        return np.arange(block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self.num_samples), dtype=np.int64)

    def block_file(self, block: int) -> Path:
        """Path of a block's file."""
        return self.folder / f"block-{block:06d}.bin"

    # -- building --------------------------------------------------------------------------------------------------

    def create_or_resume(self) -> None:
        """Create the folder with a manifest; one process calls it. Raises CheckpointError for another identity."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._read_manifest() is None:
            self._write_manifest(None)

    def is_complete(self) -> bool:
        """Whether this identity was built to the end. Raises CheckpointError for a folder of another identity."""
        manifest = self._read_manifest()
        return manifest is not None and manifest["blocks"] is not None

    def missing_blocks(self) -> list[int]:
        """Blocks without a file, or whose file does not end in its own checksum."""
        return [block for block in range(self.num_blocks) if self._checksum(block) is None]

    def write_block(self, block: int, losses: Sequence[torch.Tensor]) -> None:
        """Write the losses of `ids_of_block(block)`, one [length] tensor each. Raises ValueError for another number."""
        if len(losses) != len(self.ids_of_block(block)):
            raise ValueError(f"block {block} has {len(self.ids_of_block(block))} samples, given {len(losses)}")
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in losses])]).astype("<i8")
        flat = torch.cat([one.detach().float().cpu() for one in losses])
        if self.dtype == "bfloat16":
            values = flat.bfloat16().view(torch.int16).numpy().astype("<u2")
        else:
            values = flat.numpy().astype("<f4")
        content = offsets.tobytes() + values.tobytes()
        atomic_write(self.block_file(block), content + hashlib.sha256(content).digest())

    def finalize(self) -> None:
        """Enter the checksums of all blocks; one process calls it, after all have written.

        Raises CheckpointError when a block is missing or damaged.
        """
        digests = [self._checksum(block) for block in range(self.num_blocks)]
        missing = [self.block_file(block).name for block, digest in enumerate(digests) if digest is None]
        if missing:
            raise CheckpointError(f"{WHAT}: {self.folder}: {missing[0]} could not be read back")
        self._write_manifest([digest for digest in digests if digest is not None])

    def _write_manifest(self, digests: list[str] | None) -> None:
        content = {"version": VERSION, "identity": self.identity, "blocks": digests}
        atomic_write(self.folder / MANIFEST, json.dumps(content, indent=1))

    def _checksum(self, block: int) -> str | None:
        """The checksum at the end of a block's file; None when it is not that of the content."""
        path = self.block_file(block)
        if not path.is_file() or path.stat().st_size < DIGEST_BYTES + 8:
            return None
        sha, remaining = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
        with path.open("rb") as stream:
            while remaining > 0:
                chunk = stream.read(min(remaining, 1 << 20))
                if not chunk:
                    return None
                sha.update(chunk)
                remaining -= len(chunk)
            return sha.hexdigest() if stream.read() == sha.digest() else None

    # -- reading ---------------------------------------------------------------------------------------------------

    def integrity_errors(self, rank: int = 0, world_size: int = 1) -> list[str]:
        """The missing and damaged blocks among every `world_size`-th block of a complete cache, one line each."""
        manifest = self._read_manifest()
        if manifest is None or manifest["blocks"] is None:
            return [f"{self.folder / MANIFEST} is missing or its build is not finished"]
        digests = manifest["blocks"]
        damaged = [
            block for block in range(rank, self.num_blocks, world_size) if self._checksum(block) != digests[block]
        ]
        return [f"{self.block_file(block)} is missing or damaged" for block in damaged]

    def fetch(self, ids: np.ndarray) -> list[np.ndarray]:
        """[n] global ids -> n arrays [length] float32, copies. Raises CheckpointError when a block cannot be read."""
        return [self._losses_of(int(i)) for i in ids]

    def _losses_of(self, sample_id: int) -> np.ndarray:
        offsets, values = self._map(sample_id // BLOCK_SIZE)
        row = sample_id % BLOCK_SIZE
        stored = np.array(values[offsets[row] : offsets[row + 1]])
        if self.dtype == "bfloat16":
            return torch.from_numpy(stored.astype(np.int16)).view(torch.bfloat16).float().numpy()
        return stored.astype(np.float32)

    def _map(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if block not in self._maps:
                self._maps[block] = self._open(block)
            self._maps.move_to_end(block)
            while len(self._maps) > MAX_OPEN_BLOCKS:
                self._maps.popitem(last=False)
            return self._maps[block]

    def _open(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """([n + 1] offsets, in memory; the losses, memory-mapped) of a block."""
        num_offsets, path = len(self.ids_of_block(block)) + 1, self.block_file(block)
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{WHAT}: {path} cannot be read: {error}") from error
        offsets = np.array(raw[: 8 * num_offsets]).view("<i8")
        return offsets, raw[8 * num_offsets : len(raw) - DIGEST_BYTES].view(NUMPY_DTYPES[self.dtype])

    def _read_manifest(self) -> dict[str, Any] | None:
        return read_own_manifest(self.folder, self.identity, WHAT, VERSION)


def model_fingerprint(folder: Path) -> str:
    """16 digits of a hash of a Hugging Face folder's configuration and weights, names included.

    Raises CheckpointError when it has no weights.
    """
    weights = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin") and "model" in p.name)
    if not weights:
        raise CheckpointError(f"reference_model: {folder} has no weights (*.safetensors or *.bin)")
    sha = hashlib.sha256()
    for path in [folder / "config.json", *weights]:
        with path.open("rb") as stream:
            sha.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()[:16]
