"""What a dynamic run cannot do, checked from the configuration alone, before a model or a dataset is touched.

Static runs are LLaMA-Factory's and do all of it. Nothing is ignored in silence: what becomes of each of LLaMA-Factory's
keys is in fates.py; here are the checks that need several keys, a path or our own keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataflex_mega.json_text as json_text
from dataflex_mega.config.best_model import check_best_model
from dataflex_mega.config.corpus import check_corpora, training_domains
from dataflex_mega.config.fates import check_fates
from dataflex_mega.config.interleave import check_count
from dataflex_mega.config.losses import check_losses
from dataflex_mega.config.numbers import check_numbers
from dataflex_mega.config.optimizers import check_optimizer_keys
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.config.preferences import check_preferences, notes_on_preferences
from dataflex_mega.config.quantization import check_quantization
from dataflex_mega.config.sample_order import check_order
from dataflex_mega.config.settings_without_effect import notes_on_settings
from dataflex_mega.config.streaming import check_streaming
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.folder_hints import not_a_model

REQUIRED = {
    "model_name_or_path": "a folder or a hub name",
    "dataset": "names from dataset_info.json",
    "output_dir": "a folder",
}


def check_dynamic(config: RunConfig) -> list[str]:
    """Notes on keys that have no effect. Raises ConfigError naming the key, its value and what is allowed."""
    checks: tuple[Callable[[RunConfig], None], ...] = (
        check_preferences,
        _check_numbers,
        _check_precision,
        _check_quantization,
        _check_optimizer,
        _check_attention,
        _check_length,
        _check_evaluation,
        _check_model_path,
        _check_corpora,
        _check_datasets,
        check_order,
        check_streaming,
    )
    _check_required(config)
    notes = check_fates(config.llamafactory)
    for check in checks:
        check(config)
    losses = check_losses(config.llamafactory)
    return [*notes, *losses, *notes_on_settings(config), *notes_on_preferences(config)]


def _check_required(config: RunConfig) -> None:
    for key, what in REQUIRED.items():
        if key == "dataset" and config.dataflex.corpus_dir is not None:
            continue  # all domains of the corpus
        if not config.llamafactory.get(key):
            near = did_you_mean(key, [k for k in config.all_keys if k not in REQUIRED])
            raise ConfigError(f"{key}: missing; expected {what}{near}")


def _check_numbers(config: RunConfig) -> None:
    check_numbers(config.llamafactory, every=True)


def _check_precision(config: RunConfig) -> None:
    if config.llamafactory.get("bf16") and config.llamafactory.get("fp16"):
        raise ConfigError("bf16, fp16: both are true; choose one")


def _check_quantization(config: RunConfig) -> None:
    if config.engine == "fsdp":  # the other refuses it altogether
        check_quantization(config.llamafactory)


def _check_optimizer(config: RunConfig) -> None:
    if config.engine == "fsdp":  # the other has a table of its own
        check_optimizer_keys(config.llamafactory)


def _check_attention(config: RunConfig) -> None:
    """Rows that hold several samples need a mask with a border between them, which flash-attention's own kernels lack."""
    packs = config.llamafactory.get("packing") or config.llamafactory.get("neat_packing")
    if (
        packs
        and config.llamafactory.get("stage", "sft") == "sft"
        and str(config.llamafactory.get("flash_attn", "auto")) in ("fa2", "fa3")
    ):
        raise ConfigError(
            f"flash_attn: {config.llamafactory['flash_attn']} cannot keep packed samples apart; use sdpa, or packing: false"
        )


def _check_length(config: RunConfig) -> None:
    """A key must set the length of the run; without one, LLaMA-Factory's default of 3 epochs does."""
    epochs = config.llamafactory.get("num_train_epochs", 3.0)
    if config.dataflex.train_step < 1 and config.llamafactory.get("max_steps", -1) < 1 and epochs <= 0:
        raise ConfigError(f"num_train_epochs: must be > 0 when neither max_steps nor train_step is, found {epochs}")


def _check_evaluation(config: RunConfig) -> None:
    """An evaluation needs data; early stopping needs evaluations."""
    strategy = str(config.llamafactory.get("eval_strategy", "no"))
    has_data = bool(config.llamafactory.get("eval_dataset")) or bool(config.llamafactory.get("val_size"))
    if strategy != "no" and not has_data and config.dataflex.eval_corpus_dir is None:
        needed = "eval_dataset or val_size" if config.dataflex.corpus_dir is None else "eval_corpus_dir"
        raise ConfigError(f"eval_strategy: {strategy} needs {needed}")
    check_best_model(config.llamafactory, has_data or config.dataflex.eval_corpus_dir is not None)


def _check_model_path(config: RunConfig) -> None:
    """A path that can only be meant as local exists and holds a model; anything else may be a name on a hub."""
    name = str(config.llamafactory["model_name_or_path"])
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: {name} has no config.json{not_a_model(path)}")
    if path.is_file():
        raise ConfigError(f"model_name_or_path: {name} is a file, expected a folder with config.json")
    if path.is_dir():
        check_json_files("model_name_or_path", path)
    if local and not path.is_dir():
        hint = ""
        if path.parent.is_dir():
            hint = did_you_mean(path.name, [other.name for other in path.parent.iterdir() if other.is_dir()])
        raise ConfigError(f"model_name_or_path: folder {name} not found{hint}")


def check_json_files(key: str, folder: Path) -> None:
    """Raises ConfigError for a file of a model's folder that is no JSON: transformers would say something else."""
    for file in sorted(folder.glob("*.json")):
        try:
            content = json_text.read(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}: {file}{json_text.read_problem(file, error)}") from error
        if not isinstance(content, dict) and file.name.endswith("config.json"):
            raise ConfigError(f"{key}: {file}: expected a JSON object, found a {type(content).__name__}")


def _check_corpora(config: RunConfig) -> None:
    check_corpora(
        config.dataflex,
        config.llamafactory,
        split_names(config.llamafactory.get("dataset")),
        split_names(config.llamafactory.get("eval_dataset")),
    )


def _check_datasets(config: RunConfig) -> None:
    names = split_names(config.llamafactory.get("dataset"))
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"dataset: {name!r} is listed {names.count(name)} times")
    proportions = config.dataflex.init_mixture_proportions
    names = names or [domain.name for domain in training_domains(config.dataflex, names)]
    check_count(config.interleaving, names, split_names(config.llamafactory.get("eval_dataset")))
    if proportions is not None and len(proportions) != len(names):
        raise ConfigError(
            f"init_mixture_proportions: {len(proportions)} numbers for {len(names)} datasets ({', '.join(names)})"
        )


def split_names(value: Any, key: str = "dataset") -> list[str]:
    """`"a, b"` or `["a", "b"]` or None -> a list. Raises ConfigError for anything else."""
    if value is None:
        return []
    if not isinstance(value, str | list | tuple):
        raise ConfigError(f"{key}: expected a name, or names between commas, found {value!r}")
    parts = value.split(",") if isinstance(value, str) else list(value)
    return [str(part).strip() for part in parts if str(part).strip()]
