"""Train every example of LLaMA-Factory's source distribution as a static run, and print the outcome of each.

Only names and sizes in a file are changed: the model becomes a tiny random Llama, data that the distribution lacks becomes
data that it has, training ends after 2 steps of 64 tokens, and `deepspeed` is left out where it is not installed.
Each file is trained in a process of its own. The distribution comes from tools/demo_data.py's cache or from pip.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import demo_data
import tiny_model
import yaml

from dataflex_mega.errors import DataError
from dataflex_mega.llamafactory.compat import ensure_importable
from dataflex_mega.train import main as train

RUN_FIRST = ("train_lora/qwen3_lora_sft.yaml", "train_lora/qwen3_lora_reward.yaml")  # other examples read their output
SIZES = {
    "max_steps": 2, "num_train_epochs": 1, "cutoff_len": 64, "max_samples": 16, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1, "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "max_new_tokens": 4,
}  # fmt: skip


def examples(folder: Path) -> list[Path]:
    """Training YAMLs below `folder`; LLaMA-Factory's other trainer (v1) has YAMLs without `stage`, which are left out."""
    paths = [path for path in sorted(folder.rglob("*.yaml")) if "stage" in (yaml.safe_load(path.read_text()) or {})]
    return sorted(paths, key=lambda path: str(path.relative_to(folder)) not in RUN_FIRST)


def adapt_config(name: str, keys: dict[str, Any], data: Path, work: Path) -> dict[str, Any]:
    """The keys of example `name` with local names and small sizes."""
    known = json.loads((data / "dataset_info.json").read_text())
    available = {key for key, value in known.items() if "file_name" in value}
    for key in ("dataset", "eval_dataset"):
        if key in keys and not {part.strip() for part in keys[key].split(",")} <= available:
            keys[key] = "dpo_en_demo" if keys["stage"] == "dpo" else "alpaca_en_demo"
    keys |= SIZES | {"model_name_or_path": str(work / "model"), "dataset_dir": str(data)}
    keys["output_dir"] = str(work / name.removesuffix(".yaml"))
    if "adapter_name_or_path" in keys:
        keys["adapter_name_or_path"] = str(work / RUN_FIRST[0].removesuffix(".yaml"))
    if "tokenized_path" in keys:
        keys["tokenized_path"] = str(work / "tokenized")
    if importlib.util.find_spec("deepspeed") is None:
        keys.pop("deepspeed", None)
    return keys


def make_model(data: Path, folder: Path) -> None:
    """Save a Llama of 8 layers, with embedding rows for the tokens that templates add."""
    texts = [json.loads(line)["text"] for line in (data / "c4_demo.jsonl").read_text().splitlines() if line]
    options = tiny_model.ModelOptions(hidden=32, layers=8, heads=4, kv_heads=2, vocab=576)
    tiny_model.save(tiny_model.make_model(options), tiny_model.make_tokenizer(texts, 512), folder)


def train_and_exit(path: Path, log: Path) -> None:
    """Train in this process and exit with its status; the output goes into `log`."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)  # loggers keep the streams of the time of their import
        os.dup2(stream.fileno(), 2)
    sys.exit(train([str(path)]))


def describe_outcome(status: int | None, log: Path) -> str:
    """`trains`, or the last error line."""
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    if status == 0:
        return "trains"
    last = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return f"refused: {last.removeprefix('error: ')}" if status == 2 else f"FAILED ({status}): {last}"


def run(archive: Path, work: Path, only: list[str]) -> int:
    """Print one line for every example whose name contains one of `only` -> the number that failed with a traceback."""
    with tarfile.open(archive) as tar:
        tar.extractall(work / "source", filter="data")
    root = next((work / "source").iterdir())
    make_model(root / "data", work / "model")
    ensure_importable()
    importlib.import_module("llamafactory.train.tuner")
    context, failed = multiprocessing.get_context("fork"), 0
    for path in examples(root / "examples"):
        name = str(path.relative_to(root / "examples"))
        if name not in RUN_FIRST and only and not any(part in name for part in only):
            continue
        config, log = work / "config.yaml", work / "log"
        config.write_text(yaml.safe_dump(adapt_config(name, yaml.safe_load(path.read_text()), root / "data", work)))
        process = context.Process(target=train_and_exit, args=(config, log))
        process.start()
        process.join()
        failed += process.exitcode not in (0, 2)
        print(f"{name:<52} {describe_outcome(process.exitcode, log)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of names; all files without any")
    parser.add_argument("--source", type=Path, help="a downloaded llamafactory source distribution, instead of pip")
    parser.add_argument("--cache", type=Path, default=demo_data.FOLDER / "cache", help="folder of the download")
    options = parser.parse_args()
    try:
        archive = options.source or demo_data.download(metadata.version("llamafactory"), options.cache)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        return 1 if run(archive, Path(name), options.only) else 0


if __name__ == "__main__":
    sys.exit(main())
