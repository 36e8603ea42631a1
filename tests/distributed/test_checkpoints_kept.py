"""What lies in output_dir is kept: other tools' checkpoints always, a former run's until the new one has its first."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.support import corpus, runs, trees

SCHEDULE = {"warmup_step": 1, "update_step": 1, "update_times": -1}
ROLE = {"mixer": {"name": "odm", "reward_scale": 5.0}, **SCHEDULE}
SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 4}


class InterruptAt(TrainerCallback):
    """Ends a run as Ctrl-C does, after `step` steps and before what is due there."""

    step = 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class InterruptAtOne(InterruptAt):
    pass


class InterruptAtThree(InterruptAt):
    step = 3


class InterruptAtFive(InterruptAt):
    step = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("kept"))


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / name), **{**ROLE, **SAVES, **keys})


def train(*configs):
    return runs.train_many(1, list(configs), plain=True)


def interrupt(name):
    return [f"{__name__}:{name}"]


@pytest.fixture(scope="module")
def whole(folder):
    """A finished run with checkpoints 2, 4 and 6."""
    config = config_of(folder, "whole")
    ((status, stderr),) = train(config)
    assert status == 0, stderr
    return Path(config["output_dir"])


def copy_of(whole, name, **keys):
    """A copy of the run -> (its folder, the configuration that continues it)."""
    shutil.copytree(whole, whole.parent / name)
    return whole.parent / name, config_of(whole.parent, name, **keys)


@pytest.fixture(scope="module")
def theirs(folder):
    """LLaMA-Factory's own output folder with two checkpoints: its own training, by its own trainer."""
    config = runs.base(folder, output_dir=str(folder / "theirs"), **SAVES, save_total_limit=2, do_train=True)
    ((status, stderr),) = train(config)
    assert status == 0, stderr
    assert trees.checkpoints(folder / "theirs") == ["checkpoint-4", "checkpoint-6"]
    assert (folder / "theirs" / "checkpoint-6" / "trainer_state.json").is_file()
    return folder / "theirs"


def test_an_output_folder_of_llamafactory_survives_every_combination(folder, theirs):
    roles = [
        {"mixer": "odm"},
        {"selector": "loss", "max_samples": 12},
        {"weighter": "loss"},
        {"mixer": "odm", "engine": "megatron"},
    ]
    resumes = [None, True, False, str(theirs / "checkpoint-4"), str(theirs)]
    configs = [
        runs.base(
            folder, output_dir=str(theirs), **SAVES, **SCHEDULE, **role, overwrite_output_dir=overwrite,
            save_total_limit=limit, resume_from_checkpoint=resume,
        )
        for role, overwrite, limit, resume in itertools.product(roles, (True, False), (1, None), resumes)
    ]  # fmt: skip
    before = trees.contents(theirs)
    for config, (status, stderr) in zip(configs, train(*configs), strict=True):
        assert status == 2, (config, stderr)
        line = stderr.splitlines()[-1]
        assert line.startswith("error: output_dir: ") and "LLaMA-Factory" in line and "another output_dir" in line
    assert trees.contents(theirs) == before
    assert len(configs) == 80


@pytest.mark.parametrize("left", ["model.safetensors", "trainer_state.json", "trainer_log.jsonl"])
def test_a_finished_run_of_another_trainer_without_checkpoints_is_left_too(folder, theirs, left):
    target = folder / f"only-{left}"
    target.mkdir()
    shutil.copy(theirs / left, target)
    before = trees.contents(target)
    ((status, stderr),) = train(config_of(folder, target.name, overwrite_output_dir=True))
    assert status == 2 and left in stderr and "another output_dir" in stderr
    assert trees.contents(target) == before


def test_files_of_the_user_do_not_keep_a_run_from_starting(folder):
    target = folder / "with-notes"
    target.mkdir()
    (target / "README.md").write_text("mine")
    (target / "class_weights.jsonl").write_text('{"class": 1, "weight": 0.5}\n')
    before = trees.contents(target, "README.md", "class_weights.jsonl")
    config = config_of(folder, "with-notes", max_steps=2, overwrite_output_dir=True)
    assert train(config)[0][0] == 0
    assert trees.contents(target, "README.md", "class_weights.jsonl") == before


