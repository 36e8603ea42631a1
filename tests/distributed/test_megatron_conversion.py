"""Hugging Face -> Megatron -> Hugging Face in real processes: every kind of model in every layout."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from dataflex_mega.engines.named_init import NamedInit, reinitialise
from tests.support import runs
from tests.support.corpus import tool
from tests.unit.engines.megatron import small

pytestmark = pytest.mark.exhaustive

DENSE = ("llama", "llama-tied", "llama-scaled", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied")
SPARSE = ("mixtral", "qwen3_moe", "qwen3_moe-normalised")
# Processes -> layout -> (sizes, models). A mixture of experts under tensor parallelism needs sequence parallelism.
LAYOUTS = {
    1: {"TP1": ({}, DENSE + SPARSE)},
    2: {
        "TP2": ({"tensor": 2}, DENSE),
        "TP2 SP": ({"tensor": 2, "sequence_parallel": True, "expert_tensor": 2}, SPARSE),
        "PP2": ({"pipeline": 2}, DENSE + SPARSE),
        "PP2 VPP2": ({"pipeline": 2, "interleaved": 2}, ("llama", "qwen2-tied", "qwen3_moe")),
        "EP2": ({"expert": 2}, SPARSE),
        "DP2": ({}, ("llama", "mixtral")),
    },
    4: {
        "TP2 PP2": ({"tensor": 2, "pipeline": 2}, DENSE),
        "TP2 PP2 SP": ({"tensor": 2, "pipeline": 2, "sequence_parallel": True, "expert_tensor": 2}, SPARSE),
        "TP2 EP2": ({"tensor": 2, "expert": 2, "sequence_parallel": True}, SPARSE),
        "EP2 ETP2": ({"tensor": 2, "expert": 2, "expert_tensor": 2, "sequence_parallel": True}, SPARSE),
    },
}
CASES = [(world, layout, name) for world, of in LAYOUTS.items() for layout, (_, names) in of.items() for name in names]
SEED = 5
FILE_BYTES = 30_000  # a few tensors of these models


def tokens():
    return torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(0))


def convert_all(parallel_info, folder, world):
    """In every process: load each model, compute its logits, write it whole and in pieces, and once from names."""
    converted = {}
    for layout_name, (sizes, names) in LAYOUTS[world].items():
        layout = small.start(parallel_info, **sizes)
        for name in names:
            converted[layout_name, name] = convert(layout, small.configs()[name], folder, f"{layout_name}/{name}")
    return converted


def convert(layout, config, folder, case):
    from dataflex_mega.engines.megatron.export import ExportOptions, export
    from dataflex_mega.engines.megatron.weights import HFCheckpointReader, load

    chunks = small.build(config, layout)
    source = HFCheckpointReader(folder / "source" / case.partition("/")[2], config)
    load(chunks, config, source)
    logits = logits_of(chunks, layout, tokens())
    export(chunks, config, folder / "whole" / case, torch.float32)
    options = ExportOptions(FILE_BYTES, GenerationConfig(max_new_tokens=7))
    export(chunks, config, folder / "pieces" / case, torch.float32, options)
    load(chunks, config, NamedInit(config, SEED))
    export(chunks, config, folder / "named" / case, torch.float32)
    return logits, source.bytes_read


@torch.no_grad()
def logits_of(chunks, layout, ids):
    """[b, s, padded vocabulary] on every rank: stages one after the other, vocabulary shards side by side."""
    from megatron.core import parallel_state

    from dataflex_mega.engines.megatron import cpu

    pipeline = parallel_state.get_pipeline_model_parallel_group()
    width = layout.tensor if layout.sequence_parallel else 1
    values = None
    with cpu.cuda_calls_on_cpu():
        for number in range(layout.pipeline * layout.interleaved):
            owner = number % layout.pipeline
            last = number == layout.pipeline * layout.interleaved - 1
            shape = [12 // width, 2, 32] if not last else [2, 12, chunks[0].vocab_size // layout.tensor]
            out = torch.empty(shape)
            if parallel_state.get_pipeline_model_parallel_rank() == owner:
                chunk = chunks[number // layout.pipeline].eval()
                chunk.set_input_tensor(values)
                out = chunk(ids, torch.arange(12).expand(2, 12), None).contiguous()
            dist.broadcast(out, group=pipeline, group_src=owner)
            values = out
    shards = [torch.empty_like(values) for _ in range(layout.tensor)]
    dist.all_gather(shards, values, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model as transformers writes it, and the same model with weights from names."""
    root = tmp_path_factory.mktemp("conversion")
    for name, config in small.configs().items():
        model = small.hf_model(config)
        model.save_pretrained(root / "source" / name)
        reinitialise(model, SEED)
        model.save_pretrained(root / "source-named" / name)
    return root


