"""The exit status of a command, and the one line about what ended it."""

from __future__ import annotations

from collections.abc import Callable

from dataflex_mega.errors import TrainingFault, UserError
from dataflex_mega.log import ALL_RANKS, get_logger


def exit_status(action: Callable[[], int], interrupted: str = "") -> int:
    """What `action` returns; 2 for a user's mistake, 1 for a fault in training, 130 when it was interrupted.

    `interrupted` is logged then, where there is something to say.
    """
    logger = get_logger()
    try:
        return action()
    except UserError as error:  # every rank finds it alike, so the main one reports it
        logger.error("error: %s", error)
        return 2
    except TrainingFault as error:
        logger.error("error: %s", error, extra=ALL_RANKS)
        return 1
    except KeyboardInterrupt:
        if interrupted:
            logger.info(interrupted)
        return 130
