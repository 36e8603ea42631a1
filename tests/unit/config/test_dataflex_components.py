"""A components file written for DataFlex 1.1, with every entry and every parameter it ships, is read as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dataflex_mega.config import components
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build

LESS = {"gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16}
CLUSTER = {
    "cluster_size": 64, "num_clusters": None, "samples_per_cluster": 4, "clustering_batch_size": 8,
    "clustering_max_iter": 10, "clustering_method": "kmeans", "representative_strategy": "random",
    "embedding_model_name_or_path": None, "embedding_model_dtype": "auto", "embedding_layer": -1,
}  # fmt: skip
COINCIDE = {
    "seed": 42, "embedding_model_name_or_path": None, "embedding_model_dtype": "auto", "embedding_layers": None,
    "num_clusters": 10000, "clustering_batch_size": 8, "clustering_num_workers": 4, "clustering_device": "auto",
    "clustering_max_iter": 10, "assignment_chunk_size": 4096, "temperature": 1.0, "density_chunk_size": 2048,
    "single_member_density": 1.0,
}  # fmt: skip
NICE = {
    **LESS, "reward_model_backend": "local_vllm", "reward_backend_params": {}, "mc_samples": 4, "max_new_tokens": 512,
    "generation_temperature": 0.7, "max_prompt_length": 4096,
}  # fmt: skip
JOINT = {
    "beta": 0.1, "tau": 0.05, "fixed_point_iters": 5, "damping": 1.0, "target_update_step": 50, "target_batch_size": 1,
    "target_num_batches": 1, "embed_normalize": True, "pooling": "last_token", "embed_layer": -1,
    "objective_mode": "full",
}  # fmt: skip
SAVES = "${saves}/"
SHIPPED = {
    "selectors": {
        "less": LESS,
        "cluster_less": {**LESS, **CLUSTER},
        "nice": NICE,
        "icons": {**LESS, "task_boundaries": None},
        "coincide": COINCIDE,
        "loss": {"focus": "medium", "score_batch_size": 8, "score_num_workers": 2},
        "delta_loss": {"window_size": 0.2, "score_batch_size": 8, "score_num_workers": 2},
        "tsds": {"probs_path": "./src/dataflex/offline_selector/tsds_probs.npy"},
        "near": {"indices_path": "./src/dataflex/offline_selector/top_indices.npy"},
        "random": {"seed": 42, "replacement": False},
        "custom": {},
    },
    "mixers": {
        "random": {"seed": 42},
        "doremi": {"reference_model_path": None, "reweight_eta": 0.1, "reweight_eps": 0.01},
        "static": {"proportions": [0.5, 0.5]},
        "odm": {
            "alpha": 0.9, "warmup_steps": 2000, "initial_proportions": [0.5, 0.5], "reward_scale": 15,
            "min_exploration_rate": 0.03,
        },
        "dynamic_moe": {"eta": 10.0, "c": 0.05, "collect_steps": 5, "eval_samples": 1000, "eval_batch_size": 32},
    },
    "weighters": {
        "loss": {"strategy": "linupper", "delta": 1.0},
        "adapt": {"tau": 1.0, "refresh_interval": 50, "anchor_batch_size": 8, "clip": None},
        "custom": {"strategy": "uniform"},
        "joint_update_aware": JOINT,
    },
}  # fmt: skip
ROLES = {section: role for role, section in components.SECTIONS.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file, in DataFlex's layout, with `cache_dir` written by substitution."""
    found: dict = {"saves": "../dataflex_saves"}
    for section, entries in SHIPPED.items():
        with_cache = section == "selectors"
        found[section] = {
            name: {"name": name, "params": {**({"cache_dir": f"{SAVES}{name}_output"} if with_cache else {}), **params}}
            for name, params in entries.items()
        }
    path: Path = tmp_path_factory.mktemp("dataflex") / "components.yaml"
    path.write_text(yaml.safe_dump(found))
    return str(path)


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, entries in SHIPPED.items() for n in entries])
def test_every_entry_builds(file: str, section: str, name: str) -> None:
    role = ROLES[section]
    spec = components.read_component(file, role, name).spec
    if section == "selectors":
        assert spec["cache_dir"] == f"../dataflex_saves/{name}_output", "substituted"
    try:
        build(role, spec)
    except ConfigError as error:
        pytest.fail(str(error))


