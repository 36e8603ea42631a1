"""What one rank cannot write ends every rank with the same line, and the checkpoint before stays."""

import json
import os
import resource
from pathlib import Path
from unittest import mock

import pytest

from dataflex_mega.checkpoint import Checkpointer
from tests.support import corpus, runs

pytestmark = pytest.mark.exhaustive
LAYOUTS = {
    "ddp": {}, "fsdp2": {"fsdp": "full_shard auto_wrap"}, "TP2": {"tensor_model_parallel_size": 2},
    # both stages write the model
    "PP2": {"pipeline_model_parallel_size": 2, "gradient_accumulation_steps": 2, "save_only_model": True},
}  # fmt: skip
LARGEST = 4096  # bytes that rank 1 can write into a file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("disk"))


def train_with_a_limit(config):
    """Train in this process; the second checkpoint is one that rank 1 cannot write -> (exit status, standard error)."""
    rank, save = int(os.environ["RANK"]), Checkpointer.save

    def limited(self, state, *rest):
        if rank != 1 or state.step != 2:
            return save(self, state, *rest)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, before[1]))
        try:
            return save(self, state, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with mock.patch.object(Checkpointer, "save", limited):
        result = runs.train_here(config)
    runs.stderr_of(config, rank).write_text(json.dumps(result))
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_that_cannot_write_ends_all_with_one_line(folder, name):
    if name.endswith("P2"):
        pytest.importorskip("megatron.core")
    config = runs.base(
        folder, output_dir=str(folder / name), mixer="static", per_device_train_batch_size=4, max_steps=3,
        save_strategy="steps", save_steps=1, **LAYOUTS[name],
    )  # fmt: skip
    runs.train_many(2, [config], train_with_a_limit)
    results = [json.loads(runs.stderr_of(config, rank).read_text()) for rank in (0, 1)]
    lines = [line for _, said in results for line in said.splitlines() if line.startswith("error: ")]
    assert [status for status, _ in results] == [2, 2], results
    assert len(lines) == 1 and lines[0].startswith("error: output_dir: "), lines
    assert [path.name for path in Path(config["output_dir"]).glob("checkpoint-*")] == ["checkpoint-1"]
