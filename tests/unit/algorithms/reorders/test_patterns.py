"""The seven patterns against published numbers and against definitions written out place by place."""

import random

import pytest
import torch

from dataflex_mega.control.passes import OrderOptions, arrange_remaining
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import build

TIED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
UP, DOWN = OrderOptions(), OrderOptions(ascending=False)


def ordered(scores, spec, direction=UP):
    ids = torch.arange(len(scores))
    return arrange_remaining(build("reorder", spec), ids, torch.tensor(scores).float(), 0, direction).tolist()


@pytest.mark.parametrize(
    ("scores", "spec", "direction", "expected"),
    [
        (TIED, "sorting", UP, [1, 3, 6, 0, 9, 2, 4, 8, 7, 5]),
        (TIED, "sorting", DOWN, [5, 7, 8, 4, 2, 9, 0, 6, 3, 1]),
        (TIED, {"name": "folding", "layers": 3}, UP, [1, 0, 4, 5, 3, 9, 8, 6, 2, 7]),
        (TIED, {"name": "zigzag", "layers": 3}, UP, [1, 0, 4, 5, 8, 9, 3, 6, 2, 7]),
        (range(20), {"name": "stair", "num_sections": 2, "folding_ratio": 0.2, "layers": 3}, UP,
         [0, 1, 2, 3, 4, 5, 6, 9, 12, 7, 10, 13, 8, 11, 14, 15, 16, 17, 18, 19]),
        (range(20), {"name": "saw", "num_sections": 3, "folding_ratio": 0.15, "layers": 2}, UP,
         [0, 1, 2, 3, 4, 6, 8, 9, 7, 5, 10, 12, 14, 15, 13, 11, 16, 17, 18, 19]),
        (range(20), "segment", UP, [1, 0, 9, 12, 7, 8, 17, 16, 15, 11, 10, 3, 4, 14, 5, 6, 13, 2, 19, 18]),
        (range(10), "shuffle", UP, [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]),
        (range(20), "sorting", OrderOptions(shuffle_block=4),
         [3, 2, 1, 0, 7, 6, 4, 5, 8, 11, 10, 9, 14, 15, 12, 13, 18, 19, 16, 17]),
    ],
)  # fmt: skip
def test_numbers_of_the_reference(scores, spec, direction, expected):
    assert ordered(list(scores), spec, direction) == expected


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50, 101])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 60])
def test_layers_place_by_place(count, layers):
    """Rank r belongs to layer r mod L; layers in order, odd ones of a zigzag backwards."""
    keys = {"folding": lambda r: (r % layers, r), "zigzag": lambda r: (r % layers, -r if r % layers % 2 else r)}
    for name, key in keys.items():
        found = build("reorder", {"name": name, "layers": layers}).rank_order(count, 0).tolist()
        assert found == sorted(range(count), key=key), name


@pytest.mark.parametrize(("sections", "ratio", "layers"), [(1, 0.3, 2), (2, 0.225, 3), (3, 0.075, 2), (4, 0.12, 5)])
@pytest.mark.parametrize("count", [3, 40, 97])
def test_only_the_borders_are_layered(count, sections, ratio, layers):
    radius = round(count * ratio)
    expected = {"stair": list(range(count)), "saw": list(range(count))}
    for border in (round(count * k / sections) for k in range(1, sections)):
        low, high = max(border - radius, 0), min(border + radius, count)
        inside = range(low, high)
        up = [r for layer in range(layers) for r in inside if (r - low) % layers == layer]
        turns = [[r for r in inside if (r - low) % layers == layer] for layer in range(layers)]
        expected["stair"][low:high] = up
        expected["saw"][low:high] = [r for i, turn in enumerate(turns) for r in (turn[::-1] if i % 2 else turn)]
    for name, ranks in expected.items():
        spec = {"name": name, "num_sections": sections, "folding_ratio": ratio, "layers": layers}
        assert build("reorder", spec).rank_order(count, 0).tolist() == ranks, name


@pytest.mark.parametrize(("high_first", "high_last"), [(False, True), (True, False), (True, True), (False, False)])
def test_segments_come_from_their_ends(high_first, high_last):
    spec = {"name": "segment", "x_pct": 20, "y_pct": 15, "front_is_high": high_first, "back_is_high": high_last}
    ranks = build("reorder", spec).rank_order(41, 7).tolist()
    front, middle, back = ranks[:8], ranks[8:35], ranks[35:]
    assert sorted(ranks) == list(range(41))
    if high_first == high_last:
        assert set(front + back) == set(range(27, 41) if high_first else range(14))
        rng, both = random.Random(7), list(range(27, 41) if high_first else range(14))
        rng.shuffle(both)
        assert set(front) == set(both[:8])
    else:
        assert set(front) == set(range(33, 41) if high_first else range(8))
        assert set(back) == set(range(35, 41) if high_last else range(6))
    assert middle != sorted(middle)


def test_a_seed_names_a_shuffle():
    shuffle = build("reorder", "shuffle")
    assert (
        shuffle.rank_order(50, 1).tolist() == shuffle.rank_order(50, 1).tolist() != shuffle.rank_order(50, 2).tolist()
    )
    scores = torch.rand(50)
    assert ordered(scores.tolist(), "shuffle") == ordered((-scores).tolist(), "shuffle"), "scores do not matter"


@pytest.mark.parametrize("window", [2, 5, 64])
def test_a_window_shuffles_within_blocks(window):
    plain, jittered = (
        ordered(list(range(40)), "sorting"),
        ordered(list(range(40)), "sorting", OrderOptions(shuffle_block=window)),
    )
    assert jittered != plain
    for start in range(0, 40, window):
        assert sorted(jittered[start : start + window]) == plain[start : start + window]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "folding", "layers": 0}, r"reorder\.folding\.layers: must be >= 1, found 0"),
        ({"name": "saw", "num_sections": 4, "folding_ratio": 0.125}, r"below 0.125 with num_sections 4, found 0.125"),
        ({"name": "stair", "folding_ratio": -0.1}, r"reorder\.stair\.folding_ratio: must be >= 0"),
        ({"name": "segment", "x_pct": 60, "y_pct": 60}, r"x_pct \+ y_pct must be <= 100, found 120"),
        ({"name": "folding", "layer": 3}, "did you mean 'layers'"),
        ("foldin", "did you mean 'folding'"),
    ],
)
def test_what_is_wrong_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build("reorder", spec)
