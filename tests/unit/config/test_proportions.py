"""Proportions from a file, and the keys that limit a mixer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex_mega.config import proportions
from dataflex_mega.config.dataflex_parse import parse
from dataflex_mega.errors import ConfigError
from dataflex_mega.run.averages import write_averages


def start(keys: dict[str, Any], sizes: tuple[int, ...], names: tuple[str, ...] | None = None) -> tuple[float, ...]:
    parsed = parse(keys)
    return proportions.initial_proportions(parsed.arguments, parsed.roles.specs.get("mixer"), sizes, names)


STATIC = {"mixer": "static"}


KNOWN = (5, torch.tensor([0.1, 0.7, 0.2], dtype=torch.float64))  # as Mixer.average_weights returns them


def test_what_a_run_writes_the_next_one_reads(tmp_path: Path) -> None:
    full, bare = write_averages(tmp_path, "doremi", ("a", "b", "c"), KNOWN)
    assert (full.name, bare.name) == ("doremi_average_weights.json", "doremi_step3_proportions.txt")
    content = json.loads(full.read_text())
    assert set(content) == {"description", "update_times", "domain_names", "average_weights"}
    assert content["update_times"] == 5 and content["domain_names"] == ["a", "b", "c"]
    for path in (full, bare):
        assert proportions.read(str(path)) == [0.1, 0.7, 0.2]
        keys = {**STATIC, "init_mixture_proportions_file": str(path)}
        assert start(keys, (9, 9, 9), ("a", "b", "c")) == pytest.approx((0.1, 0.7, 0.2))


@pytest.mark.parametrize("text", ["0.1, 0.7 0.2", "[0.1, 0.7, 0.2]", "0.1\n0.7\n0.2\n"])
def test_plain_numbers_in_any_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    assert proportions.read(str(tmp_path / "p.txt")) == [0.1, 0.7, 0.2]


def test_another_order_of_the_domains_is_refused(tmp_path: Path) -> None:
    full, _ = write_averages(tmp_path, "doremi", ("a", "b", "c"), KNOWN)
    keys = {**STATIC, "init_mixture_proportions_file": str(full)}
    with pytest.raises(ConfigError, match="is for a, b, c; dataset is b, a, c"):
        start(keys, (9, 9, 9), ("b", "a", "c"))
    with pytest.raises(ConfigError, match="3 numbers for 2 datasets"):
        start(keys, (9, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected average_weights or a list of numbers"),
        ("[]", "expected average_weights or a list of numbers"),
        ("[1, true]", "expected average_weights or a list of numbers"),
        ("half of each", "line 1"),
        ("[1, -1]", "finite, >= 0 and not all 0"),
        ("[0, 0]", "finite, >= 0 and not all 0"),
    ],
)
def test_a_file_without_proportions_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(ConfigError, match=rf"init_mixture_proportions_file: .*p\.txt.*{message}"):
        proportions.read(str(tmp_path / "p.txt"))


def test_a_missing_file_and_two_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        parse({**STATIC, "init_mixture_proportions_file": str(tmp_path / "none.json")})
    with pytest.raises(ConfigError, match="init_mixture_proportions is set too"):
        parse({**STATIC, "init_mixture_proportions_file": "p", "init_mixture_proportions": [1, 1]})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixer": "static", "min_proportion": -0.1}, r"min_proportion: must be >= 0 and <= 1, found -0\.1"),
        ({"mixer": "static", "max_proportion": [0.5, 1.5]}, r"max_proportion: must be >= 0 and <= 1, found 1\.5"),
        ({"mixer": "static", "max_epochs": 0}, "max_epochs: must be > 0, found 0"),
        ({"mixer": "static", "max_epochs": []}, "max_epochs: expected a number, or one for each dataset"),
        ({"mixer": "static", "max_epochs": "often"}, "max_epochs: expected a number"),
        ({"weighter": "loss", "max_proportion": 0.5}, "max_proportion: has no effect without a mixer"),
        ({"mixer": "odm", "selector": "loss", "update_step": 1, "max_epochs": 2}, "max_epochs: does not go with a sel"),
        ({"max_epochs": 2}, "max_epochs: has no effect without a role"),
        ({"reference_model": "x"}, "reference_model: has no effect without a role"),
        ({"mixer": "doremi"}, "update_step: must be >= 1 for mixer doremi"),
    ],
)
def test_limits_that_cannot_be_meant_name_their_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(keys)


def test_numbers_and_lists_are_taken() -> None:
    arguments = parse({"mixer": "static", "min_proportion": 0.1, "max_epochs": [2, 3.5]}).arguments
    assert arguments.min_proportion == 0.1 and arguments.max_epochs == [2, 3.5]


def test_natural_proportions_of_a_corpus_are_found_by_name(tmp_path: Path) -> None:
    domains = [{"name": name, "tokens": tokens} for name, tokens in (("a", 100), ("b", 300), ("c", 600))]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"format": "dataflex_mega corpus", "version": 1, "domains": domains}))
    keys = {"mixer": "odm", "update_step": 1, "init_mixture_proportions_file": str(path)}
    assert start(keys, (9, 9, 9), ("c", "a", "b")) == pytest.approx((0.6, 0.1, 0.3))
    assert start(keys, (9, 9), ("b", "a")) == pytest.approx((0.75, 0.25)), "of those that are drawn"
    with pytest.raises(ConfigError, match=r"manifest.json has no domain 'aa' \(did you mean 'a'"):
        start(keys, (9, 9), ("aa", "b"))
    with pytest.raises(ConfigError, match="init_mixture_proportions_file: has no effect with mixture_sample_rule"):
        parse({"mixer": "static", "mixture_sample_rule": "uniform", "init_mixture_proportions_file": str(path)})
