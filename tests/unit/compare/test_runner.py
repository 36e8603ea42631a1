"""The runner of a comparison: each run trains once, and continues after failures and kills."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dataflex_mega.compare import runner, suite
from dataflex_mega.errors import ConfigError

FAKE = "tests.unit.compare.fake_training"
BASE = {"model_name_or_path": "m", "max_steps": 4, "dataset": "a,b", "eval_dataset": "a_v", "cutoff_len": 8}


class Silent:
    def __init__(self):
        self.lines, self.started, self.problems = [], [], {}

    def on_begin(self, done, total):
        pass

    def on_run_start(self, run, step):
        self.started.append((run.key, step))

    def on_step(self, run, step):
        pass

    def on_run_end(self, run, problem):
        self.problems[run.key] = problem

    def print_line(self, text):
        self.lines.append(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "TRAIN_MODULE", FAKE)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)


def build(folder, methods=None, **base):
    given = {"base": BASE | base, "methods": methods or {"one": None, "two": {"mixer": "odm"}}, "seeds": [1]}
    return suite.build(given | {"output_dir": str(folder)}, "s.yaml")


def train(chosen, rerun=()):
    silent = Silent()
    return runner.train(chosen, runner.prepare(chosen, rerun), silent), silent


def starts(run):
    return (run.folder.parent / "starts.log").read_text().splitlines()


def test_every_run_is_trained_once(tmp_path):
    chosen = build(tmp_path)
    outcome, _ = train(chosen)
    assert outcome.trained == ["one/seed-1", "two/seed-1"] and outcome.failed == {}
    again, _ = train(chosen)
    assert again.trained == [] and [starts(run) for run in chosen.runs] == [["seed-1 0"], ["seed-1 0"]]
    assert yaml.safe_load(chosen.runs[1].sibling_file(".yaml").read_text())["mixer"] == "odm"


def test_a_run_that_fails_is_reported_with_its_error_and_does_not_stop_the_others(tmp_path):
    outcome, silent = train(build(tmp_path, {"bad": {"fail": True}, "good": None}))
    assert outcome.trained == ["good/seed-1"]
    assert outcome.failed["bad/seed-1"].startswith("error: fail: found True (exit status 2;")
    assert silent.problems == {"bad/seed-1": outcome.failed["bad/seed-1"], "good/seed-1": None}


def test_phases_after_a_failed_one_are_left_out(tmp_path):
    phases = [{"phase": "a", "fail": True}, {"phase": "b"}]
    chosen = build(tmp_path, {"bad": phases})
    outcome, _ = train(chosen)
    assert outcome.failed["bad/seed-1/b"] == "bad/seed-1/a failed" and not chosen.runs[1].folder.exists()


def test_an_unfinished_run_continues_from_its_checkpoint_and_starts_anew_without_one(tmp_path):
    chosen = build(tmp_path)
    one, two = chosen.runs
    runner.prepare(chosen)
    (one.folder / "checkpoint-2").mkdir(parents=True)
    (one.folder / "times.jsonl").write_text('{"step": 2, "seconds": 0.5}\n')
    (two.folder).mkdir(parents=True)
    (two.folder / "left.over").write_text("")
    _, silent = train(chosen)
    assert starts(one) == ["seed-1 2"] and starts(two) == ["seed-1 0"] and not (two.folder / "left.over").exists()
    assert silent.started == [("one/seed-1", 2), ("two/seed-1", 0)]


@pytest.mark.parametrize("missing", ["trainer_state.json", "tokenizer_config.json"])
def test_a_run_counts_as_finished_only_with_its_last_step_and_its_model(tmp_path, missing):
    chosen = build(tmp_path)
    train(chosen)
    assert runner.is_finished(chosen.runs[0])
    (chosen.runs[0].folder / missing).unlink()
    assert not runner.is_finished(chosen.runs[0])
    (chosen.runs[1].folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert not runner.is_finished(chosen.runs[1])


def test_a_run_whose_keys_changed_is_refused_by_name_and_rerun_when_named(tmp_path):
    train(build(tmp_path))
    changed = build(tmp_path, {"one": None, "two": {"mixer": "ado"}})
    with pytest.raises(ConfigError, match="two/seed-1: mixer was 'odm', is 'ado'.*--rerun two/seed-1"):
        runner.prepare(changed)
    outcome, _ = train(changed, ["two/seed-1"])
    assert outcome.trained == ["two/seed-1"] and starts(changed.runs[0]) == ["seed-1 0"]


def test_another_number_of_processes_is_a_change_and_another_logging_interval_is_none(tmp_path):
    chosen = build(tmp_path)
    train(chosen)
    assert runner.prepare(build(tmp_path, logging_steps=7)) == []
    assert runner.changed_keys(chosen.runs[0], 2) == ["processes was 1, is 2"]


def test_rerun_of_a_phase_takes_the_later_ones_with_it(tmp_path):
    chosen = build(tmp_path, {"m": [{"phase": "a"}, {"phase": "b"}, {"phase": "c"}], "n": None})
    train(chosen)
    assert [run.key for run in runner.prepare(chosen, ["m/seed-1/b"])] == ["m/seed-1/b", "m/seed-1/c"]
    assert [run.key for run in runner.prepare(chosen, ["m"])] == ["m/seed-1/a", "m/seed-1/b", "m/seed-1/c"]
    with pytest.raises(ConfigError, match="did you mean 'm/seed-1/b'"):
        runner.prepare(chosen, ["m/seed-1/bb"])


def test_launch_lines_are_torchrun_commands_of_what_is_missing(tmp_path):
    chosen = build(tmp_path)
    first, second = runner.launch_lines(runner.prepare(chosen), 4)
    assert first == (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=4 -m {FAKE} {tmp_path}/one/seed-1.yaml"
    )
    assert second.endswith("two/seed-1.yaml")


PARENT = """
import sys
from tests.unit.compare.test_runner import BASE, FAKE, Silent, build, runner
runner.TRAIN_MODULE = FAKE
chosen = build(sys.argv[1], {"one": None, "two": {"delay": 0.3}})
runner.train(chosen, runner.prepare(chosen), Silent())
"""


def killed_during_the_second_run(folder, with_child):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)])
    log = folder / "two" / "seed-1" / "times.jsonl"
    until = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.02)
    if with_child:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True)
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
    parent.kill()
    parent.wait()


def test_killed_with_its_training_it_goes_on_and_leaves_finished_runs_alone(tmp_path):
    killed_during_the_second_run(tmp_path, with_child=True)
    chosen = build(tmp_path, {"one": None, "two": {"delay": 0.3}})
    before = (chosen.runs[0].folder / "trainer_state.json").stat()
    outcome, _ = train(chosen)
    assert outcome.trained == ["two/seed-1"] and starts(chosen.runs[1]) == ["seed-1 0", "seed-1 2"]
    after = (chosen.runs[0].folder / "trainer_state.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_training_that_outlives_it_is_waited_for_and_not_trained_twice(tmp_path):
    killed_during_the_second_run(tmp_path, with_child=False)
    chosen = build(tmp_path, {"one": None, "two": {"delay": 0.3}})
    with pytest.raises(ConfigError, match="two/seed-1 is being trained now"):
        runner.prepare(chosen, ["two"])
    outcome, silent = train(chosen)
    assert outcome.trained == ["two/seed-1"] and starts(chosen.runs[1]) == ["seed-1 0"]
    assert silent.lines == ["waiting: two/seed-1 is still being trained by an earlier command"]


def test_a_training_is_ended_when_we_are(tmp_path):
    class Leaves(Silent):
        def on_step(self, run, step):
            if step >= 1:
                raise KeyboardInterrupt

    chosen = build(tmp_path, {"one": {"delay": 0.3, "max_steps": 100}}, max_steps=100)
    with pytest.raises(KeyboardInterrupt):
        runner.train(chosen, runner.prepare(chosen), Leaves())
    with runner.lock_run(chosen.runs[0]) as lock:
        assert lock is not None
    assert not runner.is_finished(chosen.runs[0])


def test_a_token_is_in_no_file_of_a_comparison_and_may_be_renewed(tmp_path):
    chosen = build(tmp_path, hub_token="SECRETTOKEN123", extra_config={"address": "https://me:PASSWORD99@host"})
    train(chosen)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any("SECRETTOKEN123" in text or "PASSWORD99" in text for text in written)
    assert runner.environment_of(chosen.runs[0])["DATAFLEX_MEGA_SECRET_HUB_TOKEN"] == "SECRETTOKEN123"
    renewed = build(tmp_path, hub_token="OTHERTOKEN456", extra_config={"address": "https://me:OTHERWORD99@host"})
    assert runner.prepare(renewed) == []
