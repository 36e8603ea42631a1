"""Hidden states of a Hugging Face model, captured by hooks: no second forward pass, and only the layers asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from dataflex_mega.engines.fsdp.language_model import language_model_of
from dataflex_mega.engines.fsdp.parallel import layer_class_names
from dataflex_mega.errors import ConfigError


@contextmanager
def capture_hidden_states(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Layer -> its hidden states [b, S, h] after a forward pass inside, without gradient.

    A layer counts as in transformers' `hidden_states`: layer i gets state i, and the output layer gets the last one, which
    is after the final norm. Raises ConfigError for a layer that the model does not have.
    """
    captured: dict[int, Tensor] = {}

    def hook(layer: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        captured[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

    modules = {layer: module_of_hidden_state(model, layer) for layer in layers}
    handles = [
        module.register_forward_pre_hook(partial(hook, layer), with_kwargs=True) for layer, module in modules.items()
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()  # before the backward pass, where layers may be recomputed


def layers_of(model: Any) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model, in order; of one with a tower for images, those of its language model."""
    names = set(layer_class_names(model))
    return [
        module
        for module in language_model_of(model).modules()
        if type(module).__name__.removeprefix("FSDP") in names  # fully_shard makes a class of this name from a layer's
    ]


def module_of_hidden_state(model: Any, layer: int) -> nn.Module:
    """The module whose input is hidden state number `layer`."""
    layers = layers_of(model)
    count = len(layers)
    if not -count - 1 <= layer <= count:
        raise ConfigError(f"embed_layer: must be in {-count - 1}..{count}, the model has {count} layers, found {layer}")
    number = layer + count + 1 if layer < 0 else layer
    return model.get_output_embeddings() if number == count else layers[number]
