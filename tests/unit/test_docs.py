"""What README and docs say is checked against the code: paths, keys, parameters, commands, and the plug-in they show."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Selector, Weighter
from dataflex_mega.config import reorder_arguments
from dataflex_mega.config.components import flatten_spec
from dataflex_mega.config.identity import FREE_KEYS
from dataflex_mega.config.parse import MEGATRON_KEYS, OUR_KEYS, parse_config
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.args import argument_types
from dataflex_mega.registry import CONTRACTS, build, get_parameters, list_builtin_names, validate
from tests.support.corpus import tool
from tests.unit.algorithms import test_contract as contract
from tests.unit.algorithms.examples import DOMAINS, generator, observed, stats, update_context

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
        ROOT / "examples" / "slimpajama" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
)
PLUGINS = "examples.plugins.my_algorithms"
CURRICULUM, MIDDLE, CLIPPED = (f"{PLUGINS}:{name}" for name in ("Curriculum", "MiddleLoss", "Clipped"))
WHOLE_RUN = {"model_name_or_path", "output_dir"}  # a YAML that has these is a complete configuration
READERS_OWN = re.compile(r"my_package\.|loss_share|uncertain")  # a module or an algorithm that the reader writes
markdown_tables = tool("markdown_tables")
MADE = re.compile(r"\.demo/|docs/_build")  # paths that exist only after a command


def pages() -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [str(block) for block in found]


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> Iterator[list[list[str]]]:
    """Every table as rows of cells, header first, the ruler left out. `\\|` stays in a cell."""
    for lines in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in str(lines).splitlines()]
        yield [[cell.strip() for cell in row] for number, row in enumerate(rows) if number != 1]


def table(page: str, header: str) -> list[list[str]]:
    """The rows of the one table on a page whose header line holds these words."""
    found = [rows for rows in tables((ROOT / page).read_text()) if header in " | ".join(rows[0])]
    assert len(found) == 1, f"{page}: {len(found)} tables with {header!r}"
    return found[0][1:]


# -- paths and commands ------------------------------------------------------------------------------------------------


@pages()
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(page)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in slugs, f"{page.name}: {target}"


@pages()
def test_named_files_of_the_repository_exist(page: Path) -> None:
    folders = "dataflex_mega|docs|examples|tests|tools|configs"
    named = re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", page.read_text())
    shown = {  # files that the reader writes
        "dataflex_mega/algorithms/mixers/my_mixer.py",
        "dataflex_mega/algorithms/mixers/loss_share.py",
        "tests/unit/algorithms/mixers/test_loss_share.py",
    }
    for path in {str(n) for n in named} - shown:
        assert MADE.search(path) or (ROOT / path).exists(), f"{page.name}: {path}"


@pages()
def test_named_commands_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    in_code = "\n".join([*blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", without_code(page))])
    assert set(re.findall(r"^make ([a-z-]+)", in_code, re.MULTILINE)) <= targets
    for module in re.findall(r"-m (dataflex_mega[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{page.name}: {module}"


@pages()
def test_every_row_of_a_table_has_the_cells_of_its_header(page: Path) -> None:
    assert list(markdown_tables.breaches(page.read_text())) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("| a | b |\n|---|---|\n| 1 |", 3),
        ("| a | b |\n|---|---|\n| 1 | 2 | 3 |", 3),
        ("| a | b |\n|---|\n| 1 | 2 |", 2),
        ("| a | b |\n|---|---|\n| 1 | 2", 3),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n", 5),
        ("text\n| a |\n|---|\n", 2),
    ],
)
def test_a_broken_table_is_named_by_its_line(text: str, line: int) -> None:
    assert {number for number, _ in markdown_tables.breaches(text + "\n")} == {line}


def test_escaped_bars_and_code_are_no_cells() -> None:
    text = "| a | b |\n|:---|---:|\n| `x \\| y` | 2 |\n\n```text\n| 1 |\n```\n"
    assert list(markdown_tables.breaches(text)) == []


def test_every_page_is_in_the_table_of_contents() -> None:
    index = ROOT / "docs" / "index.md"
    listed = re.search(r"^```{toctree}\n(.*?)^```", index.read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = {line for line in listed.group(1).split() if not line.startswith(":")} - {"generated/index"}
    assert names == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer_keys() -> dict[str, str]:
    return argument_types()


@pages()
def test_yaml_has_known_keys_and_sound_roles(page: Path, peer_keys: dict[str, str]) -> None:
    for block in blocks(page, "yaml"):
        config = yaml.safe_load(block)
        assert set(config) <= OUR_KEYS | MEGATRON_KEYS | set(peer_keys), f"{page.name}:\n{block}"
        for role in CONTRACTS:
            if role in config and not READERS_OWN.search(str(config[role])):
                validate(
                    role,
                    reorder_arguments.read_reorder(flatten_spec(role, config[role]))[0]
                    if role == "reorder"
                    else config[role],
                )
        if set(config) >= WHOLE_RUN:
            parse_config(config, peer_keys)


@pages()
def test_code_blocks_can_be_read(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
    for block in blocks(page, "json"):
        json.loads(block)


def test_yaml_of_the_pages_is_found_at_all() -> None:
    assert sum(len(blocks(page, "yaml")) for page in PAGES) > 8


def listed_keys(header: str) -> set[str]:
    return {key for row in table("docs/checkpoints.md", header) for key in re.findall(r"`(\w+)`", row[1])}


def test_keys_that_may_change_between_runs_are_those_of_the_code(peer_keys: dict[str, str]) -> None:
    free, fixed = listed_keys("keys that may change"), listed_keys("keys that must stay")
    assert free and free <= FREE_KEYS
    assert fixed and not fixed & FREE_KEYS and fixed <= OUR_KEYS | set(peer_keys)


def test_keys_that_dataflex_users_know_exist() -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text()
    same = re.search(r"What is the same: the keys and their names \((.*?)\)", page, re.DOTALL)
    assert same is not None
    assert set(re.findall(r"`(\w+)`", same.group(1))) <= OUR_KEYS


# -- algorithms --------------------------------------------------------------------------------------------------------


def documented() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> default by parameter, as docs/algorithms.md has them."""
    parts = re.split(r"^### (\w+): `(\w+)`$", (ROOT / "docs" / "algorithms.md").read_text(), flags=re.MULTILINE)
    found = {}
    for kind, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        rows = next((rows for rows in tables(text) if rows[0] == ["parameter", "default", "meaning"]), [])[1:]
        found[kind, name] = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    return found


