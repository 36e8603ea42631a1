"""The objective against plain formulas and autograd."""

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega import objective
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.types import IGNORE_INDEX


def make_samples(count=5, vocab=17, seed=0):
    rng = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(3, 12, (), generator=rng))
        ids = torch.randint(0, vocab, (length,), generator=rng).numpy()
        labels = ids.copy()
        labels[: i % 3] = IGNORE_INDEX  # a masked prompt, as in fine-tuning
        made.append(Sample(100 + i, i % 2, ids, labels))
    return made


class Lookup(torch.nn.Module):
    """A model whose logits depend on the token alone, so that packing cannot matter."""

    def __init__(self, vocab=17):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(vocab, vocab)

    def forward(self, ids):
        return self.table(ids)


def sample_loss_by_hand(model, sample):
    """Sum of cross-entropies of the sample's own next tokens."""
    ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
    logits = model(ids)[:-1]
    return F.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"), int(
        (labels[1:] != IGNORE_INDEX).sum()
    )


@pytest.mark.parametrize("pack", [None, 16, 64])
def test_sample_sums_equal_each_sample_alone(pack):
    model, made = Lookup(), make_samples()
    batch = collate(made, pad_id=0, pack_length=pack)
    sums = objective.sample_sums(objective.token_losses(model(batch.input_ids), batch.labels), batch)
    samples = objective.make_sample_stats(sums, batch)
    for i, sample in enumerate(made):
        expected, tokens = sample_loss_by_hand(model, sample)
        torch.testing.assert_close(sums[i], expected)
        assert samples.num_tokens[i] == tokens
    assert not samples.loss_sum.requires_grad


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("pack", [None, 32])
def test_weights_change_the_gradient_as_the_formula_says(normalization, pack):
    model, made = Lookup(), make_samples()
    weights = torch.tensor([0.1, 2.0, 0.9, 1.5, 0.5])
    batch = collate(made, pad_id=0, pack_length=pack)
    sums = objective.sample_sums(objective.token_losses(model(batch.input_ids), batch.labels), batch)
    samples = objective.make_sample_stats(sums, batch)
    count = objective.loss_denominator(batch, normalization)
    objective.weighted_loss(sums, samples.num_tokens, weights, count, normalization).backward()
    got = model.table.weight.grad.clone()

    model.table.weight.grad = None
    parts = [sample_loss_by_hand(model, s) for s in made]
    if normalization == "token":
        loss = sum(w * total for w, (total, _) in zip(weights, parts, strict=True)) / sum(n for _, n in parts)
    else:
        loss = sum(w * total / n for w, (total, n) in zip(weights, parts, strict=True)) / len(parts)
    loss.backward()
    torch.testing.assert_close(got, model.table.weight.grad)


def test_equal_weights_are_the_ordinary_token_mean():
    model, made = Lookup(), make_samples()
    batch = collate(made, pad_id=0)
    losses = objective.token_losses(model(batch.input_ids), batch.labels)
    sums = objective.sample_sums(losses, batch)
    count = objective.loss_denominator(batch, "token")
    ours = objective.weighted_loss(
        sums, objective.make_sample_stats(sums, batch).num_tokens, torch.ones(5), count, "token"
    )
    plain = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(ours, plain)


def test_a_sample_without_targets_counts_for_nothing():
    made = make_samples(2)
    made[1].labels[:] = IGNORE_INDEX
    batch = collate(made, pad_id=0)
    model = Lookup()
    sums = objective.sample_sums(objective.token_losses(model(batch.input_ids), batch.labels), batch)
    samples = objective.make_sample_stats(sums, batch)
    assert samples.num_tokens[1] == 0 and sums[1] == 0 and samples.loss[1] == 0
    assert objective.loss_denominator(batch, "sample") == 1
