"""LESS from a gradient store in whole runs: equal on 1, 2 and 4 processes, builds that survive kill -9, and stores that
do not fit are refused by name."""

import json
import multiprocessing as mp
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dataflex_mega.commands import store as store_command
from dataflex_mega.distributed.testing import free_port
from dataflex_mega.store.gradients import GradientStore
from tests.support import corpus, runs

SELECT = {
    "eval_dataset": "tables,prose", "eval_on_each_dataset": True, "warmup_step": 2, "update_step": 2, "update_times": 2,
}  # fmt: skip
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
# As large as a layer's longest side: nothing is projected away, so plain scores are the streamed ones up to bfloat16.
EXACT = {"name": "less", "gradient_type": "sgd", "mode": "store", "side": 512, "store_block": 8}
STORED = {"name": "less", "mode": "store", "side": 8, "store_block": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("store"))


def config_of(folder, name, selector, **keys):
    return runs.base(folder, output_dir=str(folder / name), selector=selector, max_samples=2, **{**SELECT, **keys})


def selected(config):
    paths = sorted((Path(config["output_dir"]) / "selections").glob("step_*.json"))
    return [json.loads(path.read_text()) for path in paths]


def scores(config):
    return np.concatenate([next(iter(row["metric"].values())) for row in selected(config)])


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def alone(folder):
    """One process: streamed, stored with nothing lost, stored with Adam, full and LoRA."""
    streamed = {"name": "less", "gradient_type": "sgd"}
    configs = {
        "streamed": config_of(folder, "streamed", streamed),
        "exact": config_of(folder, "exact", EXACT),
        "full": config_of(folder, "full", STORED),
        "lora": config_of(folder, "lora", STORED, **LORA),
    }
    finished = runs.train_many(1, list(configs.values()))
    assert [status for status, _ in finished] == [0] * 4, finished
    return configs


def test_a_store_that_loses_nothing_gives_the_streamed_scores(alone):
    assert [r["indices"] for r in selected(alone["exact"])] == [r["indices"] for r in selected(alone["streamed"])]
    np.testing.assert_allclose(scores(alone["exact"]), scores(alone["streamed"]), atol=1e-3)
    assert np.ptp(scores(alone["streamed"])) > 0.02


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_same_choice_on_every_number_of_processes(folder, alone, world):
    cases = []
    for tuning in ("full", "lora"):
        for sharded in (False, True):
            cases.append((alone[tuning], {
                **alone[tuning], "output_dir": str(folder / f"{tuning}-{world}-{sharded}"),
                "per_device_train_batch_size": 8 // world, **({"fsdp": "full_shard"} if sharded else {}),
            }))  # fmt: skip
    finished = runs.train_many(world, [config for _, config in cases])
    for (expected, config), (status, stderr) in zip(cases, finished, strict=True):
        assert status == 0, stderr
        assert [r["indices"] for r in selected(config)] == [r["indices"] for r in selected(expected)]
        np.testing.assert_allclose(scores(config), scores(expected), atol=2e-3)
        stores = list((Path(config["output_dir"]) / "gradient_store").iterdir())
        assert len(stores) == 1, "the store of the first update is gone"
        assert GradientStore(stores[0]).layout.num_shards == world


# -- kill -9 and damage ----------------------------------------------------------------------------------------------------


def ours_of(argv):
    """Run the store command in this process, as `runs` runs training -> (status, standard output and error)."""
    import contextlib
    import io

    from accelerate.state import AcceleratorState, PartialState

    from dataflex_mega.commands.store import main

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        status = main(argv)
    return status, output.getvalue()


