"""`manifest.json` of a corpus folder: its domains, their sizes and the tokenizer that made their tokens.

A corpus is one pair NAME.bin, NAME.idx per domain in Megatron's layout, beside the manifest, which `dataflex-cli corpus`
writes. Reading the manifest needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import dataflex_mega.json_text as json_text
from dataflex_mega.errors import DataError, did_you_mean

NAME = "manifest.json"
FORMAT, VERSION = "dataflex_mega corpus", 1
ITEMSIZE = {"uint16": 2, "int32": 4}  # bytes of a token
UNKNOWN_TOKENIZER = "unknown"  # as a fingerprint: of a corpus that was made elsewhere
PROBE = "The year 2024, x_1 == (y + 2.50) -> [naive]\n\tna\u00efve \u4f60\u597d \U0001f600 don't  stop"


@dataclass(frozen=True)
class CorpusDomain:
    """One domain: a pair of files, their sizes and their hashes."""

    name: str
    prefix: str  # file name without .bin and .idx, in the folder of the manifest
    documents: int
    tokens: int  # with one end-of-document token for each document
    proportion: float  # of all tokens of the corpus
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class CorpusTokenizer:
    """The tokenizer that made the ids."""

    fingerprint: str  # see `tokenizer_fingerprint`
    vocab_size: int  # all ids are below it
    eod_token_id: int  # the id at the end of every document


@dataclass(frozen=True)
class Corpus:
    """The manifest of a corpus, parsed, and its folder."""

    folder: Path
    dtype: str
    tokenizer: CorpusTokenizer
    domains: tuple[CorpusDomain, ...]
    rows: int  # rows of the inputs, bad ones too
    bad_rows: int
    inputs: tuple[dict[str, Any], ...]  # {"path", "bytes"} of every input file, in order
    recipe: str  # a hash of the inputs and options it was made with

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names in manifest order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def tokens(self) -> int:
        """Tokens of all domains."""
        return sum(domain.tokens for domain in self.domains)

    def prefix(self, domain: CorpusDomain) -> Path:
        """Path of a domain's files without their suffix."""
        return self.folder / domain.prefix

    def pick(self, names: Sequence[str], key: str = "dataset") -> tuple[CorpusDomain, ...]:
        """The domains of these names in that order; all of them for no names. Raises DataError naming an unknown one."""
        known = {domain.name: domain for domain in self.domains}
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{key}: {name!r} is listed {names.count(name)} times")
            if name not in known:
                hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
                raise DataError(f"{key}: {name!r} is not a domain of {self.folder / NAME}{hint}")
        return tuple(known[name] for name in names) if names else self.domains

    def to_json(self) -> str:
        """The text of the manifest; the same corpus gives the same text wherever it lies."""
        body = {key: value for key, value in asdict(self).items() if key != "folder"}
        tokenizer = self.tokenizer
        body["tokenizer"] = {
            "fingerprint": tokenizer.fingerprint,
            "vocabulary": tokenizer.vocab_size,
            "end": tokenizer.eod_token_id,
        }
        return json.dumps({"format": FORMAT, "version": VERSION, **body}, indent=2, ensure_ascii=False) + "\n"


