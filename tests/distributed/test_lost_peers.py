"""A rank that is stopped, killed or stuck: the others end soon, in one line that names it."""

import os
import re
import signal
import time

import pytest

from tests.support import corpus, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("lost_peers"))


def until_step(config, step, seconds=60):
    """Wait for a line of the log."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if len(runs.rows(config)) >= step:
                return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"step {step} did not come")


def lose_rank(folder, name, number, world=2, rank=1, timeout=5, **keys):
    """Send a signal to a rank in the middle of a run -> (exit codes, seconds to the end, the lines of the other one)."""
    config = runs.base(
        folder, output_dir=str(folder / "out" / name), max_steps=100000, mixer="odm", update_step=2, update_times=-1,
        ddp_timeout=timeout, per_device_train_batch_size=2, **keys,
    )  # fmt: skip
    processes = runs.start(config, world)
    try:
        until_step(config, 3)
        os.kill(processes[rank].pid, number)
        start = time.monotonic()
        codes = runs.finish(processes, timeout + 30)
        return codes, time.monotonic() - start, runs.stderr_of(config, 1 - rank).read_text()
    finally:
        runs.kill(processes)


LAYOUTS = [
    {},
    pytest.param({"fsdp": "full_shard"}, marks=pytest.mark.exhaustive),
    pytest.param({"engine": "megatron", "tensor_model_parallel_size": 2}, marks=pytest.mark.exhaustive),
    pytest.param({"engine": "megatron", "pipeline_model_parallel_size": 2}, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("keys", LAYOUTS)
def test_a_stopped_rank_is_named_with_what_waits_for_it(folder, keys):
    codes, seconds, text = lose_rank(folder, "-".join(["stopped", *keys]), signal.SIGSTOP, **keys)
    assert codes == [1, -signal.SIGKILL] and seconds < 5 + 30, (codes, seconds, text)
    found = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in text, text
    assert re.match(r"error: rank 1 did not answer for 5 s while rank 0 waited in .+ of step \d+ \(\w+\)", found[0]), (
        found
    )


@pytest.mark.parametrize("keys", LAYOUTS)
def test_a_killed_rank_is_named(folder, keys):
    codes, seconds, text = lose_rank(folder, "-".join(["killed", *keys]), signal.SIGKILL, **keys)
    assert codes == [1, -signal.SIGKILL] and seconds < 15, (codes, seconds, text)
    found = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and "Traceback" not in text, text
    assert re.match(r"error: rank 1 is gone \(connection closed\) in .+ of step \d+", found[0]), found


@pytest.mark.exhaustive
def test_a_rank_that_is_busy_elsewhere_is_named_with_the_place(folder):
    config = runs.base(
        folder, output_dir=str(folder / "out" / "asleep"), max_steps=100, mixer="odm", update_step=2, update_times=-1,
        ddp_timeout=5, callbacks=["tests.support.signals:SleepAtThree"],
    )  # fmt: skip
    processes = runs.start(config, 2)
    try:
        processes[0].join(40)
        assert processes[0].exitcode == 1
    finally:
        runs.kill(processes)
    text = runs.stderr_of(config, 0).read_text()
    found = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, text
    assert re.match(r"error: no answer for 5 s in .+ of step 4 .*; rank 1 is at signals\.py:\d+ on_step_end", found[0])
