"""LLaMA-Factory's keys that say which rows are read and in which order, in whole runs on both engines."""

import gzip
import json
import re

import datasets
import pytest

from tests.support import corpus, runs

SIZES = {"few": 10, "many": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("keys"))
    info, rows = json.loads((root / "data" / "dataset_info.json").read_text()), corpus.instructions(40)
    for name, part in {"few": rows[:10], "many": rows[10:]}.items():
        (root / "data" / f"{name}.json").write_text(json.dumps(part))
        info[name] = {"file_name": f"{name}.json"}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    return root


def config(folder, name, **keys):
    base = {
        "stage": "sft", "template": "default", "dataset": "few,many", "weighter": {"name": "loss"}, "max_steps": None,
        "num_train_epochs": 1.0, "per_device_train_batch_size": 4, "cutoff_len": 64, "logging_steps": 1,
    }  # fmt: skip
    return runs.base(folder, output_dir=str(folder / "out" / name), **{**base, **keys})


def passed(results):
    for status, stderr in results:
        assert status == 0, stderr[-3000:]


def counts(run):
    """[steps] samples of `few` in each step, and of `many`."""
    return [tuple(int(row["drawn"][name]) for name in SIZES) for row in runs.rows(run)]


def test_proportions_and_lengths(folder):
    keys = {"interleave_probs": "0.5,0.5"}
    cases = {
        "under": ({"mix_strategy": "interleave_under", **keys}, [(2, 2)] * 5),
        "over": ({"mix_strategy": "interleave_over", **keys}, [(2, 2)] * 15),
        "once": ({"mix_strategy": "interleave_once", **keys}, [(2, 2)] * 5 + [(0, 4)] * 5),
        "order": ({"disable_shuffling": True}, [(4, 0), (4, 0), (2, 2)] + [(0, 4)] * 7),
    }
    runs_of = {name: config(folder, name, **given) for name, (given, _) in cases.items()}
    results = runs.train_many(1, list(runs_of.values()))
    passed(results)
    for name, (_, expected) in cases.items():
        assert counts(runs_of[name]) == expected, name


# -- tokenized_path ----------------------------------------------------------------------------------------------------

MIX = {"mixer": {"name": "odm"}, "update_step": 2, "update_times": -1, "max_steps": 4}


def losses(run):
    return [row["loss"] for row in runs.rows(run)]


