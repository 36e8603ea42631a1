"""compute_accuracy against LLaMA-Factory's ComputeAccuracy on the logits of the same model."""

from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.run.accuracy import evaluate_with_accuracy
from tests.distributed.layouts import samples_of, tiny_llama


@pytest.fixture(scope="module")
def engine():
    model = tiny_llama()
    model.get_output_embeddings().weight.data.copy_(model.get_input_embeddings().weight)  # predicts the token itself
    runner = FSDPModelRunner(model, FSDPLayout("single"), init_distributed())
    yield FSDPEngine(runner, None, None, StepOptions(2))
    shutdown_distributed(orderly=True)


def share_of(samples, batch_size):
    pool = SimpleNamespace(fetch=lambda ids: [samples[i] for i in ids])
    ids = torch.arange(len(samples)).numpy()
    return SimpleNamespace(pool=pool, batch_size=batch_size, local_ids=lambda: ids,
                           num_batches=lambda: -(-len(samples) // batch_size))  # fmt: skip


@pytest.mark.parametrize(("batch_size", "pack"), [(3, None), (8, 64)])
def test_accuracy_is_llamafactorys_and_the_loss_that_of_every_evaluation(engine, batch_size, pack):
    from llamafactory.train.sft.metric import ComputeAccuracy, eval_logit_processor

    samples = samples_of(1)
    for sample in samples[::2]:
        sample.labels[2:] = sample.input_ids[1:-1]  # right for a model that repeats its input
    loss, tokens, (hits, count) = evaluate_with_accuracy(
        share_of(samples, batch_size), lambda part: collate(part, 0, pack), engine
    )
    expected, sums = [], [0.0, 0]
    for sample in samples:
        ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)[None]
        with torch.no_grad():
            logits = engine.model(ids).logits
        predictions = SimpleNamespace(predictions=eval_logit_processor(logits, labels), label_ids=labels)
        expected.append(ComputeAccuracy()(predictions)["accuracy"])
        sums[0] += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        sums[1] += int((labels[0, 1:] != -100).sum())
    assert 0.1 < sum(expected) / len(expected) < 0.9
    assert float(hits / count) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert float(loss) == pytest.approx(sums[0], rel=1e-6) and int(tokens) == sums[1]


def test_a_sample_without_target_counts_in_neither(engine):
    samples = samples_of(2)
    alone = evaluate_with_accuracy(share_of(samples, 4), lambda part: collate(part, 0), engine)
    empty = Sample(7, 0, samples[0].input_ids, samples[0].labels * 0 - 100)
    beside = evaluate_with_accuracy(share_of([*samples, empty], 3), lambda part: collate(part, 0), engine)
    for one, other in zip(alone, beside, strict=True):
        torch.testing.assert_close(one, other)
