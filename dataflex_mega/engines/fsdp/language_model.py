"""The language model inside a model that also takes images, and what only its layers allow."""

from __future__ import annotations

from typing import Any

from torch import nn

from dataflex_mega.errors import ConfigError


def language_model_of(model: Any) -> nn.Module:
    """The layers over tokens of a Hugging Face or PEFT model: its decoder where it also has a tower for images, videos or
    audio, else the model itself."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return model
    return base.get_decoder()


def trains_outside(model: Any) -> bool:
    """Whether a parameter trains that is not the language model's: then some may take part in no loss, as the last norm of
    a tower whose earlier layer is read."""
    decoder = language_model_of(model)
    if decoder is model:
        return False
    inside = {id(p) for module in (decoder, model.get_output_embeddings()) for p in module.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in model.parameters())


def check_only_tokens_train(model: Any) -> None:
    """Raises ConfigError when linear layers train of which an input row is not the row of one sample: those of a tower for
    images, of what projects its results, and those of text layers that look at images across."""
    decoder = language_model_of(model)
    if decoder is model:
        return
    across = bool(getattr(decoder.config, "cross_attention_layers", None))
    inside = {id(module) for module in decoder.modules()} | {id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        trains = isinstance(module, nn.Linear) and module.weight.requires_grad
        if trains and (id(module) not in inside or (across and "cross_attn" in name)):
            raise ConfigError(
                f"gradient scores: {name} trains, whose inputs are images and not the tokens of one sample; set "
                "freeze_vision_tower: true and freeze_multi_modal_projector: true, or lora_target to layers of the "
                "language model"
            )
