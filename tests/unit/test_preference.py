"""The loss of pairs against LLaMA-Factory's own trainer, and against their papers where that computes another one."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex_mega import objective
from dataflex_mega.data.pairs import NUM_ROWS, collate_pairs, join_pair
from dataflex_mega.data.pool import Sample
from dataflex_mega.preference import LOSSES, WITHOUT_REFERENCE, PairLoss
from dataflex_mega.types import IGNORE_INDEX

VOCAB = 23
# (chosen answer, rejected answer) of a prompt of three tokens: longer, shorter, equal.
LENGTHS = [(4, 7), (9, 2), (5, 5), (1, 12)]
PROMPT = 3


def make_pairs():
    generator = np.random.default_rng(0)
    pairs = []
    for number, lengths in enumerate(LENGTHS):
        rows = []
        for length in lengths:
            ids = generator.integers(1, VOCAB, PROMPT + length)
            rows.append((ids, np.where(np.arange(len(ids)) < PROMPT, IGNORE_INDEX, ids)))
        ids, labels = join_pair(*rows)
        references = generator.uniform(5, 20, NUM_ROWS).astype(np.float32)
        pairs.append(Sample(number, number % 2, ids, labels, references))
    return pairs


@pytest.fixture
def batch():
    return collate_pairs(make_pairs(), pad_id=0)


@pytest.fixture
def logits(batch):
    return torch.randn(*batch.labels.shape, VOCAB, generator=torch.Generator().manual_seed(1))


def labels_of_library(batch):
    """[2n, S + 1]: not shifted, as LLaMA-Factory's collator gives them."""
    return torch.cat([torch.full((len(batch.labels), 1), IGNORE_INDEX), batch.labels], dim=1)


def trainer(loss):
    """LLaMA-Factory's trainer, as far as its functions need one."""
    from dataflex_mega.llamafactory.compat import ensure_importable

    ensure_importable()
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    made = CustomDPOTrainer.__new__(CustomDPOTrainer)
    made.finetuning_args = SimpleNamespace(use_ref_model=loss.kind not in WITHOUT_REFERENCE)
    made.beta, made.loss_type, made.simpo_gamma = loss.beta, loss.kind, loss.gamma
    made.label_smoothing, made.bco_gemma, made.ftx_gamma, made.ld_alpha = (
        loss.label_smoothing,
        0.0,
        loss.ftx,
        loss.ld_alpha,
    )
    made.f_divergence_type, made.reference_free = "reverse_kl", False
    made.accelerator = SimpleNamespace(device=torch.device("cpu"))
    return made


def by_library(loss, batch, logits):
    """([n] losses, its metrics) by `get_batch_loss_metrics` of LLaMA-Factory, whose forward passes are replaced."""
    made = trainer(loss)
    lengths = (batch.labels != IGNORE_INDEX).sum(dim=1)
    references = -batch.row_references / (lengths if loss.kind == "ipo" else 1)
    shifted = torch.cat([logits, logits[:, :1]], dim=1)  # the library drops the last position
    model = lambda **_: SimpleNamespace(logits=shifted)  # noqa: E731
    made.compute_reference_log_probs = lambda *_: references.view(2, -1)
    losses = []
    whole = made.compute_preference_loss
    if loss.kind in ("hinge", "ipo"):  # beside trl 0.24 it would compute the sigmoid loss
        whole = lambda *logps: made.dpo_loss(*logps, loss_type=loss.kind)  # noqa: E731
    made.compute_preference_loss = lambda *logps: losses.append(whole(*logps)) or losses[0]
    inputs = {"input_ids": batch.input_ids, "labels": labels_of_library(batch)}
    mean, metrics = made.get_batch_loss_metrics(model, inputs)
    return losses[0][0], mean, metrics


CASES = {
    **{kind: PairLoss(kind, beta=0.3) for kind in LOSSES},
    "smoothed": PairLoss("sigmoid", beta=0.2, label_smoothing=0.2),
    "ftx": PairLoss("sigmoid", ftx=0.7),
    "ftx of means": PairLoss("simpo", ftx=0.7, gamma=1.2),
    "orpo with ftx": PairLoss("orpo", ftx=0.5),
    "ld_alpha": PairLoss("sigmoid", ld_alpha=0.4),
    "ld_alpha of means": PairLoss("ipo", ld_alpha=0.0),
}


@pytest.mark.exhaustive  # trl takes seconds to import
@pytest.mark.parametrize("name", CASES)
def test_losses_metrics_and_gradients_equal_llamafactorys(name, batch, logits):
    loss = CASES[name]
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_losses = objective.token_losses(ours, batch.labels)
    sums = loss.sums(token_losses, batch)
    expected, mean, metrics = by_library(loss, batch, theirs)
    torch.testing.assert_close(sums.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    sums.mean().backward()
    mean.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    report = dict(zip(loss.report_names, loss.report(token_losses.detach(), batch).mean(dim=0).tolist(), strict=True))
    assert set(report) == set(metrics) - {"logits/chosen", "logits/rejected"}
    assert report == pytest.approx({key: metrics[key] for key in report}, rel=1e-4, abs=1e-5)


def test_sigmoid_by_hand():
    """log-probabilities -2 and -5, of the reference -3 and -4: r = 3 - 1."""
    ids = np.array([1, 2])
    row = (ids, np.array([IGNORE_INDEX, 2]))
    batch = collate_pairs([Sample(0, 0, *join_pair(row, row), np.array([3.0, 4.0]))], pad_id=0)
    token_losses = torch.zeros(2, batch.labels.shape[1])
    token_losses[0, 0], token_losses[1, 0] = 2.0, 5.0
    loss = PairLoss("sigmoid", beta=0.5)
    assert float(loss.sums(token_losses, batch)) == pytest.approx(float(-F.logsigmoid(torch.tensor(0.5 * 2))))
    report = loss.report(token_losses, batch)[0].tolist()
    assert report == pytest.approx([0.5, -0.5, 1.0, 1.0, -2.0, -5.0])


@pytest.mark.parametrize("kind", LOSSES)
def test_a_pair_without_targets_counts_nothing_and_spoils_nothing(kind, batch, logits):
    labels = batch.labels.clone()
    labels[1], labels[2] = IGNORE_INDEX, IGNORE_INDEX  # the chosen answers of pairs 1 and 2
    batch, loss = replace(batch, labels=labels), PairLoss(kind, beta=0.01)
    logits = logits.clone().requires_grad_()
    sums = loss.sums(objective.token_losses(logits, batch.labels), batch)
    sums.sum().backward()
    assert loss.counts(batch).tolist() == [1, 0, 0, 1]
    assert sums[1:3].tolist() == [0.0, 0.0] and torch.isfinite(logits.grad).all()
    assert not logits.grad[[1, 2, 5, 6]].any() and logits.grad[[0, 3, 4, 7]].any()
