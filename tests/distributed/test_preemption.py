"""SIGTERM and SIGUSR1: the step is finished, a checkpoint written, and the same command goes on bit by bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import corpus, runs

TIMES = ("seconds", "tokens_per_second", "time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("preemption"))


def plain(rows):
    """Rows of a log without the measured times."""
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in rows]


def same_weights(one, other):
    one, other = ({k: v for f in weights_of(c) for k, v in load_file(f).items()} for c in (one, other))
    return one.keys() == other.keys() and len(one) > 0 and all(one[name].equal(other[name]) for name in one)


def weights_of(config):
    return sorted(Path(config["output_dir"]).glob("model*.safetensors"))


def interrupted_and_whole(folder, world, name, callback, **keys):
    """-> (status and lines of the interrupted run, of its continuation; configuration of both; of the whole run)"""
    keys = {"mixer": "odm", "update_step": 2, "update_times": -1, "max_steps": 6, **keys}
    whole = runs.base(folder, output_dir=str(folder / "out" / f"{name}-whole"), **keys)
    part = runs.base(folder, output_dir=str(folder / "out" / name), **keys)
    signalled = {**part, "callbacks": [f"tests.support.signals:{callback}"]}
    first, second, third = runs.train_many(world, [whole, signalled, part])
    assert first[0] == 0, first[1]
    return second, third, part, whole


@pytest.mark.parametrize(
    ("world", "callback", "keys"),
    [
        (1, "Usr1AtThree", {}),
        (2, "TermAtThree", {}),
        pytest.param(2, "TermAtThree", {"fsdp": "full_shard"}, marks=pytest.mark.exhaustive),
        pytest.param(
            1,
            "TermAtThree",
            {"save_only_model": True, "save_strategy": "steps", "save_steps": 3},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            2, "TermAtThree", {"engine": "megatron", "tensor_model_parallel_size": 2}, marks=pytest.mark.exhaustive
        ),
        pytest.param(
            2, "TermAtThree", {"engine": "megatron", "pipeline_model_parallel_size": 2}, marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_step_and_loses_none(folder, world, callback, keys):
    name = f"{callback}-{world}-{'-'.join(keys)}"
    stopped, continued, part, whole = interrupted_and_whole(folder, world, name, callback, **keys)
    assert stopped[0] == 143, stopped[1]
    number = "SIGUSR1" if callback.startswith("Usr1") else "SIGTERM"
    assert f"stopped by {number} at step 3; checkpoint-3; the same command goes on\n" in stopped[1]
    assert "Traceback" not in stopped[1] + continued[1]
    assert continued[0] == 0 and "checkpoint-3 at step 3" in continued[1], continued[1]
    assert plain(runs.rows(part)) == plain(runs.rows(whole))
    assert same_weights(part, whole)


def test_a_checkpoint_of_the_step_is_not_written_twice(folder):
    keys = {"save_strategy": "steps", "save_steps": 3}
    stopped, _, _, _ = interrupted_and_whole(folder, 1, "saved", "TermAtThree", **keys)
    assert stopped[0] == 143
