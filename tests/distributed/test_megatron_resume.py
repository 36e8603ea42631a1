"""A killed Megatron run continues bit-equal, and other layouts read its checkpoints."""

import time
from pathlib import Path

import pytest

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

pytest.importorskip("megatron.core")
ROLES = {
    "selector": {"name": "loss"}, "mixer": {"name": "odm", "reward_scale": 5.0}, "weighter": {"name": "loss"},
    "candidate_fraction": 0.3, "score_reuse": "latest",  # so that scores of earlier updates are part of a checkpoint
    "warmup_step": 2, "update_step": 4, "update_times": 2, "weight_scope": "step", "max_samples": 16,
    "init_mixture_proportions": [0.5, 0.3, 0.2],
}  # fmt: skip
STEPS, SAVED = 10, 6
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("megatron-resume"))


def config_of(folder, name, **keys):
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 64,
        "learning_rate": 3.0e-3, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, **ROLES, **SHARDED,
    }  # fmt: skip
    return runs.base(folder, output_dir=str(folder / name), **{**options, **keys})


def moved(folder, name, source, **keys):
    """A run in a folder of its own that goes on from a checkpoint of `source`."""
    checkpoint = str(folder / source / f"checkpoint-{SAVED}")
    return config_of(folder, name, resume_from_checkpoint=checkpoint, save_strategy="no", **keys)


@pytest.fixture(scope="module")
def finished(folder):
    """Name -> configuration of whole and of moved runs, all on two processes."""
    configs = {
        "TP2": config_of(folder, "TP2", **TENSOR),
        "PP2": config_of(folder, "PP2", **PIPELINE, **{"use_distributed_optimizer": False}),
        "TP2 on PP2": moved(folder, "TP2-on-PP2", "TP2", **PIPELINE),
        "TP2 on DP2": moved(folder, "TP2-on-DP2", "TP2", engine="megatron", gradient_accumulation_steps=1),
        "PP2 on TP2": moved(
            folder, "PP2-on-TP2", "PP2", **{**TENSOR, "sequence_parallel": True, "use_distributed_optimizer": False}
        ),
    }
    for name, (status, stderr) in zip(configs, runs.train_many(2, list(configs.values())), strict=True):
        assert status == 0, f"{name}: {stderr}"
    return configs


def numbers(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize("name", ["TP2 on PP2", "TP2 on DP2", "PP2 on TP2"])
def test_a_checkpoint_of_one_layout_goes_on_in_another(finished, name):
    expected = runs.rows(finished[name.split()[0]])
    rows = runs.rows(finished[name])
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows][-(STEPS - SAVED) :] == list(range(SAVED + 1, STEPS + 1))
    for row, row0 in zip(rows[-(STEPS - SAVED) :], expected[SAVED:], strict=True):
        assert row["drawn"] == row0["drawn"]
        for key in ("loss", "objective", "grad_norm", "learning_rate"):
            assert row[key] == pytest.approx(row0[key], rel=1e-5), (row["step"], key)
        assert row["proportions"] == pytest.approx(row0["proportions"], rel=1e-5)


def after_step(output):
    """A step that no checkpoint has is done."""
    log = output / "metrics.jsonl"
    return log.is_file() and len(log.read_text().splitlines()) >= SAVED - 1


def while_saving(output):
    """The second checkpoint is being written, or has just been."""
    return any(f"checkpoint-{SAVED}" in path.name for path in output.glob("*"))


@pytest.mark.parametrize("moment", [after_step, while_saving])
def test_killed_and_started_again_every_later_step_is_bit_equal(folder, finished, moment):
    expected = [numbers(row) for row in runs.rows(finished["PP2"])]
    config = {**finished["PP2"], "output_dir": str(folder / moment.__name__)}
    processes = runs.start(config, 2)
    deadline = time.monotonic() + 120
    while not moment(Path(config["output_dir"])) and time.monotonic() < deadline:
        time.sleep(0.002)
    runs.kill(processes)
    before = Path(config["output_dir"])
    assert not (before / f"checkpoint-{STEPS}").is_dir(), "it was killed before its end"
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    assert [numbers(row) for row in runs.rows(config)] == expected


def test_a_damaged_checkpoint_is_passed_over(folder, finished):
    """One byte of a tensor's file is changed; the run goes on from the checkpoint before."""
    import shutil

    config = {**finished["PP2"], "output_dir": str(folder / "damaged")}
    shutil.copytree(finished["PP2"]["output_dir"], config["output_dir"])
    for number in (STEPS, 9):
        for file in (Path(config["output_dir"]) / f"checkpoint-{number}").rglob("*.distcp"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    assert [numbers(row) for row in runs.rows(config)] == [numbers(row) for row in runs.rows(finished["PP2"])]
