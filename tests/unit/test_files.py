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


# -- models --------------------------------------------------------------------------------------------------------------

ONE_FILE = ["model.safetensors"]
SHARDS = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
THREE_SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


def write_model(folder: Path, weights: list[str], content: str) -> None:
    for name in [*weights, "generation_config.json", "config.json"]:
        (folder / name).write_text(content)
    if len(weights) > 1:
        (folder / "model.safetensors.index.json").write_text(content)


def loadable(folder: Path) -> set[str] | None:
    """What a reader of the folder gets of its weights: transformers prefers the single file to an index."""
    if not (folder / "config.json").exists():
        return None
    if (folder / ONE_FILE[0]).exists():
        return {(folder / ONE_FILE[0]).read_text()}
    return {path.read_text() for path in folder.glob("model-*.safetensors")}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("former", [ONE_FILE, SHARDS, THREE_SHARDS])
@pytest.mark.parametrize("new", [ONE_FILE, SHARDS, THREE_SHARDS])
def test_a_kill_between_two_renames_leaves_no_mixed_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: list[str], new: list[str]
) -> None:
    replace, unlink, seen = Path.replace, Path.unlink, []
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_model(folder, former, "former")
        (folder / "metrics.jsonl").write_text("kept")
        left = [number]

        def counted(action, left=left):
            def act(path: Path, *arguments, **options):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return action(path, *arguments, **options)

            return act

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", counted(replace))
            patch.setattr(Path, "unlink", counted(unlink))
            patch.setattr(files.shutil, "rmtree", lambda *_args, **_options: None)
            try:
                with files.published_model(folder) as temporary:
                    write_model(temporary, new, "new")
                finished = True
            except Killed:
                finished = False
        seen.append(loadable(folder))
        assert seen[-1] in (None, {"former"}, {"new"}), (number, names(folder))
        files.remove_leftovers(folder)
        assert (folder / "metrics.jsonl").read_text() == "kept"
        if finished:
            break
    assert seen[0] == {"former"} and seen[-1] == {"new"}
    index = ["model.safetensors.index.json"] if len(new) > 1 else []
    assert names(folder) == sorted([*new, *index, "config.json", "generation_config.json", "metrics.jsonl"])


def test_a_model_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    write_model(tmp_path, SHARDS, "former")
    before = names(tmp_path)
    with pytest.raises(OSError, match="full"), files.published_model(tmp_path) as temporary:
        write_model(temporary, ONE_FILE, "new")
        raise OSError(28, "the disk is full")
    assert names(tmp_path) == before and loadable(tmp_path) == {"former"}
