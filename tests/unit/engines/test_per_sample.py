"""Values of single samples on one process; layouts are in tests/distributed/test_per_sample.py."""

import numpy as np
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.engines.per_sample import per_sample_values, stack_values, width_of


def batch_of(lengths, pack):
    samples = [Sample(i, 0, np.arange(3, 3 + n), np.arange(3, 3 + n)) for i, n in enumerate(lengths)]
    return collate(samples, 0, pack)


def test_each_sample_is_seen_alone_and_without_padding():
    for pack in (None, 12):
        batch = batch_of([5, 2, 7], pack)
        seen = []

        def fn(logits, labels, seen=seen):
            seen.append((logits[:, 0].tolist(), labels.tolist()))
            return logits.sum()

        logits = batch.input_ids.unsqueeze(-1).expand(-1, -1, 4).double()
        values = per_sample_values(logits, batch, fn)
        assert [ids for ids, _ in seen] == [[3, 4, 5, 6, 7], [3, 4], [3, 4, 5, 6, 7, 8, 9]]
        assert [labels for _, labels in seen] == [[4, 5, 6, 7, -100], [4, -100], [4, 5, 6, 7, 8, 9, -100]]
        table = stack_values(values, 3, width_of(values), torch.device("cpu"))
        assert table.dtype == torch.float32 and table.tolist() == [[100.0], [28.0], [168.0]]


def test_low_precision_logits_are_float32_and_a_vocabulary_in_shards_is_gathered_by_sample():
    batch = batch_of([3, 2], None)
    widths = []

    def fn(logits, _labels):
        widths.append((logits.dtype, tuple(logits.shape)))
        return logits.new_tensor([1.0, 2.0])

    values = per_sample_values(
        torch.zeros(2, 3, 4, dtype=torch.bfloat16), batch, fn, lambda shard: torch.cat([shard, shard], dim=-1)
    )
    assert widths == [(torch.float32, (3, 8)), (torch.float32, (2, 8))]
    assert stack_values(values, 2, 2, torch.device("cpu")).tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_a_sample_without_positions_gets_zeros():
    values = {1: torch.tensor([4.0])}
    assert stack_values(values, 2, width_of(values), torch.device("cpu")).tolist() == [[0.0], [4.0]]
    assert width_of({}) == 0
