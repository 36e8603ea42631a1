"""Whose a folder checkpoint-N is, what of it can be believed, and what a kill leaves behind."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from dataflex_mega.checkpoint import Contents
from dataflex_mega.checkpoint_folder import choose_for_removal, find_superseded, inspect, recover, remove, survey
from dataflex_mega.checkpoint_format import Lineage, Manifest, read_state
from dataflex_mega.errors import CheckpointError
from tests.support import trees
from tests.unit.test_checkpoint import EXTRA, FakeEngine, checkpointer, state


def save(folder, *steps, **options):
    for step in steps:
        checkpointer(folder, **options).save(state(step), FakeEngine(step), EXTRA)
    return folder / f"checkpoint-{steps[-1]}"


def change(path, edit):
    content = json.loads(path.read_text())
    changed = edit(content)
    path.write_text(json.dumps(content if changed is None else changed))


def rehash(checkpoint):
    """Make the manifest agree with changed files, as somebody could who means harm."""
    from dataflex_mega.checkpoint_format import FileHash

    def edit(content):
        for name in content["files"]:
            found = FileHash.of(checkpoint / name)
            content["files"][name] = {"size": found.size, "sha256": found.sha256}

    change(checkpoint / "manifest.json", edit)


FOREIGN = {
    "trainer": ("trainer_state.json", "optimizer.pt", "model.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "deepspeed": ("latest", "zero_to_fp32.py", "global_step4/mp_rank_00_model_states.pt"),
    "megatron": ("common.pt", "metadata.json", ".metadata", "__0_0.distcp"),
    "unknown": ("weights.bin", "manifest.json"),
    "state alone": ("state.json",),
    "nothing": (),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_without_our_manifest_is_another_tools(tmp_path, kind):
    path = tmp_path / "checkpoint-4"
    path.mkdir()
    for name in FOREIGN[kind]:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    save(tmp_path, 5, 6, save_total_limit=1)
    before = trees.contents(path)
    found = inspect(path)
    assert not found.is_own and not found.is_usable and not found.may_be_replaced and found.fault is None
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path, 4)
    assert trees.contents(path) == before and trees.checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("files", [("manifest.json",), ("manifest.json", "state.json"), ("engine/part.safetensors",)])
def test_files_emptied_by_a_power_failure_make_it_a_damaged_one_of_ours(tmp_path, files):
    path = save(tmp_path, 4)
    for name in files:
        (path / name).write_bytes(b"")
    found = inspect(path)
    assert found.is_own and not found.is_usable and found.fault and found.may_be_replaced
    assert save(tmp_path, 4) == path and inspect(path).is_usable


MANIFESTS = {
    "empty": lambda content: [],
    "null": lambda content: 0,
    "no files": lambda content: content.pop("files") and None,
    "files a list": lambda content: content.update(files=[]),
    "size misspelt": lambda content: content["files"].update({"state.json": {"sizf": 1, "sha256": ""}}),
    "size a text": lambda content: content["files"]["state.json"].update(size="12"),
    "file null": lambda content: content["files"].update({"state.json": None}),
    "outside": lambda content: content["files"].update({"../x": content["files"]["state.json"]}),
    "absolute": lambda content: content["files"].update({"/etc/hostname": content["files"]["state.json"]}),
    "zero byte": lambda content: content["files"].update({"a\0": content["files"]["state.json"]}),
    "state not listed": lambda content: content["files"].pop("state.json") and None,
    "newer": lambda content: content.update(version=4),
    "step a text": lambda content: content.update(step="4"),
    "lineage null": lambda content: content.update(lineage=None),
    "superseded numbers": lambda content: content["lineage"].update(supersedes=[1]),
}  # fmt: skip


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_that_says_nothing_usable_is_passed_over(tmp_path, damage):
    save(tmp_path, 2, 4)
    change(tmp_path / "checkpoint-4" / "manifest.json", MANIFESTS[damage])
    reader = checkpointer(tmp_path)
    found, faults = reader.newest_whole(reader.survey())
    assert found.step == 2 and len(faults) == 1 and "checkpoint-4 is damaged (manifest.json cannot be read" in faults[0]
    with pytest.raises(CheckpointError, match="checkpoint-4 is damaged: manifest.json"):
        reader.verify(tmp_path / "checkpoint-4")


def test_other_kinds_of_entries_are_no_manifest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5)
    files = {step: tmp_path / f"checkpoint-{step}" / "manifest.json" for step in (2, 3, 4, 5)}
    files[2].write_text("[" * 100_000)
    files[3].write_bytes(b"\xff\xfe{}")
    for step in (4, 5):
        files[step].unlink()
    files[4].mkdir()
    files[5].symlink_to("nowhere")
    reader = checkpointer(tmp_path)
    found, faults = reader.newest_whole(reader.survey())
    assert found.step == 1 and len(faults) == 4


STATES = {
    "list": lambda content: [],
    "null": lambda content: 0,
    "no identity": lambda content: content.pop("identity") and None,
    "identity null": lambda content: content.update(identity=None),
    "no batch": lambda content: content["identity"].pop("global_batch_size") and None,
    "step a text": lambda content: content.update(step="4"),
    "plan without cursors": lambda content: content["plan"].pop("cursors") and None,
    "extra a list": lambda content: content.update(extra=[]),
    "another tensor": lambda content: content["extra"].update(x={"tensor": "no/such"}),
    "tensor a list": lambda content: content["extra"].update(x={"tensor": []}),
    "older": lambda content: content.update(version=2),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_state_that_is_not_one_ends_in_one_line(tmp_path, damage):
    path = save(tmp_path, 4)
    change(path / "state.json", STATES[damage])
    with pytest.raises(CheckpointError) as error:
        checkpointer(tmp_path).read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_behind_links_and_extra_files(tmp_path):
    path = save(tmp_path, 4)
    (path / "notes.txt").write_text("mine")
    assert checkpointer(tmp_path).verify(path).step == 4
    (path / "engine").rename(tmp_path / "engine")
    (path / "engine").symlink_to(tmp_path / "engine")
    with pytest.raises(CheckpointError, match="behind a symbolic link"):
        checkpointer(tmp_path).verify(path)


def test_a_copy_is_never_used_counted_or_removed(tmp_path):
    save(tmp_path, 2, 4)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "best")
    save(tmp_path, 6, save_total_limit=2)
    assert trees.checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]
    reader = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="holds step 2"):
        reader.verify(tmp_path / "checkpoint-3")
    assert reader.verify(tmp_path / "best").step == 2
    with pytest.raises(CheckpointError, match="not overwritten"):
        save(tmp_path, 3)


def test_a_step_changed_together_with_the_hashes_is_noticed_by_the_name(tmp_path):
    path = save(tmp_path, 4)
    change(path / "state.json", lambda content: content.update(step=99999))
    rehash(path)
    reader = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="99999"):
        reader.verify(path)
    assert reader.newest_whole(reader.survey())[0] is None


def test_only_whole_ones_below_the_step_are_counted(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 8)
    (tmp_path / "checkpoint-3" / "state.json").write_bytes(b"")
    found = survey(tmp_path)
    kept = {(tmp_path / "checkpoint-1").resolve()}
    assert [p.name for p in choose_for_removal(found, 4, 1, ())] == ["checkpoint-1", "checkpoint-2"]
    assert [p.name for p in choose_for_removal(found, 4, 2, ())] == ["checkpoint-1"]
    assert [p.name for p in choose_for_removal(found, 4, 1, kept)] == ["checkpoint-2"]
    assert choose_for_removal(found, 4, None, ()) == choose_for_removal(found, 4, 0, ()) == []


def test_names_that_are_no_steps_are_nobodys_business(tmp_path):
    for number in ("007", "\u0664", "\u00b2", "4-hf", "", "-1"):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert [one.path.name for one in survey(tmp_path)] == ["checkpoint-9"] and not survey(tmp_path)[0].is_own


def test_what_a_start_makes_void_is_void_after_a_kill_too(tmp_path):
    """The first checkpoint of a new start was written, and the kill came before the old ones were removed."""
    save(tmp_path, 4, 6)
    writer = checkpointer(tmp_path)
    writer.lineage, writer.superseded = Lineage("new"), survey(tmp_path)
    removed = []
    writer._remove_superseded = removed.append
    writer.save(state(2), FakeEngine(2), EXTRA)
    assert trees.checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert {path.name for path in find_superseded(survey(tmp_path))} == {"checkpoint-4", "checkpoint-6"}


def test_what_was_superseded_goes_after_the_new_one_is_there_and_what_is_read_stays(tmp_path):
    path = save(tmp_path, 2)
    save(tmp_path, 4, 6)
    writer = checkpointer(tmp_path)
    writer.superseded, writer.kept = survey(tmp_path), (tmp_path / "." / path.name,)
    (tmp_path / "logs").mkdir()
    writer.former_logs = tmp_path / "logs"
    writer.save(state(4), FakeEngine(40), EXTRA)
    assert trees.checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"] and not (tmp_path / "logs").exists()
    assert writer.superseded == [] and replace(writer.lineage) == Lineage()


@pytest.mark.parametrize("moment", ["aside", "both"])
def test_a_kill_between_the_two_renames_loses_neither(tmp_path, moment):
    path = save(tmp_path, 4)
    before = trees.contents(path)
    path.rename(tmp_path / ".replaced-checkpoint-4")
    if moment == "both":
        shutil.copytree(tmp_path / ".replaced-checkpoint-4", path)
    for name in (".writing-checkpoint-4", ".removing-checkpoint-2", ".writing-mine", ".replaced-mine"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert trees.contents(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".replaced-mine", ".writing-mine", "checkpoint-4"]


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    path = save(tmp_path, 4)

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    assert [p.name for p in tmp_path.iterdir()] == [".removing-checkpoint-4"]


class Exporting(FakeEngine):
    """Writes a Hugging Face model too."""

    def export(self, folder):
        save_file({"weight": self.value}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")


def with_model(folder, step, **contents):
    saver = checkpointer(folder)
    saver.contents = Contents(
        model=True, companions=lambda path: (path / "trainer_state.json").write_text("{}"), **contents
    )
    return saver.save(state(step), Exporting(step), EXTRA)


def test_a_model_inside_is_hashed_and_what_damages_it_damages_the_checkpoint(tmp_path):
    path = with_model(tmp_path, 4)
    listed = set(Manifest.read(path).files)
    assert {"model.safetensors", "config.json", "trainer_state.json", "model.safetensors.index.json"} <= listed
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"weight": "model.safetensors"}
    assert inspect(path).is_usable and not inspect(path).is_model_only
    (path / "model.safetensors").write_bytes(b"")
    assert inspect(path).fault and inspect(path).is_own


@pytest.mark.parametrize("files", [("manifest.json",), ("manifest.json", "state.json"), ("model.safetensors",)])
def test_a_damaged_one_with_a_model_inside_is_ours(tmp_path, files):
    path = with_model(tmp_path, 4)
    for name in files:
        (path / name).unlink()
    found = inspect(path)
    assert found.is_own and not found.is_usable and found.may_be_replaced
    assert with_model(tmp_path, 4) == path and inspect(path).is_usable


def test_one_with_the_model_alone_has_no_state_of_the_engine_and_is_counted(tmp_path):
    for step in (2, 4):
        path = with_model(tmp_path, step, resumable=False)
    assert inspect(path).is_model_only and not (path / "engine").exists() and not list(path.glob("rng*"))
    assert read_state(path)["extra"] == {}
    saver = checkpointer(tmp_path, save_total_limit=1)
    assert saver.save(state(6), FakeEngine(6), EXTRA) and trees.checkpoints(tmp_path) == ["checkpoint-6"]
    saver.contents = Contents(resumable=False, model=True)
    assert saver.make_resumable() and not saver.make_resumable()
    whole = saver.save(state(8), Exporting(8), EXTRA)
    assert not inspect(whole).is_model_only
