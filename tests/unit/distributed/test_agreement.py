"""An action on one or on every process: its value everywhere, its error on all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataflex_mega.distributed.agreement import run_and_agree, run_on_main
from dataflex_mega.errors import CheckpointError, DataError


class Rank:
    """One rank of two; `received` is what the main rank broadcasts, or what the other rank adds to a gather."""

    def __init__(self, rank: int, received: Any = None) -> None:
        self.parallel_info = SimpleNamespace(is_main=rank == 0)
        self.received, self.sent = received, None

    def broadcast_object(self, value: Any) -> Any:
        self.sent = value
        return value if self.parallel_info.is_main else self.received

    def all_gather_objects(self, value: Any) -> list[Any]:
        self.sent = value
        return [value, self.received]


def fail(error: Exception) -> None:
    raise error


def never() -> None:
    raise AssertionError("called on another rank than the main one")


def test_the_main_processs_value_is_on_every_process() -> None:
    main = Rank(0)
    assert run_on_main(main, lambda: 5) == 5  # type: ignore[arg-type]  # a fake
    assert run_on_main(Rank(1, main.sent), never) == 5  # type: ignore[arg-type]


def test_the_main_processs_error_is_raised_on_every_process() -> None:
    main = Rank(0)
    with pytest.raises(CheckpointError, match="no such file"):
        run_on_main(main, lambda: fail(DataError("no such file")))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such file"):
        run_on_main(Rank(1, main.sent), never)  # type: ignore[arg-type]


def test_every_process_keeps_its_own_value_unless_one_of_them_fails() -> None:
    assert run_and_agree(Rank(0), lambda: 7) == 7  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the other's file is damaged"):
        run_and_agree(Rank(0, "the other's file is damaged"), lambda: 7)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="damaged"):
        run_and_agree(Rank(1), lambda: fail(CheckpointError("damaged")))  # type: ignore[arg-type]