def test_rows_are_saved_with_their_identity_and_read_again_by_everyone(folder):
    """Trained from the files, then from the folder; continued from a checkpoint with it; the same bits each time."""
    path = folder / "tokenized"
    keys = {
        **MIX,
        "val_size": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    first = config(folder, "tokens-first", tokenized_path=str(path), **keys)
    plain = config(folder, "tokens-plain", **keys)
    again = config(folder, "tokens-again", **{**keys, "tokenized_path": str(path)})
    resumed = config(
        folder, "tokens-resumed", **{**keys, "tokenized_path": str(path)},
        resume_from_checkpoint=str(folder / "out" / "tokens-plain" / "checkpoint-2"),
    )  # fmt: skip
    megatron = config(folder, "tokens-megatron", engine="megatron", **{**keys, "tokenized_path": str(path)})
    static = {
        key: value for key, value in config(folder, "tokens-static", do_train=True).items()
        if key not in ("weighter", "tensorboard")
    } | {"tokenized_path": str(path), "max_steps": 2, "report_to": "none", "val_size": 0.2}  # fmt: skip
    results = runs.train_many(1, [first, plain, again, resumed, megatron, static])
    passed(results)
    assert "32 rows saved in" in results[0][1] and "saved in" not in results[2][1]
    assert losses(first) == losses(plain) == losses(again) and losses(resumed) == losses(plain)[2:]
    assert losses(megatron) == pytest.approx(losses(plain), rel=1e-4)
    saved = datasets.load_from_disk(str(path))
    assert set(saved) == {"train", "validation"} and len(saved["train"]) == 32 and len(saved["validation"]) == 8
    names = saved["train"].features["dataflex_domain"].names
    assert names == ["few", "many"]
    pairs = [
        (names[d], r) for d, r in zip(saved["train"]["dataflex_domain"], saved["train"]["dataflex_row"], strict=True)
    ]
    assert pairs == sorted(set(pairs)) and all(row < SIZES[name] for name, row in pairs)
    assert not list(folder.glob(".tokenized*")), "nothing of the writing is left"


# -- streaming, compressed files ---------------------------------------------------------------------------------------


def test_of_a_stream_as_much_is_kept_as_the_run_needs_and_it_is_read_once(folder):
    for name in SIZES:
        rows = json.loads((folder / "data" / f"{name}.json").read_text())
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((folder / "data" / "dataset_info.json").read_text())
    info |= {f"{name}_lines": {"file_name": f"{name}.jsonl"} for name in SIZES}
    info["few_packed"], info["many_packed"] = {"file_name": "few.jsonl.gz"}, {"file_name": "packed"}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "data" / "packed").mkdir()
    for name, target in {"few": "few.jsonl.gz", "many": "packed/many.jsonl.gz"}.items():
        (folder / "data" / target).write_bytes(gzip.compress((folder / "data" / f"{name}.jsonl").read_bytes()))
    stream = {
        **MIX, "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "dataset": "few_lines,many_lines",
        "streaming": True, "buffer_size": 7,
    }  # fmt: skip
    plain, packed = config(folder, "plain", **MIX), config(folder, "packed", **MIX, dataset="few_packed,many_packed")
    first = config(folder, "stream", **stream)
    again = {**first, "resume_from_checkpoint": str(folder / "out" / "stream" / "checkpoint-2")}
    text = config(
        folder,
        "stream-text",
        stage="pt",
        template=None,
        dataset="code,prose",
        streaming=True,
        max_steps=4,
        cutoff_len=32,
    )
    squeezed = config(folder, "stream-packed", **{**stream, "dataset": "few_packed,many_packed"})
    results = runs.train_many(1, [plain, packed, first, again, text, squeezed])
    passed(results)
    assert losses(plain) == losses(packed)
    [done] = (folder / "out" / "stream").glob("stream/*/done.json")
    assert json.loads(done.read_text()) == {"rows": 12, "tokens": None, "ended": False}
    for name, count in {"few": 10, "many": 12}.items():
        kept = [json.loads(line) for line in (done.parent / f"{name}_lines.jsonl").read_text().splitlines()]
        file = str(folder / "data" / f"{name}.jsonl")
        expected = datasets.load_dataset("json", data_files=file, split="train", streaming=True)
        assert kept == list(expected.shuffle(buffer_size=7, seed=3).take(count))
    assert "all 10 rows of few_lines are kept" in results[2][1] and "the first 12 rows of many_lines" in results[2][1]
    assert "are kept in" not in results[3][1] and "are used" in results[3][1]
    assert losses(first) == losses(squeezed)
    sizes = [int(n) for n in re.findall(r": (\d+) rows \d+ target tokens", results[4][1].replace(",", ""))]
    assert len(sizes) == 2 and all(16 <= size < 40 for size in sizes), results[4][1]


@pytest.mark.exhaustive
def test_two_processes_share_what_one_of_them_keeps(folder):
    half = {"per_device_train_batch_size": 2}
    alone = config(folder, "one-process", **MIX, dataset="few,many")
    keys = {**MIX, "dataset": "few,many"}
    saved = config(folder, "two-saved", **{**keys, **half}, tokenized_path=str(folder / "two"))
    read = config(folder, "two-read", **{**keys, **half}, tokenized_path=str(folder / "two"))
    stream = config(folder, "two-stream", **{**keys, **half}, streaming=True, buffer_size=7)
    once = config(folder, "two-once", **half, mix_strategy="interleave_once", interleave_probs="0.5,0.5")
    order = config(folder, "two-order", **half, disable_shuffling=True)
    [one] = runs.train_many(1, [alone])
    passed([one, *runs.train_many(2, [saved, read, stream, once, order])])
    assert losses(saved) == losses(read) == pytest.approx(losses(alone), rel=1e-5)
    [done] = (folder / "out" / "two-stream").glob("stream/*/done.json")
    assert json.loads(done.read_text())["rows"] == 16
    assert counts(once) == [(2, 2)] * 5 + [(0, 4)] * 5
    assert counts(order) == [(4, 0), (4, 0), (2, 2)] + [(0, 4)] * 7
