"""Parameters in DataFlex's components files that no algorithm has: keys of the run, and parameters without an effect.

An entry of DataFlex's file is read as it is. Some of its parameters are keys of the run here (`MOVED_TO_RUN_KEYS`); others
have no effect (`UNUSED_PARAMETERS`), which one note per entry says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.errors import ConfigError

Spec = dict[str, Any]

# (role, algorithm) -> parameter -> key of the run.
MOVED_TO_RUN_KEYS: dict[tuple[str, str], dict[str, str]] = {
    ("selector", "loss"): {"score_batch_size": "score_batch_size"},
    ("selector", "delta_loss"): {"score_batch_size": "score_batch_size"},
    ("selector", "coincide"): {"clustering_batch_size": "score_batch_size"},
    ("mixer", "doremi"): {"reference_model_path": "reference_model"},
}
NOT_PROJECTED = "gradients are not projected"
NOT_SAVED = "gradients are not written to files"
LOADER = "the loader of the run reads the candidates"
RUN_BATCH = "score_batch_size is the key of the run"
DEVICES = "clustering runs on the devices of the run"
TRAINED_MODEL = "the model that trains embeds the samples"
ROUTERS = "routers are counted in the forward passes of training (count_steps)"
REWARD = "reward says what scores an answer"
# (role, algorithm) -> parameter -> why it has no effect.
UNUSED_PARAMETERS: dict[tuple[str, str], dict[str, str]] = {
    ("selector", "loss"): {"score_num_workers": LOADER},
    ("selector", "delta_loss"): {"score_num_workers": LOADER},
    ("selector", "less"): {"save_interval": NOT_SAVED},
    ("selector", "icons"): {"proj_dim": NOT_PROJECTED, "seed": NOT_PROJECTED, "save_interval": NOT_SAVED},
    ("selector", "nice"): {
        "proj_dim": NOT_PROJECTED, "save_interval": NOT_SAVED, "reward_model_backend": REWARD,
        "reward_backend_params": REWARD,
    },
    ("selector", "cluster_less"): {
        "proj_dim": NOT_PROJECTED, "save_interval": NOT_SAVED, "clustering_batch_size": RUN_BATCH,
        "embedding_model_dtype": TRAINED_MODEL, "embedding_model_name_or_path": TRAINED_MODEL,
    },
    ("selector", "coincide"): {
        "clustering_num_workers": LOADER, "clustering_device": DEVICES, "assignment_chunk_size": DEVICES,
        "density_chunk_size": DEVICES, "embedding_model_dtype": TRAINED_MODEL,
        "embedding_model_name_or_path": TRAINED_MODEL,
    },
    ("mixer", "dynamic_moe"): {"collect_steps": ROUTERS, "eval_samples": ROUTERS, "eval_batch_size": ROUTERS},
    ("weighter", "adapt"): {"anchor_batch_size": RUN_BATCH, "eps": "a vector is divided by its length as it is"},
}  # fmt: skip
# Those of them that must be left out: any value would ask for another behaviour.
ONLY_NOTHING = ("embedding_model_name_or_path",)


def move_to_run_keys(role: str, spec: Spec) -> tuple[Spec, dict[str, Any]]:
    """A specification -> (it without the parameters that are keys of the run, those keys with their values)."""
    moved = MOVED_TO_RUN_KEYS.get((role, spec["name"]), {})
    keys = {key: spec[parameter] for parameter, key in moved.items() if spec.get(parameter) is not None}
    return {name: value for name, value in spec.items() if name not in moved}, keys


def drop_unused(role: str, spec: Mapping[str, Any], where: str) -> tuple[Spec, list[str]]:
    """A specification -> (it without the parameters that have no effect, at most one note, on those that are set).

    Raises ConfigError for one of ONLY_NOTHING that has a value.
    """
    reasons = UNUSED_PARAMETERS.get((role, str(spec.get("name"))), {})
    unused = [name for name in spec if name in reasons and spec[name] is not None]
    for name in unused:
        if name in ONLY_NOTHING:
            found = f"expected nothing: {reasons[name]}, found {spec[name]!r}"
            raise ConfigError(f"{role}.{spec['name']}.{name}: {found}")
    by_reason: dict[str, list[str]] = {}
    for name in unused:
        by_reason.setdefault(reasons[name], []).append(name)
    text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    used = {name: value for name, value in spec.items() if name not in reasons}
    return used, [f"{where}: no effect here: {text}"] if text else []
