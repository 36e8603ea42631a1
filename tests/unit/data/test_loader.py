"""The loader returns what (plan, step) say, whatever was prepared ahead, in any order of questions."""

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.loader import BatchPartition, Loader
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import DataError
from tests.unit.data.test_pool import pool

SIZES = (30, 11, 25)


def loader(dp_rank=0, dp_size=1, micro=4, accumulation=2, **keys):
    partition = BatchPartition(dp_rank, dp_size, micro, accumulation)
    sampler = Sampler(SIZES, partition.global_batch_size, 3)
    return Loader(pool(*SIZES), sampler, partition, lambda s: collate(s, 0), **keys)


def plan_of(made, selected_ids=None, proportions=(0.5, 0.2, 0.3)):
    return made.sampler.next_plan(None, 0, proportions, selected_ids=selected_ids)


def ids(batches):
    return [i for batch in batches for i in batch.sample_ids.tolist()]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_samplers_whatever_is_prefetched(prefetch, workers):
    made = loader(prefetch=prefetch, workers=workers)
    plan = plan_of(made)
    for step in (0, 1, 2, 7, 3, 4, 0):
        assert ids(made.micro_batches(plan, step, 8)) == made.sampler.global_batch(plan, step).tolist()
    other = plan_of(made, proportions=(0.1, 0.1, 0.8))
    assert ids(made.micro_batches(other, 5, 8)) == made.sampler.global_batch(other, 5).tolist()
    made.close()


def test_ranks_take_contiguous_parts_that_make_up_the_batch():
    whole = loader(micro=8, accumulation=1)
    plan = plan_of(whole)
    parts = [ids(loader(rank, 4, 1, 2).micro_batches(plan, 2)) for rank in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    assert [i for part in parts for i in part] == ids(whole.micro_batches(plan, 2))


def test_a_step_that_a_plan_cannot_serve_is_an_error_only_when_it_is_asked_for():
    made = loader(micro=2, accumulation=1, prefetch=3)
    selected_ids = torch.tensor([0, 31])  # nothing of domain 2
    plan = plan_of(made, selected_ids=selected_ids, proportions=(0.45, 0.45, 0.1))
    served = 0
    with pytest.raises(DataError, match="domain 2"):
        for step in range(20):
            assert set(ids(made.micro_batches(plan, step))) <= {0, 31}
            served += 1
    assert served >= 2
    made.close()


def test_content_follows_the_ids():
    made = loader()
    for batch in made.micro_batches(plan_of(made), 0):
        domain, row = made.pool.locate(batch.sample_ids.numpy())
        assert np.array_equal(batch.input_ids[:, 0], domain) and np.array_equal(batch.input_ids[:, 1], row)
        assert np.array_equal(batch.domain_ids, domain)


def test_nothing_is_prepared_at_or_after_the_last_step_that_is_named():
    made, asked = loader(prefetch=3), []
    fetch = made.pool.fetch
    made.pool.fetch = lambda ids: asked.append(len(ids)) or fetch(ids)
    plan = plan_of(made)
    for step, last, num_micro_batches in ((0, 1, 2), (1, 4, 8), (2, 4, 8), (3, 4, 8), (4, 5, 10)):
        made.micro_batches(plan, step, last)
        made._threads.submit(int).result()  # one worker: what was submitted before is done
        assert len(asked) == num_micro_batches
    made.close()
