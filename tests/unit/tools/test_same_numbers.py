"""What tools/same_numbers.py calls equal, on files written here; that it cuts every example; how a job is kept."""

import json
import math
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from tests.support import corpus

STEP = {"step": 1, "loss": 0.1, "drawn": {"c4": 1.0}, "plan": "26a2412eaed11202"}


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> ModuleType:
    sys.path.insert(0, str(corpus.ROOT / "tools"))
    request.addfinalizer(lambda: sys.path.remove(str(corpus.ROOT / "tools")))
    return corpus.tool("same_numbers")


@pytest.fixture(scope="module")
def files(tool: ModuleType) -> ModuleType:
    return sys.modules["side_by_side.files"]


@pytest.fixture(scope="module")
def runs(tool: ModuleType) -> ModuleType:
    return sys.modules["side_by_side.runs"]


def write_run(folder: Path, **changes: Any) -> Path:
    """A run's files; `changes` say what is not as usual."""
    folder.mkdir(parents=True)
    rows = [STEP, {**STEP, "step": 2, "loss": changes.get("loss", 0.2)}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = {"loss": 0.2, "elapsed_time": changes.get("elapsed", "0:00:01"), "throughput": changes.get("speed", 7.0)}
    (folder / "trainer_log.jsonl").write_text(json.dumps(log) + "\n")
    (folder / "selections").mkdir()
    (folder / "selections" / "step_2.json").write_text(json.dumps({"indices": [1, 2], "metric": {"loss": [0.5, 1e-9]}}))
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    weight[1, 2] = changes.get("element", 5.0)
    save_file({"a": weight, "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "model.safetensors")
    np.save(folder / "scores.npy", np.array([0.25, changes.get("score", math.nan)]))
    (folder / "odm_step3_proportions.txt").write_text("0.5 0.5\n")
    writer = SummaryWriter(str(folder / "runs"))
    writer.add_scalar("train/loss", changes.get("scalar", 0.2), 1)
    writer.add_scalar("seconds/step", changes.get("speed", 7.0), 1)
    writer.close()
    return folder


def test_equal_runs_may_differ_in_time_only(files: ModuleType, tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", elapsed="0:00:09", speed=3.0)
    (slow / "proportions.png").write_bytes(b"picture")
    (slow / "checkpoint-2").mkdir()
    (slow / "checkpoint-2" / "state.json").write_text("{}")
    outcome = files.compare_folders(write_run(tmp_path / "fast"), slow)
    assert outcome.difference is None and outcome.compared == 7
    assert files.compare_folders(slow, slow).left_out == {"*.png": 1, "checkpoint-*": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": math.nextafter(0.2, 1)}, "metrics.jsonl: line 2, loss: 0.2 | 0.20000000000000004"),
        ({"loss": 0}, "metrics.jsonl: line 2, loss: 0.2 | 0"),
        ({"element": 5.0000005}, "model.safetensors: a[5]: 5.0 | 5.000000476837158"),
        ({"score": 0.5}, "scores.npy: [1]: nan | 0.5"),
        ({"scalar": 0.25}, "runs/events.tfevents.0: [0].value: 0.20000000298023224 | 0.25"),
    ],
)
def test_one_changed_bit_is_named(files: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", **changes)
    assert files.compare_folders(first, second).difference == message


def test_a_file_a_line_or_a_tensor_of_one_side_only_is_named(files: ModuleType, tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    (second / "orders.jsonl").write_text("{}\n")
    assert files.compare_folders(first, second).difference == "orders.jsonl: only in the second"
    (first / "orders.jsonl").write_text("{}\n{}\n")
    assert files.compare_folders(first, second).difference == "orders.jsonl: number of lines: 2 | 1"
    (first / "orders.jsonl").unlink()
    (second / "orders.jsonl").unlink()
    save_file({"a": torch.ones(1)}, second / "model.safetensors")
    found = files.compare_folders(first, second).difference
    assert found == "model.safetensors: tensors of one side only: b"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": 1}, {"b": 1}, 'keys: ["a"] | ["b"]'),
        ({"a": [1, 2]}, {"a": [1]}, "a length: 2 | 1"),
        ({"a": {"b": True}}, {"a": {"b": 1}}, "a.b: True | 1"),
        ({"a": 0.0}, {"a": -0.0}, "a: 0.0 | -0.0"),
        ({"eval_runtime": 1.0, "a": math.nan}, {"eval_runtime": 2.0, "a": math.nan}, None),
    ],
)
def test_values(files: ModuleType, first: Any, second: Any, message: str | None) -> None:
    assert files.value_difference(first, second) == message


def test_tensors_differ_by_type_and_by_any_bit(files: ModuleType, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("half.safetensors", "other.safetensors", "type.safetensors")]
    half = torch.tensor([1.0, -0.0], dtype=torch.bfloat16)
    for path, value in zip(paths, (half, half.abs(), half.float()), strict=True):
        save_file({"w": value}, path)
    contents = [path.read_bytes() for path in paths]
    assert files.tensors_difference(contents[0], contents[1]) == "w[1]: '0080' | '0000'"
    assert files.tensors_difference(contents[0], contents[2]) == "w.dtype: 'BF16' | 'F32'"
    assert files.tensors_difference(contents[0], contents[0]) is None
    assert files.bytes_difference(struct.pack("<2i", 1, 2), struct.pack("<2i", 1, 3)) == "byte 4: 2 | 3"


def test_every_example_is_run_or_needs_four_processes(runs: ModuleType) -> None:
    inputs = runs.Inputs(corpus.ROOT)
    jobs = runs.all_jobs(inputs, [1, 2])
    assert {name for job in jobs for name in job.examples} == set(inputs.examples())
    assert len({job.folder_name for job in jobs}) == len(jobs)
    assert [job.name for job in runs.all_jobs(inputs, [4])] == ["megatron/pretrain_odm_tp2_pp2.yaml"]


def test_a_run_of_base_is_used_again_only_when_it_is_the_same(tool: ModuleType, tmp_path: Path) -> None:
    job = tool.Job("a.yaml mixer=odm", 2, [{"module": "m", "argv": ["x=1"]}])
    assert tool.ended(job, tmp_path) is None
    (tmp_path / job.folder_name).mkdir()
    record = {"statuses": [0], "job": job.as_dict()}
    (tmp_path / job.folder_name / tool.STATUS_FILE).write_text(json.dumps(record))
    assert tool.ended(job, tmp_path) == record
    assert tool.ended(tool.Job(job.name, 2, [{"module": "m", "argv": ["x=2"]}]), tmp_path) is None


def test_verdicts(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, table = tool.Job("a.yaml", 1, []), tool.Table()
    folders = tmp_path / "base", tmp_path / "this"
    for folder in folders:
        write_run(folder / job.folder_name / "out")
        (folder / job.folder_name / "log").write_text("note\nerror: too small\n")

    def verdict(first: list[int], second: list[int]) -> str:
        said = tool.judge(job, {"statuses": first}, {"statuses": second}, folders, table)
        table.add(job, said)
        return said

    assert verdict([0], [0]) == "equal: 7 files"
    assert verdict([2], [2]) == "not compared: refused by both: error: too small"
    assert verdict([0], [1]) == "differs: statuses of the tasks: [0] | [1]: error: too small"
    assert verdict([1], [1]).startswith("not compared: ends with status 1 on both sides")
    assert (table.equal, len(table.differs)) == (1, 1)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_what_cannot_be_compared_is_said_in_one_line(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-revision is no folder"):
        tool.copy_checkout("no-such-revision", tmp_path)
