"""Locks between processes: one holder, who is named; nothing a dead process left blocks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataflex_mega import locks
from dataflex_mega.files import temporary_path
from dataflex_mega.locks import LOCK_FILE, FolderLock, Held, locked

HOLD = """
import sys, time
from pathlib import Path
from dataflex_mega.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.try_acquire() is None
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), "token=secret"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_without_its_later_arguments(tmp_path, other):
    holder = FolderLock(tmp_path / "run").try_acquire()
    assert holder is not None and holder.startswith(f"process {other.pid} on ") and " since " in holder
    assert "secret" not in holder + (tmp_path / "run" / LOCK_FILE).read_text()


def test_a_killed_holder_blocks_nobody(tmp_path, other):
    other.kill()
    other.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    lock = FolderLock(tmp_path / "run")
    assert lock.try_acquire() is None
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_is_taken_once_also_within_a_process(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.try_acquire() is None and first.try_acquire() is None
    assert str(os.getpid()) in (second.try_acquire() or "")
    first.release()
    assert second.try_acquire() is None
    second.release()


def test_a_file_that_its_holder_removes_meanwhile_is_not_mistaken_for_the_lock(tmp_path, monkeypatch):
    """Another process opens the file, then the holder removes it: its lock on the removed file means nothing."""
    holder, late = FolderLock(tmp_path), FolderLock(tmp_path)
    assert holder.try_acquire() is None
    flock, calls = fcntl.flock, []

    def release_first(stream, operation):
        if not calls:
            calls.append(None)
            holder.release()
        return flock(stream, operation)

    monkeypatch.setattr(locks.fcntl, "flock", release_first)
    assert late.try_acquire() is None
    assert (tmp_path / LOCK_FILE).stat().st_nlink == 1
    assert FolderLock(tmp_path).try_acquire() is not None
    late.release()


def test_the_message_of_a_block_names_the_holder(tmp_path, other):
    with pytest.raises(Held, match=f"^busy: process {other.pid} on"), locked(tmp_path / "run", "busy: {holder}"):
        pass


def test_a_damaged_lock_file_still_locks(tmp_path, other):
    (tmp_path / "run" / LOCK_FILE).write_bytes(b"\xff\x00[[")
    assert FolderLock(tmp_path / "run").try_acquire() == "another process"


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.try_acquire() is None
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        lock.release()
        assert lock.try_acquire() is None, "the child holds it"
        lock.release()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_without_locks_a_line_says_so(tmp_path, monkeypatch, caplog):
    def refuse(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    lines = []
    monkeypatch.setattr(locks.get_logger(), "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    assert lock.try_acquire() is None
    assert len(lines) == 1 and f"{tmp_path}: this file system has no locks" in lines[0]
    lock.release()


def test_leftovers_of_killed_writers_go_with_the_lock_and_nothing_else_does(tmp_path):
    leftover = temporary_path(tmp_path / "metrics.jsonl")
    leftover.write_text("half")
    folder = temporary_path(tmp_path / "model")
    (folder / "inner").mkdir(parents=True)
    kept = [tmp_path / name for name in (".hidden.tmp", "a.tmp", ".a.12-xyz.tmp", "metrics.jsonl")]
    for path in kept:
        path.write_text("a user's")
    lock = FolderLock(tmp_path)
    assert lock.try_acquire() is None
    lock.release()
    assert sorted(Path(tmp_path).iterdir()) == sorted(kept)
