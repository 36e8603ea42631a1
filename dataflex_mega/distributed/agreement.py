"""What one process finds, on all of them: a mistake ends every process with the same line, and none waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dataflex_mega.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from dataflex_mega.run.build import Opened


def on_main(run: Opened, act: Callable[[], Any]) -> Any:
    """What `act` returns on the main process, on all of them; its UserError too."""
    value, error = None, None
    if run.mesh.is_main:
        try:
            value = act()
        except UserError as found:
            error = str(found)
    value, error = run.ranks.share_main((value, error))
    if error is not None:
        raise CheckpointError(error)
    return value


def on_all(run: Opened, act: Callable[[], Any]) -> Any:
    """What `act` returns here. Raises CheckpointError on every process when it does on one."""
    value, error = None, None
    try:
        value = act()
    except CheckpointError as found:
        error = str(found)
    errors = [one for one in run.ranks.gather_objects(error) if one is not None]
    if errors:
        raise CheckpointError(errors[0])
    return value
