"""tokenized_path: which row is which, and folders that are damaged, of another kind, or of another run's making."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

from dataflex_mega.errors import DataError  # noqa: E402
from dataflex_mega.llamafactory import tokenized  # noqa: E402
from dataflex_mega.llamafactory.tokenized import TokenizedData  # noqa: E402


class Tokenizer:
    """Hundred ids, by name of its vocabulary."""

    def __init__(self, name="a", size=100):
        self.words = {f"{name}{i}": i for i in range(size)}
        self.bos_token_id = self.eos_token_id = self.pad_token_id = 0

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return self.words

    def get_added_vocab(self):
        return {}

    def __call__(self, text, **_):
        return {"input_ids": [len(text)]}


def arguments(path, dataset=("b", "a"), stage="sft", **data):
    keys = {"tokenized_path": str(path), "dataset": list(dataset), "cutoff_len": 8, "packing": False, "neat_packing": False,
            "val_size": 0.0, "eval_dataset": None, "template": "default"}  # fmt: skip
    return SimpleNamespace(data=SimpleNamespace(**{**keys, **data}), finetuning=SimpleNamespace(stage=stage))


def rows(first, count, **columns):
    ids = [[first + i, first + i + 1] for i in range(count)]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1, 1]] * count, "labels": ids, **columns})


@pytest.fixture
def saved(tmp_path):
    """Domains a (rows 1, 4, 5 of theirs) and b (all 2), and an evaluation set."""
    data = TokenizedData({"a": rows(10, 3), "b": rows(50, 2)}, {"": rows(80, 1)}, {"a": np.asarray([1, 4, 5])})
    (tmp_path / "set").mkdir()  # an empty folder counts as none
    tokenized.save(data, arguments(tmp_path / "set", val_size=1), Tokenizer(), tmp_path / "half")
    assert not (tmp_path / "half").exists()
    return tmp_path / "set"


def ids(data):
    return {name: [row[0] for row in part["input_ids"]] for name, part in data.items()}


def test_rows_come_back_by_dataset_and_row_whatever_their_order(saved, tmp_path):
    loaded = tokenized.load(arguments(saved, val_size=1), Tokenizer())
    assert ids(loaded.train) == {"b": [50, 51], "a": [10, 11, 12]} and list(loaded.train) == ["b", "a"]
    assert loaded.rows["a"].tolist() == [1, 4, 5] and ids(loaded.evaluation) == {"": [80]} and loaded.notes == ()
    mixed = datasets.load_from_disk(str(saved))
    mixed["train"] = mixed["train"].shuffle(seed=1).select(range(4))
    mixed.save_to_disk(str(tmp_path / "mixed"))
    again = tokenized.load(arguments(tmp_path / "mixed"), Tokenizer())
    for name, which in again.rows.items():
        assert which.tolist() == sorted(which.tolist())
        assert ids(again.train)[name] == [{"a": {1: 10, 4: 11, 5: 12}, "b": {0: 50, 1: 51}}[name][r] for r in which]
    assert tokenized.load(arguments(saved, dataset=["a"]), Tokenizer()).train.keys() == {"a"}


def test_a_set_of_llamafactory_is_one_domain_with_a_note(tmp_path):
    sets = datasets.DatasetDict({"train": rows(1, 4), "validation_x": rows(9, 1), "validation_y": rows(7, 1)})
    sets.save_to_disk(str(tmp_path / "lf"))
    loaded = tokenized.load(arguments(tmp_path / "lf", eval_dataset=["x", "y"]), Tokenizer())
    assert ids(loaded.train) == {"tokenized": [1, 2, 3, 4]} and ids(loaded.evaluation) == {"x": [9], "y": [7]}
    assert "does not say which row is of which dataset" in loaded.notes[0]
    rows(1, 4).save_to_disk(str(tmp_path / "single"))
    assert ids(tokenized.load(arguments(tmp_path / "single"), Tokenizer()).train) == {"tokenized": [1, 2, 3, 4]}


def test_other_settings_are_notes_and_another_tokenizer_an_error(saved):
    loaded = tokenized.load(arguments(saved, cutoff_len=16, val_size=1), Tokenizer())
    assert len(loaded.notes) == 1 and "were made with cutoff_len: 8; 16 does not change them" in loaded.notes[0]
    with pytest.raises(DataError, match="was made by another tokenizer"):
        tokenized.load(arguments(saved), Tokenizer("other"))
    with pytest.raises(DataError, match="was made for stage sft, this run's is pt"):
        tokenized.load(arguments(saved, stage="pt"), Tokenizer())


def damaged(kind, folder):
    arrow = next((folder / "train").glob("*.arrow"))
    if kind == "cut":
        arrow.write_bytes(arrow.read_bytes()[:-100])
    elif kind == "no rows file":
        arrow.unlink()
    elif kind == "no set":
        shutil.rmtree(folder / "train")
    elif kind == "no list of sets":
        (folder / "dataset_dict.json").unlink()
    elif kind == "broken list of sets":
        (folder / "dataset_dict.json").write_text("{")
    elif kind == "broken recipe":
        (folder / "dataflex.json").write_text("{")
    elif kind == "another recipe":
        (folder / "dataflex.json").write_text(json.dumps({"format": 99}))
    elif kind == "noise without a recipe":
        (folder / "dataflex.json").unlink()
        arrow.write_bytes(b"x" * 500)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut", "bytes, dataflex.json says"), ("no rows file", "tokenized_path: .*"), ("no set", "tokenized_path: .*set"),
        ("no list of sets", "holds no tokenized dataset"), ("broken list of sets", "cannot be read"),
        ("broken recipe", "dataflex.json"), ("another recipe", "of no format that this version reads"),
        ("noise without a recipe", "cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(saved, kind, words):
    damaged(kind, saved)
    with pytest.raises(DataError, match=words) as caught:
        tokenized.load(arguments(saved), Tokenizer())
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def wrong(kind):
    plain = rows(1, 4)
    return {
        "chosen": datasets.Dataset.from_dict({"chosen_input_ids": [[1]], "chosen_labels": [[1]]}),
        "no labels": plain.remove_columns("labels"),
        "large id": rows(98, 4),
        "negative id": datasets.Dataset.from_dict({"input_ids": [[-1]], "labels": [[1]]}),
        "other lengths": datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1]]}),
        "packed": datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "attention_mask": [[1, 2]]}),
        "images": plain.add_column("images", [["a.png"]] * 4),
        "none": plain.select([]),
        "half an identity": plain.add_column("dataflex_domain", [0] * 4).add_column("dataflex_row", [0, None, 1, 2]),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("chosen", "pairs of answers, .* are not kept as tokens"), ("no labels", "no column labels .* stage pt"),
        ("large id", "the id 102; the model's tokenizer has 100 ids"), ("negative id", "the id -1"),
        ("other lengths", "not as many labels as input_ids"), ("packed", "several samples each"),
        ("images", "rows with images are not kept as tokens"), ("none", "has no rows"),
        ("half an identity", "must say the dataset and the row"),
    ],
)  # fmt: skip
def test_rows_of_another_kind_are_one_line(tmp_path, kind, words):
    datasets.DatasetDict({"train": wrong(kind)}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=words) as caught:
        tokenized.load(arguments(tmp_path / "set"), Tokenizer())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_asked_for_and_not_there_is_named(saved, tmp_path):
    with pytest.raises(DataError, match=r"dataset: 'bb' is not in tokenized_path .*did you mean 'b'.*it holds a, b"):
        tokenized.load(arguments(saved, dataset=["bb"]), Tokenizer())
    with pytest.raises(DataError, match="does not fit into packs of cutoff_len 1"):
        tokenized.load(arguments(saved, packing=True, cutoff_len=1), Tokenizer())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        tokenized.is_saved(tmp_path / "file")
    datasets.DatasetDict({"train": rows(1, 4)}).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(DataError, match=r"eval_dataset: tokenized_path .* holds no evaluation set; it has train"):
        tokenized.load(arguments(tmp_path / "bare", eval_dataset=["x"]), Tokenizer())
    assert not tokenized.is_saved(tmp_path / "absent")
