"""A reorder's specification in DataFlex's layout and in the short one, with DataFlex's defaults."""

import pytest

from dataflex_mega.config import components, reorder_arguments
from dataflex_mega.errors import ConfigError

PRESETS = {
    "sorting": ("sorting", {}, "static", "precomputed"),
    "shuffle": ("shuffle", {}, "static", "precomputed"),
    "segment": ("segment", {"x_pct": 10, "y_pct": 10, "front_is_high": False, "back_is_high": True}, "static",
                "precomputed"),
    "folding": ("folding", {"layers": 3}, "static", "precomputed"),
    "zigzag": ("zigzag", {"layers": 3}, "static", "precomputed"),
    "stair": ("stair", {"num_sections": 2, "folding_ratio": 0.225, "layers": 3}, "static", "precomputed"),
    "saw": ("saw", {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}, "static", "precomputed"),
    "dynamic_saw": ("saw", {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}, "dynamic", "model_loss"),
    "dynamic_folding": ("folding", {"layers": 3}, "dynamic", "model_loss"),
    "reuse_selector_scores": ("saw", {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}, "dynamic",
                              "cached_selection"),
}  # fmt: skip


def test_the_packaged_entries_are_dataflex_own():
    assert set(components.entries(None, "reorder")) == set(PRESETS)
    for name, (pattern, parameters, kind, source) in PRESETS.items():
        spec, order = reorder_arguments.read_reorder(components.read_component(None, "reorder", name).spec)
        assert spec == {"name": pattern, **parameters}, name
        assert (order.kind, order.resolved_source, order.low_first) == (kind, source, True), name
    assert (
        reorder_arguments.read_reorder(components.read_component(None, "reorder", "dynamic_saw").spec)[
            1
        ].scores.max_samples
        == 20000
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "folding", "layers": 4, "kind": "static"},
        {"name": "anything", "pattern": "folding", "pattern_params": {"layers": 4}, "kind": "static"},
        {"name": "mine", "pattern": "folding", "pattern_params": {"folding_layer": 4}, "kind": "static"},
    ],
)
def test_the_layouts_say_the_same(spec):
    assert reorder_arguments.read_reorder(spec) == (
        {"name": "folding", "layers": 4},
        reorder_arguments.ReorderArguments(kind="static"),
    )


@pytest.mark.parametrize(
    ("keys", "low_first"),
    [
        ({"kind": "static"}, True),
        ({"kind": "dynamic"}, False),  # DataFlex: hard samples first unless polarity says otherwise
        ({"kind": "dynamic", "polarity": "higher_later"}, True),
        ({"kind": "static", "polarity": "higher_earlier"}, False),
        ({"kind": "static", "polarity": "lower_is_better"}, False),
        ({"kind": "dynamic", "polarity": "higher_is_better"}, True),
        ({"kind": "static", "ascending": False}, False),
        ({"kind": "static", "polarity": "higher_earlier", "ascending": False}, True),
    ],
)
def test_which_end_comes_first(keys, low_first):
    order = reorder_arguments.read_reorder({"name": "sorting", **keys})[1]
    assert order.low_first is low_first
    assert order.resolved_source == ("precomputed" if keys["kind"] == "static" else "model_loss")


def test_identity_does_not_depend_on_how_it_is_written():
    one = reorder_arguments.read_reorder({"name": "sorting", "score_params": {"batch_size": 4}})[1]
    other = reorder_arguments.read_reorder(
        {"name": "sorting", "polarity": "lower_is_better", "score_source": "model_loss"}
    )[1]
    assert one.identity() == other.identity()
    assert one.identity() != reorder_arguments.read_reorder({"name": "sorting", "ascending": False})[1].identity()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "folding", "layer": 3}, r"^reorder.folding.layer: unknown parameter \(did you mean 'layers'\?\)"),
        ({"name": "folding", "pattern_params": {"layrs": 3}}, r"layrs: unknown parameter \(did you mean 'layers'\?\)"),
        ({"name": "folding", "polarty": "higher_later"}, r"polarty: unknown parameter \(did you mean 'polarity'\?\)"),
        ({"name": "folding", "polarity": "higher_latter"}, r"reorder.polarity: .*did you mean 'higher_later'"),
        ({"name": "folding", "layers": 3, "pattern_params": {"layers": 2}}, "layers: given in pattern_params and beside it"),
        ({"name": "folding", "kind": "dynamical"}, "reorder.kind: "),
        ({"name": "folding", "score_source": "loss"}, "reorder.score_source: "),
        ({"name": "folding", "score_params": {"max_sample": 3}}, "max_sample: unknown .*did you mean 'max_samples'"),
        ({"name": "folding", "score_params": {"score_field": "x"}}, "score_field: unknown parameter; model_loss has"),
        ({"name": "folding", "score_params": {"max_samples": 0}}, "reorder.score_params.max_samples: must be >= 1, found 0"),
        ({"name": "folding", "score_source": "cached_selection"}, "reorder.score_params.cache_path: missing"),
        ({"name": "folding", "score_source": "selector"}, "reorder.score_params.selector: missing"),
        ({"name": "folding", "kind": "static", "score_params": {"score_path": "a.txt"}}, r"expected .npy, .json, .jsonl"),
        ({"name": "folding", "window_size": -1}, "reorder.window_size: must be >= 0, found -1"),
        ({"name": "folding", "pattern_params": [3]}, "reorder.pattern_params: expected a mapping"),
        ({"name": "foldng"}, "no reorder is called 'foldng'.*did you mean 'folding'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        reorder_arguments.read_reorder(spec)
