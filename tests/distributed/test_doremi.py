"""DoReMi in whole runs: equal for every batch partition, bit-equal after a kill, and its reference is checked."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive

STEPS = 6
MIX = {
    "mixer": {"name": "doremi"}, "update_step": 2, "update_times": -1, "init_mixture_proportions": [0.5, 0.3, 0.2],
    "max_steps": STEPS,
}  # fmt: skip
PER_DOMAIN = {**MIX, "mixer": {"name": "doremi", "loss_norm": "per_domain"}}
# world -> (micro-batch, accumulation, sharded)
SPLITS = {1: [(4, 2, True)], 2: [(1, 4, False), (2, 2, True)], 4: [(1, 2, False)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("doremi"))


def config_of(folder, name, **keys):
    options = {"reference_model": str(folder / "model"), **MIX, **keys}
    return runs.base(folder, output_dir=str(folder / name), **options)


def averages(config):
    return json.loads((Path(config["output_dir"]) / "doremi_average_weights.json").read_text())


def blocks(config):
    return {p.name: p.read_bytes() for p in sorted((Path(config["output_dir"]) / "reference").iterdir())}


@pytest.fixture(scope="module")
def whole(folder):
    """Both norms, one process, whole batches; then the same with the cache of the first."""
    cache = str(folder / "token" / "reference")
    configs = [
        config_of(folder, "token"),
        config_of(folder, "per_domain", reference_cache=cache, **PER_DOMAIN),
        config_of(folder, "unweighted", mixer="static", reference_model=None),
    ]
    finished = runs.train_many(1, configs)
    assert [status for status, _ in finished] == [0, 0, 0], finished
    return configs


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_weights_losses_and_cache_however_a_batch_is_cut(folder, whole, world):
    cases = []
    for expected in whole[:2]:
        for number, (micro, accumulation, sharded) in enumerate(SPLITS[world]):
            name = f"{Path(expected['output_dir']).name}-{world}-{number}"
            cases.append((expected, {
                **expected, "output_dir": str(folder / name), "per_device_train_batch_size": micro,
                "gradient_accumulation_steps": accumulation, **({"fsdp": "full_shard"} if sharded else {}),
            }))  # fmt: skip
    finished = runs.train_many(world, [config for _, config in cases])
    for (expected, config), (status, stderr) in zip(cases, finished, strict=True):
        assert status == 0, stderr
        for row, row0 in zip(runs.rows(config), runs.rows(expected), strict=True):
            assert row["drawn"] == row0["drawn"]
            for key in ("loss", "objective", "grad_norm"):
                assert row[key] == pytest.approx(row0[key], rel=1e-5), (config["output_dir"], row["step"], key)
        weights = averages(config)["average_weights"]
        assert weights == pytest.approx(averages(expected)["average_weights"], rel=1e-5)
        if "reference_cache" not in config and "fsdp" not in config:
            assert blocks(config) == blocks(expected), "whoever computed them"


def test_weights_move_and_change_what_is_learnt(whole):
    token, per_domain, unweighted = whole
    log = runs.rows(token, "doremi_weights.jsonl")
    assert [row["step"] for row in log] == list(range(0, STEPS, 2))
    assert (
        log[0]["domain_weights"] == pytest.approx([1 / 3] * 3) and log[0]["domain_weights"] != log[-1]["domain_weights"]
    )
    assert averages(token)["update_times"] == STEPS and averages(token)["domain_names"] == ["code", "prose", "tables"]
    last = [runs.rows(config)[-1]["loss"] for config in (token, per_domain, unweighted)]
    assert len(set(last)) == 3
    row = runs.rows(token)[0]  # weights 1/3 over drawn shares: the largest factor is the smallest domain's
    assert row["weights"]["max"] / row["weights"]["min"] == pytest.approx(0.5 / 0.2)


def test_a_first_step_against_its_own_start_has_no_excess(whole):
    log = runs.rows(whole[0], "doremi_weights.jsonl")
    assert log[0]["perdomain_scores"] == [None] * 3 and log[1]["domain_weights"] != log[0]["domain_weights"]
    state = Path(whole[0]["output_dir"]) / "metrics.jsonl"
    assert state.is_file()


def test_killed_and_started_again_every_later_step_is_bit_equal(folder):
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "max_steps": 10}
    cache = {"reference_cache": str(folder / "shared-cache")}
    config = config_of(folder, "uninterrupted", **options, **cache)
    assert runs.finish(runs.start(config, 2)) == [0, 0]
    expected = [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(config)]
    killed = config_of(folder, "killed", **options, **cache)
    processes = runs.start(killed, 2)
    wait_for_step(killed, 7)
    runs.kill(processes)
    assert runs.finish(runs.start(killed, 2)) == [0, 0]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in runs.rows(killed)]
    assert rows == expected and averages(killed) == averages(config)
    weights = [(row["step"], row["domain_weights"]) for row in runs.rows(killed, "doremi_weights.jsonl")]
    assert weights == [(row["step"], row["domain_weights"]) for row in runs.rows(config, "doremi_weights.jsonl")]


def wait_for_step(config, step, seconds=60):
    """Until a run's log has that many lines."""
    log, deadline = Path(config["output_dir"]) / "metrics.jsonl", time.monotonic() + seconds
    while not (log.is_file() and log.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, f"no step {step} after {seconds} s"
        time.sleep(0.005)


def test_a_build_that_was_killed_goes_on_and_ends_in_the_same_bytes(folder, whole):
    config = config_of(folder, "cut-short", max_steps=1)
    cache = Path(config["output_dir"]) / "reference"
    processes = runs.start({**config, "score_batch_size": 8}, 2)
    deadline = time.monotonic() + 60
    while not list(cache.glob("block-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.005)
    runs.kill(processes)
    written_before = {p.name: p.stat().st_mtime_ns for p in cache.glob("block-*.bin")}
    assert written_before
    assert runs.finish(runs.start(config, 1)) == [0]
    assert blocks(config) == blocks(whole[0])
    written_after = {p.name: p.stat().st_mtime_ns for p in cache.glob("block-*.bin")}
    assert {name: written_after[name] for name in written_before} == written_before, (
        "whole blocks are not computed anew"
    )


def test_references_that_do_not_fit_are_refused_in_one_line(folder, whole):
    cache = folder / "token" / "reference"
    damaged, other = folder / "damaged", folder / "other-model"
    shutil.copytree(cache, damaged)
    raw = bytearray((damaged / "block-000001.bin").read_bytes())
    raw[-100] ^= 1
    (damaged / "block-000001.bin").write_bytes(raw)
    shutil.copytree(folder / "model", other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    cases = [
        ({"reference_model": None}, "set reference_model (a Hugging Face folder or a checkpoint) or reference_cache"),
        ({"reference_model": None, "reference_cache": str(folder / "nothing")}, "has no manifest.json"),
        ({"reference_model": str(folder / "data")}, "is not a Hugging Face folder"),
        ({"reference_cache": str(damaged)}, "block-000001.bin is missing or damaged"),
        ({"reference_cache": str(cache), "reference_model": str(other)}, "belongs to something else (model:"),
        ({"reference_cache": str(cache), "cutoff_len": 16}, "cutoff_len: 32 there, 16 here"),
        ({"reference_cache": str(cache), "dataset": "code,prose", "init_mixture_proportions": [1, 1]}, "data:"),
    ]
    configs = [config_of(folder, f"refused-{n}", **keys) for n, (keys, _) in enumerate(cases)]
    good = config_of(folder, "cache-alone", reference_model=None, reference_cache=str(cache), max_steps=1)
    finished = runs.train_many(2, [*configs, good])
    for (_, message), (status, stderr) in zip(cases, finished, strict=False):
        assert status == 2 and message in stderr and stderr.count("error: ") == 1, stderr
    assert finished[-1][0] == 0, finished[-1][1]
