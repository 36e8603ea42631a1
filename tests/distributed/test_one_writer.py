"""Several jobs that want one folder at once: one line, or the right result."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from dataflex_mega.locks import LOCK_FILE
from tests.distributed.test_lost_peers import until_step
from tests.support import corpus, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write_reference(corpus.write(tmp_path_factory.mktemp("one_writer")))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_second_run_in_one_folder_ends_in_a_line_that_names_the_first(folder, world):
    config = runs.base(
        folder, output_dir=str(folder / "out" / f"two-{world}"), mixer="odm", update_step=2, update_times=-1,
        max_steps=100000, save_strategy="steps", save_steps=2, save_total_limit=1,
    )  # fmt: skip
    first = runs.start(config, world)
    try:
        until_step(config, 3)
        second = runs.start({**config, "overwrite_output_dir": True}, world)
        assert runs.finish(second) == [2] * world
        lines = [line for line in runs.stderr_of(config, 0).read_text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"{config['output_dir']} is in use by process {first[0].pid} on " in lines[0]
        done = len(runs.rows(config))
        until_step(config, done + 3)
    finally:
        runs.kill(first)
    assert [row["step"] for row in runs.rows(config)] == list(range(1, len(runs.rows(config)) + 1))
    status, stderr = runs.train_many(world, [{**config, "max_steps": len(runs.rows(config)) + 2}])[0]
    assert status == 0, stderr
    assert not (Path(config["output_dir"]) / LOCK_FILE).exists()


@pytest.mark.parametrize("jobs", [3])
def test_jobs_that_need_one_reference_cache_at_once_all_get_the_same_losses(folder, jobs):
    def config(name, cache):
        return runs.base(
            folder, output_dir=str(folder / "out" / name), mixer="doremi", update_step=1, update_times=-1, max_steps=3,
            reference_model=str(folder / "reference"), reference_cache=str(folder / cache),
        )  # fmt: skip

    configs = [config(f"job-{number}", "shared") for number in range(jobs)]
    processes = [process for one in configs for process in runs.start(one, 1)]
    alone = config("alone", "own")
    status, stderr = runs.train_many(1, [alone])[0]
    assert status == 0, stderr
    assert runs.finish(processes) == [0] * jobs, [runs.stderr_of(one, 0).read_text() for one in configs]
    texts = [runs.stderr_of(one, 0).read_text() for one in configs]
    assert sum("blocks to compute" in text for text in texts) == 1, texts
    right = load_file(f"{alone['output_dir']}/model.safetensors")
    for one in configs:
        found = load_file(f"{one['output_dir']}/model.safetensors")
        assert all(found[name].equal(right[name]) for name in right)
    assert not (folder / "shared" / LOCK_FILE).exists()
