"""What the Megatron engine can do; importing this imports nothing of megatron-core."""

from __future__ import annotations

from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.engines.megatron import version

CAPABILITIES = frozenset(
    {
        Capability.GRADIENT_SCORES,
        Capability.DOMAIN_GRADIENTS,
        Capability.ROUTER_LOADS,
        Capability.LAST_HIDDEN_STATE,
        Capability.PER_SAMPLE,
    }
)


def check_available() -> None:
    """Raises UserError without megatron-core or with an unsupported version."""
    version.check()
