"""What is on the disk of a machine whose power fails; tools/soak/power_cut.py tries whole runs at random moments."""

import os
import subprocess

import pytest

from tests.support import corpus
from tests.unit.test_checkpoint import EXTRA, FakeEngine, checkpointer, latest, state


@pytest.fixture
def disk(tmp_path):
    """A mounted file system in a file -> (where it is mounted, a function that gives the newest whole step of a copy)."""
    tool = corpus.tool("soak/power_cut")
    image, mounted = tmp_path / "disk.img", tmp_path / "disk"
    try:
        tool.make_disk(image)
        tool.mount(image, mounted)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device can be mounted here: {error}")

    def newest_on_a_copy():
        copy, there = tmp_path / "copy.img", tmp_path / "copy"
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        tool.mount(copy, there)
        try:
            path, _ = latest(there / "out")
            return path and path.name
        finally:
            tool.unmount(there)

    yield mounted, newest_on_a_copy
    tool.unmount(mounted)


def test_a_checkpoint_is_on_the_disk_when_its_save_returns(disk):
    mounted, newest_on_a_copy = disk
    for step in (1, 2, 3):
        checkpointer(mounted / "out", save_total_limit=1).save(state(step), FakeEngine(step), EXTRA)
        assert newest_on_a_copy() == f"checkpoint-{step}"


def test_without_flushing_it_is_not(disk, monkeypatch):
    """The test above can fail."""
    mounted, newest_on_a_copy = disk
    monkeypatch.setattr(os, "fsync", lambda _: None)
    checkpointer(mounted / "out", save_total_limit=1).save(state(1), FakeEngine(1), EXTRA)
    assert newest_on_a_copy() is None


@pytest.mark.exhaustive
def test_what_is_on_the_disk_at_a_power_cut_resumes_bit_equal(tmp_path, capsys):
    tool = corpus.tool("soak/power_cut")
    status = tool.main(["--cuts", "2", "--steps", "8", "--work", str(tmp_path)])
    printed = capsys.readouterr().out
    if status == tool.SKIPPED:
        pytest.skip(printed.strip())
    assert status == 0 and "2 power cuts, 2 came back bit-equal" in printed
