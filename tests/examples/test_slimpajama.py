"""The runs of examples/slimpajama: each trains with its own keys, small, on a corpus with SlimPajama's seven domains.

DoReMi's three hand their files on, and the tool measures the perplexity that training logged.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataflex_mega.config.load import load
from dataflex_mega.corpus import command
from tests.support import corpus, runs

pytest.importorskip("megatron.core")
PLACE = corpus.ROOT / "examples" / "slimpajama"
SINGLE = sorted(path for path in PLACE.glob("*.yaml") if path.stem != "compare")
STEPS = 2
NAMES = ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in SlimPajama's schema under its seven names, and a corpus of it."""
    root = corpus.write(tmp_path_factory.mktemp("slimpajama"))
    texts = [text for documents in corpus.domains(28).values() for text in documents]
    rows = [{"text": t, "meta": {"redpajama_set_name": f"RedPajama{NAMES[i % 7]}"}} for i, t in enumerate(texts)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--domain-field", "meta.redpajama_set_name", "--tokenizer", str(root / "model")]
    assert command.main([str(root / "rows.jsonl"), *options, "--output", str(root / "corpus")]) == 0
    return root


def shrunk(path, folder, **more):
    """One of the files with the places and sizes of a test; layout, mixture and schedule are its own."""
    config = yaml.safe_load(path.read_text())
    natural = config.get("init_mixture_proportions_file", "").endswith("manifest.json")
    config.update(
        model_name_or_path=str(folder / "model"), corpus_dir=str(folder / "corpus"),
        eval_corpus_dir=str(folder / "corpus"), eval_dataset="RedPajamaBook", cutoff_len=32, max_steps=STEPS,
        output_dir=str(folder / path.parent.name / path.stem), per_device_train_batch_size=2, eval_steps=STEPS,
        gradient_accumulation_steps=1, per_device_eval_batch_size=32, tensorboard=False,
        **({"init_mixture_proportions_file": str(folder / "corpus" / "manifest.json")} if natural else {}), **more,
    )  # fmt: skip
    return config


@pytest.mark.parametrize(
    "path", [*SINGLE, *sorted(PLACE.glob("doremi_*/*.yaml"))], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_the_arithmetic_of_a_file_is_what_its_readme_says(path):
    keys = load(str(path))
    large = "30b" in str(path.relative_to(PLACE))
    ranks, steps = (32, 14300) if large else (8, 5720)
    windows = ranks * keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"]
    assert windows == (512 if large else 256) and keys["max_steps"] == steps
    assert windows * keys["cutoff_len"] * steps == pytest.approx(30e9 if large else 6e9, rel=1e-3)
    assert len(keys["dataset"].split(",")) == 7


def test_every_file_trains_and_doremi_hands_its_files_on(folder):
    configs = {path.stem: shrunk(path, folder) for path in SINGLE}
    for size in ("doremi_6b", "doremi_30b"):
        out = [folder / size / f"step{n}" for n in (1, 2, 3)]
        more = (
            {},
            {"reference_model": str(out[0])},
            {"init_mixture_proportions_file": str(out[1] / "doremi_average_weights.json")},
        )
        for n, handed in enumerate(more, 1):
            configs[f"{size} {n}"] = shrunk(PLACE / size / f"step{n}.yaml", folder, **handed)
    for name, (status, stderr) in zip(configs, runs.train_many(1, list(configs.values())), strict=True):
        assert status == 0, f"{name}: {stderr}"
    tokens = {
        d["name"]: d["proportion"] for d in json.loads((folder / "corpus" / "manifest.json").read_text())["domains"]
    }
    for name in ("static_6b", "odm_30b", "ado_6b", "doremi_30b 1"):
        assert runs.rows(configs[name])[0]["proportions"] == pytest.approx(tokens), name
    for size in ("doremi_6b", "doremi_30b"):
        averages = json.loads((folder / size / "step2" / "doremi_average_weights.json").read_text())
        proportions = runs.rows(configs[f"{size} 3"])[0]["proportions"]
        assert proportions == pytest.approx(
            dict(zip(averages["domain_names"], averages["average_weights"], strict=True))
        )
    measured_alike(folder, configs["odm_6b"])


def measured_alike(folder, config):
    """What the run logged of a domain is what the tool measures on the corpus."""
    history = json.loads((Path(config["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    logged = [row["eval_RedPajamaBook_perplexity"] for row in history if "eval_RedPajamaBook_perplexity" in row][-1]
    tool, out = corpus.ROOT / "tools" / "eval_perplexity.py", folder / "perplexity.json"
    arguments = [
        "--model",
        config["output_dir"],
        "--corpus",
        str(folder / "corpus"),
        "--dataset",
        "RedPajamaBook",
        "--bf16",
    ]
    done = subprocess.run(
        [sys.executable, str(tool), *arguments, "--cutoff-len", "32", "--output", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())["domains"]["RedPajamaBook"]["perplexity"] == pytest.approx(logged, rel=5e-3)
