"""The files and folders that a configuration names: where its run works, and which key an error is about."""

from __future__ import annotations

from pathlib import Path

from dataflex_mega.config.parse import RunConfig

# Keys whose values are paths, or names that are no paths; the latter match no file.
KEYS = (
    "output_dir", "logging_dir", "dataset_dir", "media_dir", "model_name_or_path", "adapter_name_or_path", "cache_dir",
    "resume_from_checkpoint", "tokenized_path", "deepspeed", "corpus_dir", "eval_corpus_dir", "reference_model",
    "reference_cache", "components_cfg_file", "init_mixture_proportions_file",
)  # fmt: skip


def named_paths(config: RunConfig) -> tuple[Path | None, dict[str, Path]]:
    """(output_dir, key -> the path it names); output_dir is None where the configuration has none."""
    found = {key: config.all_keys.get(key) for key in KEYS}
    paths = {key: Path(value).expanduser() for key, value in found.items() if isinstance(value, str) and value}
    for role, spec in config.roles.items():
        for key, value in spec.items():
            if isinstance(value, str) and key.endswith(("_path", "_dir", "_file")):
                paths[f"{role}.{spec['name']}.{key}"] = Path(value).expanduser()
    return paths.get("output_dir"), paths
