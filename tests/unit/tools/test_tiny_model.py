"""The tiny model: its tokenizer, its size, and weights that depend on the seed alone."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dataflex_mega.errors import ConfigError

TEXTS = ["def add(a, b):\n    return a + b\n", "Anarchism is a political philosophy.", "The cat sat on the mat."] * 30


@pytest.fixture(scope="module")
def tiny(tool: Any) -> ModuleType:
    return tool("tiny_model")


@pytest.fixture(scope="module")
def tokenizer(tiny: ModuleType) -> Any:
    return tiny.make_tokenizer(TEXTS, 320)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    info: dict[str, Any] = {}
    for name, texts in {"demo_a": TEXTS, "demo_a_validation": ["zzzz qqqq zzzz qqqq"] * 50}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
    (folder / "demo_sft.jsonl").write_text('{"instruction": "x", "input": "", "output": "y"}\n')
    info["demo_sft"] = {"file_name": "demo_sft.jsonl"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def small(tiny: ModuleType, **changes: Any) -> Any:
    return tiny.ModelOptions(**{"hidden": 16, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 300, **changes})


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("plain", "  two  spaces\n\ttab", "caf\u00e9 \u6f22\u5b57 \U0001f600", "\x00\x7f", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_and_padding_is_not_the_end_of_text(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for token in ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_training_text_takes_fewer_tokens_than_bytes(tokenizer: Any) -> None:
    assert 256 < len(tokenizer) <= 320
    assert len(tokenizer(TEXTS[1])["input_ids"]) < 0.7 * len(TEXTS[1])


def test_a_vocabulary_without_room_for_every_byte_is_refused(tiny: ModuleType) -> None:
    assert len(tiny.make_tokenizer(["aa"], 260)) == 260
    with pytest.raises(ConfigError, match="vocab 259: must be at least 260"):
        tiny.make_tokenizer(["aa"], 259)


@pytest.mark.parametrize("tie", [False, True])
def test_the_number_of_parameters_is_that_of_a_llama(tiny: ModuleType, tie: bool) -> None:
    h, layers, v, inner = 16, 2, 300, 64  # 8/3 x 16 = 42.7, rounded up to a multiple of 32
    kv = h // 4 * 2
    one_layer = 2 * h * h + 2 * h * kv + 3 * h * inner + 2 * h
    expected = layers * one_layer + h + v * h * (1 if tie else 2)
    assert sum(p.numel() for p in tiny.make_model(small(tiny, tie=tie)).parameters()) == expected


def test_weights_depend_on_the_seed_only_and_the_callers_random_state_stays(tiny: ModuleType) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = tiny.make_model(small(tiny)).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(8)
    again, other = tiny.make_model(small(tiny)).state_dict(), tiny.make_model(small(tiny, seed=1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers 0: must be at least 1"),
        ({"hidden": 20}, "--hidden 20: must be a multiple of 2 x heads = 8"),
        ({"kv_heads": 3}, "--kv-heads 3: must divide heads = 4"),
        ({"vocab": 100}, "--vocab 100: must be at least 260"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(tiny: ModuleType, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tiny, **changes).check()


def test_what_is_written_is_what_transformers_reads(tiny: ModuleType, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "model"
    count = tiny.run(data, output, small(tiny))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert count == sum(p.numel() for p in model.parameters())
    made = tiny.make_model(small(tiny)).state_dict()
    assert all(torch.equal(value, made[name]) for name, value in model.state_dict().items())
    loaded = AutoTokenizer.from_pretrained(output)
    assert loaded.pad_token_id == model.config.pad_token_id and loaded.eos_token_id == model.config.eos_token_id
    assert loaded("The cat")["input_ids"] == tiny.make_tokenizer(TEXTS, 300)("The cat")["input_ids"]


def test_the_tokenizer_never_sees_validation_text(tiny: ModuleType, data: Path) -> None:
    assert tiny.training_texts(data) == TEXTS


def test_the_same_options_give_the_same_files_and_only_changes_are_rebuilt(
    tiny: ModuleType, data: Path, tmp_path: Path
) -> None:
    def digests(name: str) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).iterdir()}

    assert tiny.run(data, tmp_path / "a", small(tiny)) and tiny.run(data, tmp_path / "b", small(tiny))
    before = digests("a")
    assert before == digests("b")
    assert tiny.run(data, tmp_path / "a", small(tiny)) is None
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert tiny.run(data, tmp_path / "a", small(tiny)) is not None and digests("a") == before
    assert tiny.run(data, tmp_path / "a", small(tiny, seed=1)) is not None and digests("a") != before


def test_missing_data_end_with_status_2_and_one_line(
    tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.main(["--data", str(tmp_path / "none"), "--output", str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "none/dataset_info.json" in captured.err
    assert tiny.main(["--heads", "3"]) == 2
    assert "--hidden 128: must be a multiple of 2 x heads = 6" in capsys.readouterr().err
