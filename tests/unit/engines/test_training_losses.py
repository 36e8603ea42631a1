"""What a step differentiates beside weighted cross-entropy: loss forms, load balancing, noise on embeddings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune

from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.auxiliary_loss import AuxiliaryLoss
from dataflex_mega.engines.fsdp.frozen_model import adapters_disabled, frozen_logits
from dataflex_mega.errors import ConfigError
from dataflex_mega.losses.asft import Anchored
from dataflex_mega.losses.dft import DynamicFineTuning
from dataflex_mega.types import ProjectionSpec
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.engines.test_gradient import RATE, engine_of
from tests.unit.engines.test_router_load import model_of

SCALE = torch.tensor([0.2, 1.7, 0.4, 1.9, 0.1, 2.5, 0.7, 0.5])


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def weigh(samples):
    return SCALE[samples.sample_ids - 100]


def ce_of(model, sample):
    """[s - 1] token losses of one sample alone."""
    ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
    logits = model(ids.unsqueeze(0)).logits[0, :-1]
    return F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")


def same_update(trained, before, loss):
    loss.backward()
    for parameter, old in zip(trained.parameters(), before.parameters(), strict=True):
        if old.grad is not None:
            torch.testing.assert_close(parameter.detach(), old.detach() - RATE * old.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pack", [None, 64])
@pytest.mark.parametrize("weight_scope", ["micro_batch", "step"])
def test_a_form_is_weighed_and_accumulated_while_algorithms_see_cross_entropy(alone, pack, weight_scope):
    model, made = tiny_llama(), samples_of(1)
    before, seen = copy.deepcopy(model), []

    def weigh_and_look(samples):
        seen.append(samples.loss_sum)
        return weigh(samples)

    engine = engine_of(alone, model, loss_form=DynamicFineTuning(), weight_scope=weight_scope)
    stats = engine.train_step([collate(made[:3], 0, pack), collate(made[3:], 0, pack)], weigh_and_look)
    losses = [ce_of(before, sample) for sample in made]
    tokens = sum(int((loss > 0).sum()) for loss in losses)
    expected = sum(w * (loss * (-loss.detach()).exp()).sum() for w, loss in zip(SCALE, losses, strict=True)) / tokens
    assert stats.loss == pytest.approx(float(expected), rel=1e-5)
    assert stats.mean_loss == pytest.approx(float(sum(loss.sum() for loss in losses)) / tokens, rel=1e-5)
    torch.testing.assert_close(torch.cat(seen), torch.stack([x.sum() for x in losses]).detach(), rtol=1e-5, atol=1e-5)
    same_update(model, before, expected)


def test_scores_and_features_are_of_the_form_and_policy_gradients_of_the_likelihood(alone):
    made, batch = samples_of(1), collate(samples_of(1), 0)
    results = {}
    for name, form in (("plain", None), ("dft", DynamicFineTuning())):
        engine = engine_of(alone, tiny_llama(), loss_form=form)
        scorer = engine.gradient_scorer(adam=False)
        directions = scorer.directions([[batch]])
        results[name] = (
            scorer.score(batch, directions)[1].clone(), engine.feature_maker(ProjectionSpec(), adam=False).features(batch),
            engine.gradient_gram([[batch]]), scorer.policy_directions([[(batch, torch.ones(8))]]).for_layer("lm_head"),
            engine.sample_losses(batch).loss_sum, engine.feature_maker(ProjectionSpec(), adam=False).fingerprint(),
        )  # fmt: skip
    plain, dft = results["plain"], results["dft"]
    for of_gradient in range(3):
        assert not torch.allclose(plain[of_gradient], dft[of_gradient], rtol=0.1)
    for of_likelihood in (3, 4):
        assert torch.equal(plain[of_likelihood], dft[of_likelihood])
    assert plain[5] != dft[5], "a store of the one is not taken for the other's"
    model = tiny_llama()
    loss = ce_of(model, made[0])
    (loss * (-loss.detach()).exp()).sum().div((loss > 0).sum()).backward()
    names = [name for name, _ in scorer.linears.items()]
    by_hand = sum(float(model.get_submodule(name).weight.grad.pow(2).sum()) for name in names)
    assert float(dft[0][0]) == pytest.approx(by_hand, rel=1e-4)


def adapted(seed=3):
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", ["adapter", "second model"])
def test_an_anchor_is_the_model_before_training(alone, kind):
    model, batch = adapted(), collate(samples_of(1), 0)
    engine = engine_of(alone, model, loss_form=Anchored(0.5))
    engine.runner.reference = frozen_logits(engine.runner, None if kind == "adapter" else tiny_llama())
    with torch.no_grad():
        expected = tiny_llama()(batch.input_ids).logits
        trained_flags = [p.requires_grad for p in model.parameters()]
        torch.testing.assert_close(engine.runner.reference(batch), expected)
        assert not torch.allclose(engine.runner.logits(batch), expected, atol=0.1)
    assert model.training and [p.requires_grad for p in model.parameters()] == trained_flags
    scores = engine.gradient_scorer(adam=False)
    assert bool((scores.score(batch, scores.directions([[batch]]))[1] > 0).all())
    assert engine.train_step([batch], None).grad_norm > 0


def test_adapters_come_back_after_an_error(alone):
    model, batch = adapted().eval(), collate(samples_of(1), 0)
    before = model(batch.input_ids).logits
    with pytest.raises(ZeroDivisionError), adapters_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(batch.input_ids).logits, before)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_load_balancing_loss_is_the_models_own_without_padding(alone, kind):
    model, made = model_of(kind), samples_of(1)
    auxiliary, batch = AuxiliaryLoss(model), collate(made, 0)
    mask = (batch.segment_ids >= 0).long()
    assert 0 < int(mask.sum()) < mask.numel()
    expected = model(batch.input_ids, attention_mask=mask, output_router_logits=True).aux_loss
    model.config.output_router_logits = True  # as LLaMA-Factory sets it
    engine = engine_of(alone, model)
    for pack in (None, 64):
        packed = collate(made, 0, pack)
        with auxiliary.recording() as recorded:
            engine.runner.forward(packed, None)
        torch.testing.assert_close(auxiliary.loss(recorded, packed), expected, rtol=1e-5, atol=1e-6)


def test_a_model_with_load_balancing_can_generate_afterwards(alone):
    model = model_of("mixtral")
    model.config.output_router_logits = True  # as LLaMA-Factory sets it
    engine = engine_of(alone, model, moe_aux_loss_coef=0.3)
    engine.train_step([collate(samples_of(1), 0)], None)
    ids = torch.arange(3, 9).view(2, 3)
    model.eval()
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2).shape == (2, 5)


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_load_balancing_counts_by_tokens_and_is_not_weighed(alone, normalization):
    model, made = model_of("mixtral"), samples_of(1)
    before, parts = copy.deepcopy(model), (made[:3], made[3:])
    engine = engine_of(alone, model, moe_aux_loss_coef=0.3, normalization=normalization)
    stats = engine.train_step([collate(part, 0) for part in parts], weigh)
    losses, loss, start = [ce_of(before, sample) for sample in made], 0.0, 0
    counts = [int((one > 0).sum()) if normalization == "token" else 1 for one in losses]
    for part in parts:
        batch, of_part = collate(part, 0), range(start, start + len(part))
        mask = (batch.segment_ids >= 0).long()
        balance = before(batch.input_ids, attention_mask=mask, output_router_logits=True).aux_loss
        loss += 0.3 * balance * sum(counts[i] for i in of_part) / sum(counts)
        start += len(part)
    for weight, one in zip(SCALE, losses, strict=True):
        loss += weight * one.sum() / (1 if normalization == "token" else (one > 0).sum()) / sum(counts)
    assert stats.loss == pytest.approx(float(loss), rel=1e-5)
    assert stats.mean_loss == pytest.approx(
        float(sum(x.sum() for x in losses) / sum(int((x > 0).sum()) for x in losses))
    )
    same_update(model, before, loss)


def test_a_dense_model_has_no_load_balancing_loss(alone):
    with pytest.raises(ConfigError, match="moe_aux_loss_coef: a llama has no load-balancing loss; leave the key out"):
        engine_of(alone, tiny_llama(), moe_aux_loss_coef=0.1)


def test_noise_on_embeddings_is_huggingfaces_and_is_off_in_every_pass_that_scores(alone):
    model, bare, batch = tiny_llama(), tiny_llama(), collate(samples_of(1), 0)
    engine = engine_of(alone, model)
    quiet = engine.sample_losses(batch).loss_sum
    activate_neftune(model, 5.0)
    torch.manual_seed(11)
    noisy = engine.runner.logits(batch)
    embedded = bare.get_input_embeddings()(batch.input_ids)
    torch.manual_seed(11)
    bound = 5.0 / (embedded.shape[1] * embedded.shape[2]) ** 0.5
    by_hand = bare(inputs_embeds=embedded + torch.empty_like(embedded).uniform_(-bound, bound)).logits
    torch.testing.assert_close(noisy, by_hand, rtol=1e-5, atol=1e-5)
    scorer, state = engine.gradient_scorer(adam=False), torch.get_rng_state()
    assert torch.equal(engine.sample_losses(batch).loss_sum, quiet)
    assert torch.equal(scorer.score(batch, scorer.directions([[batch]]))[1],
                       scorer.score(batch, scorer.directions([[batch]]))[1])  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_weights_of_the_whole_step_are_of_the_noise_that_is_trained_on(alone):
    model, made = tiny_llama(), samples_of(1)
    activate_neftune(model, 5.0)
    engine, seen = engine_of(alone, model, weight_scope="step"), []

    def look(samples):
        seen.append(samples.loss_sum)
        return torch.ones(len(samples.sample_ids))

    stats = engine.train_step([collate(made[:4], 0), collate(made[4:], 0)], look)
    assert float(seen[0].sum()) == pytest.approx(float(stats.domain_loss.sum()), rel=1e-6)
