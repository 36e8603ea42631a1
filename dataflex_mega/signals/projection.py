"""Random projections of gradients: functions of (seed, layer) alone, so equal on every rank and never stored.

Two-sided: a weight's gradient G [d_out, d_in] becomes P_o G P_i^T [k_o, k_i]. As G is the sum over positions of e_t a_t^T,
that is the sum of (P_o e_t)(P_i a_t)^T: two thin products of what the hooks see, and the gradient itself is never formed.
It is (P_o kron P_i) vec(G), so inner products are kept on average, with a spread of about 1 / sqrt(k_o k_i) at best.

Dense (Johnson-Lindenstrauss, as LESS has it): all gradients as one vector times signs [k, P]. It needs the gradient, tile by
tile, and 2 k operations for each of its P elements; it is here as a baseline.

Signs come from Philox, keyed by a hash of seed and layer. A side that is not longer than its projection is not projected.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.signals.per_sample_gradients import AdamMoments


def random_signs(seed: int, name: str, rows: int, columns: int) -> Tensor:
    """[rows, columns] float32 of +1 and -1, a function of the arguments."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-rows * columns // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=rows * columns, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1).view(rows, columns)


def scaled_signs(seed: int, name: str, size: int, dimension: int) -> Tensor | None:
    """[size, dimension] projection of one side, scaled to keep lengths on average; None for a side that is not longer."""
    return None if size >= dimension else random_signs(seed, name, size, dimension) / size**0.5


@dataclass(frozen=True)
class RankOneAdam:
    """Adam with a second moment of rank one, split into a factor for each side.

    The update for the gradient g is about (b1 m + (1 - b1) g) / (1 - b1^t) * r^(-1/2) c^(-1/2), where r c^T is the rank-one
    matrix with the row and column sums of b2 v / (1 - b2^t) + eps^2, as in Adafactor; g^2's own part of the second moment,
    1 - b2 of it, is left out. The term with m is one constant for all samples; it stays, since without it scores of LESS
    lose far more than by the rank-one split.
    """

    rows: Tensor  # [d_out] r^(-1/2)
    columns: Tensor  # [d_in] c^(-1/2)
    gain: float  # of the gradient: (1 - b1) / (1 - b1^t)
    momentum: Tensor  # [d_out, d_in] b1 m / (1 - b1^t), not yet scaled by the factors

    @classmethod
    def from_moments(cls, adam: AdamMoments) -> RankOneAdam:
        """The rank-one split of a weight's moments."""
        b1, b2 = adam.betas
        t = adam.step + 1
        second = adam.second.double() * (b2 / (1 - b2**t)) + adam.eps**2
        rows, columns = second.sum(1), second.sum(0) / second.sum()
        dtype = adam.first.dtype
        gain, momentum = (1 - b1) / (1 - b1**t), adam.first * (b1 / (1 - b1**t))
        return cls(rows.rsqrt().to(dtype), columns.rsqrt().to(dtype), gain, momentum)

    def update(self, gradient: Tensor) -> Tensor:
        """[..., d_out, d_in] gradients -> updates, of which TwoSidedProjection.features are the projections."""
        return (self.momentum + self.gain * gradient) * self.rows.unsqueeze(1) * self.columns


class TwoSidedProjection:
    """The two-sided projection of one layer's gradients."""

    def __init__(self, name: str, shape: tuple[int, int], size: int, seed: int) -> None:
        """`shape`: of the weight. `size`: k_o and k_i, where a side is longer than that."""
        self.outputs = scaled_signs(seed, f"{name}/out", size, shape[0])
        self.inputs = scaled_signs(seed, f"{name}/in", size, shape[1])
        self.shape = (min(size, shape[0]), min(size, shape[1]))
        self.width = self.shape[0] * self.shape[1]
        self.preconditioned: tuple[Tensor, Tensor, Tensor] | None = None  # outputs, inputs, the projected constant
        self._gain = 1.0

    def precondition(self, adam: RankOneAdam) -> None:
        """Fold Adam's factors into the projection, and project the constant term once."""
        outputs = torch.diag(adam.rows) if self.outputs is None else self.outputs.to(adam.rows) * adam.rows
        inputs = torch.diag(adam.columns) if self.inputs is None else self.inputs.to(adam.columns) * adam.columns
        self.preconditioned = (outputs, inputs, (outputs @ adam.momentum @ inputs.t()).flatten())
        self._gain = adam.gain

    def features(self, inputs: Tensor, grads: Tensor, plain: bool) -> Tensor:
        """[n, T, d_in] inputs, [n, T, d_out] gradients of the outputs -> [n, width]. `plain`: not preconditioned."""
        if plain or self.preconditioned is None:
            return _project(grads, self.outputs).transpose(1, 2).bmm(_project(inputs, self.inputs)).flatten(1)
        output_projection, input_projection, constant = self.preconditioned
        projected = (
            _project(grads, output_projection).transpose(1, 2).bmm(_project(inputs, input_projection)).flatten(1)
        )
        return projected * self._gain + constant.to(projected)


def _project(values: Tensor, projection: Tensor | None) -> Tensor:
    return values if projection is None else values @ projection.to(values).t()


TILE = 1 << 16  # elements of the gradient that are projected at once


class DenseProjection:
    """One layer's summand of a dense projection of all layers."""

    def __init__(self, name: str, shape: tuple[int, int], size: int, seed: int) -> None:
        self.name, self.shape, self.width, self.seed = name, shape, size, seed
        self.adam: AdamMoments | None = None

    def features(self, inputs: Tensor, grads: Tensor, plain: bool) -> Tensor:
        """As TwoSidedProjection.features, but with Adam's exact update."""
        features = inputs.new_zeros(len(inputs), self.width)
        num_rows = max(1, TILE // self.shape[1])
        for first in range(0, self.shape[0], num_rows):
            rows = slice(first, min(first + num_rows, self.shape[0]))
            tile = grads[:, :, rows].transpose(1, 2).bmm(inputs)  # [n, num_rows, d_in]
            if not plain and self.adam is not None:
                tile = self.adam.tile(rows).update(tile)
            signs = random_signs(self.seed, f"{self.name}/{first}", self.width, tile[0].numel())
            features += tile.flatten(1) @ signs.to(tile).t()
        return features / self.width**0.5
