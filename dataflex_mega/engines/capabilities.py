"""What each engine can do beyond training and losses: known before an engine is built, so that a run is refused at once."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache


class Capability:
    """Names of capabilities. A layout may still refuse one, with a ConfigError."""

    GRADIENT_SCORES = "gradient_scores"  # Engine.gradient_scorer: directions and score
    POLICY_GRADIENTS = "policy_gradients"  # the scorer's policy_directions
    GRADIENT_FEATURES = "gradient_features"  # Engine.feature_maker
    DOMAIN_GRADIENTS = "domain_gradients"  # Engine.gradient_gram
    ROUTER_LOADS = "router_loads"  # StepStats.expert_load
    LAST_HIDDEN_STATE = "hidden_states:last"  # embed and embeddings of the training forward pass, of layer -1
    ALL_HIDDEN_STATES = "hidden_states:all_layers"  # the same of any layer
    PER_SAMPLE = "per_sample"  # Engine.per_sample
    GENERATION = "generation"  # Engine.generate
    MEDIA = "media"  # batches with images, video or audio in Batch.extra

    @classmethod
    def all(cls) -> frozenset[str]:
        """The names of all capabilities of this class."""
        return frozenset(value for name, value in vars(cls).items() if name.isupper())


DESCRIPTIONS = {
    Capability.GRADIENT_SCORES: "gradients of single samples",
    Capability.POLICY_GRADIENTS: "policy gradients",
    Capability.GRADIENT_FEATURES: "projected gradients",
    Capability.DOMAIN_GRADIENTS: "gradients of domains",
    Capability.ROUTER_LOADS: "the loads of experts",
    Capability.LAST_HIDDEN_STATE: "hidden states",
    Capability.ALL_HIDDEN_STATES: "hidden states of any layer",
    Capability.PER_SAMPLE: "logits of single samples",
    Capability.GENERATION: "generation",
    Capability.MEDIA: "images, videos and audio",
}


@cache
def engine_names() -> tuple[str, ...]:
    """The engines that the package has: its folders in `engines`, each with a module `capabilities`."""
    package = importlib.import_module("dataflex_mega.engines")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg))


def capabilities_of(engine: str) -> frozenset[str]:
    """What an engine can do, as its module `capabilities` says."""
    return importlib.import_module(f"dataflex_mega.engines.{engine}.capabilities").CAPABILITIES


def check_available(engine: str) -> None:
    """Raises UserError when a package that an engine needs is missing or too old."""
    importlib.import_module(f"dataflex_mega.engines.{engine}.capabilities").check_available()


def describe_missing(missing: frozenset[str], engine: str) -> str:
    """`projected gradients, not supported by engine: megatron; use engine: fsdp`, for a message."""
    name = min(missing)
    others = [other for other in engine_names() if missing <= capabilities_of(other)]
    remedy = f"; use engine: {' or '.join(others)}" if others else ""
    return f"{DESCRIPTIONS.get(name, name)}, not supported by engine: {engine}{remedy}"
