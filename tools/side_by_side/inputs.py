"""Data and models for tools/same_numbers.py: `python inputs.py CHECKOUT FOLDER`, with the package of CHECKOUT importable.

Text comes from the standard library of the Python that runs this, so no network is needed. It goes into data sets with
the names of the demo's; models and corpora are written by the tools of CHECKOUT. The same Python gives the same files.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics
from types import ModuleType
from typing import Any

NUM_TRAIN, NUM_VALIDATION, LENGTH = 24, 6, 500  # documents of a domain, characters of a document
SCALE = 6.0
NUM_COMPONENT_ROWS = 24  # rows that files of neighbours and chances are written for
DOMAINS = ("demo_c4", "demo_wiki", "demo_alpaca_text", "demo_python")
SLIMPAJAMA = ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")
SHAPE = ("--hidden", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab", "512")
FOLDERS = ("configs", "examples")  # of CHECKOUT, copied: both sides read these


def texts() -> dict[str, list[str]]:
    """Domain -> documents, those for validation last."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    prose = [text for _, text in sorted(topics.topics.items())]
    found = {
        "demo_c4": [text[-LENGTH:] for text in prose],
        "demo_wiki": [path.read_text()[1000 : 1000 + LENGTH] for path in sorted(stdlib.glob("encodings/cp*.py"))],
        "demo_alpaca_text": [f"Explain {row['instruction']}\n\n{row['output']}" for row in instructions()],
        "demo_python": [path.read_text()[:LENGTH] for path in sorted(stdlib.glob("[a-h]*.py"))],
    }
    return {name: documents[: NUM_TRAIN + NUM_VALIDATION] for name, documents in found.items()}


def instructions() -> list[dict[str, Any]]:
    """Alpaca rows with answers of different lengths, each with a score."""
    rows = []
    for number, (name, text) in enumerate(sorted(topics.topics.items())[: NUM_TRAIN + NUM_VALIDATION]):
        answer = text[: 60 + 13 * (number % 20)]
        rows.append({"instruction": f"Explain {name}.", "input": "", "output": answer, "score": (7 * number) % 23})
    return rows


def write_data(folder: Path) -> None:
    """Every data set with its validation set, and dataset_info.json."""
    folder.mkdir(parents=True)
    info: dict[str, Any] = {}
    sets: dict[str, list[dict[str, Any]]] = {name: [{"text": t} for t in found] for name, found in texts().items()}
    sets["demo_alpaca"] = instructions()
    for name, rows in sets.items():
        for suffix, chosen in (("", rows[:NUM_TRAIN]), ("_validation", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}{suffix}.jsonl").write_text(lines)
            info[name + suffix] = {"file_name": f"{name}{suffix}.jsonl"}
            if "text" in rows[0]:
                info[name + suffix]["columns"] = {"prompt": "text"}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1))
    every = [text for found in texts().values() for text in found]
    rows = [
        {"text": text, "meta": {"redpajama_set_name": f"RedPajama{SLIMPAJAMA[number % len(SLIMPAJAMA)]}"}}
        for number, text in enumerate(every)
    ]
    (folder / "slimpajama.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_tool(path: Path) -> ModuleType:
    """A script of a checkout as a module."""
    spec = importlib.util.spec_from_file_location(f"checkout_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def require(status: int, what: str) -> None:
    """Raises SystemExit when a tool has failed."""
    if status:
        raise SystemExit(f"inputs: {what} ended with status {status}")


def write_models(folder: Path, tool: ModuleType) -> None:
    """`model`, `moe`, and `reference`: the first with noise on it, so that losses of the two differ.

    A new model has nearly the same loss on all text, where weights and choices by loss would be nearly the same too. Its
    matrices are multiplied by SCALE, which spreads the losses.
    """
    import torch
    from safetensors.torch import load_file, save_file

    data = ["--data", str(folder / "data"), *SHAPE]
    require(tool.main([*data, "--output", str(folder / "model")]), "tiny_model")
    require(tool.main([*data, "--output", str(folder / "moe"), "--experts", "4"]), "tiny_model --experts")
    shutil.copytree(folder / "model", folder / "reference")
    noise = torch.Generator().manual_seed(7)
    for name in ("model", "moe", "reference"):
        file = folder / name / "model.safetensors"
        weights = {key: value * (SCALE if value.ndim > 1 else 1) for key, value in load_file(file).items()}
        if name == "reference":
            weights = {key: value + 0.1 * torch.randn(value.shape, generator=noise) for key, value in weights.items()}
        save_file(weights, file, metadata={"format": "pt"})


def write_corpora(folder: Path) -> None:
    """Megatron's .bin/.idx files: the four domains, their validation sets, SlimPajama's seven."""
    from dataflex_mega.cli import main

    tokenizer = ["--tokenizer", str(folder / "model")]
    for name, suffix in (("corpus", ""), ("corpus_validation", "_validation")):
        sets = ["--dataset", ",".join(domain + suffix for domain in DOMAINS), "--dataset-dir", str(folder / "data")]
        require(main(["corpus", *sets, *tokenizer, "--output", str(folder / name)]), name)
    rows = [str(folder / "data" / "slimpajama.jsonl"), "--domain-field", "meta.redpajama_set_name"]
    require(main(["corpus", *rows, *tokenizer, "--output", str(folder / "slimpajama")]), "slimpajama")


def write_component_files(folder: Path) -> None:
    """What the selectors `near` and `tsds` and the reorder `reuse_selector_scores` read."""
    import numpy as np

    count = NUM_COMPONENT_ROWS
    order = np.random.default_rng(0).permutation(count)
    np.save(folder / "near.npy", order.reshape(2, -1))
    np.save(folder / "tsds.npy", np.random.default_rng(1).dirichlet(np.ones(count)))
    losses = [1.0 + (5 * number % 7) / 8 for number in range(count // 2)]
    content = {"indices": sorted(order[: count // 2].tolist()), "metric": {"loss": losses}}
    (folder / "step_10.json").write_text(json.dumps(content))


def main(checkout: Path, folder: Path) -> None:
    """Write everything into a folder that does not exist yet."""
    for name in FOLDERS:
        shutil.copytree(checkout / name, folder / name)
    write_data(folder / "data")
    write_models(folder, load_tool(checkout / "tools" / "tiny_model.py"))
    write_corpora(folder)
    write_component_files(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
