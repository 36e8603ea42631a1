"""The table and the picture of docs/architecture.md are those of the code's imports; `python tools/rooms.py --write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.corpus import ROOT, tool


@pytest.fixture(scope="module")
def rooms() -> Any:
    return tool("rooms")


def test_the_page_has_every_room_with_the_imports_that_the_code_has(rooms: Any) -> None:
    written = rooms.table_rows((ROOT / rooms.PAGE).read_text())
    graph = rooms.import_graph()
    assert set(written) == set(graph)
    assert {room: imports for room, (_, imports) in written.items()} == graph
    assert all(description for description, _ in written.values())


def test_the_table_and_the_picture_are_up_to_date(rooms: Any) -> None:
    page, picture = rooms.render()
    assert (ROOT / rooms.PAGE).read_text() == page
    assert (ROOT / rooms.PICTURE).read_text() == picture


# -- the tool, on a small package --------------------------------------------------------------------------------------


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / "dataflex_mega" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


FILES = {
    "__init__.py": "",
    "types.py": "X = 1",
    "data/pool.py": "from dataflex_mega.types import X",
    "engines/base.py": "if TYPE_CHECKING:\n    from dataflex_mega.data.pool import Pool",
    "engines/fsdp/engine.py": "def f():\n    from dataflex_mega.engines import base\n    import dataflex_mega.data.pool",
    "train.py": '"""Trains. More text."""\nfrom dataflex_mega.engines.fsdp.engine import f\nfrom dataflex_mega import data',
}


def test_every_kind_of_import_counts_and_engines_are_rooms_of_their_own(rooms: Any, tmp_path: Path) -> None:
    graph = rooms.import_graph(write_package(tmp_path, FILES))
    assert graph == {
        "data": set(), "engines": {"data"}, "engines.fsdp": {"engines", "data"}, "train": {"engines.fsdp", "data"},
        "types": set(),
    }  # fmt: skip
    assert rooms.levels(graph) == {"types": 0, "data": 0, "engines": 1, "engines.fsdp": 2, "train": 3}
    assert rooms.cycles(graph) == []
    assert rooms.first_sentence("train", tmp_path) == "Trains"


def test_a_cycle_is_named_and_shares_a_level(rooms: Any) -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert rooms.cycles(graph) == [["b", "c"]]
    assert rooms.levels(graph) == {"a": 1, "b": 0, "c": 0, "d": 0}


def test_writing_keeps_descriptions_and_adds_new_rooms(rooms: Any, tmp_path: Path) -> None:
    root = write_package(tmp_path, FILES)
    page = root / rooms.PAGE
    page.parent.mkdir()
    head = "| level | room | holds | imports |\n|---|---|---|---|\n"
    page.write_text(f"before\n{rooms.BEGIN}\n\n{head}| 9 | `data` | samples | `gone` |\n\n{rooms.END}\nafter")
    text, picture = rooms.render(root)
    rows = rooms.table_rows(text)
    assert rows["data"] == ("samples", set()) and rows["train"] == ("Trains", {"engines.fsdp", "data"})
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert picture.count("<rect ") == 4 and picture.count("<line ") == 3  # train -> data is implied by the others
