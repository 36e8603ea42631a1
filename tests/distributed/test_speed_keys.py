"""Keys about speed, precision and processes: each changes what it is for and leaves the losses as they are."""

import os
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.support import corpus, runs

MIX = {"mixer": "odm", "warmup_step": 1, "update_step": 1, "update_times": -1, "max_steps": 3}
DDP = {
    "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": False, "ddp_static_graph": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("speed"))


def config(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / "out" / name), **{**MIX, **keys})


def losses(keys):
    found = [row["loss"] for row in runs.rows(keys) if "loss" in row]
    assert len(found) == keys["max_steps"]
    return found


def train_watched(keys):
    """Train -> (exit status, standard error, what the keys have set in this process)."""
    arguments = {}
    make = DistributedDataParallel.__init__

    def watch(self, *args, **kwargs):
        arguments.update(kwargs)
        make(self, *args, **kwargs)

    with mock.patch.object(DistributedDataParallel, "__init__", watch), mock.patch.dict(os.environ):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        try:
            status, stderr = runs.train_here(keys)
            deterministic = torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        arguments.pop("device_ids", None)
        seen = {"ddp": arguments, "deterministic": deterministic, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
    return status, stderr, seen


@pytest.mark.exhaustive
def test_the_arguments_of_ddp_are_those_of_the_keys_and_change_no_loss(folder):
    plain, tuned = config(folder, "plain"), config(folder, "tuned", **DDP)
    accumulated = config(folder, "both", ddp_static_graph=True, gradient_accumulation_steps=2)
    greats = {"mixer": None, "weighter": "greats", "eval_dataset": "prose", "dataset": "code,tables"}
    scored = [config(folder, f"greats-{i}", **greats, ddp_static_graph=bool(i) or None) for i in range(2)]
    sharded = config(folder, "sharded", fsdp="full_shard", **DDP)
    results = runs.train_many(2, [plain, tuned, *scored, sharded, accumulated], run=train_watched)
    assert [status for status, _, _ in results] == [0, 0, 0, 0, 0, 2], results
    assert results[0][2]["ddp"] == {"find_unused_parameters": False}
    assert results[1][2]["ddp"] == {key.removeprefix("ddp_"): value for key, value in DDP.items()}
    assert losses(tuned) == losses(plain) and losses(scored[1]) == losses(scored[0])
    assert "ddp_bucket_cap_mb, ddp_static_graph: no effect on sharded parameters" in results[4][1]
    assert "error: ddp_static_graph: needs gradient_accumulation_steps: 1" in results[5][1]


@pytest.mark.exhaustive
def test_keys_of_one_process(folder):
    plain = config(folder, "one")
    determined = config(folder, "determined", full_determinism=True)
    on_cpu = config(folder, "cpu", use_cpu=True, ddp_bucket_cap_mb=5)
    watched = config(folder, "watched", debug="underflow_overflow")
    diverging = config(folder, "diverging", debug="underflow_overflow", learning_rate=1e30, max_grad_norm=0)
    results = runs.train_many(1, [plain, determined, on_cpu, watched, diverging], run=train_watched, plain=True)
    assert [status for status, _, _ in results] == [0, 0, 0, 0, 1], results
    assert [seen["deterministic"] for _, _, seen in results] == [False, True, False, False, False]
    assert [seen["gpus"] for _, _, seen in results] == [None, None, "", None, None]
    assert losses(determined) == losses(on_cpu) == losses(watched) == losses(plain)
    assert "ddp_bucket_cap_mb: no effect on one process" in results[2][1]
    (line,) = [line for line in results[4][1].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: debug: underflow_overflow: inf or NaN in forward pass")


@pytest.mark.exhaustive
def test_overflow_is_found_in_sharded_parameters_too(folder):
    keys = {"fsdp": "full_shard", "debug": "underflow_overflow", "max_grad_norm": 0}
    fine, diverging = config(folder, "fine", **keys), config(folder, "far", **keys, learning_rate=1e30)
    (status, stderr), (failed, line) = runs.train_many(2, [fine, diverging])
    assert status == 0, stderr
    assert failed == 1 and "error: debug: underflow_overflow: inf or NaN in forward pass" in line
