"""Padding is masked by position: a tokenizer whose padding token is the end of a document loses no target."""

import json
import shutil

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import corpus, runs

LENGTH, BLOCKS = 16, 8


def without_pad_token(folder):
    """A copy of the model whose tokenizer has no padding token, for which LLaMA-Factory then takes <eos>."""
    model = folder / "no-pad"
    shutil.copytree(folder / "model", model)
    for name, key in (("tokenizer_config.json", "pad_token"), ("config.json", "pad_token_id")):
        content = json.loads((model / name).read_text())
        content.pop(key, None)
        (model / name).write_text(json.dumps(content))
    return model


def test_ends_of_documents_are_targets_without_a_pad_token(tmp_path):
    folder = corpus.write(tmp_path)
    model = without_pad_token(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token is None
    words = [f"{word} = {number}" for number, word in enumerate(["one", "two", "three", "four"] * 30)]
    ids = [i for text in words for i in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: LENGTH * BLOCKS]).view(BLOCKS, LENGTH)
    documents, used = [], 0
    for text in words:  # the documents of these blocks; the last may be cut off
        used += len(tokenizer(text, add_special_tokens=False).input_ids) + 1
        if used > LENGTH * BLOCKS:
            break
        documents.append({"text": text})
    blocks = blocks[: (used := sum(len(tokenizer(d["text"]).input_ids) + 1 for d in documents)) // LENGTH]
    (folder / "data" / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    info["short"] = {"file_name": "short.jsonl", "columns": {"prompt": "text"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    config = runs.base(
        folder, model_name_or_path=str(model), dataset="short", cutoff_len=LENGTH, max_steps=1, mixer="static",
        learning_rate=0.0, per_device_train_batch_size=len(blocks),
    )  # fmt: skip
    status, stderr = runs.train_here(config)
    assert status == 0, stderr
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(blocks).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert (blocks[:, 1:] == tokenizer.eos_token_id).any()
    torch.testing.assert_close(runs.rows(config)[0]["loss"], float(expected), atol=1e-5, rtol=1e-5)
