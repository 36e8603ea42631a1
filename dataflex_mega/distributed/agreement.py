"""Run an action on one or on every process and raise its error on all of them, so that none waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError, UserError

T = TypeVar("T")


def run_on_main(collectives: Collectives, action: Callable[[], T]) -> T:
    """The main process's result of `action`, on every process. A UserError becomes a CheckpointError on all of them."""
    value, error = None, None
    if collectives.parallel_info.is_main:
        try:
            value = action()
        except UserError as raised:
            error = str(raised)
    value, error = collectives.broadcast_object((value, error))
    if error is not None:
        raise CheckpointError(error)
    return value


def run_and_agree(collectives: Collectives, action: Callable[[], T]) -> T:
    """This process's own result of `action`. Raises CheckpointError on every process when one of them raises it."""
    value, error = None, None
    try:
        value = action()
    except CheckpointError as raised:
        error = str(raised)
    errors = [one for one in collectives.all_gather_objects(error) if one is not None]
    if errors:
        raise CheckpointError(errors[0])
    return cast("T", value)
