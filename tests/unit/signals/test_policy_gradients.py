"""Policy gradients against autograd's gradient of the expected reward, and answers against the model's probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.selectors.nice import Nice
from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.generate import rank_tokens, sample_tokens
from dataflex_mega.types import GenerationSpec
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.algorithms.examples import generator, update_context
from tests.unit.signals.test_per_sample_gradients import engine_of, linear_weights, lora_of


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def prompts_of(count, length=6):
    rng = np.random.default_rng(count)
    return [rng.integers(3, 128, length + row) for row in range(count)]


def answered(prompt, tokens):
    """A sample of a prompt and its answer."""
    labels = np.concatenate([np.full(len(prompt), -100), tokens])
    return replace(samples_of(0)[0], input_ids=np.concatenate([prompt, tokens]), labels=labels)


def flat(directions, names):
    return torch.cat([directions.for_layer(name)[0].flatten() for name in names]).double()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_answers_with_reward_one_are_less(alone, lora):
    engine = engine_of(alone, lora_of(tiny_llama()) if lora else tiny_llama())
    targets, scorer = samples_of(3)[:4], engine.gradient_scorer(adam=False)
    expected = scorer.directions([[collate(targets, 0)]])
    for scale in (1.0, 250.0):  # rewards' size does not count
        prompts = [(collate([target], 0), torch.tensor([scale]).double()) for target in targets]
        directions = scorer.policy_directions([prompts])
        for name in scorer.weights:
            torch.testing.assert_close(directions.for_layer(name), expected.for_layer(name), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in engine.model.parameters())


def test_no_reward_is_no_direction(alone):
    engine = engine_of(alone, tiny_llama())
    scorer = engine.gradient_scorer(adam=False)
    prompts = [(collate(samples_of(3)[:2], 0), torch.zeros(2).double()) for _ in range(2)]
    directions = scorer.policy_directions([prompts])
    dot, norm2 = scorer.score(collate(samples_of(5), 0), directions)
    assert float(dot.abs().max()) == 0 and bool(torch.isfinite(norm2).all())


def test_the_weighted_answers_are_the_gradient_of_the_expected_reward(alone):
    """All 128 answers of one token, each with probability times reward, in place of drawn ones: the exact expectation."""
    engine = engine_of(alone, tiny_llama())
    prompt = prompts_of(1)[0]
    rewards = torch.sin(torch.arange(128.0))
    logits = engine.model(input_ids=torch.from_numpy(prompt).unsqueeze(0)).logits[0, -1]
    probabilities = torch.softmax(logits, 0)
    weights = linear_weights(engine.model)
    exact = torch.autograd.grad(-(probabilities * rewards).sum(), list(weights.values()))
    expected = torch.cat([g.flatten() for g in exact]).double()
    batch = collate([answered(prompt, np.array([token])) for token in range(128)], 0)
    scorer = engine.gradient_scorer(adam=False)
    directions = scorer.policy_directions([[(batch, (probabilities * rewards).detach().double())]])
    torch.testing.assert_close(flat(directions, weights), expected / expected.norm(), rtol=1e-3, atol=1e-5)


def test_the_highest_scores_are_of_the_candidates_whose_step_raises_the_expected_reward(alone):
    """Exact: the expected reward is a sum over all answers of one token, before and after a small step on a candidate."""
    engine = engine_of(alone, tiny_llama())
    prompts, rewards = prompts_of(2), torch.sin(torch.arange(128.0))

    def likely():
        """[prompts, 128] probabilities of the answers."""
        rows = [engine.model(input_ids=torch.from_numpy(prompt).unsqueeze(0)).logits[0, -1] for prompt in prompts]
        return torch.softmax(torch.stack(rows).double(), 1).detach()

    scorer, before = engine.gradient_scorer(adam=False), likely()
    answers_of = [collate([answered(prompt, np.array([token])) for token in range(128)], 0) for prompt in prompts]
    weighed = [(batch, row * rewards) for batch, row in zip(answers_of, before, strict=True)]
    directions = scorer.policy_directions([[pair] for pair in weighed])  # each prompt a sub-task, so cosines are exact
    candidates = samples_of(5)[:10]
    dot, norm2 = scorer.score(collate(candidates, 0), directions)
    weights = linear_weights(engine.model).values()
    rise_of_each = []
    for candidate in candidates:
        batch = collate([candidate], 0)
        loss = engine.runner.token_losses(batch).sum() / (batch.labels != -100).sum()
        gradients = torch.autograd.grad(loss, list(weights))
        length = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            saved = [weight.clone() for weight in weights]
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 1e-2 * gradient / length
            rise_of_each.append((likely() - before) @ rewards.double())
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)
    rises, cosines = torch.stack(rise_of_each), dot / norm2.sqrt().unsqueeze(1)
    for task in range(2):  # the rise is the cosine times the length of the step and of the reward's gradient
        assert float(torch.corrcoef(torch.stack([rises[:, task], cosines[:, task].double()]))[0, 1]) > 0.99
    best = Nice().select(cosines[:, 0], 3, update_context(), generator())
    assert set(best.tolist()) == set(rises[:, 0].topk(3).indices.tolist()) and bool((rises[best, 0] > 0).all())


def test_answers_follow_the_models_probabilities_and_nothing_else_in_the_batch(alone):
    engine = engine_of(alone, tiny_llama())
    spec, prompts = GenerationSpec(7, temperature=0.9, top_k=20, top_p=0.9), prompts_of(5)
    numbers = np.random.default_rng(0).random((5, 7))
    answers = engine.generate(prompts, numbers, spec, [2], 0)
    for prompt, row, answer in zip(prompts, numbers, answers, strict=True):
        assert engine.generate([prompt], row[None], spec, [2], 0)[0].tolist() == answer.tolist()
        ids = prompt.tolist()
        for turn, token in enumerate(answer.tolist()):  # without a cache, token by token
            with torch.no_grad():
                logits = engine.model(input_ids=torch.tensor([ids])).logits[:, -1].float()
            assert int(sample_tokens(logits, row[turn : turn + 1], spec)[0]) == token
            ids.append(token)
    assert engine.model.training


def test_an_answer_ends_with_its_end_token(alone):
    engine = engine_of(alone, tiny_llama())
    prompts, numbers = prompts_of(3), np.random.default_rng(1).random((3, 9))
    free = engine.generate(prompts, numbers, GenerationSpec(9), [-1], 0)
    assert [len(answer) for answer in free] == [9, 9, 9]
    end = int(free[0][3])
    shortened = engine.generate(prompts, numbers, GenerationSpec(9), [end], 0)
    assert shortened[0].tolist() == free[0][: free[0].tolist().index(end) + 1].tolist()


def test_evenly_spaced_numbers_draw_in_proportion_to_the_probabilities():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]]))
    numbers = (np.arange(1000) + 0.5) / 1000
    for spec, expected in (
        (GenerationSpec(1), [100, 500, 250, 150]),
        (GenerationSpec(1, top_k=2), [0, 667, 333, 0]),
        (GenerationSpec(1, top_p=0.7), [0, 667, 333, 0]),
        (GenerationSpec(1, top_p=0.4), [0, 1000, 0, 0]),
        (GenerationSpec(1, temperature=0.5), [29, 725, 181, 65]),
    ):
        tokens = sample_tokens(logits.expand(1000, 4), numbers, spec)
        counts = np.bincount(tokens, minlength=4)
        assert np.abs(counts - expected).max() <= 1, (spec, counts)
    assert sample_tokens(logits, np.array([1.0]), GenerationSpec(1, top_k=2)).tolist() == [2]


@pytest.mark.parametrize("levels", [3, 60, 10**6])
@pytest.mark.parametrize("top_k", [0, 1, 7, 90])
def test_the_likeliest_tokens_come_in_the_order_of_a_stable_sort(levels: int, top_k: int) -> None:
    """Also where many are equal, as logits in bfloat16 are, and where twice as many as asked for are the vocabulary."""
    generator = torch.Generator().manual_seed(levels + top_k)
    probabilities = torch.randint(levels, (40, 150), generator=generator).double()
    values, tokens = rank_tokens(probabilities, top_k)
    expected_values, expected_tokens = probabilities.sort(dim=1, descending=True, stable=True)
    count = top_k or 150
    assert torch.equal(values, expected_values[:, :count]) and torch.equal(tokens, expected_tokens[:, :count])
