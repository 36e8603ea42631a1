"""Names, specs and parameters of algorithms: what is right is built, what is wrong is named."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from dataflex_mega import algorithms
from dataflex_mega.algorithms.mixers.odm import Odm
from dataflex_mega.errors import ConfigError
from dataflex_mega.registry import (
    CONTRACTS,
    build,
    get_parameters,
    list_builtin_names,
    load_class,
    validate,
)

PLUG_IN = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from dataflex_mega.algorithms.base import Mixer

@dataclass
class Evenly(Mixer):
    sharpness: float = 2.0
    table: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError("sharpness must not be negative")

    def proportions(self, context, rng):
        return torch.ones(2).double() / 2

@dataclass
class Needs(Mixer):
    path: str

    def proportions(self, context, rng):
        return torch.ones(2).double() / 2

@dataclass
class Vague(Mixer):
    value: Unknown = None

    def proportions(self, context, rng):
        return torch.ones(2).double() / 2

@dataclass
class Unfinished(Mixer):
    pass

class NoDataclass(Evenly):
    pass

class Other:
    pass

def function():
    pass
"""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_plug_in.py").write_text(PLUG_IN)
    (tmp_path / "broken_plug_in.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_plug_in", raising=False)
    return "my_plug_in"


def failure(kind: str, spec: Any) -> str:
    """The message of the ConfigError, from `validate` and `build` alike."""
    with pytest.raises(ConfigError) as checked:
        validate(kind, spec)
    with pytest.raises(ConfigError) as built:
        build(kind, spec)
    assert str(checked.value) == str(built.value) and "\n" not in str(built.value)
    return str(built.value)


MIXERS = ", ".join(list_builtin_names("mixer"))


def test_available_are_the_files() -> None:
    root = Path(str(algorithms.__path__[0]))
    for kind in CONTRACTS:
        files = sorted(p.stem for p in (root / f"{kind}s").glob("*.py") if not p.stem.startswith("_"))
        assert list_builtin_names(kind) == files and files
    with pytest.raises(ValueError, match="kind must be one of selector, mixer, reorder, weighter"):
        list_builtin_names("sorter")


@pytest.mark.parametrize(("kind", "contract"), CONTRACTS.items())
def test_every_name_loads_a_class_of_its_kind(kind: str, contract: type) -> None:
    for name in list_builtin_names(kind):
        assert issubclass(load_class(kind, name), contract)
        validate(kind, name)


@pytest.mark.parametrize(
    "spec", [{"name": "odm", "alpha": 0.8}, {"name": "odm", "params": {"alpha": 0.8}}, {"alpha": 0.8, "name": "odm"}]
)
def test_parameters_stand_beside_the_name_or_under_params(spec: dict[str, Any]) -> None:
    kept = {**spec}
    assert build("mixer", spec) == Odm(alpha=0.8)
    assert spec == kept


@pytest.mark.parametrize(
    "spec", ["odm", {"name": "odm"}, {"name": "odm", "params": None}, {"name": "odm", "params": {}}]
)
def test_a_bare_name_has_the_defaults(spec: Any) -> None:
    assert build("mixer", spec) == Odm()


def test_numbers_and_lists_become_what_the_field_says() -> None:
    odm = build("mixer", {"name": "odm", "reward_scale": 3, "initial_proportions": [1, 2]})
    assert isinstance(odm, Odm)
    assert isinstance(odm.reward_scale, float) and odm.initial_proportions == [1.0, 2.0]
    loss = build("selector", {"name": "loss", "quantiles": [0, 0.5], "focus": "low"})
    assert getattr(loss, "quantiles") == (0.0, 0.5)  # noqa: B009


