"""The environment variables by which a launcher tells a process where it stands, checked before anything reads them."""

from __future__ import annotations

from collections.abc import Mapping

from dataflex_mega.errors import UserError

LARGEST_PORT = 65535
LEAST = {
    "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1, "GROUP_RANK": 0,
}  # fmt: skip
NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside RANK


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises UserError naming a variable that is no whole number, out of range, or missing beside RANK."""
    numbers = {name: _number(environment[name], name) for name in LEAST if name in environment}
    if "RANK" not in numbers:
        if numbers.get("WORLD_SIZE", 1) > 1:
            raise UserError(
                f"WORLD_SIZE: {numbers['WORLD_SIZE']} without RANK; start the processes with torchrun or "
                "NPROC_PER_NODE=N dataflex-cli train, or unset it"
            )
        return
    for name in NEEDED:
        if not environment.get(name):
            raise UserError(f"{name}: missing beside RANK={numbers['RANK']}; torchrun sets both")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and size in numbers and numbers[rank] >= numbers[size]:
            raise UserError(f"{rank}: must be below {size}, which is {numbers[size]}, found {numbers[rank]}")
    if numbers["MASTER_PORT"] > LARGEST_PORT:
        raise UserError(f"MASTER_PORT: must be <= {LARGEST_PORT}, found {numbers['MASTER_PORT']}")


def _number(value: str, name: str) -> int:
    if not (value.isascii() and value.isdecimal()) or int(value) < LEAST[name]:
        raise UserError(f"{name}: expected a whole number >= {LEAST[name]}, found {value!r}")
    return int(value)
