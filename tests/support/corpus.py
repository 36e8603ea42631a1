"""Real text without a network: three domains and an instruction set from Python's standard library."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tool(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def domains(per_domain=60):
    """Domain name -> list of documents: source code, reference prose, character tables."""
    from pydoc_data import topics

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    code = [p.read_text() for p in sorted(stdlib.glob("[a-h]*.py"))][:per_domain]
    prose = [text for _, text in sorted(topics.topics.items())][:per_domain]
    tables = [p.read_text() for p in sorted(stdlib.glob("encodings/cp*.py"))][: per_domain // 2]
    documents = {"code": code, "prose": prose, "tables": tables}
    return {name: [text[:1500] for text in texts] for name, texts in documents.items()}


def instructions(count=80):
    """Alpaca rows: a topic of the language reference to explain."""
    from pydoc_data import topics

    rows = []
    for name, text in sorted(topics.topics.items())[:count]:
        rows.append({"instruction": f"Explain {name} in Python.", "input": "", "output": text[:300]})
    return rows


def write(folder, hidden=32, vocab=512):
    """`data/` with a dataset_info.json and `model/` in Hugging Face layout -> the folder."""
    data = folder / "data"
    data.mkdir(parents=True)
    info = {}
    texts = domains()
    for name, documents in texts.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
    (data / "sft.json").write_text(json.dumps(instructions()))
    info["sft"] = {"file_name": "sft.json"}
    (data / "dataset_info.json").write_text(json.dumps(info))
    maker = tool("tiny_model")
    tokenizer = maker.make_tokenizer([t for documents in texts.values() for t in documents], vocab)
    options = maker.ModelOptions(hidden=hidden, layers=2, heads=4, kv_heads=2, vocab=vocab)
    maker.save(maker.make_model(options), tokenizer, folder / "model")
    return folder


def write_experts(folder, experts=4):
    """`moe/` beside `model/`: a Mixtral of that size with the same tokenizer -> the folder."""
    maker = tool("tiny_model")
    options = maker.ModelOptions(hidden=32, layers=2, heads=4, kv_heads=2, vocab=512, experts=experts)
    maker.make_model(options).save_pretrained(folder / "moe")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "moe" / file).write_bytes((folder / "model" / file).read_bytes())
    return folder


def write_reference(folder):
    """`reference/`: the model with noise on it, since against itself rounding alone would say what exceeds what."""
    import torch
    from safetensors.torch import load_file, save_file

    reference = folder / "reference"
    shutil.copytree(folder / "model", reference)
    weights = load_file(reference / "model.safetensors")
    noise = torch.Generator().manual_seed(7)
    noisy = {name: w + 0.02 * torch.randn(w.shape, generator=noise) for name, w in weights.items()}
    save_file(noisy, reference / "model.safetensors", metadata={"format": "pt"})
    return folder