@pytest.fixture(scope="module")
def results(folder):
    """(processes, layout, model) -> what each rank found."""
    by_case = {}
    for world in LAYOUTS:
        ranks = runs.run_forked(convert_all, world, folder, world)
        for layout, name in ranks[0]:
            by_case[world, layout, name] = [rank[layout, name] for rank in ranks]
    return by_case


def tensors_in(folder):
    """All tensors of a folder, through its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    listed = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in sorted(set(listed.values()))}
    assert {key for tensors in files.values() for key in tensors} == set(listed)
    return {key: files[file][key] for key, file in listed.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key].dtype == expected[key].dtype, key
        assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2]}")
def test_a_model_that_went_through_megatron_is_bit_equal_and_so_is_its_configuration(results, folder, case):
    assert case in results
    source = folder / "source" / case[2]
    for kind in ("whole", "pieces"):
        written = folder / kind / case[1] / case[2]
        assert_same(tensors_in(written), tensors_in(source))
        assert json.loads((written / "config.json").read_text()) == json.loads((source / "config.json").read_text())
        assert not list(written.glob("*.part"))
    generation = (folder / "whole" / case[1] / case[2] / "generation_config.json").read_text()
    assert json.loads(generation) == json.loads((source / "generation_config.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2]}")
def test_logits_are_those_of_transformers(results, folder, case):
    model = AutoModelForCausalLM.from_pretrained(folder / "source" / case[2]).eval()
    with torch.no_grad():
        expected = model(tokens()).logits
    for logits, _ in results[case]:
        torch.testing.assert_close(logits[..., :53], expected, rtol=1e-5, atol=1e-5)
        assert (logits[..., 53:] == 0).all(), "the padding of the vocabulary is zero"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2]}")
def test_weights_from_names_are_the_same_in_every_layout_and_in_transformers(results, folder, case):
    assert case in results
    assert_same(tensors_in(folder / "named" / case[1] / case[2]), tensors_in(folder / "source-named" / case[2]))


@pytest.mark.parametrize("kind", ["whole", "pieces"])
@pytest.mark.parametrize(
    "case", [(4, "TP2 PP2", "qwen2-tied"), (2, "EP2", "mixtral"), (4, "TP2 EP2", "qwen3_moe")], ids=lambda c: str(c)
)
def test_transformers_loads_the_export(results, folder, case, kind):
    assert case in results
    written = folder / kind / case[1] / case[2]
    model, report = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    original = AutoModelForCausalLM.from_pretrained(folder / "source" / case[2])
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(dict(model.named_parameters()), dict(original.named_parameters()))
    assert (model.generation_config.max_new_tokens == 7) == (kind == "pieces")


def test_each_tensor_parallel_rank_reads_only_its_share(results, folder):
    tensors = tensors_in(folder / "source" / "llama")
    total = sum(t.nbytes for t in tensors.values())
    unsplit = sum(t.nbytes for t in tensors.values() if t.dim() == 1)  # norms, which every rank needs
    vocabulary = 2 * 32 * 4  # bytes of one token in the embedding and the output layer
    inner = total - unsplit - 53 * vocabulary
    read = [count for _, count in results[2, "TP2", "llama"]]
    # The vocabulary of 53 is padded to 64: 32 tokens on the first rank and 21 on the second.
    assert read == [inner // 2 + unsplit + 32 * vocabulary, inner // 2 + unsplit + 21 * vocabulary]
    assert [count for _, count in results[1, "TP1", "llama"]] == [total]


def test_each_expert_and_pipeline_rank_reads_only_its_share(results, folder):
    tensors = tensors_in(folder / "source" / "mixtral")
    experts = sum(t.nbytes for key, t in tensors.items() if ".experts." in key)
    rest = sum(t.nbytes for t in tensors.values()) - experts
    assert [count for _, count in results[2, "EP2", "mixtral"]] == [rest + experts // 2] * 2
    first = sum(t.nbytes for key, t in tensors.items() if "embed" in key or ".0." in key[:15] or ".1." in key[:15])
    second = rest + experts - first
    assert [count for _, count in results[2, "PP2", "mixtral"]] == [first, second]


def test_files_are_shared_out_over_writers_and_no_larger_than_asked(results, folder):
    assert results
    whole = folder / "whole" / "PP2" / "llama"
    assert sorted(f.name for f in whole.glob("model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ], "one file a stage"
    assert [f.name for f in (folder / "whole" / "TP2" / "llama").glob("model*")] == ["model.safetensors"]
    pieces = sorted((folder / "pieces" / "TP2 PP2" / "llama").glob("*.safetensors"))
    contents = [load_file(file) for file in pieces]
    assert len(contents) > 4
    assert all(sum(t.nbytes for t in tensors.values()) <= FILE_BYTES for tensors in contents)
    index = json.loads((folder / "pieces" / "TP2 PP2" / "llama" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in contents for t in tensors.values())


@pytest.fixture
def run_tool(monkeypatch):
    """tools/convert.py with its arguments -> the exit status. Its processes are forked, which is quicker."""
    monkeypatch.setattr("dataflex_mega.distributed.testing.run_distributed_test", runs.run_forked)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    return lambda *arguments: tool("convert").main([str(a) for a in arguments])


def test_the_tool_writes_a_checkpoint_that_another_layout_turns_back(run_tool, tmp_path, capsys):
    config = small.configs()["qwen3_moe"]
    small.hf_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert run_tool("to-megatron", "--model", tmp_path / "hf", "--output", tmp_path / "mcore", "--expert", 2) == 0
    arguments = ("--model", tmp_path / "mcore", "--output", tmp_path / "back", "--pipeline", 2, "--vocab-multiple", 16)
    assert run_tool("to-hf", *arguments) == 0
    assert_same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "hf"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    capsys.readouterr()


def test_the_tool_checks_and_refuses_in_one_line(run_tool, folder, tmp_path, capsys):
    source = folder / "source" / "qwen2-tied"
    assert run_tool("check", "--model", source, "--tensor", 2) == 0
    assert capsys.readouterr().out == "all tensors are bit-equal\n"
    for arguments, message in (
        (("check", "--model", source, "--tensor", 3), "tensor_model_parallel_size: 3 does not divide"),
        (("check", "--model", source, "--pipeline", 3), "pipeline_model_parallel_size: 3 stages"),
        (("check", "--model", source, "--expert", 2), "expert_model_parallel_size: 2, but a qwen2 has no experts"),
        (("check", "--model", tmp_path), "no config.json"),
        (("check", "--model", source, "--tensor", 0), "--tensor 0: must be above 0"),
        (("to-hf", "--model", source, "--output", tmp_path / "o"), "no folder tensors"),
        (("to-megatron", "--model", source, "--output", source), "not empty"),
    ):
        assert run_tool(*arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
