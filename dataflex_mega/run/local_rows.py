"""Before any row is read by number: streams kept on the disk as far as the run needs them, compressed files unpacked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.llamafactory import local_rows
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.data import check_names
from dataflex_mega.llamafactory.local_rows import LocalRows, StreamNeed
from dataflex_mega.locks import locked

MEASURED_TEXTS = 200  # texts that are tokenized to learn how many tokens a character is
SPARE = 1.05  # of tokens, since the others are estimated


def make_local(
    args: LFArgs, collectives: TorchCollectives, tokenizer: Any, output_dir: Path, report: Callable[[str], None]
) -> LocalRows:
    """Arguments under which all rows are in local files of known kinds. Raises DataError naming the dataset."""
    for names in (args.data.dataset, args.data.eval_dataset):
        check_names(names, args.data.dataset_dir)
    if args.data.streaming:
        folder = local_rows.stream_folder(args, output_dir)
        need = _need(args, collectives.parallel_info.dp_size)
        for note in run_on_main(collectives, partial(_keep, args, folder, need, tokenizer)):
            report(f"note: {note}")
        args = local_rows.with_kept_rows(args, folder)
    return local_rows.unpack(args)


def _need(args: LFArgs, dp_size: int) -> StreamNeed:
    """What the whole run draws and holds out, of one dataset: a mixer may come to draw from no other."""
    training = args.training
    batch = dp_size * training.per_device_train_batch_size * training.gradient_accumulation_steps
    rows = training.max_steps * batch + math.ceil(args.data.val_size)
    if args.finetuning.stage != "pt" or not args.data.packing:
        return StreamNeed(rows)
    return StreamNeed(rows, math.ceil(rows * args.data.cutoff_len * SPARE))


def _keep(args: LFArgs, folder: Path, need: StreamNeed, tokenizer: Any) -> list[str]:
    with locked(folder.parent, f"streaming: {folder.parent} is in use by {{holder}}; wait for its end"):
        kept = local_rows.read_kept(folder)
        if kept is None:
            lost = args.data.cutoff_len / args.data.preprocessing_batch_size  # a batch of texts ends in half a block
            return local_rows.keep_stream(args, folder, need, TokenEstimate(tokenizer, lost))
    if kept.ended or kept.rows >= need.rows:
        return [f"streaming: the rows kept in {folder} are used"]
    return [
        f"streaming: {folder} keeps the {kept.rows:,} rows of each dataset that an earlier run needed, this one may draw "
        f"{need.rows:,}: some come again; without that folder they are read anew"
    ]


@dataclass
class TokenEstimate:
    """About how many tokens a text gives: counted for the first ones, and by their tokens per character for the others."""

    tokenizer: Any
    lost: float  # tokens of a text that fill no block, on average
    texts: int = field(default=0, init=False)
    characters: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)

    def __call__(self, text: str) -> float:
        if self.texts < MEASURED_TEXTS:
            count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
            self.texts, self.characters, self.tokens = self.texts + 1, self.characters + len(text), self.tokens + count
            return count - self.lost
        return len(text) * self.tokens / max(1, self.characters) - self.lost
