"""`tokenized_path`: tokenized rows saved as LLaMA-Factory saves them, each with the dataset and the row that it is.

The folder is a DatasetDict of `train` and `validation` or `validation_NAME`, which LLaMA-Factory reads too. Two more columns
say what its own merged sets forget: `dataflex_domain`, a class label whose names are those of the datasets, and
`dataflex_row`, the row in that tokenized dataset. They are numbers, since LLaMA-Factory's collators make a tensor of every
column. `dataflex.json` beside the rows says how they were made. A set of LLaMA-Factory's own has neither, and is one domain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dataflex_mega.json_text as json_text
from dataflex_mega.data.manifest import tokenizer_fingerprint
from dataflex_mega.errors import DataError, did_you_mean
from dataflex_mega.files import atomic_write, remove_if_empty, remove_tree, replace_folder
from dataflex_mega.llamafactory.args import LFArgs, first_line

KEY = "tokenized_path"
DOMAIN, ROW = "dataflex_domain", "dataflex_row"
WHOLE = "tokenized"  # the one domain of a set that does not say which row is of which dataset
RECIPE, FORMAT = "dataflex.json", 1
TRAIN, VALIDATION = "train", "validation"
DICT_FILE, DATASET_FILE = "dataset_dict.json", "state.json"
SETTINGS = (
    "template", "cutoff_len", "train_on_prompt", "mask_history", "max_samples", "val_size", "tool_format",
    "default_system", "enable_thinking", "preserve_thinking", "eval_dataset",
)  # fmt: skip
MEDIA = ("images", "videos", "audios")
ROWS_PER_READ = 20_000
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError)


@dataclass(frozen=True)
class TokenizedData:
    """Tokenized Hugging Face datasets by name, and for each of the training ones which of its rows they are."""

    train: dict[str, Any]
    evaluation: dict[str, Any]  # "" for the one evaluation set, else a name for each
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [n] rows; all of them where it is absent
    notes: tuple[str, ...] = ()


def is_saved(path: str | Path) -> bool:
    """Whether something is there to be loaded, by LLaMA-Factory's rule. Raises DataError for a file."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{KEY}: {folder} is a file, expected a folder")
    return folder.is_dir() and any(folder.iterdir())


# -- save --------------------------------------------------------------------------------------------------------------


def save(data: TokenizedData, args: LFArgs, tokenizer: Any, temporary: Path) -> None:
    """Write `tokenized_path`, whole or not at all. `temporary`: a folder of the same file system, made and removed here."""
    from datasets import ClassLabel, DatasetDict, Value, concatenate_datasets

    for name, rows in [*data.train.items(), *data.evaluation.items()]:
        refuse_unkept(f"{KEY}: dataset {name!r}" if name else f"{KEY}: the evaluation set", rows)
    parts, label = [], ClassLabel(names=list(data.train))
    for number, (name, rows) in enumerate(data.train.items()):
        which = data.rows.get(name, np.arange(len(rows), dtype=np.int64))
        marked = rows.add_column(DOMAIN, np.full(len(rows), number, dtype=np.int64), feature=label)
        parts.append(marked.add_column(ROW, which, feature=Value("int64")))
    sets: dict[Any, Any] = {TRAIN: concatenate_datasets(parts)}
    sets.update({f"{VALIDATION}_{name}" if name else VALIDATION: rows for name, rows in data.evaluation.items()})
    target = Path(args.data.tokenized_path).expanduser()
    try:
        DatasetDict(sets).save_to_disk(str(temporary))
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in sorted(temporary.rglob("*.arrow"))}
        recipe = {"format": FORMAT, "datasets": list(data.train), "files": sizes, **_made_with(args, tokenizer)}
        atomic_write(temporary / RECIPE, json.dumps(recipe, indent=1) + "\n")
        remove_if_empty(target)
        replace_folder(temporary, target)
    finally:
        remove_tree(temporary)


def _made_with(args: LFArgs, tokenizer: Any) -> dict[str, Any]:
    settings = {key: getattr(args.data, key, None) for key in SETTINGS}
    return {
        "stage": args.finetuning.stage,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "settings": json.loads(json.dumps(settings, default=str)),
    }


# -- load --------------------------------------------------------------------------------------------------------------


