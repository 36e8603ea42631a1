"""Files and folders appear complete or not at all, under names that do not collide."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from dataflex_mega import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_by_bytes_or_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.atomic_write(path, b"one")
    files.atomic_write(path, "zw\u00f6lf\n")
    assert path.read_bytes() == "zw\u00f6lf\n".encode() and names(tmp_path) == ["a.json"]


def test_the_mode_is_that_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.atomic_write(tmp_path / "atomic", b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_an_exception_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.atomic_write(path, b"former")
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"former" and names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.atomic_write(path, b"former")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write(path, b"new")
    assert path.read_bytes() == b"former" and names(tmp_path) == ["a"]


def test_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [bytes([number]) * 200_000 for number in range(8)]
    threads = [threading.Thread(target=files.atomic_write, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and names(tmp_path) == ["a"]


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(files, "_fsync", lambda path: events.append(f"fsync {path.name}"))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: events.append("rename") or rename(self, target))
    (tmp_path / "a.part").write_bytes(b"x")
    files.replace_file(tmp_path / "a.part", tmp_path / "a")
    assert events == ["fsync a.part", "rename", f"fsync {tmp_path.name}"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    former, new = tmp_path / "final", tmp_path / ".writing"
    former.mkdir()
    (former / "old").touch()
    (new / "inner").mkdir(parents=True)
    (new / "inner" / "file").write_bytes(b"x")
    files.replace_folder(new, former)
    assert names(tmp_path) == ["final"] and names(former) == ["inner"]
    assert (former / "inner" / "file").read_bytes() == b"x"


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("one\n", "two\n"):
        files.append_durably(tmp_path / "log", line)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
