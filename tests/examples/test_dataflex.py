"""Every component of DataFlex 1.1, from the table of docs/status.md: its example trains or is refused."""

import json
import re

import numpy as np
import pytest
import yaml

from tests.support import corpus, runs
from tests.unit.config.test_dataflex_components import ROLES, SHIPPED

pytestmark = pytest.mark.exhaustive

FILES = {"select": "selector", "mix": "mixer", "reorder": "reorder", "weight": "weighter", "lego": "pipeline"}
REORDERS = (
    "sorting", "shuffle", "segment", "folding", "zigzag", "stair", "saw", "dynamic_saw", "dynamic_folding",
    "reuse_selector_scores",
)  # fmt: skip
PIPELINES = ("hierarchical", "select_then_reorder", "mix_then_weight", "select_only")
STEPS = 3
SMALL = {"cutoff_len": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_samples": 24}


def rows():
    """(role, component, example, what the FSDP and the Megatron column say) of the table of docs/status.md."""
    text = (corpus.ROOT / "docs" / "status.md").read_text()
    line = r"^\| (\w+) \| `(\w+)` \| `(examples/dataflex/\w+\.yaml)`[^|]* \| (\w+) \| (\w+) \|$"
    return re.findall(line, text, re.MULTILINE)


def test_the_table_has_every_component():
    named = {(role, name) for role, name, *_ in rows()}
    expected = {(ROLES[section], name) for section, entries in SHIPPED.items() for name in entries}
    expected |= {("reorder", name) for name in REORDERS} | {("pipeline", name) for name in PIPELINES}
    assert named == expected and len(rows()) == len(expected)
    for role, _, path, fsdp, megatron in rows():
        assert FILES[path.split("/")[-1].removesuffix(".yaml")] == role
        assert fsdp == "yes" and megatron in ("yes", "refused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and models under the names that the examples use; every row carries a score."""
    root = corpus.write_experts(corpus.write(tmp_path_factory.mktemp("dataflex")))
    data = root / "data"
    scored = [{**row, "score": (7 * number) % 23} for number, row in enumerate(corpus.instructions())]
    (data / "scored.json").write_text(json.dumps(scored))
    info = json.loads((data / "dataset_info.json").read_text())
    alpaca = {"demo_alpaca": {"file_name": "scored.json"}, "demo_alpaca_validation": info["sft"]}
    texts = {f"demo_{new}": info[old] for new, old in (("c4", "prose"), ("wiki", "tables"), ("python", "code"))}
    (data / "dataset_info.json").write_text(json.dumps({**info, **alpaca, **texts}))
    corpus.write_reference(root)
    np.save(root / "near.npy", np.arange(24).reshape(2, -1))
    np.save(root / "tsds.npy", np.full(24, 1 / 24))
    (root / "step_10.json").write_text(json.dumps({"indices": list(range(12)), "metric": {"loss": [1.0] * 12}}))
    return root


def further(folder, name):
    """Keys that a component cannot do without, and sizes that make it quick."""
    return {
        "nice": {"selector": {"mc_samples": 2, "max_new_tokens": 4}},
        "near": {"selector": {"indices_path": str(folder / "near.npy")}},
        "tsds": {"selector": {"probs_path": str(folder / "tsds.npy")}},
        "dynamic_moe": {"model_name_or_path": str(folder / "moe")},
        "doremi": {"reference_model": str(folder / "reference")},
        "reuse_selector_scores": {"reorder": {"score_params": {"cache_path": str(folder / "step_10.json")}}},
    }.get(name, {})


def config_of(folder, row, engine):
    role, name, path, *_ = row
    config = yaml.safe_load((corpus.ROOT / path).read_text())
    config.update(
        model_name_or_path=str(folder / "model"), dataset_dir=str(folder / "data"), component_name=name,
        output_dir=str(folder / f"{role}-{name}-{engine}"), warmup_step=1, save_strategy="no", tensorboard=False,
        plot_loss=False, num_train_epochs=1.0, **SMALL,
    )  # fmt: skip
    if "update_step" in config:
        config.update(update_step=1, update_times=STEPS - 1)
    else:
        config["train_step"] = STEPS
    if engine == "megatron":
        config.update(engine="megatron", tensor_model_parallel_size=2, sequence_parallel=True)
        if name == "coincide":  # the other layers are on other pipeline stages
            config["selector"] = {"embedding_layers": [-1]}
    return {**config, **further(folder, name)}


def check(folder, engine, world, column):
    cases = {(row[0], row[1]): (config_of(folder, row, engine), row[column]) for row in rows()}
    finished = runs.train_many(world, [config for config, _ in cases.values()], plain=world == 1)
    for (key, (config, expected)), (status, stderr) in zip(cases.items(), finished, strict=True):
        if expected == "yes":
            assert status == 0, f"{key}: {stderr}"
            assert [row["step"] for row in runs.rows(config)] == list(range(1, STEPS + 1)), key
        else:
            lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(lines) == 1 and key[1] in lines[0] and engine in lines[0], f"{key}: {stderr}"


def test_every_example_trains_on_the_fsdp_engine(folder):
    check(folder, "fsdp", 1, 3)


def test_every_example_trains_on_the_megatron_engine_or_is_refused_by_name(folder):
    check(folder, "megatron", 2, 4)
