"""Token losses of a reference model for every sample of a pool, by global id, on disk.

    manifest.json       what the losses belong to; once the build is done also the SHA-256 of every block
    block-000012.bin    samples 12 * 256 .. 12 * 256 + 255

A block is little-endian: [n + 1] int64 where each sample's losses begin, counted in losses; the losses, float32 or
bfloat16; the SHA-256 of all before it. Blocks are written beside and renamed in, so a build that was killed has only whole
ones and goes on with those that are missing. Nothing in a block depends on the number of ranks.
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
from dataflex_mega.store.files import MANIFEST, check_identity, read_json, write_beside

VERSION = 1
BLOCK = 256  # samples
DIGEST = hashlib.sha256().digest_size
OPEN_BLOCKS = 512  # memory maps kept

Dtype = Literal["float32", "bfloat16"]
NUMPY: dict[str, Any] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}  # NumPy has no bfloat16


class ReferenceCache:
    """A folder of token losses: being built, or complete and read.

    Args:
        folder: where it is or will be.
        identity: what the losses belong to, plain values by name; a folder with another identity is refused.
        samples: N, of the pool.
        dtype: of the losses on disk.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], samples: int, dtype: Dtype = "float32") -> None:
        self.folder, self.samples, self.dtype = folder, samples, dtype
        self.identity = {**identity, "samples": samples, "dtype": dtype, "block": BLOCK}
        self.blocks = -(-samples // BLOCK)
        self._maps: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def ids(self, block: int) -> np.ndarray:
        """[n] int64 global ids of a block."""
        return np.arange(block * BLOCK, min((block + 1) * BLOCK, self.samples), dtype=np.int64)

    def path(self, block: int) -> Path:
        """Of a block's file."""
        return self.folder / f"block-{block:06d}.bin"

    # -- building --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the folder and say what it belongs to; one process calls it. Raises CheckpointError for another's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._read_manifest() is None:
            self._write_manifest(None)

    def complete(self) -> bool:
        """Whether a build of this identity was finished here. Raises CheckpointError for a folder of another."""
        manifest = self._read_manifest()
        return manifest is not None and manifest["blocks"] is not None

    def missing(self) -> list[int]:
        """Blocks that are not there or do not end in their own checksum."""
        return [block for block in range(self.blocks) if self._checksum(block) is None]

    def write(self, block: int, losses: Sequence[torch.Tensor]) -> None:
        """The losses of `ids(block)`, one [length] tensor each. Raises ValueError for another number of them."""
        if len(losses) != len(self.ids(block)):
            raise ValueError(f"block {block} has {len(self.ids(block))} samples, given {len(losses)}")
        begins = np.concatenate([[0], np.cumsum([len(one) for one in losses])]).astype("<i8")
        flat = torch.cat([one.detach().float().cpu() for one in losses])
        if self.dtype == "bfloat16":
            values = flat.bfloat16().view(torch.int16).numpy().astype("<u2")
        else:
            values = flat.numpy().astype("<f4")
        content = begins.tobytes() + values.tobytes()
        write_beside(self.path(block), content + hashlib.sha256(content).digest())

    def finish(self) -> None:
        """Enter the checksums of all blocks; one process calls it, after all have written."""
        sums = [self._checksum(block) for block in range(self.blocks)]
        absent = [self.path(block).name for block, found in enumerate(sums) if found is None]
        if absent:
            raise CheckpointError(f"reference_cache: {self.folder}: {absent[0]} could not be read back")
        self._write_manifest([found for found in sums if found is not None])

    def _write_manifest(self, blocks: list[str] | None) -> None:
        content = {"version": VERSION, "identity": self.identity, "blocks": blocks}
        write_beside(self.folder / MANIFEST, json.dumps(content, indent=1).encode())

    def _checksum(self, block: int) -> str | None:
        """The checksum that a block ends in, when it is right."""
        path = self.path(block)
        if not path.is_file() or path.stat().st_size < DIGEST + 8:
            return None
        sha, left = hashlib.sha256(), path.stat().st_size - DIGEST
        with path.open("rb") as stream:
            while left > 0:
                part = stream.read(min(left, 1 << 20))
                if not part:
                    return None
                sha.update(part)
                left -= len(part)
            return sha.hexdigest() if stream.read() == sha.digest() else None

    # -- reading ---------------------------------------------------------------------------------------------------

    def faults(self, rank: int = 0, ranks: int = 1) -> list[str]:
        """What is wrong with this rank's share of the blocks of a complete cache, a line each."""
        manifest = self._read_manifest()
        if manifest is None or manifest["blocks"] is None:
            return [f"{self.folder / MANIFEST} is missing or its build is not finished"]
        sums = manifest["blocks"]
        shares = range(rank, self.blocks, ranks)
        wrong = [block for block in shares if self._checksum(block) != sums[block]]
        return [f"{self.path(block)} is missing or damaged" for block in wrong]

    def fetch(self, ids: np.ndarray) -> list[np.ndarray]:
        """[n] global ids -> n arrays [length] float32, copies. Raises CheckpointError when a block cannot be read."""
        return [self._one(int(i)) for i in ids]

    def _one(self, sample: int) -> np.ndarray:
        begins, values = self._map(sample // BLOCK)
        first = sample % BLOCK
        mine = np.array(values[begins[first] : begins[first + 1]])
        if self.dtype == "bfloat16":
            return torch.from_numpy(mine.astype(np.int16)).view(torch.bfloat16).float().numpy()
        return mine.astype(np.float32)

    def _map(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if block not in self._maps:
                self._maps[block] = self._open(block)
            self._maps.move_to_end(block)
            while len(self._maps) > OPEN_BLOCKS:
                self._maps.popitem(last=False)
            return self._maps[block]

    def _open(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        count, path = len(self.ids(block)) + 1, self.path(block)
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"reference_cache: {path} cannot be read: {error}") from error
        begins = np.array(raw[: 8 * count]).view("<i8")
        return begins, raw[8 * count : len(raw) - DIGEST].view(NUMPY[self.dtype])

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest when there is one. Raises CheckpointError when it belongs to something else."""
        found = read_json(self.folder / MANIFEST, "reference_cache", VERSION)
        if found is None:
            return None
        check_identity(self.folder, found["identity"], self.identity, "reference_cache")
        return found


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
