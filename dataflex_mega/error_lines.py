"""What an exception says to a user: one line `key or file: cause`, and whether the user can mend it.

The package's own errors are such lines already. Those of libraries, plug-ins and the operating system are translated here,
by what they are and by whose code raised them. Library exceptions are known by the names of their classes: nothing heavy is
imported.
"""

from __future__ import annotations

import errno
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from dataflex_mega.errors import CodeError, TrainingFault, UserError, cause_of

LONGEST = 600  # characters of a library's message
PACKAGE = Path(__file__).resolve().parent
INSTALLED = [Path(sysconfig.get_paths()[name]).resolve() for name in ("purelib", "platlib")]
STDLIB = Path(sysconfig.get_paths()["stdlib"]).resolve()
MENDABLE, FAULT = 2, 1

# What the operating system refuses -> (status, cause and remedy).
SYSTEM = {
    errno.ENOSPC: (MENDABLE, "no space left on the device; make room, then give the same command again"),
    errno.EDQUOT: (MENDABLE, "the disk quota is used up; make room, then give the same command again"),
    errno.EFBIG: (MENDABLE, "larger than the file system or `ulimit -f` allows"),
    errno.EROFS: (MENDABLE, "the file system is read-only"),
    errno.EACCES: (MENDABLE, "permission denied"),
    errno.EPERM: (MENDABLE, "not permitted"),
    errno.ENOENT: (MENDABLE, "no such file or folder"),
    errno.ENOTDIR: (MENDABLE, "a part of the path is a file, not a folder"),
    errno.EISDIR: (MENDABLE, "is a folder, expected a file"),
    errno.EEXIST: (MENDABLE, "exists already and is not what is expected there"),
    errno.ENOTEMPTY: (MENDABLE, "the folder is not empty"),
    errno.ENAMETOOLONG: (MENDABLE, "the name is too long"),
    errno.ELOOP: (MENDABLE, "symbolic links lead in a circle"),
    errno.EINVAL: (MENDABLE, "the file system does not take this name or operation"),
    errno.ENOTSUP: (MENDABLE, "the file system cannot do this"),
    errno.EMFILE: (MENDABLE, "too many open files; `ulimit -n` raises the limit"),
    errno.ENFILE: (MENDABLE, "too many open files on this machine"),
    errno.ENOMEM: (FAULT, "not enough memory"),
    errno.EIO: (FAULT, "the device reports an input/output error"),
    errno.ESTALE: (FAULT, "the network file system has lost the file"),
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
ERRNO_IN_TEXT = re.compile(r"(?:os error |\[Errno )(\d+)")
UNFINISHED_WRITE = re.compile(r"inline_container|PytorchStreamWriter|file write failed|iostream error")
LOST_PEER = re.compile(
    r"[Cc]onnection (?:closed|reset|refused)|[Bb]roken pipe|[Tt]imed? ?out|Socket|NCCL|ncclRemoteError|heartbeat|Interrupted"
)

# Function of this package -> the keys by which a library refuses inside it.
STAGES = {
    "build_optimizer": "optim, learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon, optim_args",
    "build_scheduler": "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps",
    "load_callbacks": "callbacks",
    "load_tokenizer": "model_name_or_path",
    "build_model": "model_name_or_path",
    "parse_arguments": "configuration",
    "read_layout": "fsdp",
    "load_data": "dataset",
    "tokenize": "dataset",
    "init_distributed": "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    "init_processes": "the layout of the processes",
    "build_engine": "model_name_or_path",
    "delegate": "llamafactory",
}
PATH_NAMES = (
    "path",
    "file",
    "filename",
    "fname",
    "file_path",
    "pretrained_model_name_or_path",
    "checkpoint_file",
    "folder",
)
DATA_ERRORS = {
    "JSONDecodeError": "not JSON",
    "UnicodeDecodeError": "not UTF-8 text",
    "SafetensorError": "not a whole safetensors file",
    "UnpicklingError": "not a file that may be loaded",
    "BadZipFile": "not a whole zip file",
    "EOFError": "the file ends too early",
    "ArrowInvalid": "not a table that can be read",
    "YAMLError": "not YAML",
    "MarkedYAMLError": "not YAML",
    "ScannerError": "not YAML",
    "ParserError": "not YAML",
}
SETTINGS_ERRORS = (
    "StrictDataclassError", "StrictDataclassFieldValidationError", "StrictDataclassClassValidationError",
    "ValidationError", "HFValidationError",
)  # fmt: skip
NETWORK_ERRORS = (
    "HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "RepositoryNotFoundError", "GatedRepoError",
    "EntryNotFoundError", "RevisionNotFoundError", "ConnectError", "gaierror", "SSLError",
)  # fmt: skip


@dataclass(frozen=True)
class ErrorLine:
    """One line for the user, without `error: ` before it."""

    text: str
    status: int  # of the program: 2 when the user can mend it, 1 for a fault
    keeps_trace: bool  # whether the trace says more than the line
    is_consequence: bool = False  # another process of the job has failed before
    is_about_peer: bool = False  # the line says what became of another process


@dataclass
class Place:
    """Where a command works. Empty until its configuration is read."""

    folder: Path | None = None  # for error.log
    paths: dict[str, Path] = field(default_factory=dict)  # key of the configuration -> the path it names


def describe(error: BaseException, paths: Mapping[str, Path] | None = None) -> ErrorLine:
    """The line of an exception. `paths`: keys that name files and folders, to say which key a file belongs to."""
    if isinstance(error, UserError):
        return ErrorLine(_one_line(str(error)), MENDABLE, isinstance(error, CodeError))
    if isinstance(error, TrainingFault):
        trace = _has_foreign_cause(error)
        return ErrorLine(_one_line(str(error)), FAULT, trace, is_about_peer=error.is_consequence)
    error = next(iter(_failures_of_ranks(error)), error)  # what the first rank that failed has
    for rule in RULES:
        line = rule(error, paths or {})
        if line is not None:
            return line
    return ErrorLine(f"internal: {_cut(cause_of(error))}", FAULT, True)


# -- rules: an exception -> its line, or None where the rule says nothing of it ----------------------------------------


def _full_disk(error: BaseException, paths: Mapping[str, Path]) -> ErrorLine | None:
    """A write that failed, wherever in the chain the system said why: libraries raise something else on top."""
    for link in chain(error):
        number = _errno(link)
        if number in FULL_DISK:
            return _system_line(link, number, paths)
    for link in chain(error):
        if isinstance(link, RuntimeError) and UNFINISHED_WRITE.search(str(link)):
            place = _name(paths, _file_of(link) or _file_of(error), "output_dir")
            return ErrorLine(
                f"{place}a file could not be written whole: {_cut(str(link))}; is the disk full?", MENDABLE, True
            )
    return None


def _system(error: BaseException, paths: Mapping[str, Path]) -> ErrorLine | None:
    if isinstance(error, ConnectionError | TimeoutError):
        return None
    number = _errno(error)
    return _system_line(error, number, paths) if number in SYSTEM else None


def _system_line(error: BaseException, number: int, paths: Mapping[str, Path]) -> ErrorLine:
    status, cause = SYSTEM[number]
    file = getattr(error, "filename", None)
    named = file if isinstance(file, str | Path) else None
    place = _name(paths, Path(named) if named else _file_of(error), "output_dir" if number in FULL_DISK else "")
    return ErrorLine(f"{place}{cause}", status, True)


def _memory(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    remedy = "smaller per_device_train_batch_size or cutoff_len, or fsdp: full_shard, need less"
    for link in chain(error, contexts=False):
        if type(link).__name__ == "OutOfMemoryError":
            return ErrorLine(f"not enough memory on the device: {_cut(str(link))}; {remedy}", FAULT, True)
        if isinstance(link, MemoryError) or "DefaultCPUAllocator" in str(link):
            detail = f": {_cut(str(link))}" if str(link) else ""
            return ErrorLine(f"not enough memory of the machine{detail}; {remedy}", FAULT, True)
    return None


def _lost_peer(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    """torch.distributed cannot reach the others: one of them has failed, or was never there."""
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    inside = isinstance(error, RuntimeError) and any(
        "torch/distributed" in frame.f_code.co_filename for frame in _frames(error.__traceback__)
    )
    if named or (inside and LOST_PEER.search(str(error))):
        text = f"torch.distributed: another process of the job has ended or does not answer: {_cut(str(error))}"
        return ErrorLine(text, FAULT, True, is_consequence=True)
    return None


def _nesting(error: BaseException, paths: Mapping[str, Path]) -> ErrorLine | None:
    if not isinstance(error, RecursionError):
        return None
    reading = any(part in frame.f_code.co_filename for frame in _frames(error.__traceback__) for part in READERS)
    if not reading:
        return None
    return ErrorLine(f"{_name(paths, _file_of(error), 'configuration')}nested too deeply", MENDABLE, True)


READERS = ("/json/", "/yaml/", "/omegaconf/")


def _unreadable(error: BaseException, paths: Mapping[str, Path]) -> ErrorLine | None:
    """A file with something else in it than its name says."""
    for link in chain(error, contexts=False):
        what = DATA_ERRORS.get(type(link).__name__)
        if what is not None:
            place = _name(paths, _file_of(link) or _file_of(error), "")
            return ErrorLine(f"{place}{what}: {_cut(str(link))}", MENDABLE, True)
    return None


def _missing_package(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    if not isinstance(error, ImportError) or (
        _owner(error) == PACKAGE.name and not isinstance(error, ModuleNotFoundError)
    ):
        return None
    module = (error.name or "").partition(".")[0]
    if not module or module == PACKAGE.name:
        return None
    remedy = f"; pip install {module}" if isinstance(error, ModuleNotFoundError) else ""
    return ErrorLine(f"{module}: {_cut(cause_of(error))}{remedy}", MENDABLE, True)


def _settings(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    """Validated dataclasses of transformers, huggingface_hub and Pydantic, and the hub's own refusals."""
    for link in chain(error, contexts=False):
        if type(link).__name__ in SETTINGS_ERRORS:
            return ErrorLine(f"{_stage(error) or 'configuration'}: {_cut(cause_of(link))}", MENDABLE, True)
        if type(link).__name__ in NETWORK_ERRORS:
            return ErrorLine(f"{_stage(error) or 'hub'}: {_cut(cause_of(link))}", MENDABLE, True)
    return None


def _code_of_user(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    """Raised in a file that is neither ours nor an installed library's: a plug-in, a callback, a reward."""
    frame = _raising_frame(error)
    if frame is None or _owner(error) is not None:
        return None
    where = f"{frame.f_code.co_filename}, line {_line_number(error, frame)}, in {frame.f_code.co_name}"
    return ErrorLine(f"plug-in {where}: {_cut(cause_of(error))}", MENDABLE, True)


def _refused_by_library(error: BaseException, _: Mapping[str, Path]) -> ErrorLine | None:
    """Raised in an installed library: about the configuration while parts are built, a fault afterwards."""
    library = _owner(error)
    if library is None or library == PACKAGE.name:
        return None
    stage = _stage(error)
    if stage is not None:
        return ErrorLine(f"{stage}: {_cut(cause_of(error))} (said by {library})", MENDABLE, True)
    return ErrorLine(f"{library}: {_cut(cause_of(error))}", FAULT, True)


RULES: tuple[Callable[[BaseException, Mapping[str, Path]], ErrorLine | None], ...] = (
    _full_disk, _memory, _lost_peer, _system, _nesting, _unreadable, _missing_package, _settings, _code_of_user,
    _refused_by_library,
)  # fmt: skip


# -- what is known of an exception -------------------------------------------------------------------------------------


def chain(error: BaseException, contexts: bool = True) -> Iterator[BaseException]:
    """The exception, what caused it, and so on; `contexts`: also what was being handled when it was raised."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        yield from _failures_of_ranks(link)
        link = link.__cause__ or (link.__context__ if contexts and not link.__suppress_context__ else None)


def _failures_of_ranks(error: BaseException) -> list[BaseException]:
    """What torch.distributed.checkpoint's exception holds: (exception, stack) of each rank that failed."""
    failures = getattr(error, "failures", None)
    if type(error).__name__ != "CheckpointException" or not isinstance(failures, Mapping):
        return []
    return [one[0] for one in failures.values() if isinstance(one, tuple) and isinstance(one[0], BaseException)]


def is_user_code(error: BaseException) -> bool:
    """Whether it was raised in a file that is neither of this package nor of an installed library."""
    return _raising_frame(error) is not None and _owner(error) is None


def _has_foreign_cause(error: BaseException) -> bool:
    return any(not isinstance(link, UserError | TrainingFault) for link in chain(error, contexts=False))


def _errno(error: BaseException) -> int:
    """The system's error number, which Rust libraries give in their text only; 0 without one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = ERRNO_IN_TEXT.search(str(error))
    return int(found.group(1)) if found else 0


def _frames(trace: TracebackType | None) -> list[FrameType]:
    """The frames of a trace, the outermost first."""
    return [frame for frame, _ in traceback.walk_tb(trace)]


def _raising_frame(error: BaseException) -> FrameType | None:
    """The innermost frame outside the standard library."""
    for frame in reversed(_frames(error.__traceback__)):
        file = Path(frame.f_code.co_filename)
        if not _inside(file, STDLIB) or any(_inside(file, folder) for folder in INSTALLED):
            return frame
    return None


def _line_number(error: BaseException, frame: FrameType) -> int:
    return next((line for one, line in traceback.walk_tb(error.__traceback__) if one is frame), frame.f_lineno)


def _owner(error: BaseException) -> str | None:
    """Whose code raised: the name of this package or of a library; None for code that is neither."""
    frame = _raising_frame(error)
    if frame is None:
        return PACKAGE.name
    file = Path(frame.f_code.co_filename)
    if _inside(file, PACKAGE) or str(file).startswith("<frozen"):
        return PACKAGE.name
    for folder in INSTALLED:
        if _inside(file, folder):
            return file.resolve().relative_to(folder).parts[0].removesuffix(".py")
    return "python" if str(file).startswith("<") else None


def _inside(file: Path, folder: Path) -> bool:
    return file.is_absolute() and (file.is_relative_to(folder) or file.resolve().is_relative_to(folder))


def _stage(error: BaseException) -> str | None:
    """The keys that a library was reading when it raised; None outside such a part of the program."""
    found = None
    for frame in _frames(error.__traceback__):
        if _inside(Path(frame.f_code.co_filename), PACKAGE):
            found = STAGES.get(frame.f_code.co_name, found)
    return found


def _file_of(error: BaseException) -> Path | None:
    """The file that a reader or writer was at: the innermost local variable that is named like one and is a path."""
    for frame in reversed(_frames(error.__traceback__)):
        for name in PATH_NAMES:
            value = frame.f_locals.get(name)
            if isinstance(value, Path) or (
                isinstance(value, str) and ("/" in value or "." in value) and len(value) < 4096
            ):
                return Path(value)
            named = getattr(value, "name", None)
            if isinstance(named, str) and "/" in named:
                return Path(named)
    return None


def _name(paths: Mapping[str, Path], file: Path | None, default: str) -> str:
    """`output_dir: out/metrics.jsonl: `, with the key whose folder is nearest to the file."""
    if file is None:
        value = paths.get(default)
        return f"{default}: {value}: " if value is not None else f"{default}: " if default else ""
    whole = file.absolute()
    owners = [(len(path.absolute().parts), key) for key, path in paths.items() if whole.is_relative_to(path.absolute())]
    owners += [(0, key) for key, path in paths.items() if path.absolute().is_relative_to(whole)]
    return f"{max(owners)[1]}: {file}: " if owners else f"{file}: "


def _one_line(text: str) -> str:
    return " ".join(text.split()) if "\n" in text else text


def _cut(text: str) -> str:
    """A library's message on one line, without its C++ stack."""
    text = re.split(r"\n(?:Exception raised from|C\+\+ CapturedTraceback|frame #0)", text)[0]
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
