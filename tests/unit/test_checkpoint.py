"""Checkpoints with a small fake engine: what is restored, what is refused, and the state after a kill."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataflex_mega import files
from dataflex_mega.checkpoint import Checkpointer
from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import SamplingPlan, TrainState


class Alone:
    """Collectives of one process."""

    parallel_info = SimpleNamespace(rank=0, world_size=1, is_main=True)

    def barrier(self):
        pass

    def all_gather_objects(self, value):
        return [value]

    def broadcast_object(self, value):
        return value


class FakeEngine:
    def __init__(self, value):
        self.value = torch.full((3,), float(value))

    def save_state(self, folder):
        save_file({"value": self.value}, folder / "part.safetensors")

    def load_state(self, folder):
        self.value = load_file(folder / "part.safetensors")["value"]

    def export(self, folder):
        raise NotImplementedError

    def rng_state(self):
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state):
        torch.set_rng_state(state["cpu"])


def checkpointer(folder, save_total_limit=None, ignored_differences=(), **identity):
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpointer(
        folder, Alone(), {"seed": 1, "global_batch_size": 8, **identity}, save_total_limit, ignored_differences
    )


def latest(folder):
    """(the newest whole checkpoint or None, what is wrong with newer ones)."""
    reader = checkpointer(folder)
    found, faults = reader.newest_whole(reader.survey())
    return found and found.path, faults


def state(step, chosen=None):
    plan = SamplingPlan(
        step,
        (0.25, 0.75),
        (3, 9),
        (0.5, -0.5),
        selected_ids=chosen,
        pool_cursors=(1, 2),
        domain_loss_weights=(0.1 + 0.2, 1.0),
    )
    return TrainState(step, plan, tokens_seen=1000 * step, samples_seen=8 * step)


EXTRA = {
    "controller": {"mixer": {"rewards": torch.tensor([0.1, 0.2], dtype=torch.float64), "t": 3}},
    "hooks": {"log": [1.5]},
}


def test_state_plan_and_tensors_come_back_exactly(tmp_path):
    before = state(5, torch.tensor([4, 4, 9]))
    torch.manual_seed(7)
    checkpointer(tmp_path).save(before, FakeEngine(5), EXTRA)
    drawn = torch.rand(3)
    engine = FakeEngine(0)
    path, notes = latest(tmp_path)
    after, extra = checkpointer(tmp_path).restore(path, engine)
    assert notes == [] and path.name == "checkpoint-5"
    assert (
        after.plan.digest() == before.plan.digest()
        and after.plan.domain_loss_weights == before.plan.domain_loss_weights
    )
    assert (after.step, after.tokens_seen, after.samples_seen) == (5, 5000, 40)
    assert torch.equal(engine.value, torch.full((3,), 5.0))
    assert torch.equal(extra["controller"]["mixer"]["rewards"], EXTRA["controller"]["mixer"]["rewards"])
    assert extra["controller"]["mixer"]["rewards"].dtype == torch.float64
    assert torch.equal(torch.rand(3), drawn), "the random generator continues where it was"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    for step in (5, 10):
        checkpointer(tmp_path).save(state(step), FakeEngine(step), EXTRA)
    part = tmp_path / "checkpoint-10" / "engine" / "part.safetensors"
    manifest = tmp_path / "checkpoint-10" / "manifest.json"
    if damage == "flip":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(bytes(content))
    elif damage == "truncate":
        part.write_bytes(part.read_bytes()[:-3])
    elif damage == "remove":
        part.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    path, notes = latest(tmp_path)
    assert path.name == "checkpoint-5"
    assert (
        len(notes) == 1 and "checkpoint-10" in notes[0] and ("part.safetensors" in notes[0] or "manifest" in notes[0])
    )


def test_a_kill_while_writing_leaves_the_older_one(tmp_path):
    checkpointer(tmp_path).save(state(5), FakeEngine(5), EXTRA)

    class Killed(FakeEngine):
        def save_state(self, folder):
            super().save_state(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointer(tmp_path).save(state(10), Killed(10), EXTRA)
    assert latest(tmp_path)[0].name == "checkpoint-5"
    checkpointer(tmp_path).save(state(10), FakeEngine(10), EXTRA)
    assert latest(tmp_path)[0].name == "checkpoint-10"
    assert not list(tmp_path.glob(".writing*"))


def test_another_run_is_refused_with_the_difference_unless_accepted(tmp_path):
    checkpointer(tmp_path).save(state(5), FakeEngine(5), EXTRA)
    path = tmp_path / "checkpoint-5"
    with pytest.raises(CheckpointError, match="global_batch_size: 8 there, 16 here"):
        checkpointer(tmp_path, global_batch_size=16).read(path)
    with pytest.raises(CheckpointError, match="weighter: null there"):
        checkpointer(tmp_path, weighter={"name": "loss"}).read(path)
    accepted = checkpointer(tmp_path, ignored_differences=("global_batch_size",), global_batch_size=16)
    assert accepted.read(path)["step"] == 5


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpointer(tmp_path, save_total_limit=2).save(state(step), FakeEngine(step), EXTRA)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-3"]


def test_a_folder_of_another_program_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        checkpointer(tmp_path).read(tmp_path)


def test_everything_is_on_the_disk_before_the_rename_and_nothing_goes_before_the_new_name_is(tmp_path, monkeypatch):
    """The order of the calls that a power failure can come between."""
    checkpointer(tmp_path).save(state(5), FakeEngine(5), EXTRA)
    events, flush, rename, rmtree = [], files._fsync, Path.rename, shutil.rmtree
    monkeypatch.setattr(files, "_fsync", lambda path: events.append(("flush", Path(path))) or flush(path))
    monkeypatch.setattr(Path, "rename", lambda path, new: events.append(("rename", path)) or rename(path, new))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: events.append(("remove", Path(path))) or rmtree(path))
    final = checkpointer(tmp_path, save_total_limit=1).save(state(10), FakeEngine(10), EXTRA)
    writing = tmp_path / ".writing-checkpoint-10"
    named = events.index(("rename", writing))
    flushed = {path for kind, path in events[:named] if kind == "flush"}
    assert {writing / path.relative_to(final) for path in (final, *final.rglob("*"))} <= flushed
    after = events[named:]
    assert after.index(("flush", tmp_path)) < after.index(("rename", tmp_path / "checkpoint-5"))
    assert not [kind for kind, _ in events[:named] if kind == "remove"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_an_error_while_flushing_is_raised(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    checkpointer(tmp_path).save(state(5), FakeEngine(5), EXTRA)
    monkeypatch.setattr(files, "_fsync", full)
    with pytest.raises((OSError, CheckpointError), match="No space left"):
        checkpointer(tmp_path).save(state(10), FakeEngine(10), EXTRA)
    assert latest(tmp_path)[0].name == "checkpoint-5"
