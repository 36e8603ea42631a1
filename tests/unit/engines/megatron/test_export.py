"""How export divides tensors over files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataflex_mega.distributed.testing import run_distributed_test
from dataflex_mega.engines.megatron.export import file_names, pack
from tests.unit.engines.megatron import small


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([3, 3, 3], [[0, 1], [2]]),
        ([6, 1], [[0], [1]]),
        ([9, 1, 1], [[0], [1, 2]]),  # larger than a file may be: alone
        ([1, 9, 1], [[0], [1], [2]]),
        ([6, 6], [[0], [1]]),
    ],
)
def test_files_are_filled_in_order_up_to_the_limit(sizes, expected):
    names = [f"t{i}" for i in range(len(sizes))]
    assert pack(names, sizes, 6) == [[names[i] for i in batch] for batch in expected]


def test_files_are_numbered_through_all_writers():
    assert file_names([0, 1, 0]) == [[], ["model.safetensors"], []]
    assert file_names([1, 0, 2]) == [
        ["model-00001-of-00003.safetensors"],
        [],
        ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"],
    ]


def export_over_an_older_one(parallel_info, folder):
    from dataflex_mega.engines.megatron.export import ExportOptions, export
    from dataflex_mega.engines.megatron.weights import HFCheckpointReader, load

    config = small.configs()["llama"]
    chunks = small.build(config, small.start(parallel_info), torch.bfloat16)
    load(chunks, config, HFCheckpointReader(folder / "source", config))
    export(chunks, config, folder / "out", torch.bfloat16, ExportOptions(20_000))
    assert len(list(folder.glob("out/*.safetensors"))) > 3
    export(chunks, config, folder / "out", torch.bfloat16)


def test_an_export_replaces_the_files_of_an_older_one_and_keeps_others(tmp_path):
    small.hf_model(small.configs()["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "adapter.safetensors")
    run_distributed_test(export_over_an_older_one, 1, tmp_path)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter.safetensors", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    found, expected = (load_file(tmp_path / kind / "model.safetensors") for kind in ("out", "source"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key