def test_another_tools_checkpoint_beside_our_own_is_left_and_not_counted(whole):
    target, config = copy_of(whole, "beside", max_steps=8, save_total_limit=1)
    trees.as_trainer(target / "checkpoint-500")
    trees.as_trainer(target / "checkpoint-1")
    before = trees.contents(target, "checkpoint-500", "checkpoint-1")
    collided, colliding = copy_of(whole, "collides", max_steps=8)
    trees.as_trainer(collided / "checkpoint-8")
    old = trees.contents(collided)
    (status, stderr), (refused, line) = train(config, colliding)
    assert status == 0 and "checkpoint-500 is of" in stderr and "damaged" not in stderr
    assert trees.contents(target, "checkpoint-500", "checkpoint-1") == before
    assert trees.checkpoints(target) == ["checkpoint-1", "checkpoint-8", "checkpoint-500"]
    assert refused == 2 and "checkpoint-8 is of" in line and trees.contents(collided) == old


def test_a_run_beside_a_damaged_checkpoint_keeps_its_own_newest(whole):
    target, config = copy_of(whole, "damaged-newest", save_steps=1, save_total_limit=1, max_steps=5)
    (target / "checkpoint-6" / "state.json").write_text("{")
    (status, stderr), *_ = train(config)
    assert status == 0 and "checkpoint-6 is damaged (state.json has 1 bytes" in stderr
    assert "continuing from" in stderr and "checkpoint-4 at step 4" in stderr
    assert trees.checkpoints(target) == ["checkpoint-5", "checkpoint-6"]


def test_none_whole_stops_the_run_and_a_copy_is_no_checkpoint(whole):
    target, config = copy_of(whole, "none-whole")
    for step in (2, 4, 6):
        (target / f"checkpoint-{step}" / "manifest.json").write_bytes(b"")
    copied, keepsake = copy_of(whole, "keepsake", max_steps=7, save_total_limit=1)
    shutil.copytree(copied / "checkpoint-2", copied / "checkpoint-1000")
    before, kept = trees.contents(target), trees.contents(copied, "checkpoint-1000")
    (status, stderr), (second, notes) = train(config, keepsake)
    assert status == 2 and stderr.count("error") == 1 and "overwrite_output_dir: true" in stderr
    assert all(f"checkpoint-{step} is damaged" in stderr for step in (2, 4, 6))
    assert trees.contents(target) == before
    assert second == 0 and "checkpoint-1000 holds step 2" in notes
    assert trees.contents(copied, "checkpoint-1000") == kept
    assert trees.checkpoints(copied) == ["checkpoint-7", "checkpoint-1000"]


def test_overwriting_removes_nothing_before_its_first_checkpoint(whole):
    target, config = copy_of(whole, "overwritten", learning_rate=0.02, overwrite_output_dir=True)
    before = trees.contents(target)
    wrong = {**config, "finetuning_type": "lora", "lora_target": "no_such_layer"}
    interrupted = {**config, "callbacks": interrupt("InterruptAtOne")}
    (status, stderr), (stopped, _), (continued, _) = train(
        wrong, interrupted, config_of(whole.parent, "overwritten", max_steps=6)
    )
    assert status == 2 and "no_such_layer" in stderr, stderr
    assert stopped == 130 and continued == 0
    names = [*(f"checkpoint-{step}" for step in (2, 4, 6)), "metrics.jsonl", "odm_weights.jsonl"]
    assert trees.contents(target, *names) == {k: v for k, v in before.items() if k.split("/")[0] in names}
    assert train(interrupted, config)[1][0] == 0
    assert runs.rows(config)[0]["learning_rate"] == pytest.approx(0.02)
    assert trees.checkpoints(target) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not list(target.glob(".*"))