def read(folder: str | Path, key: str = "corpus_dir") -> Corpus:
    """The corpus in `folder`, the sizes of its .bin files checked.

    Raises DataError, beginning with `key`, for a folder without manifest, a manifest that is damaged or of another
    version, and files that are missing or of another size than the manifest says.
    """
    path = Path(folder).expanduser()
    file = path / NAME
    if not path.is_dir():
        hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{key}: folder {folder} not found{hint}")
    if not file.is_file():
        raise DataError(f"{key}: {file} not found; {_who_writes_it(path)}")
    try:
        content = json_text.read(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {file}{json_text.read_problem(file, error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{key}: {file} is not a corpus manifest ('format' must be {FORMAT!r})")
    if content.get("version") != VERSION:
        raise DataError(f"{key}: {file} has version {content.get('version')!r}, this program reads {VERSION}")
    corpus = _from_json(path, content, f"{key}: {file}")
    for domain in corpus.domains:
        _check_files(corpus, domain, key)
    return corpus


def _who_writes_it(folder: Path) -> str:
    """How a folder without a manifest gets one."""
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    if not prefixes:
        return "`dataflex-cli corpus` writes it"
    more = " ..." if len(prefixes) > 3 else ""
    return f"`dataflex-cli corpus --from-megatron {' '.join(prefixes[:3])}{more} --tokenizer MODEL` writes it"


def _from_json(folder: Path, content: dict[str, Any], where: str) -> Corpus:
    try:
        values = {f.name: content[f.name] for f in fields(Corpus) if f.name != "folder"}
        values["domains"] = tuple(CorpusDomain(**domain) for domain in content["domains"])
        tokenizer = content["tokenizer"]
        values["tokenizer"] = CorpusTokenizer(tokenizer["fingerprint"], tokenizer["vocabulary"], tokenizer["end"])
        values["inputs"] = tuple(content["inputs"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged: {type(error).__name__} {error}") from error
    _check_types(values, where)
    corpus = Corpus(folder, **values)
    if not isinstance(corpus.dtype, str) or corpus.dtype not in ITEMSIZE or not corpus.domains:
        raise DataError(f"{where} is damaged: dtype {corpus.dtype!r}, {len(corpus.domains)} domains")
    return corpus


def _check_types(values: dict[str, Any], where: str) -> None:
    """Raises DataError for an entry of another type than written, a file outside the folder and a domain listed twice."""
    for domain in values["domains"]:
        for name, kind in TYPES.items():
            value = getattr(domain, name)
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is not str and not value >= 0):
                raise DataError(f"{where} is damaged: {name} of domain {domain.name!r} is {value!r}")
        if not domain.name or Path(domain.prefix).name != domain.prefix or domain.prefix in ("", ".", ".."):
            found = f"domain {domain.name!r} has the file {domain.prefix!r}, not one of its folder"
            raise DataError(f"{where} is damaged: {found}")
    for what, found in (("domain", "name"), ("prefix", "prefix")):
        names = [getattr(domain, found) for domain in values["domains"]]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{where} is damaged: {what} {twice!r} is listed {names.count(twice)} times")
    tokenizer = values["tokenizer"]
    numbers = {"tokenizer.vocabulary": tokenizer.vocab_size, "tokenizer.end": tokenizer.eod_token_id}
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"{where} is damaged: {name} is {value!r}")
    if not isinstance(tokenizer.fingerprint, str):
        raise DataError(f"{where} is damaged: tokenizer.fingerprint is {tokenizer.fingerprint!r}")


TYPES: dict[str, Any] = {
    "name": str, "prefix": str, "documents": int, "tokens": int, "proportion": int | float, "bin_sha256": str,
    "idx_sha256": str,
}  # fmt: skip


def _check_files(corpus: Corpus, domain: CorpusDomain, key: str) -> None:
    for suffix in (".bin", ".idx"):
        path = corpus.prefix(domain).with_name(domain.prefix + suffix)
        if not path.is_file():
            raise DataError(f"{key}: {path} not found (domain {domain.name!r} of {corpus.folder / NAME})")
    path = corpus.prefix(domain).with_name(domain.prefix + ".bin")
    size, expected = path.stat().st_size, domain.tokens * ITEMSIZE[corpus.dtype]
    if size != expected:
        raise DataError(f"{key}: {path} has {size} bytes, its manifest says {expected}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a Hugging Face tokenizer's vocabulary and of its ids of a probe text.

    Added tokens are left out: training adds padding and chat tokens, which changes no id of a text.
    """
    added = set(tokenizer.get_added_vocab())
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in added)
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, list(ids)]).encode()).hexdigest()


def check_tokenizer(corpus: Corpus, tokenizer: Any, key: str = "corpus_dir") -> None:
    """Raises DataError when `tokenizer` is not the one that made the corpus."""
    if corpus.tokenizer.fingerprint == UNKNOWN_TOKENIZER:
        if corpus.tokenizer.vocab_size > len(tokenizer):
            largest = corpus.tokenizer.vocab_size - 1
            raise DataError(
                f"{key}: {corpus.folder} has the id {largest}; the model's tokenizer has {len(tokenizer)} ids"
            )
        return
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != corpus.tokenizer.fingerprint:
        raise DataError(
            f"{key}: {corpus.folder} was tokenized with another tokenizer (fingerprint "
            f"{corpus.tokenizer.fingerprint[:12]}, the model's is {fingerprint[:12]}); prepare it with the model's tokenizer"
        )
