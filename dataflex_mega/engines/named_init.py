"""Weights from scratch that depend on a seed and on their names only.

Every engine and every layout builds the same model from them: a rank that holds a shard of a tensor generates the tensor
and takes its shard.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.engines.hf_names import SUPPORTED_MODEL_TYPES, checkpoint_shapes, checkpoint_slices
from dataflex_mega.errors import ConfigError, did_you_mean


class NamedInit:
    """A source of weights: N(0, initializer_range) for matrices and embeddings, ones for norms, zeros for biases.

    These are the distributions of transformers' `_init_weights` for the supported families, except that the row of the
    padding token is drawn like any other: it is never looked up.
    """

    def __init__(self, hf_config: Any, seed: int) -> None:
        kind = str(hf_config.model_type)
        if kind not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(
                f"train_from_scratch: no weights by name for a {kind!r} model{did_you_mean(kind, SUPPORTED_MODEL_TYPES)}; "
                f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        self.seed = seed
        self.std = float(hf_config.initializer_range)
        self.shapes = checkpoint_shapes(hf_config)

    def tensor(self, name: str) -> Tensor:
        """All of the checkpoint tensor `name`, float32 on the CPU. Raises KeyError for a name the model has not."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along `dim` of the tensor."""
        return self.tensor(name).narrow(dim, start, stop - start)


@torch.no_grad()
def reinitialise(hf_model: Any, seed: int) -> None:
    """Give a Hugging Face model, in place, the weights that `NamedInit(hf_model.config, seed)` has.

    For a whole model that is not wrapped: ValueError names a parameter that its configuration does not have.
    """
    source = NamedInit(hf_model.config, seed)
    for name, parameter in hf_model.named_parameters():
        for piece in checkpoint_slices(hf_model.config.model_type, name, parameter.shape):
            if piece.name not in source.shapes:
                raise ValueError(f"{piece.name}: not a parameter of a plain {hf_model.config.model_type} model")
            target = parameter[piece.index] if piece.index else parameter
            target.copy_(source.tensor(piece.name))
