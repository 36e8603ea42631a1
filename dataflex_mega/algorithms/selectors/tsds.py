"""Samples drawn with the chances that TSDS found before the run.

Liu et al. 2024, "TSDS: Data Selection for Task-Specific Model Finetuning" (arXiv 2410.11303): an optimal transport from
the samples of a task to the candidates gives every candidate a chance p_i. The offline tool writes them; here they are
drawn from, anew at every update: one after the other without replacement as DataFlex does, or with it as the paper does.
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
DTYPES = {"<f8": torch.float64, "<f4": torch.float32}


def read_chances(path: Path) -> Tensor:
    """[N] float64 of a .npy file (numpy's format 1 to 3). Raises DataError when it holds anything else."""
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{path}: expected a .npy file of numbers, found another format")
        width = 2 if stream.read(2)[:1] == b"\x01" else 4
        text = stream.read(int.from_bytes(stream.read(width), "little"))
        content = bytearray(stream.read())
    try:
        header = ast.literal_eval(text.decode("utf-8"))
        kind, shape = header["descr"], header["shape"]
    except (SyntaxError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the header of the .npy file cannot be read") from error
    if kind not in DTYPES or len(shape) != 1:
        raise DataError(f"{path}: expected [N] numbers of type {' or '.join(DTYPES)}, found {list(shape)} of {kind}")
    size = shape[0] * DTYPES[kind].itemsize
    if len(content) != size or size == 0:
        raise DataError(
            f"{path}: expected {size} bytes for the shape {list(shape)}, at least one, found {len(content)}"
        )
    return torch.frombuffer(content, dtype=DTYPES[kind]).double()


@dataclass
class Tsds(Selector):
    """Chances from a file.

    Args:
        probs_path: the .npy file of the offline tool: [N] float64 or float32, one number >= 0 for each sample of the
            pool in its order, taken relative to their sum.
        replacement: whether a candidate may be chosen more than once.
        cache_dir: where step_N.json of each selection goes; None: the output directory.
    """

    probs_path: str = "tsds_probs.npy"
    replacement: bool = False
    cache_dir: str | None = None
    _log_chances: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] float32

    def setup(self, domains: Domains) -> None:
        """Read the file.

        Raises:
            ConfigError: there is no such file.
            DataError: its content is of another type, belongs to a pool of another size, or holds no chances.
        """
        path, samples = Path(self.probs_path).expanduser(), sum(domains.sizes)
        if not path.is_file():
            raise ConfigError(f"selector.tsds.probs_path: {path} not found (relative to {Path.cwd()})")
        chances = read_chances(path)
        if len(chances) != samples:
            sizes = ", ".join(f"{name} {size}" for name, size in zip(domains.names, domains.sizes, strict=True))
            raise DataError(
                f"{path}: expected {samples} numbers, one a sample of the pool ({sizes}), found {len(chances)}"
            )
        wrong = (~(torch.isfinite(chances) & (chances >= 0))).nonzero()
        if len(wrong):
            raise DataError(f"{path}: must be finite and >= 0, found {float(chances[wrong[0]])} at {int(wrong[0])}")
        if float(chances.max()) == 0:
            raise DataError(f"{path}: must not be 0 for all {samples} samples")
        relative = chances / chances.max()  # before the sum, which may overflow
        self._log_chances = (relative.log() - relative.sum().log()).float()

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: log p of each sample, -inf for p = 0."""
        assert self._log_chances is not None, "setup was not called"
        return self._log_chances[table.sample_id.cpu()]

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] int64 positions: the largest of log p + Gumbel noise, which is drawing one after the other (Yellott 1977).

        Raises DataError when count is more than there are candidates with p > 0.
        """
        logs = scores.double()
        possible = int((logs > -math.inf).sum())
        if count > possible and (not self.replacement or possible == 0):
            found = f"{count} samples wanted, {self.probs_path} gives {possible} of {len(scores)} candidates a chance"
            raise DataError(f"selector.tsds: {found}; shorten update_step or set selector.tsds.replacement")
        if self.replacement:
            bounds = (logs - logs.max()).exp().cumsum(0)
            place = torch.rand(count, generator=rng, dtype=torch.float64) * bounds[-1]
            last = int((logs > -math.inf).nonzero().max())  # rounding may put a place at the very end
            return torch.searchsorted(bounds, place, right=True).clamp(max=last)
        uniform = torch.rand(len(scores), generator=rng, dtype=torch.float64)
        waiting = -torch.log1p(-uniform)  # exponential, so -log of it is Gumbel
        keys = torch.where(logs > -math.inf, logs - waiting.log(), -math.inf)
        return keys.sort(descending=True, stable=True).indices[:count]

    def state(self) -> dict[str, Any]:
        """What the chances are, so that a resumed run cannot go on with others."""
        assert self._log_chances is not None, "setup was not called"
        return {"chances": hashlib.sha256(self._log_chances.numpy().tobytes()).hexdigest()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the file has changed."""
        if state != self.state():
            raise CheckpointError(f"{self.probs_path} gives other chances than when the checkpoint was written")