def test_an_overwriting_run_that_was_interrupted_goes_on(whole):
    target, config = copy_of(whole, "preempted", overwrite_output_dir=True, save_total_limit=2)
    shutil.rmtree(target / "checkpoint-2")
    (stopped, _), (status, stderr) = train({**config, "callbacks": interrupt("InterruptAtThree")}, config)
    assert stopped == 130 and status == 0
    assert "checkpoint-2 is of the unfinished run" in stderr and "continuing from" in stderr
    assert runs.rows(config) == runs.rows({"output_dir": str(whole)})
    (again, stderr), *_ = train(config)
    assert again == 0 and "continuing" not in stderr, "a finished one is begun anew"


def test_a_named_checkpoint_is_verified_and_its_own_newer_ones_win(whole):
    target, _ = copy_of(whole, "named")
    path = target / "checkpoint-2"
    config = config_of(whole.parent, "branch", resume_from_checkpoint=f"{path}/", save_total_limit=1)
    inside = config_of(whole.parent, "named", resume_from_checkpoint=str(path), save_total_limit=1)
    once = {"callbacks": interrupt("InterruptAtThree")}
    later_once = {"callbacks": interrupt("InterruptAtFive")}
    later = trees.contents(target, "checkpoint-4", "checkpoint-6")
    ((stopped, _),) = train({**inside, **once})
    assert stopped == 130 and trees.contents(target, "checkpoint-4", "checkpoint-6") == later
    (first, _), (again, stderr), (here, _) = train({**config, **later_once}, config, inside)
    assert (first, again, here) == (130, 0, 0)
    assert "checkpoint-4 comes from resume_from_checkpoint" in stderr and "checkpoint-4 at step 4" in stderr
    assert trees.checkpoints(whole.parent / "branch") == ["checkpoint-6"]
    assert trees.checkpoints(target) == ["checkpoint-2", "checkpoint-6"], "the one that is named stays"
    expected = runs.rows({"output_dir": str(whole)})
    assert runs.rows(config) == expected[2:] and runs.rows(inside) == expected
    trees.flip(path / "engine" / "__0_0.distcp")
    ((status, stderr),) = train(inside)
    assert status == 2 and "__0_0.distcp has another SHA-256" in stderr and "resume_from_checkpoint" in stderr


def test_changed_data_is_refused_whatever_row_it_is(whole):
    target, config = copy_of(whole, "other-data", max_steps=8)
    data = whole.parent / "data-changed"
    shutil.copytree(whole.parent / "data", data)
    rows = (data / "prose.jsonl").read_text().splitlines()
    rows[37] = json.dumps({"text": json.loads(rows[37])["text"].replace("e", "o", 1)})
    (data / "prose.jsonl").write_text("\n".join(rows) + "\n")
    before = trees.contents(target)
    ((status, stderr),) = train({**config, "dataset_dir": str(data)})
    assert status == 2 and "data of prose: " in stderr and "data of code" not in stderr
    assert trees.contents(target) == before


DAMAGED_LOGS = {
    "byte": lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"\xff", 1)),
    "zeros": lambda path: path.write_bytes(path.read_bytes()[:40] + b"\0" * 64 + path.read_bytes()[104:]),
    "list": lambda path: path.write_text("[1]\n" + path.read_text()),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_damaged_logs_do_not_block_a_resume_and_lose_nothing_in_silence(whole):
    names = ("metrics.jsonl", "trainer_log.jsonl", "odm_weights.jsonl")
    cases = list(itertools.product(DAMAGED_LOGS, names))
    configs = []
    for kind, name in cases:
        target, config = copy_of(whole, f"log-{kind}-{name}", max_steps=7)
        DAMAGED_LOGS[kind](target / name)
        configs.append((target, config))
    for (kind, name), (target, _), (status, stderr) in zip(
        cases, configs, train(*(config for _, config in configs)), strict=True
    ):
        assert status == 0 and f"{name}.damaged" in stderr, (kind, name, stderr)
        assert (target / f"{name}.damaged").exists()
        former = [] if kind == "folder" else (whole / name).read_text().splitlines()
        now = (target / name).read_text().splitlines() if (target / name).exists() else []
        lost = {"byte": 1, "zeros": 1, "list": 0, "folder": 0}[kind]
        assert len(set(former) - set(now)) <= lost and all(json.loads(line) for line in now), (kind, name)
