"""Each form against the function of the library that has its key, on padded and packed rows."""

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.losses.asft import Anchored
from dataflex_mega.losses.base import form_losses
from dataflex_mega.losses.dft import DynamicFineTuning
from dataflex_mega.losses.eaft import EntropyAdaptive
from dataflex_mega.losses.label_smoothing import LabelSmoothing

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
VOCABULARY = 97


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(3, 8, VOCABULARY, generator=generator)).requires_grad_(True)
    labels = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    labels[0, 5:] = labels[1, :3] = labels[2, 7] = -100
    reference = 4 * torch.randn(3, 8, VOCABULARY, generator=generator)
    return logits, labels, reference


def library(name, logits, labels, reference):
    """The mean over the batch by the library; its labels are not shifted."""
    from llamafactory.train import trainer_utils
    from transformers.trainer_pt_utils import LabelSmoother

    before = torch.cat([torch.full_like(labels[:, :1], -100), labels], dim=1)
    padded, padded_reference = (F.pad(t, (0, 0, 0, 1)) for t in (logits, reference))
    outputs = {"logits": padded}
    if name == "smoothing":
        return LabelSmoother(epsilon=0.2)(outputs, before, shift_labels=True)
    if name == "dft":
        return trainer_utils.dft_loss_func(outputs, before)
    if name == "eaft":
        return trainer_utils.eaft_loss_func(outputs, before, alpha=1.7)
    return trainer_utils.asft_loss_func(outputs, before, padded_reference, asft_alpha=0.3)


FORMS = {
    "smoothing": LabelSmoothing(0.2), "dft": DynamicFineTuning(), "eaft": EntropyAdaptive(1.7), "asft": Anchored(0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_mean_and_its_gradient_are_the_librarys(batch, name):
    logits, labels, reference = batch
    losses = form_losses(FORMS[name], logits, labels, reference)
    mean = losses.trained.sum() / (labels != -100).sum()
    expected = library(name, logits, labels, reference)
    torch.testing.assert_close(mean, expected, **TOLERANCE)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (mean, expected)), **TOLERANCE)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_seen_is_cross_entropy_and_positions_without_target_are_zero(batch, name):
    logits, labels, reference = batch
    losses = form_losses(FORMS[name], logits, labels, reference)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert torch.equal(losses.plain, expected) and not losses.plain.requires_grad
    assert bool((losses.trained[labels == -100] == 0).all())


@pytest.mark.parametrize("name", FORMS)
def test_a_form_takes_positions_in_chunks(batch, name):
    logits, labels, reference = batch
    whole = form_losses(FORMS[name], logits, labels, reference).trained
    parts = [
        form_losses(FORMS[name], logits[:, s : s + 3], labels[:, s : s + 3], reference[:, s : s + 3]).trained
        for s in range(0, 8, 3)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=0)


def test_without_a_form_one_tensor_is_both(batch):
    losses = form_losses(None, batch[0], batch[1], None)
    assert losses.plain is losses.trained and losses.plain.requires_grad


def test_alpha_zero_and_a_vocabulary_below_twenty(batch):
    logits, labels, _ = batch
    torch.testing.assert_close(*form_losses(EntropyAdaptive(0.0), logits, labels, None))
    few = form_losses(EntropyAdaptive(1.0), logits[..., :7], labels.clamp(max=6), None).trained
    p = logits[..., :7].softmax(-1)
    torch.testing.assert_close(few, form_losses(None, logits[..., :7], labels.clamp(max=6), None).plain
                               * (-(p * p.log()).sum(-1) / 3), rtol=1e-5, atol=1e-6)  # fmt: skip


def test_half_precision_logits_are_computed_in_float32(batch):
    logits, labels, reference = batch
    half = logits.detach().bfloat16()
    for form in FORMS.values():
        losses = form_losses(form, half, labels, reference.bfloat16())
        assert losses.trained.dtype == losses.plain.dtype == torch.float32