def written(config, name):
    path = Path(config["output_dir"]).parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def start(argv, world):
    """The store command in `world` forked processes."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    port = free_port()
    started = [context.Process(target=_forked, args=(rank, world, port, argv)) for rank in range(world)]
    for process in started:
        process.start()
    return started


def _forked(rank, world, port, argv):
    torch.set_num_threads(1)
    runs.as_torchrun(rank, world, port)
    status, output = ours_of(argv)
    if status:
        print(output)
    os._exit(status)


@pytest.fixture(scope="module")
def config(folder):
    """Blocks of 8 of some 150 samples, one batch each, so that a build takes many turns."""
    return runs.base(
        folder,
        output_dir=str(folder / "command"),
        selector=STORED,
        per_device_eval_batch_size=8,
        max_samples=6,
        **SELECT,
    )


@pytest.fixture(scope="module")
def built(folder, config):
    target = folder / "whole"
    assert runs.finish(start(["build", written(config, "build"), "--folder", str(target)], 2)) == [0, 0]
    return target


def test_killed_while_building_less_than_a_block_a_rank_is_computed_again(folder, config, built):
    target = folder / "killed"
    argv = ["build", written(config, "killed"), "--folder", str(target)]
    kills, whole_blocks = 0, {}
    for _ in range(2):
        processes = start(argv, 2)
        before = sizes(target)
        deadline = time.monotonic() + 90
        while not grown(before, sizes(target)) and any(p.is_alive() for p in processes):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        runs.kill(processes)
        kills += any(p.exitcode == -9 for p in processes)
        now = sizes(target)
        assert all(now[name] >= size for name, size in whole_blocks.items()), "a whole block was thrown away"
        whole_blocks = now
    assert kills == 2 and not (target / "manifest.json").read_text().count('"sums": ["')
    assert runs.finish(start(argv, 2)) == [0, 0]
    assert content(target) == content(built)


def sizes(target):
    """Bytes of whole blocks in each shard, whether finished or not."""
    num_blocks = {}
    for shard in (0, 1):
        for path in target.glob(f"shard-{shard:05d}-of-00002.sums*"):
            num_blocks[shard] = max(num_blocks.get(shard, 0), path.stat().st_size // 16)
    return num_blocks


def grown(before, now):
    return len(now) == 2 and all(now[shard] >= before.get(shard, 0) + 2 for shard in now)


def test_scores_and_refusals_by_name(folder, config, built, capsys):
    flipped, cut = folder / "flipped", folder / "cut"
    for target in (flipped, cut):
        shutil.copytree(built, target)
    shard = "shard-00001-of-00002.bin"
    raw = bytearray((flipped / shard).read_bytes())
    raw[len(raw) // 2] ^= 4
    (flipped / shard).write_bytes(raw)
    (cut / shard).write_bytes((cut / shard).read_bytes()[:-2])
    other = {**config, "learning_rate": 0.5}
    trained = {**config, "output_dir": str(folder / "moved"), "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    assert runs.train_many(1, [{**trained, "selector": "random", "warmup_step": 3}])[0][0] == 0
    path, moved = written(config, "score"), f"resume_from_checkpoint={folder / 'moved' / 'checkpoint-3'}"
    calls = [
        (["score", path, "--folder", str(built), "--top", "5", "--output", str(folder / "scores-W.npy")], 0, ""),
        (["score", path, "--folder", str(flipped)], 2, "is damaged in the rows of samples"),
        (["score", path, "--folder", str(cut)], 2, f"{shard} has"),
        (["score", path, "--folder", str(built), moved], 2, "belongs to something else (model:"),
        (["score", path, "--folder", str(built), "selector.side=4"], 2, "projection:"),
        (["build", path, "--folder", str(built), "cutoff_len=16"], 2, "cutoff_len: 32 there, 16 here"),
        (["score", path, "--folder", str(folder / "nothing")], 2, "has no manifest.json"),
        (["build", written({**other, "selector": "loss"}, "none")], 2, "uses no store here"),
    ]
    printed = {}
    for world in (1, 2, 4):
        arguments = [[word.replace("-W.", f"-{world}.") for word in argv] for argv, _, _ in calls]
        arguments = arguments if world == 2 else arguments[:1]
        finished = runs.train_many(world, arguments, ours_of)
        for (argv, status, message), (actual, stderr) in zip(calls, finished, strict=False):
            assert actual == status and message in stderr, (argv, stderr)
            assert status == 0 or stderr.strip().splitlines()[-1].startswith("error: "), stderr
        printed[world] = [line for line in finished[0][1].splitlines() if line[:1] in "+-"]
    scores_of = [np.load(folder / f"scores-{world}.npy") for world in (1, 2, 4)]
    for other in scores_of[1:]:
        np.testing.assert_allclose(other, scores_of[0], atol=1e-6)
    assert printed[1] == printed[2] == printed[4] and len(printed[1]) == 5
    assert int(printed[1][0].split()[1]) == int(scores_of[0].argmax())
    assert store_command.main(["verify", str(built)]) == 0 and store_command.main(["info", str(built)]) == 0
    assert "all as they were written" in capsys.readouterr().out
    assert store_command.main(["verify", str(flipped)]) == 1 and store_command.main(["verify", str(cut)]) == 2
    captured = capsys.readouterr()
    assert f"{shard} is damaged in the rows of samples" in captured.out and f"{shard} has" in captured.err
