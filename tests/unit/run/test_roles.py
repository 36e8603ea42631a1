"""The algorithms of a run are checked against the engine before anything is read."""

from types import SimpleNamespace

import pytest

from dataflex_mega.control.weighter_product import ProductWeighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.run.roles import RunRoles


def config_of(engine, *weighters, **others):
    """A configuration, as far as roles need it: several weighters in a pipeline, and further roles."""
    pipeline = SimpleNamespace(
        weighter_specs=weighters,
        weighter_stages=[SimpleNamespace(warmup_step=0, every=1) for _ in weighters],
        identity=list,
    )
    roles = {"weighter": weighters[0], **others} if weighters else others
    return SimpleNamespace(
        reorder=None,
        pipeline=pipeline if weighters else None,
        roles=roles,
        engine=engine,
        llamafactory={"stage": "sft"},
    )


def test_every_weighter_of_a_product_is_checked_under_its_own_name():
    joint = {"name": "joint_update_aware", "embed_layer": 2}
    roles = RunRoles.from_config(config_of("fsdp", {"name": "loss"}, joint))
    assert isinstance(roles.algorithms.weighter, ProductWeighter)
    with pytest.raises(
        ConfigError, match=r"^weighter\.joint_update_aware\.embed_layer: engine: megatron has the last layer"
    ):
        RunRoles.from_config(config_of("megatron", {"name": "loss"}, joint))


def test_what_an_engine_lacks_is_refused_for_every_role():
    for role, name in (("selector", "nice"), ("weighter", "greats")):
        with pytest.raises(
            ConfigError, match=f"^{role} {name} needs .*, not supported by engine: megatron; use engine: fsdp$"
        ):
            RunRoles.from_config(config_of("megatron", **{role: {"name": name}}))


def test_an_instance_takes_the_place_of_a_specification():
    first = RunRoles.from_config(config_of("fsdp", mixer={"name": "doge", "eta": 0.5})).algorithms.mixer
    again = RunRoles.from_config(config_of("fsdp", mixer={"name": "doge"}), {"mixer": first})
    assert again.algorithms.mixer is first and again.specs["mixer"]["eta"] == 0.5
