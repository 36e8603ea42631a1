"""Pipelines in DataFlex's layout: the shipped presets, the key `pipeline`, and what is refused."""

import pytest
import yaml

from dataflex_mega.config import pipelines
from dataflex_mega.config.dataflex_parse import parse
from dataflex_mega.errors import ConfigError

LOSS = {"family": "selector", "component": "loss"}
PRESETS = {
    "hierarchical": [("selector", "loss", 10, 200), ("mixer", "odm", 0, 50), ("reorder", "saw", 0, 50),
                     ("weighter", "loss", 10, 1)],
    "select_then_reorder": [("selector", "loss", 10, 100), ("reorder", "saw", 0, 20)],
    "mix_then_weight": [("mixer", "odm", 0, 50), ("weighter", "loss", 10, 1)],
    "select_only": [("selector", "loss", 10, 1)],
}  # fmt: skip


def lego(**keys):
    return parse({"train_type": "dynamic_lego", **keys})


@pytest.mark.parametrize("name", PRESETS)
def test_the_shipped_presets(name):
    pipeline, roles = lego(component_name=name).roles.pipeline, lego(component_name=name).roles.specs
    stages = [*pipeline.role_stages.values(), *pipeline.weighter_stages]
    assert [(s.family, roles[s.family]["name"], s.warmup_step, s.every) for s in stages] == PRESETS[name]
    assert set(roles) == {family for family, *_ in PRESETS[name]}
    assert pipelines.preset_names(None) == list(PRESETS)


def test_a_file_as_dataflex_users_have_it(tmp_path):
    """Another order of the stages, parameters that have no place here, a stage that is off, `${}`."""
    stages = [
        {"family": "weighter", "component": "w", "every": 5},
        {"family": "reorder", "component": "r", "every": 4, "score_max_age": 4},
        {"family": "mixer", "component": "m", "allow_replacement": True, "warmup_step": "${start}"},
        {"family": "selector", "component": "s", "enabled": False},
        {"family": "weighter", "component": "w2"},
    ]
    params = {"cache_dir": "${saves}/lego", "score_batch_size": 3, "score_num_workers": 2, "seed": 42, "stages": stages}
    content = {
        "saves": "out", "start": 7,
        "selectors": {"s": {"name": "loss", "params": {}}},
        "mixers": {"m": {"name": "odm", "params": {"alpha": 0.5}}},
        "reorderers": {"r": {"name": "r", "params": {"pattern": "zigzag", "pattern_params": {"zigzag_layer": 4}}}},
        "weighters": {"w": {"name": "loss", "params": {"strategy": "extremes"}}, "w2": {"name": "focal", "params": {}}},
        "pipelines": {"mine": {"name": "mine", "params": params}},
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    parsed = lego(component_name="mine", components_cfg_file=str(path))
    assert parsed.roles.specs == {
        "mixer": {"name": "odm", "alpha": 0.5}, "reorder": {"name": "zigzag", "layers": 4},
        "weighter": {"name": "loss", "strategy": "extremes"},
    }  # fmt: skip
    pipeline = parsed.roles.pipeline
    assert pipeline.weighter_specs == ({"name": "loss", "strategy": "extremes"}, {"name": "focal"})
    assert list(pipeline.role_stages) == ["mixer", "reorder"] and pipeline.role_stages["mixer"].warmup_step == 7
    assert parsed.arguments.score_batch_size == 3 and pipeline.arguments.cache_dir == "out/lego"
    heard = "\n".join(parsed.notes)
    for said in (
        "seed",
        "score_num_workers",
        "reorder, mixer act in the order mixer, reorder",
        "allow_replacement",
        "every 5",
    ):
        assert said in heard, said


def test_the_key_alone_and_beside_a_preset():
    stages = [{"family": "reorder", "component": {"name": "folding", "layers": 2, "kind": "static"}, "every": 3}]
    roles = lego(pipeline={"stages": stages}).roles
    assert roles.specs["reorder"] == {"name": "folding", "layers": 2} and roles.reorder.kind == "static"
    parsed = lego(component_name="hierarchical", pipeline={"stages": stages})
    assert "mixer" not in parsed.roles.specs and parsed.arguments.score_batch_size == 8
    assert lego(pipeline="select_only").roles.pipeline.role_stages["selector"].mode == "draw"
    one, other = (lego(pipeline={"stages": [{**LOSS, "every": n}]}).roles.pipeline.identity() for n in (2, 3))
    assert one != other


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "needs component_name .one of hierarchical, select_then_reorder, mix_then_weight, select_only. or pipeline"),
        ({"component_name": "hierachical"}, "no pipeline 'hierachical' .*did you mean 'hierarchical'"),
        ({"pipeline": {"stages": []}}, "at least one must be present and enabled"),
        ({"pipeline": {"stages": [{**LOSS, "enabled": False}]}}, "at least one must be present and enabled"),
        ({"pipeline": {"stage": []}}, r"pipeline.stage: unknown key \(did you mean 'stages'\?\)"),
        ({"pipeline": {"stages": [{**LOSS, "evry": 2}]}}, r"stages\[0\].evry: unknown key \(did you mean 'every'\?\)"),
        ({"pipeline": {"stages": [{**LOSS, "every": 0}]}}, r"stages\[0\].every: must be >= 1, found 0"),
        ({"pipeline": {"stages": [{**LOSS, "keep_ratio": 1.5}]}}, "keep_ratio: must be > 0 and <= 1, found 1.5"),
        ({"pipeline": {"stages": [{"family": "mixer", "component": "odm", "mode": "draw"}]}}, "only for family selector"),
        ({"pipeline": {"stages": [{"component": "odm"}]}}, r"stages\[0\].family: missing"),
        ({"pipeline": {"stages": [{"family": "selectr", "component": "loss"}]}}, r"stages\[0\].family: "),
        ({"pipeline": {"stages": [{**LOSS, "component": "lss"}]}}, "no selector component 'lss' .did you mean 'loss'"),
        ({"pipeline": {"stages": [LOSS, LOSS]}}, "2 of family selector; at most one can be enabled"),
        ({"pipeline": {"stages": [LOSS]}, "mixer": "odm"}, "mixer: train_type: dynamic_lego takes its roles from"),
        ({"pipeline": {"stages": [LOSS]}, "static_mix": True}, "static_mix: train_type: dynamic_lego takes its roles"),
        ({"pipeline": {"stages": [LOSS]}, "candidate_fraction": 0.5}, "candidate_fraction: below 1 does not go"),
        ({"pipeline": "select_only", "component_name": "hierarchical"}, "pipeline: select_only differs from component_name"),
        ({"pipeline": {"stages": ["loss"]}}, r"stages\[0\]: expected a mapping with family and component, found 'loss'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        lego(**keys)


def test_a_pipeline_needs_its_train_type():
    with pytest.raises(ConfigError, match="pipeline: needs train_type: dynamic_lego, found dynamic_mix"):
        parse({"train_type": "dynamic_mix", "mixer": "odm", "update_step": 1, "pipeline": "select_only"})
    with pytest.raises(ConfigError, match="pipeline: has no effect without a role"):
        parse({"pipeline": "select_only"})
