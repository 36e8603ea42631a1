"""Hidden states of a Hugging Face model, heard where they pass: no second forward, and only the layer asked for is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dataflex_mega.engines.fsdp.parallel import layer_class_names
from dataflex_mega.errors import ConfigError


@contextmanager
def listening(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """A list that has the hidden states [b, S, h] of `layer` after a forward pass inside, without gradient.

    `layer` counts as transformers' `hidden_states`: layer i gets state i, and the output layer gets the last one, which
    is after the final norm. Raises ConfigError for a layer that the model does not have.
    """
    heard: list[Tensor] = []

    def hear(_module: nn.Module, args: Any, kwargs: Any) -> None:
        heard.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = place(model, layer).register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()  # before the backward pass, where layers may be computed once more


def place(model: Any, layer: int) -> nn.Module:
    """The module whose input is hidden state number `layer`."""
    names = set(layer_class_names(model))
    layers = [module for module in model.modules() if type(module).__name__ in names]
    count = len(layers)
    if not -count - 1 <= layer <= count:
        raise ConfigError(f"embed_layer: must be in {-count - 1}..{count}, the model has {count} layers, found {layer}")
    number = layer + count + 1 if layer < 0 else layer
    return model.get_output_embeddings() if number == count else layers[number]
