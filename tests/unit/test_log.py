"""The package's logger: what reaches standard error, on which rank, and with what in front."""

import logging

import pytest

from dataflex_mega.log import ALL_RANKS, NAME, get_logger, is_main


@pytest.fixture
def unconfigured():
    """The logger as in a fresh process; afterwards as it was."""
    logger = logging.getLogger(NAME)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers, logger.level, logger.propagate = [], logging.NOTSET, True
    get_logger.cache_clear()
    yield logger
    logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    get_logger.cache_clear()


def test_the_main_rank_writes_plain_lines_to_standard_error(unconfigured, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    get_logger().info("note: %s", "50% done")
    get_logger().debug("not shown")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "note: 50% done\n")


def test_another_rank_writes_only_what_is_marked_and_names_itself(unconfigured, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert not is_main()
    get_logger().info("once is enough")
    get_logger().error("error: %s", "a NaN", extra=ALL_RANKS)
    assert capsys.readouterr().err == "[rank 3] error: a NaN\n"


def test_a_library_that_configures_the_root_logger_does_not_print_lines_twice(unconfigured, capsys):
    logging.getLogger().addHandler(handler := logging.StreamHandler())
    get_logger().warning("a line")
    logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "a line\n"


def test_a_handler_of_the_program_is_left_alone(unconfigured, capsys):
    unconfigured.addHandler(handler := logging.NullHandler())
    get_logger().error("elsewhere")
    assert unconfigured.handlers == [handler] and capsys.readouterr().err == ""
