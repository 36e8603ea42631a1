"""The key `static_mix`: the initial proportions for the whole run."""

from tests.unit.config.test_dataflex_parse import MOVING, SIZES, arguments, fails, parse, roles, start


def test_static_mix_is_the_mixer_static():
    keys = (
        {"train_type": "dynamic_mix", "component_name": "static", "static_mix": True, "warmup_step": 100,
         "update_step": 200, "update_times": 3, "init_mixture_proportions": [3, 1]}
    )  # fmt: skip
    parsed = parse(keys)
    assert parsed.roles.specs["mixer"] == {"name": "static", "proportions": [0.75, 0.25]}
    assert start(SIZES, **keys) == (0.75, 0.25)
    assert parsed.arguments.update_step == 0  # so the run is as long as its epochs, as in DataFlex
    assert list(parsed.notes) == [
        "static_mix: true keeps the proportions; component_name, update_step, update_times not used"
    ]


def test_static_mix_without_a_train_type_or_proportions():
    assert arguments(static_mix=True).train_type == "dynamic"
    assert roles(static_mix=True)["mixer"] == {"name": "static"}
    assert start(SIZES, static_mix=True) == (0.5, 0.5)


def test_static_mix_by_size():
    assert start(SIZES, static_mix=True, mixture_sample_rule="stratified") == (0.25, 0.75)


def test_static_mix_beside_a_selector_keeps_the_schedule():
    found = arguments(static_mix=True, selector="loss", **MOVING)
    assert found.update_step == 5


def test_static_mix_keeps_the_numbers_of_a_static_mixer():
    assert roles(static_mix=True, mixer={"name": "static", "proportions": [1, 3]})["mixer"] == {
        "name": "static",
        "proportions": [1, 3],
    }


def test_static_mix_and_a_moving_mixer_contradict_each_other():
    assert fails(static_mix=True, mixer="odm", **MOVING) == (
        "static_mix: true keeps the proportions, but mixer: odm moves them; drop one"
    )