def load(args: LFArgs, tokenizer: Any) -> TokenizedData:
    """What `tokenized_path` holds, its training rows by dataset in the order of the `dataset` key.

    Raises DataError for a folder that is damaged or of another kind, tokenizer or stage, a dataset that it does not hold,
    and an evaluation set that the configuration needs and it lacks.
    """
    folder = Path(args.data.tokenized_path).expanduser()
    recipe = _read_recipe(folder)  # first, since it says which file is cut
    sets = _read(folder)
    for name, rows in sets.items():
        _check_columns(f"{KEY}: {folder}: {name}", rows, args)
        _check_rows(f"{KEY}: {folder}: {name}", rows, args, len(tokenizer))
    notes = _check_recipe(folder, recipe, args, tokenizer)
    train, whose = _by_domain(folder, sets[TRAIN], list(args.data.dataset or []))
    if not whose:
        notes.append(
            f"{KEY}: {folder} does not say which row is of which dataset, as sets that LLaMA-Factory made: one domain, "
            f"{WHOLE}"
        )
    return TokenizedData(train, _evaluation(folder, sets, args), whose, tuple(notes))


def _read(folder: Path) -> dict[str, Any]:
    """The sets by name, as LLaMA-Factory would read them."""
    from datasets import DatasetDict, load_from_disk

    if not any((folder / name).is_file() for name in (DICT_FILE, DATASET_FILE)):
        raise DataError(
            f"{KEY}: {folder} holds no tokenized dataset ({DICT_FILE} is missing); name a folder that is not there yet, or "
            "one that a run has written"
        )
    try:
        loaded: Any = load_from_disk(str(folder))
    except UNREADABLE as error:
        raise DataError(f"{KEY}: {folder} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    sets: Any = dict(loaded) if isinstance(loaded, DatasetDict) else {TRAIN: loaded}
    if TRAIN not in sets:
        raise DataError(f"{KEY}: {folder} has no set {TRAIN!r}; it has {', '.join(map(str, sets)) or 'none'}")
    return sets


def _check_columns(what: str, rows: Any, args: LFArgs) -> None:
    refuse_unkept(what, rows)
    has = ", ".join(rows.column_names) or "none"
    if "input_ids" not in rows.column_names:
        raise DataError(f"{what}: no column input_ids; it has {has}")
    if args.finetuning.stage != "pt" and "labels" not in rows.column_names:
        raise DataError(f"{what}: no column labels (it has {has}): those are the rows of stage pt, this run's is sft")
    if len(rows) == 0:
        raise DataError(f"{what} has no rows")


def _check_rows(what: str, rows: Any, args: LFArgs, num_ids: int) -> None:
    """Every id is one of the tokenizer's, every row has as many labels, and none holds several samples."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute
    columns = [name for name in ("input_ids", "labels", "attention_mask") if name in rows.column_names]
    table_of, longest = rows.select_columns(columns).with_format("arrow"), 0
    try:
        for first in range(0, len(rows), ROWS_PER_READ):
            table = table_of[first : min(first + ROWS_PER_READ, len(rows))]
            lengths = {name: compute.list_value_length(table[name]) for name in columns}
            found = compute.min_max(compute.list_flatten(table["input_ids"])).as_py()
            if found["min"] is not None and not 0 <= found["min"] <= found["max"] < num_ids:
                wrong = found["min"] if found["min"] < 0 else found["max"]
                raise DataError(f"{what}: the id {wrong}; the model's tokenizer has {num_ids} ids")
            if "labels" in lengths and not lengths["labels"].equals(lengths["input_ids"]):
                raise DataError(f"{what}: rows {first} to {first + len(table) - 1}: not as many labels as input_ids")
            mask = (
                compute.max(compute.list_flatten(table["attention_mask"])).as_py() if "attention_mask" in columns else 1
            )
            if mask is not None and mask > 1:
                raise DataError(
                    f"{what}: its rows hold several samples each (neat_packing); save it without packing, which this run "
                    "does when it makes a batch"
                )
            longest = max(longest, compute.max(lengths["input_ids"]).as_py() or 0)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{what} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    if (args.data.packing or args.data.neat_packing) and longest > args.data.cutoff_len:
        raise DataError(
            f"{what}: a row of {longest} tokens does not fit into packs of cutoff_len {args.data.cutoff_len}"
        )


def refuse_unkept(what: str, rows: Any) -> None:
    """Raises DataError for pairs, and for rows with images, videos or audio, whose files such a set would not keep."""
    if "chosen_input_ids" in rows.column_names:
        raise DataError(
            f"{what}: pairs of answers, the rows of stages rm and dpo, are not kept as tokens; leave {KEY} out"
        )
    for column in MEDIA:
        if column in rows.column_names:
            values = rows.select_columns([column]).with_format("arrow")[:][column]
            if values.null_count == len(values):
                continue
            raise DataError(f"{what}: rows with {column} are not kept as tokens; leave {KEY} out")


def _read_recipe(folder: Path) -> dict[str, Any] | None:
    """What is beside the rows of a set that a run of ours made. Raises DataError for one that is damaged."""
    file = folder / RECIPE
    try:
        content = json_text.read(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{KEY}: {file}{json_text.read_problem(file, error)}") from error
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(files, dict):
        raise DataError(f"{KEY}: {file} is of no format that this version reads ({FORMAT})")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{KEY}: {folder / name} {state}, {RECIPE} says {size}: the folder is damaged")
    return content


def _check_recipe(folder: Path, recipe: dict[str, Any] | None, args: LFArgs, tokenizer: Any) -> list[str]:
    """Notes on settings under which the rows were made and that the configuration has otherwise."""
    if recipe is None:
        return []
    now = _made_with(args, tokenizer)
    if recipe.get("tokenizer") != now["tokenizer"]:
        raise DataError(
            f"{KEY}: {folder} was made by another tokenizer than that of model_name_or_path; name another folder"
        )
    if recipe.get("stage") != now["stage"]:
        raise DataError(f"{KEY}: {folder} was made for stage {recipe.get('stage')}, this run's is {now['stage']}")
    made = recipe.get("settings")
    made = made if isinstance(made, dict) else {}
    return [
        f"{KEY}: the rows of {folder} were made with {key}: {json.dumps(made[key])}; {json.dumps(value)} does not change "
        "them"
        for key, value in now["settings"].items()
        if key in made and made[key] != value
    ]


def _by_domain(folder: Path, rows: Any, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The training rows by dataset, each in the order of its rows -> (them, which rows they are). Without the columns: all
    of them under one name."""
    if DOMAIN not in rows.column_names or ROW not in rows.column_names:
        return {WHOLE: rows}, {}
    labels = getattr(rows.features[DOMAIN], "names", None)
    table = rows.select_columns([DOMAIN, ROW]).with_format("arrow")[:]
    domain, row = (table[name].to_pylist() for name in (DOMAIN, ROW))
    if any(value is None for value in (*domain, *row)) or (
        labels is None and not all(isinstance(d, str) for d in domain)
    ):
        raise DataError(f"{KEY}: {folder}: {DOMAIN} and {ROW} must say the dataset and the row of every sample")
    given = np.asarray(domain if labels is None else [labels[d] for d in domain])
    numbers = np.asarray(row, dtype=np.int64)
    held = list(dict.fromkeys(given.tolist()))
    for name in names:
        if name not in held:
            near = did_you_mean(name, held)
            raise DataError(f"dataset: {name!r} is not in {KEY} {folder}{near}; it holds {', '.join(held)}")
    parts, whose = {}, {}
    for name in names or held:
        positions = np.flatnonzero(given == name)
        positions = positions[np.argsort(numbers[positions], kind="stable")]
        parts[name], whose[name] = rows.select(positions), numbers[positions]
    return parts, whose


def _evaluation(folder: Path, sets: dict[str, Any], args: LFArgs) -> dict[str, Any]:
    """The evaluation sets by LLaMA-Factory's rule; none where the configuration asks for none."""
    wants = bool(args.data.eval_dataset) or args.data.val_size > 1e-6
    found = {VALIDATION: sets[VALIDATION]} if VALIDATION in sets else sets
    prefix = f"{VALIDATION}_"
    held = {
        name.removeprefix(VALIDATION).removeprefix("_"): rows
        for name, rows in found.items()
        if name == VALIDATION or name.startswith(prefix)
    }
    if wants and not held:
        key = "eval_dataset" if args.data.eval_dataset else "val_size"
        raise DataError(f"{key}: {KEY} {folder} holds no evaluation set; it has {', '.join(sets)}")
    return held if wants else {}
