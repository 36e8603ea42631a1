"""`dataflex-cli components`: the algorithms and their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING

from dataflex_mega.errors import UserError, did_you_mean

SUMMARY = (
    "components [ROLE ...]          the algorithms that can be a selector, mixer, reorder or weighter, "
    "and their parameters"
)
HELP_ORDER = 50
HELP = """usage: dataflex-cli components [ROLE ...]

Prints the algorithms of every role, or of the roles named (selector, mixer, reorder, weighter), with their parameters,
types and defaults. In a configuration: mixer: odm, or mixer: {name: odm, alpha: 0.8}."""


def main(argv: Sequence[str]) -> int:
    """Print the algorithms of all roles, or of the roles named."""
    from dataflex_mega.registry import CONTRACTS

    if argv and argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    for role in argv:
        if role not in CONTRACTS:
            raise UserError(f"components: no role {role!r}{did_you_mean(role, CONTRACTS)}; {', '.join(CONTRACTS)}")
    print("\n\n".join(describe_role(role) for role in argv or CONTRACTS))
    return 0


def describe_role(role: str) -> str:
    """`mixer:` and, for every algorithm, its first docstring line and its parameters with type and default."""
    from dataflex_mega.registry import get_parameters, list_names, load_class

    lines = [f"{role}:"]
    for name in list_names(role):
        first = (load_class(role, name).__doc__ or "").strip().splitlines()[:1]
        lines.append(f"  {name:<12} {''.join(first)}".rstrip())
        for key, parameter in get_parameters(role, name).items():
            default = "required" if parameter.default is MISSING else f"= {parameter.default!r}"
            lines.append(f"    {key}: {parameter.type_text} {default}")
    return "\n".join(lines)
