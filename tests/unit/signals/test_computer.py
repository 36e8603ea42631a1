"""Signals from providers: which are called, with which candidates, and in how many batches."""

import numpy as np
import pytest
import torch
from dataflex_mega.signals.computer import SignalComputer

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers import registry as providers
from dataflex_mega.providers.registry import Entry, check, wants_targets
from dataflex_mega.registry import build


class Rows:
    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def fetch(self, rows):
        return [(np.full(3, self.first + r), np.full(3, self.first + r)) for r in rows.tolist()]


def computer_of(rank, ranks, providers):
    def forward(batch):
        raise AssertionError("nobody asked for losses")

    pool = SamplePool([Domain("a", Rows(7, 10)), Domain("b", Rows(4, 50))])
    return SignalComputer(pool, lambda samples: collate(samples, 0), forward, 2, rank, ranks, providers=providers)


class Asks(Selector):
    signals = frozenset()

    def __init__(self, *signals):
        self.signals = frozenset(signals)

    def score(self, table):
        return table["length"]

    def select(self, scores, count, context, rng):
        return torch.arange(count)


def test_a_provider_sees_each_ranks_candidates_in_equally_many_batches():
    num_batches = []

    def first_token(computer, ids):
        batches = list(computer.batches(ids))
        num_batches.append(len(batches))
        first_tokens = [int(sample.input_ids[0]) for samples, count in batches for sample in samples[:count]]
        return {"first": torch.tensor(first_tokens), "twice": torch.tensor(first_tokens) * 2}

    tables = [computer_of(rank, 3, {"first": first_token}).table(frozenset({"first"})) for rank in range(3)]
    assert len(set(num_batches)) == 1
    assert torch.cat([t["first"] for t in tables]).tolist() == [*range(10, 17), *range(50, 54)]
    assert torch.cat([t["twice"] for t in tables])[3] == 26
    assert [len(t["first"]) for t in tables] == computer_of(0, 3, {}).rank_counts()


def test_a_provider_that_nobody_asks_for_is_not_called():
    def never(computer, ids):
        raise AssertionError("called")

    assert computer_of(0, 1, {"dear": never}).table(frozenset()).signals == {}


def test_unknown_signals_and_engines_without_one_are_named():
    entries = {"length": Entry(lambda run, engine, selector: lambda computer, ids: {}, engines=("fsdp",), targets=True)}
    check("fsdp", Asks("length", "loss"), entries)
    check("megatron", None, entries)
    with pytest.raises(ConfigError, match=r"Asks needs a signal 'lenght', which nobody makes.*length"):
        check("fsdp", Asks("lenght"), entries)
    with pytest.raises(ConfigError, match=r"'length', which engine: megatron does not have; engine: fsdp has"):
        check("megatron", Asks("length"), entries)
    assert wants_targets(Asks("length"), entries) and wants_targets(Asks("gradient_sgd"), entries)
    assert not wants_targets(Asks("loss"), entries) and not wants_targets(None, entries)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("selector", {"name": "coincide"}, r"selector\.coincide\.embedding_layers: .* set \[-1\], found null"),
        ("selector", {"name": "coincide", "embedding_layers": [1, -1]}, r"found \[1, -1\]"),
        (
            "weighter", {"name": "joint_update_aware", "embed_layer": 2},
            r"weighter\.joint_update_aware\.embed_layer: .* set -1, found \[2\]",
        ),
    ],
)  # fmt: skip
def test_layers_that_megatron_cannot_capture_are_refused_by_name(kind, spec, message):
    algorithm = build(kind, spec)
    providers.check_layers("fsdp", kind, spec["name"], algorithm)
    with pytest.raises(ConfigError, match=message):
        providers.check_layers("megatron", kind, spec["name"], algorithm)


def test_the_last_layer_and_algorithms_without_layers_are_fine_on_megatron():
    last = {"name": "coincide", "embedding_layers": [-1]}
    for kind, spec in (("selector", last), ("weighter", {"name": "adapt"}), ("selector", {"name": "loss"})):
        providers.check_layers("megatron", kind, spec["name"], build(kind, spec))
