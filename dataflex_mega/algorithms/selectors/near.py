"""The neighbours of some query samples, the nearest of each query first: what DataFlex's offline tool found.

Its file holds a row of neighbours for each of M queries, the nearest first. They are taken column by column, every query's
nearest, then every query's second, without what was taken before, until there are enough. There is no paper.
"""

from __future__ import annotations

import ast
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Selector
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import Clock, SignalTable

MAGIC = b"\x93NUMPY"
DTYPES = {"<i8": torch.int64, "<i4": torch.int32}
PADDING = -1  # in place of a neighbour that the search did not find


def read_indices(path: Path) -> Tensor:
    """[M, K] int64 of a .npy file (numpy's format 1 to 3). Raises DataError when it holds anything else."""
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{path}: expected a .npy file of whole numbers, found another format")
        width = 2 if stream.read(2)[:1] == b"\x01" else 4
        text = stream.read(int.from_bytes(stream.read(width), "little"))
        content = bytearray(stream.read())
    try:
        header = ast.literal_eval(text.decode("utf-8"))
        kind, shape, columns_first = header["descr"], header["shape"], header["fortran_order"]
    except (SyntaxError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the header of the .npy file cannot be read") from error
    if kind not in DTYPES or len(shape) != 2:
        raise DataError(f"{path}: expected [M, K] numbers of type {' or '.join(DTYPES)}, found {list(shape)} of {kind}")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if len(content) != size or size == 0:
        raise DataError(
            f"{path}: expected {size} bytes for the shape {list(shape)}, at least one, found {len(content)}"
        )
    flat = torch.frombuffer(content, dtype=DTYPES[kind]).long()
    return flat.view(shape[::-1]).t() if columns_first else flat.view(shape)


def ranks(indices: Tensor, samples: int) -> Tensor:
    """[M, K] neighbours, each in -1..samples-1 -> [samples] int64: the place of a sample, -1 for one never named."""
    order = indices.t().reshape(-1)
    places = torch.arange(len(order))[order != PADDING]
    named = order[order != PADDING]
    first = torch.full((samples,), len(order)).scatter_reduce_(0, named, places, "amin")
    taken = (first < len(order)).nonzero().squeeze(1)
    found = torch.full((samples,), -1)
    found[taken[first[taken].argsort()]] = torch.arange(len(taken))
    return found


@dataclass
class Near(Selector):
    """The nearest neighbours of the queries; the same ones at every update.

    Args:
        indices_path: the .npy file of the offline tool: [M, K] int64 or int32, global ids of the pool, nearest first; -1
            where the search found no more.
        cache_dir: where step_N.json of each selection goes; None: the output directory.
    """

    indices_path: str = "top_indices.npy"
    cache_dir: str | None = None
    _ranks: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] int64

    def setup(self, domains: Domains) -> None:
        """Read the file.

        Raises:
            ConfigError: there is no such file.
            DataError: its content is of another type or shape, or names a sample that the pool does not have.
        """
        path, samples = Path(self.indices_path).expanduser(), sum(domains.sizes)
        if not path.is_file():
            raise ConfigError(f"selector.near.indices_path: {path} not found (relative to {Path.cwd()})")
        indices = read_indices(path)
        wrong = ((indices < PADDING) | (indices >= samples)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            found = f"found {int(indices[row, column])} in row {row}, column {column} of {list(indices.shape)}"
            raise DataError(f"{path}: ids must be -1 or in 0..{samples - 1}, those of the pool; {found}")
        self._ranks = ranks(indices, samples)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: minus a sample's place in the order, -inf for one that no query names.

        Places above 2**24 are rounded in float32: neighbours there may tie, and then go by their ids.
        """
        assert self._ranks is not None, "setup was not called"
        places = self._ranks[table.sample_id.cpu()]
        return torch.where(places >= 0, -places.float(), -math.inf)

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] int64 positions, first places first. Raises DataError when fewer candidates are named."""
        named = int(torch.isfinite(scores).sum())
        if count > named:
            found = f"{count} samples wanted, {self.indices_path} names {named} of the {len(scores)} candidates"
            raise DataError(f"selector.near: {found}; shorten update_step or search for more neighbours")
        return scores.sort(descending=True, stable=True).indices[:count]

    def state(self) -> dict[str, Any]:
        """What the order is, so that a resumed run cannot go on with another."""
        assert self._ranks is not None, "setup was not called"
        return {"order": hashlib.sha256(self._ranks.numpy().tobytes()).hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the file has changed."""
        if state != self.state():
            raise CheckpointError(f"{self.indices_path} gives another order than when the checkpoint was written")