@pytest.mark.parametrize(
    ("kind", "spec", "parts"),
    [
        ("mixer", "odmm", ["mixer: no mixer is called 'odmm'", "did you mean 'odm'", f"available: {MIXERS}"]),
        ("mixer", "ODM", ["did you mean 'odm'"]),
        ("selector", {"name": "los"}, ["did you mean 'loss'"]),
        ("weighter", "odm", ["no weighter is called 'odm'", "available: ", "loss"]),
        ("mixer", "odm/../static", ["no mixer is called"]),
        ("mixer", {"name": "odm", "alhpa": 0.8}, ["mixer.odm.alhpa: unknown parameter", "did you mean 'alpha'"]),
        ("mixer", {"name": "odm", "params": {"wramup_steps": 1}}, ["mixer.odm.wramup_steps", "'warmup_steps'"]),
        ("mixer", {"name": "odm", "_step": 3}, ["mixer.odm._step: unknown parameter", "odm has: alpha, "]),
        ("mixer", {"name": "static", "fixed": [1.0]}, ["mixer.static.fixed: unknown", "static has: proportions"]),
        ("mixer", {"name": "odm", "alpha": "high"}, ["mixer.odm.alpha: expected a number, found 'high'"]),
        ("mixer", {"name": "odm", "alpha": True}, ["expected a number, found True"]),
        ("mixer", {"name": "odm", "alpha": None}, ["expected a number, found nothing"]),
        ("mixer", {"name": "odm", "warmup_steps": 1.5}, ["expected a whole number, found 1.5"]),
        ("mixer", {"name": "odm", "warmup_steps": False}, ["expected a whole number, found False"]),
        (
            "mixer",
            {"name": "odm", "variant": "papers"},
            ["one of paper, exp3, smoothed_mean, group", "'papers' (did you mean 'paper'?)"],
        ),
        ("mixer", {"name": "odm", "initial_proportions": 0.5}, ["expected a list of numbers, or nothing, found 0.5"]),
        ("mixer", {"name": "odm", "initial_proportions": [0.5, "x"]}, ["expected a list of numbers, or nothing"]),
        ("selector", {"name": "loss", "quantiles": [0.1]}, ["expected a list of a number and a number, found [0.1]"]),
        ("selector", {"name": "random", "replacement": "no"}, ["selector.random.replacement: expected true or false"]),
        ("selector", {"name": "random", "seed": 1.5}, ["expected a whole number, or nothing, found 1.5"]),
        ("mixer", {"name": "odm", "alpha": 1.5}, ["mixer.odm.alpha: must be >= 0 and < 1, found 1.5"]),
        ("mixer", {"name": "odm", "alpha": 0.8, "params": {"alpha": 0.9}}, ["alpha must stand under `params`"]),
        ("mixer", {"name": "odm", "params": [1]}, ["mixer.odm.params: expected a mapping, found [1]"]),
        ("mixer", {"alpha": 0.8}, [f"mixer.name: expected one of {MIXERS}, found None"]),
        ("mixer", {"name": 3}, ["mixer.name: expected one of", "found 3"]),
        ("mixer", ["odm"], ["mixer: expected a name or a mapping with `name`, found ['odm'] (list)"]),
        ("mixer", None, ["mixer: expected a name", "found None"]),
    ],
)
def test_mistakes_are_named(kind: str, spec: Any, parts: list[str]) -> None:
    message = failure(kind, spec)
    assert all(part in message for part in parts), message


def test_a_plug_in_is_built_like_the_others(plug_in: str) -> None:
    mixer = build("mixer", {"name": f"{plug_in}:Evenly", "sharpness": 3, "table": {"a": 1}})
    assert type(mixer).__name__ == "Evenly"
    assert (getattr(mixer, "sharpness"), getattr(mixer, "table")) == (3.0, {"a": 1.0})  # noqa: B009
    assert build("mixer", {"name": f"{plug_in}:Needs", "params": {"path": "x"}})


def test_mistakes_of_plug_ins_are_named(plug_in: str) -> None:
    assert "cannot import 'no_such_module'" in failure("mixer", "no_such_module:X")
    assert "a_package_that_is_not_there" in failure("mixer", "broken_plug_in:X")
    for name in (":X", ".odm:X", "my_plug_in:", "my_plug_in:Evenly:Other", "a b:C"):
        assert f"named package.module:Class, found {name!r}" in failure("mixer", name)
    assert "an annotation of my_plug_in:Vague cannot be resolved" in failure("mixer", f"{plug_in}:Vague")
    assert "has no class 'Evenli' (did you mean 'Evenly'?)" in failure("mixer", f"{plug_in}:Evenli")
    assert "has no class 'function'" in failure("mixer", f"{plug_in}:function")
    assert "must be a subclass of dataflex_mega.algorithms.base.Mixer" in failure("mixer", f"{plug_in}:Other")
    assert "must be a subclass of dataflex_mega.algorithms.base.Weighter" in failure("weighter", f"{plug_in}:Evenly")
    assert "must be decorated with @dataclass" in failure("mixer", f"{plug_in}:NoDataclass")
    assert "lacks proportions" in failure("mixer", f"{plug_in}:Unfinished")
    assert "missing parameter path" in failure("mixer", f"{plug_in}:Needs")
    message = failure("mixer", {"name": f"{plug_in}:Evenly", "sharpness": -1.0})
    assert message == f"mixer.{plug_in}:Evenly: sharpness must not be negative"


OLD_CONTRACT = """
from dataclasses import dataclass
from typing import ClassVar
from dataflex_mega.algorithms.base import Mixer, Reorder, Selector

class OldBase(Selector):
    needs: ClassVar[frozenset] = frozenset({"loss"})

@dataclass
class Old(OldBase):
    def score(self, table):
        return table["loss"]

    def choose(self, scores, count, clock, rng):
        return scores.topk(count).indices

    def accumulate(self, ids, scores, clock):
        return scores

@dataclass
class Halfway(Mixer):
    @property
    def signals(self):
        return frozenset({"loss"})

    def state(self):
        return {}

    def restore(self, state):
        pass

    def proportions(self, context, rng):
        return None

@dataclass
class OldOrder(Reorder):
    reads_scores: ClassVar[bool] = False

    def ranks(self, count, seed):
        return None

@dataclass
class Named(Mixer):
    state: int = 3
    choose: float = 0.5

    def proportions(self, context, rng):
        return None
"""