def test_every_algorithm_is_documented_with_its_parameters_and_defaults() -> None:
    expected = {}
    for kind in CONTRACTS:
        for name in list_builtin_names(kind):
            defaults = {key: parameter.default for key, parameter in get_parameters(kind, name).items()}
            expected[kind, name] = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    assert documented() == expected


def test_variants_and_strategies_are_those_of_the_code() -> None:
    variants = {row[0].strip("`") for row in table("docs/algorithms.md", "variant | reward")}
    assert variants == set(re.findall(r"'(\w+)'", get_parameters("mixer", "odm")["variant"].type_text))
    strategies = {row[0].strip("`") for row in table("docs/algorithms.md", "strategy | f")}
    assert strategies == set(re.findall(r"'(\w+)'", get_parameters("weighter", "loss")["strategy"].type_text))


# -- the plug-in -------------------------------------------------------------------------------------------------------


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the contract tests have to give a plug-in that has a parameter without a default."""
    monkeypatch.setitem(contract.SPECS, f"mixer.{CURRICULUM}", {"final": [1, 1, 2], "tokens": 100})


@pytest.mark.parametrize(
    ("check", "name"),
    [
        (contract.test_mixer_gives_proportions_again_and_again, CURRICULUM),
        (contract.test_mixer_leaves_its_inputs_as_they_were, CURRICULUM),
        (contract.test_selector_chooses_the_count_from_its_candidates, MIDDLE),
        (contract.test_scores_of_a_share_are_the_scores_of_the_whole, MIDDLE),
        (contract.test_weights_move_with_their_samples, CLIPPED),
    ],
)
def test_plug_ins_keep_the_contract(check: Callable[[str], None], name: str, needed: None) -> None:
    check(name)


@pytest.mark.parametrize(("kind", "name"), [("mixer", CURRICULUM), ("selector", MIDDLE), ("weighter", CLIPPED)])
def test_plug_ins_survive_a_restart_and_say_what_they_are(kind: str, name: str, needed: None) -> None:
    contract.test_state_through_json_continues_bit_by_bit(kind, name)
    contract.test_class_says_what_it_is(kind, name)


@pytest.mark.parametrize("losses", [[2.0], [1.0, 1.0], [1.0, 2.0, 3.0, 5.0, 0.1], [1e-8, 3e4, 7.0]])
def test_the_weighter_gives_weights_with_mean_one(losses: list[float]) -> None:
    contract.test_weighter_gives_weights_with_mean_one(CLIPPED, losses)


def test_the_curriculum_is_a_straight_line_in_tokens() -> None:
    mixer = build("mixer", {"name": CURRICULUM, "final": [0, 1, 1], "tokens": 80})
    assert isinstance(mixer, Mixer)
    mixer.setup(DOMAINS)  # starts at 0.5, 0.3, 0.2
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx([0.5, 0.3, 0.2])
    mixer.observe(stats({0: 1.0, 1: 1.0}, tokens=10.0), DOMAINS.initial_proportions, 1)
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx([0.375, 0.35, 0.275])
    for step in range(2, 9):
        mixer.observe(stats({0: 1.0, 1: 1.0}, tokens=10.0), DOMAINS.initial_proportions, step)
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx([0, 0.5, 0.5])


def test_the_selector_takes_what_is_nearest_to_the_middle() -> None:
    selector = build("selector", {"name": MIDDLE})
    assert isinstance(selector, Selector)
    losses = torch.tensor([9.0, 1.0, 3.0, float("nan"), 2.5, 7.0])
    assert selector.select(losses, 3, update_context(), generator()).tolist() == [2, 4, 1]
    with pytest.raises(DataError, match="6 samples wanted, 5 have a finite loss"):
        selector.select(losses, 6, update_context(), generator())


def test_the_weighter_cuts_both_ends() -> None:
    weighter = build("weighter", {"name": CLIPPED, "most": 1.5})
    assert isinstance(weighter, Weighter)
    samples = observed([1.0, 3.0, 8.0])  # over their mean: 1/4, 3/4, 2; cut: 2/3, 3/4, 3/2
    cut = [2 / 3, 3 / 4, 3 / 2]
    assert weighter.weights(samples, 0, 1).tolist() == pytest.approx([3 * c / sum(cut) for c in cut])
    even = build("weighter", {"name": CLIPPED, "most": 1})
    assert isinstance(even, Weighter) and even.weights(samples, 0, 1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("mixer", {"name": CURRICULUM}, "missing parameter final"),
        ("mixer", {"name": CURRICULUM, "final": [1, -1]}, "final: must be finite, >= 0"),
        ("mixer", {"name": CURRICULUM, "final": [1], "token": 5}, "did you mean 'tokens'"),
        ("selector", {"name": MIDDLE, "quantile": 2.0}, "quantile: must be >= 0 and <= 1, found 2"),
        ("weighter", {"name": CLIPPED, "most": "much"}, "most: expected a number, found 'much'"),
        ("weighter", MIDDLE, "must be a subclass of"),
        ("weighter", f"{PLUGINS}:Cliped", "did you mean 'Clipped'"),
    ],
)
def test_plug_ins_refuse_what_is_wrong(kind: str, spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(kind, spec)


def test_the_curriculum_refuses_another_number_of_domains() -> None:
    mixer = build("mixer", {"name": CURRICULUM, "final": [1, 2]})
    with pytest.raises(ConfigError, match="2 numbers for 3 datasets"):
        mixer.setup(DOMAINS)
    mixer.setup(DomainInfo(("a", "b"), (1, 1), (0.5, 0.5)))
