"""The file of docs/add-a-signal.md, installed as a package: its selector chooses the same samples on both engines."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.support import corpus, packages, runs

ROOT = Path(__file__).resolve().parents[2]


def source_of_the_page():
    page = (ROOT / "docs" / "add-a-signal.md").read_text()
    return re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as site-packages is, with the package in it."""
    return packages.install(tmp_path_factory.mktemp("package"), "my_signals", source_of_the_page())


def train_with_site(config):
    """Train in this process, with the package importable as an installed one is."""
    folder = config.pop("site")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from dataflex_mega import plugins

    plugins._load_installed_plugins.cache_clear()
    return runs.train_here(config)


def chosen(config):
    return json.loads((Path(config["output_dir"]) / "selections" / "step_0.json").read_text())


LAYOUTS = [(1, {}), (2, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})]


@pytest.mark.exhaustive
def test_the_same_samples_are_chosen_on_both_engines_and_any_layout(site, tmp_path):
    folder = corpus.write(tmp_path)
    found = []
    for number, (world, layout) in enumerate([*LAYOUTS, (1, {"engine": "megatron"})]):
        config = runs.base(
            folder, selector="uncertain", update_step=2, update_times=-1, max_steps=2,
            per_device_train_batch_size=8 // (1 if layout or world == 1 else world), max_grad_norm=1.0,
            output_dir=str(tmp_path / f"run{number}"), site=str(site), **layout,
        )  # fmt: skip
        status, heard = runs.train_many(world, [dict(config)], run=train_with_site)[0]
        assert status == 0, heard
        found.append(chosen(config))
    first = found[0]
    assert len(first["indices"]) == 16
    for other in found[1:]:
        assert other["indices"] == first["indices"]
        torch.testing.assert_close(
            torch.tensor(other["metric"]["last_token_entropy"]),
            torch.tensor(first["metric"]["last_token_entropy"]),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_the_signal_is_the_entropy_by_an_independent_formula(site, tmp_path):
    from transformers import AutoModelForCausalLM

    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import prepare

    folder = corpus.write(tmp_path)
    keys = {"dataset": "code", "update_step": 1, "update_times": -1, "max_steps": 1}
    config = runs.base(folder, **keys, selector="uncertain", output_dir=str(tmp_path / "run"), site=str(site))
    status, heard = runs.train_many(1, [dict(config)], run=train_with_site, plain=True)[0]
    assert status == 0, heard
    run = prepare(
        parse_config(runs.base(folder, **keys, selector="loss", output_dir=str(tmp_path / "x")), argument_types())
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    entropies = []
    with torch.no_grad():
        for sample in run.data.pool.fetch(torch.arange(len(run.data.pool)).numpy()):
            probabilities = model(torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0, -1].softmax(-1)
            entropies.append(float(-(probabilities * probabilities.log()).sum()))
    order = sorted(range(len(entropies)), key=lambda i: -entropies[i])[:8]
    selection = chosen(config)
    assert selection["indices"] == sorted(order)
    expected = torch.tensor([entropies[i] for i in selection["indices"]])
    torch.testing.assert_close(torch.tensor(selection["metric"]["last_token_entropy"]), expected, rtol=1e-4, atol=1e-5)