def test_the_path_of_dataflexs_own_file_means_the_packaged_one() -> None:
    keys = {"train_type": "dynamic_mix", "component_name": "odm", "update_step": 1}
    run = parse_config({**keys, "components_cfg_file": "src/dataflex/configs/components.yaml"}, {})
    assert run.dataflex.components_cfg_file is None and run.roles["mixer"]["name"] == "odm"
    assert [note for note in run.notes if "components_cfg_file: src/dataflex" in note]
    with pytest.raises(ConfigError, match=r"mine/components.yaml not found"):
        parse_config({**keys, "components_cfg_file": "mine/components.yaml"}, {})


def test_the_evaluation_of_dynamic_moe_has_nothing_to_set_here(file: str) -> None:
    keys = {"components_cfg_file": file, "train_type": "dynamic_mix", "component_name": "dynamic_moe", "update_step": 1}
    run = parse_config(keys, {})
    assert run.roles["mixer"] == {"name": "dynamic_moe", "eta": 10.0, "c": 0.05}
    (note,) = (note for note in run.notes if note.startswith("mixer dynamic_moe: no effect here: "))
    assert "collect_steps, eval_batch_size, eval_samples (routers are counted" in note


def test_parameters_that_are_keys_of_the_run_here_become_those(tmp_path: Path) -> None:
    path = tmp_path / "components.yaml"
    params = {"focus": "low", "score_batch_size": 3, "score_num_workers": 2}
    mixers = {"doremi": {"name": "doremi", "params": {"reference_model_path": "a/model", "reweight_eta": 0.1}}}
    selectors = {"easy": {"name": "loss", "params": params}}
    path.write_text(yaml.safe_dump({"selectors": selectors, "mixers": mixers}))
    keys = {"components_cfg_file": str(path), "update_step": 1}
    run = parse_config({**keys, "train_type": "dynamic_select", "component_name": "easy"}, {})
    assert run.dataflex.score_batch_size == 3 and run.roles["selector"] == {"name": "loss", "focus": "low"}
    assert [note for note in run.notes if "score_num_workers" in note]
    run = parse_config({**keys, "train_type": "dynamic_mix", "component_name": "doremi"}, {})
    assert run.dataflex.reference_model == "a/model"
    with pytest.raises(
        ConfigError, match="reference_model: 'b' contradicts component_name 'doremi', which says 'a/model'"
    ):
        parse_config({**keys, "train_type": "dynamic_mix", "component_name": "doremi", "reference_model": "b"}, {})


def test_parameters_without_an_effect_are_dropped_with_one_note(file: str) -> None:
    keys = {"components_cfg_file": file, "train_type": "dynamic_select", "component_name": "nice", "update_step": 1}
    run = parse_config(keys, {})
    assert not {"proj_dim", "save_interval", "reward_model_backend", "reward_backend_params"} & set(
        run.roles["selector"]
    )
    (note,) = (note for note in run.notes if "no effect here" in note)
    assert note.startswith("selector nice: no effect here: ")
    assert "proj_dim (gradients are not projected)" in note and "reward_model_backend (reward says" in note


def test_the_same_parameters_under_our_key() -> None:
    run = parse_config({"selector": {"name": "icons", "proj_dim": 8, "seed": None}, "update_step": 1}, {})
    assert run.roles["selector"] == {"name": "icons"}
    assert run.notes == ["selector: no effect here: proj_dim (gradients are not projected)"]
    source = {"name": "less", "save_interval": 3}
    reorder = {"name": "sorting", "score_source": "selector", "score_params": {"selector": source}}
    run = parse_config({"reorder": reorder, "update_step": 1}, {})
    assert run.reorder is not None and run.reorder.scores.selector == {"name": "less"}
    assert run.notes == [
        "reorder.score_params.selector: no effect here: save_interval (gradients are not written to files)"
    ]


@pytest.mark.parametrize("name", ["cluster_less", "coincide"])
def test_another_model_for_embeddings_is_refused(name: str) -> None:
    selector = {"name": name, "embedding_model_name_or_path": "bge"}
    message = f"selector.{name}.embedding_model_name_or_path: expected nothing: the model that trains .*, found 'bge'"
    with pytest.raises(ConfigError, match=message):
        parse_config({"selector": selector, "update_step": 1}, {})