def test_a_class_of_the_former_contract_is_refused_with_what_replaces_it(plug_in: str, tmp_path: Path) -> None:
    (tmp_path / "my_plug_in.py").write_text(OLD_CONTRACT)
    end = "; see docs/add-an-algorithm.md"
    assert failure("selector", f"{plug_in}:Old") == (
        f"selector: {plug_in}:Old is written for an earlier version: needs is now requests, choose is now select, "
        f"accumulate is now combine_updates{end}"
    )
    assert failure("mixer", f"{plug_in}:Halfway") == (
        f"mixer: {plug_in}:Halfway is written for an earlier version: signals is now requests, state is now state_dict, "
        f"restore is now load_state_dict{end}"
    )
    assert failure("reorder", f"{plug_in}:OldOrder") == (
        f"reorder: {plug_in}:OldOrder is written for an earlier version: ranks is now rank_order, "
        f"reads_scores is now uses_scores{end}"
    )
    assert set(get_parameters("mixer", f"{plug_in}:Named")) == {"state", "choose"}, "a parameter may have any name"


def test_a_former_name_is_read_with_a_note() -> None:
    spec = {"name": "rho1", "keep": 0.5}
    assert validate("weighter", spec) == ["weighter.rho1.keep is now keep_ratio: 0.5"]
    assert build("weighter", spec) == build("weighter", {"name": "rho1", "keep_ratio": 0.5})
    message = failure("weighter", {**spec, "keep_ratio": 0.5})
    assert message == "weighter.rho1.keep: is the former name of keep_ratio, which is set too; drop keep"


def test_parameters_describe_themselves() -> None:
    found = get_parameters("mixer", "odm")
    assert list(found)[:2] == ["alpha", "warmup_steps"] and not any(name.startswith("_") for name in found)
    assert (found["alpha"].type_text, found["alpha"].default) == ("float", 0.9)
    static = get_parameters("mixer", "static")["proportions"]
    assert (static.attribute, static.type_text, static.default) == ("fixed", "list[float] | None", None)
    assert get_parameters("selector", "loss")["quantiles"].type_text == "tuple[float, float]"


def test_a_missing_default_is_marked(plug_in: str) -> None:
    assert get_parameters("mixer", f"{plug_in}:Needs")["path"].default is dataclasses.MISSING


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("selector", {"name": "random", "seed": -7}, "selector.random.seed: must be >= 0, found -7"),
        ("selector", {"name": "coincide", "temperature": -1}, "selector.coincide.temperature: must be > 0, found -1"),
        ("weighter", {"name": "rho1", "keep_ratio": 2}, "weighter.rho1.keep_ratio: must be > 0 and <= 1, found 2"),
        (
            "mixer",
            {"name": "static", "proportions": [0, 0]},
            "mixer.static.proportions: must be finite, >= 0 and not all",
        ),
        (
            "selector",
            {"name": "icons", "task_boundaries": []},
            "selector.icons.task_boundaries: must have at least one",
        ),
        (
            "mixer",
            {"name": "ado", "ignore_steps": 9, "start_step": 9},
            "mixer.ado.ignore_steps: must be below start_step",
        ),
    ],
)
def test_declared_ranges_hold_for_every_algorithm(kind: str, spec: dict[str, Any], message: str) -> None:
    assert failure(kind, spec).startswith(message)


def test_every_way_of_making_an_algorithm_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^mixer\.odm\.alpha: must be >= 0 and < 1, found -1$"):
        Odm(alpha=-1)


def test_every_number_of_an_algorithm_has_a_range() -> None:
    free = {"min_irreducible", "embedding_layer", "embed_layer", "target_num_batches", "folding_ratio"}
    for kind in CONTRACTS:
        for name in list_builtin_names(kind):
            for parameter in get_parameters(kind, name).values():
                number = {"int", "float"} & set(parameter.type_text.replace("[", " ").replace("]", " ").split())
                assert not number or parameter.range_text or parameter.name in free, (kind, name, parameter.name)


def test_a_plug_in_declares_ranges_too(plug_in: str, tmp_path: Path) -> None:
    (tmp_path / "my_plug_in.py").write_text(
        PLUG_IN.replace("    sharpness: float", "    sharpness: Annotated[float, Range(lt=9)]").replace(
            "import torch\nfrom dataflex_mega.algorithms.base import Mixer\n",
            "from typing import Annotated\nimport torch\nfrom dataflex_mega.algorithms.base import Mixer, Range\n",
        )
    )
    message = failure("mixer", {"name": f"{plug_in}:Evenly", "sharpness": 9})
    assert message == f"mixer.{plug_in}:Evenly.sharpness: must be < 9, found 9"
