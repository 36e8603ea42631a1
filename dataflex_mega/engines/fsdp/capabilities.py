"""What the FSDP engine can do; importing this imports no model."""

from __future__ import annotations

from dataflex_mega.engines.capabilities import Capability

CAPABILITIES = Capability.all()


def check_available() -> None:
    """Every package that the engine needs is a dependency of this one."""
