"""Perplexity of held-out text: exp of the model's own loss for any batch size, as a function and in a run."""

import math

import numpy as np
import pytest
import torch

from dataflex_mega.compare import perplexity
from dataflex_mega.compare.perplexity import EvaluationSums
from dataflex_mega.data.pool import Domain, SamplePool
from tests.support import corpus


class Rows:
    """Rows of different lengths; the first `silent` labels of each carry no loss."""

    def __init__(self, lengths, silent, seed):
        rng = np.random.default_rng(seed)
        self.rows = []
        for length in lengths:
            ids = rng.integers(4, 260, size=length)
            self.rows.append((ids, np.where(np.arange(length) < silent, -100, ids)))

    def __len__(self):
        return len(self.rows)

    def fetch(self, rows):
        return [self.rows[row] for row in rows]


@pytest.fixture(scope="module")
def model():
    maker = corpus.tool("tiny_model")
    return maker.make_model(maker.ModelOptions(hidden=32, layers=2, heads=4, kv_heads=2, vocab=260)).eval()


DOMAINS = {"even": Rows([9, 16, 16, 12, 7], 0, 1), "answers": Rows([20, 11, 6], 5, 2)}


def by_hugging_face(model, rows):
    """Targets, and the mean loss of all of them from the losses that the model itself computes, row by row."""
    total, tokens = 0.0, 0
    for ids, labels in rows.rows:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor(ids)[None], labels=torch.tensor(labels)[None]).loss
        count = int((labels[1:] != -100).sum())
        total, tokens = total + float(loss) * count, tokens + count
    return tokens, total / tokens


@pytest.mark.parametrize("size", [1, 3, 8])
def test_perplexity_is_exp_of_the_models_own_loss_on_the_same_rows_for_any_batch_size(model, size):
    pool = SamplePool([Domain(name, rows) for name, rows in DOMAINS.items()])
    loss, tokens = perplexity.domain_sums(model, pool, (0, size, None))
    for d, rows in enumerate(DOMAINS.values()):
        count, mean = by_hugging_face(model, rows)
        assert int(tokens[d]) == count
        assert float(loss[d] / tokens[d]) == pytest.approx(mean, rel=2e-6)
        measured = EvaluationSums(float(loss[d]), int(tokens[d]), len(rows)).as_dict()
        assert measured["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_progress_counts_batches(model):
    told = []
    pool = SamplePool([Domain("even", DOMAINS["even"])])
    perplexity.domain_sums(model, pool, (0, 2, None), lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_overall_weighs_tokens_and_macro_weighs_domains():
    found = perplexity.summary({"a": EvaluationSums(6.0, 3, 1), "b": EvaluationSums(9.0, 9, 2)})
    assert found["domains"]["a"]["perplexity"] == pytest.approx(math.exp(2))
    assert found["overall"] == {
        "perplexity": pytest.approx(math.exp(15 / 12)),
        "loss": 1.25,
        "tokens": 12,
        "samples": 3,
    }
    assert found["macro"]["perplexity"] == pytest.approx(math.sqrt(math.exp(2) * math.exp(1)))


def test_the_keys_of_a_run_evaluate_the_trained_model_on_the_named_sets(tmp_path):
    config = {
        "model_name_or_path": "base", "train_from_scratch": True, "dataset": "a", "eval_dataset": "v", "cutoff_len": 8,
        "finetuning_type": "freeze", "output_dir": "out", "mixer": "odm",
    }  # fmt: skip
    known = dict.fromkeys([*config, "disable_gradient_checkpointing"], "str")
    del known["mixer"]
    keys = perplexity.evaluation_keys(config, known, tmp_path, ["v", "w"])
    assert keys == {
        "model_name_or_path": str(tmp_path), "dataset": "v,w", "cutoff_len": 8, "finetuning_type": "full",
        "output_dir": str(tmp_path / "perplexity"), "disable_gradient_checkpointing": True,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text("{}")
    keys = perplexity.evaluation_keys(config | {"finetuning_type": "lora"}, known, tmp_path, ["v"])
    assert (keys["model_name_or_path"], keys["adapter_name_or_path"]) == ("base", str(tmp_path))
    assert keys["finetuning_type"] == "lora"
