"""Whole runs that order their samples: the same on 1, 2 and 4 processes, bit-equal when continued, on both engines."""

import pytest

from tests.support import corpus, runs

SAW = {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}
DYNAMIC = {"kind": "dynamic", "polarity": "higher_later"}
WINDOWS = {"warmup_step": 1, "update_step": 2, "update_times": 3, "max_steps": 7, "max_samples": 4}
CASES = {
    "folding": {"reorder": {"name": "folding", "layers": 3, **DYNAMIC}, **WINDOWS},
    "gradients": {
        "reorder": {
            "name": "sorting", **DYNAMIC, "score_source": "selector", "score_params": {"selector": "less", "max_samples": 9}
        },
        "eval_dataset": "tables", **WINDOWS, "update_step": 3,
    },
    "mixed": {
        "reorder": {"pattern": "saw", "name": "mine", "pattern_params": SAW, **DYNAMIC}, "mixer": "odm",
        "init_mixture_proportions": [0.5, 0.3, 0.2], **WINDOWS,
    },
    "selected": {
        "selector": "loss", "reorder": {"name": "zigzag", "layers": 2, **DYNAMIC, "window_size": 3}, "weighter": "loss",
        "lookahead": "exact", **WINDOWS,
    },
}  # fmt: skip
SPLITS = {1: [(8, 1), (2, 4)], 2: [(2, 2)], 4: [(1, 2)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("orders"))


def cases_of(folder, world):
    return {
        (name, number): runs.base(
            folder,
            output_dir=str(folder / f"{name}-{world}-{number}"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            **keys,
        )
        for name, keys in CASES.items()
        for number, (micro, accumulation) in enumerate(SPLITS[world])
    }


@pytest.fixture(scope="module")
def finished(folder):
    found = {}
    for world in SPLITS:
        cases = cases_of(folder, world)
        for key, (status, heard) in zip(cases, runs.forked_many(world, list(cases.values())), strict=True):
            assert status == 0, f"{key} on {world}: {heard}"
            found[(key[0], world, key[1])] = cases[key]
    return found


def test_the_same_plans_draws_and_losses_however_a_batch_is_cut(finished):
    for (name, world, number), config in finished.items():
        log, log0 = runs.rows(config), runs.rows(finished[name, 1, 0])
        for row, row0 in zip(log, log0, strict=True):
            where = f"{name} on {world} processes, split {number}, step {row['step']}"
            assert row["drawn"] == row0["drawn"], where
            if name != "mixed":  # proportions of a mixer carry the last bits of the losses
                assert row["plan"] == row0["plan"], where
            for key in ("loss", "objective", "grad_norm"):
                assert row[key] == pytest.approx(row0[key], rel=1e-5), where
        orders, orders0 = (runs.rows(c, "orders.jsonl") for c in (config, finished[name, 1, 0]))
        assert (
            [o["step"] for o in orders] == [o["step"] for o in orders0] == list(range(1, 7, CASES[name]["update_step"]))
        )


def test_what_was_scored(finished):
    """The warm-up's samples and those of earlier windows are not scored again."""
    scored = {name: [o["scored"] for o in runs.rows(finished[name, 1, 0], "orders.jsonl")] for name in CASES}
    assert scored["gradients"] == [9, 9]
    assert scored["folding"][0] - scored["folding"][1] == scored["folding"][1] - scored["folding"][2] == 16


def test_easy_samples_come_before_hard_ones(folder):
    """With the loss of the untrained model as a fixed score, sorting up and down train on what they say."""
    config = runs.base(folder, output_dir=str(folder / "up"), max_steps=4, max_samples=4, learning_rate=1.0e-9,
                       reorder={"name": "sorting", "kind": "static", "score_source": "model_loss"})  # fmt: skip
    down = {**config, "reorder": {**config["reorder"], "ascending": False}, "output_dir": str(folder / "down")}
    assert [status for status, _ in runs.forked_many(1, [config, down])] == [0, 0]
    losses = [row["loss"] for row in runs.rows(config)]
    assert losses == sorted(losses) and losses[-1] > losses[0] + 0.01
    other = [row["loss"] for row in runs.rows(down)]
    assert other == sorted(other, reverse=True) and other[0] > losses[-1]
