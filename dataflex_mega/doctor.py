"""`python -m dataflex_mega.doctor`: which software and hardware this machine has, and what can therefore be run.

`inspect_machine` returns plain data, `format_report` makes text of it. Every check asks a `Probe`, so a test can present
a machine that does not exist.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from dataflex_mega.exit_status import OneLineParser
from dataflex_mega.log import get_logger
from dataflex_mega.setup.imports import first_cause
from dataflex_mega.setup.packages import EXTRAS, IMPORTED_WHEN_PRESENT, LLAMAFACTORY_VERSIONS, module_of
from dataflex_mega.setup.versions import read_requirement, version_fits

PACKAGE = "dataflex_mega"
DESCRIPTION = (
    "Print which software and hardware this machine has, and what can therefore be run. Ends with 1 when nothing can."
)
# What importing an installed package raises when it, or a library it needs, does not fit this machine.
IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError)
OK, ABSENT, BROKEN, UNFIT = "ok", "absent", "broken", "unfit"

MEGATRON_VERSIONS = ">=0.16.1,<0.20"  # versions of megatron-core; engines/megatron/version.py refuses others


@dataclass(frozen=True)
class Finding:
    """The state of one package or device."""

    name: str
    state: str  # OK, ABSENT, BROKEN (installed, not importable) or UNFIT (another version or another package)
    detail: str = ""  # version, device, or what is wrong
    consequence: str = ""  # what this means for the user, where it is not obvious
    required: bool = False  # whether training is impossible unless it is OK


@dataclass(frozen=True)
class Ability:
    """One thing a user may want to do."""

    name: str
    possible: bool
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The findings of all checks, as `main` prints them."""

    findings: list[Finding]
    abilities: list[Ability]

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be trained here, in one line; None when training is possible."""
        for f in self.findings:
            if f.required and f.state != OK:
                return f"{f.name} is {f.state}" + (f" ({f.detail})" if f.detail else "")
        return None

    def state(self, name: str) -> str:
        """The state of the finding of that name. Raises KeyError when there is none."""
        return {f.name: f.state for f in self.findings}[name]


class Probe:
    """All questions to the machine that the checks ask."""

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution, or None."""
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return None

    def requirements(self) -> list[str]:
        """The requirements in dataflex_mega's own metadata, like `torch>=2.8`; none in an uninstalled source tree."""
        try:
            return metadata.requires(PACKAGE) or []
        except metadata.PackageNotFoundError:
            return []

    def import_module(self, module: str) -> ModuleType:
        """Import a module. Raises one of IMPORT_ERRORS."""
        return importlib.import_module(module)

    def hide_module(self, module: str) -> None:
        """Let a broken module count as not installed, as `llamafactory.compat` does before training."""
        for name in [m for m in sys.modules if m == module or m.startswith(module + ".")]:
            del sys.modules[name]
        sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError

    def has_program(self, name: str) -> bool:
        """Whether a program of that name is on the path."""
        return shutil.which(name) is not None

    def python_version(self) -> tuple[int, ...]:
        """The version of this Python, like (3, 11, 7)."""
        return sys.version_info[:3]


def supported_versions(probe: Probe, distribution: str) -> str:
    """`>=2.8` for torch: the range in dataflex_mega's own metadata, or an empty string."""
    ranges = [r.bounds for r in map(read_requirement, probe.requirements()) if r.name == distribution and not r.extra]
    return ranges[0] if ranges else LLAMAFACTORY_VERSIONS if distribution == "llamafactory" else ""


def check_python(probe: Probe) -> Finding:
    """The version of this interpreter."""
    version = probe.python_version()
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", UNFIT, f"{text}; 3.11 or newer is needed", required=True)
    return Finding("python", OK, text, required=True)


def check_package(
    probe: Probe, distribution: str, required: bool = True, consequence: str = "", module: str | None = None
) -> Finding:
    """Whether a package has a supported version and its module, by default of the same name, can be imported."""
    version = probe.version(distribution)
    if version is None:
        return Finding(distribution, ABSENT, consequence=consequence, required=required)
    bounds = supported_versions(probe, distribution)
    if not version_fits(version, bounds):
        return Finding(distribution, UNFIT, f"{version}; {bounds} is supported", consequence, required)
    try:
        probe.import_module(module or distribution)
    except IMPORT_ERRORS as error:
        return Finding(distribution, BROKEN, f"{version}: {first_cause(error)}", consequence, required)
    return Finding(distribution, OK, version, required=required)


def check_torch(probe: Probe) -> Finding:
    """PyTorch, and the CUDA version that it was built for."""
    finding = check_package(probe, "torch")
    if finding.state != OK:
        return finding
    cuda = probe.import_module("torch").version.cuda
    return Finding("torch", OK, f"{finding.detail} ({f'CUDA {cuda}' if cuda else 'CPU'} build)", required=True)


def check_devices(probe: Probe, torch: Any) -> list[Finding]:
    """CUDA devices, and the communication libraries that this torch was built with."""
    findings = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            size = f"{device.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(f"cuda:{index}", OK, f"{device.name}, {size}, sm_{device.major}{device.minor}"))
    elif torch.version.cuda is None and probe.has_program("nvidia-smi"):
        consequence = "install a CUDA build of torch (DATAFLEX_TORCH names it to `make env`)"
        findings.append(Finding("cuda", UNFIT, "an NVIDIA driver is here, but this torch is a CPU build", consequence))
    else:
        findings.append(Finding("cuda", ABSENT, "no CUDA device", "training runs on the CPU"))
    distributed = torch.distributed
    gloo = distributed.is_available() and distributed.is_gloo_available()
    findings.append(Finding("gloo", OK if gloo else ABSENT, consequence="" if gloo else "one process only on CPU"))
    nccl = distributed.is_available() and distributed.is_nccl_available()
    findings.append(
        Finding("nccl", OK if nccl else ABSENT, consequence="" if nccl else "no training over several GPUs")
    )
    return findings


def check_llamafactory(probe: Probe) -> Finding:
    """The front end, by its version: importing it takes ten seconds."""
    name, bounds = "llamafactory", supported_versions(probe, "llamafactory")
    version = probe.version(name)
    if version is None:
        return Finding(name, ABSENT, "`dataflex-cli setup` installs it", required=True)
    if not version_fits(version, bounds):
        return Finding(name, UNFIT, f"{version}; {bounds} is supported", required=True)
    return Finding(name, OK, version, required=True)


def check_others(probe: Probe, checked: Iterable[str]) -> list[Finding]:
    """What is wrong with the other packages: those that dataflex_mega asks for, and the optional ones that are installed.

    Optional are those of the extras and those that transformers and peft import when they are there: one of these that is
    broken makes them unimportable too, by an error that does not name it.
    """
    requirements = list(map(read_requirement, probe.requirements()))
    needed = {r.name for r in requirements if not r.extra} - {*checked}
    findings = [check_package(probe, name, module=module_of(name)) for name in sorted(needed)]
    optional = {*IMPORTED_WHEN_PRESENT, *(r.name for r in requirements if r.extra in EXTRAS)} - needed - {*checked}
    present = [name for name in sorted(optional) if probe.version(name) is not None]
    findings += [check_package(probe, name, False, "reinstall or remove it", module_of(name)) for name in present]
    return [finding for finding in findings if finding.state != OK]


def check_media(probe: Probe, distribution: str, use: str) -> Finding:
    """torchvision and torchaudio: not needed for text; a broken one is treated as not installed.

    It is hidden from what is imported later: a broken torchvision makes transformers and peft look broken too.
    """
    version = probe.version(distribution)
    if version is None:
        return Finding(distribution, ABSENT, consequence=f"no {use}; text training does not need it")
    if "placeholder" in version:
        return Finding(distribution, ABSENT, "a placeholder is installed", f"no {use}; text training does not need it")
    try:
        probe.import_module(distribution)
    except IMPORT_ERRORS as error:
        probe.hide_module(distribution)
        consequence = f"treated as not installed; no {use}"
        return Finding(distribution, BROKEN, f"{version}: {first_cause(error)}", consequence)
    return Finding(distribution, OK, version)


def check_megatron(probe: Probe) -> Finding:
    """megatron-core, in a supported version."""
    name, version = "megatron-core", probe.version("megatron-core")
    if version is None:
        return Finding(name, ABSENT)
    if not version_fits(version, MEGATRON_VERSIONS):
        return Finding(name, UNFIT, f"{version}; {MEGATRON_VERSIONS} is supported")
    try:
        probe.import_module("megatron.core")
    except IMPORT_ERRORS as error:
        return Finding(name, BROKEN, f"{version}: {first_cause(error)}")
    return Finding(name, OK, version)


def check_transformer_engine(probe: Probe) -> Finding:
    """NVIDIA Transformer Engine: its PyTorch part, which is compiled for one torch."""
    name, version = "transformer-engine", probe.version("transformer-engine")
    try:
        module = probe.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if version is None:
            return Finding(name, ABSENT)
        return Finding(name, BROKEN, f"{version}: {first_cause(error)}")
    except IMPORT_ERRORS as error:
        return Finding(name, BROKEN, f"{version or 'unknown version'}: {first_cause(error)}")
    return Finding(name, OK, version or str(getattr(module, "__version__", "unknown version")))


def check_apex(probe: Probe) -> Finding:
    """NVIDIA Apex, recognized by `apex.optimizers.FusedAdam`. PyPI's `apex` is another project with the same name."""
    name, version = "nvidia-apex", probe.version("apex")
    try:
        optimizers = probe.import_module("apex.optimizers")
    except ModuleNotFoundError as error:
        if version is None and error.name == "apex":
            return Finding(name, ABSENT)
        if error.name in {"apex", "apex.optimizers"}:
            return foreign_apex(version)
        return Finding(
            name, BROKEN, f"{version or 'unknown version'}: {first_cause(error)}", "PyPI's apex is another project"
        )
    except IMPORT_ERRORS as error:
        return Finding(
            name, BROKEN, f"{version or 'unknown version'}: {first_cause(error)}", "PyPI's apex is another project"
        )
    if not hasattr(optimizers, "FusedAdam"):
        return foreign_apex(version)
    return Finding(name, OK, version or "unknown version")


def foreign_apex(version: str | None) -> Finding:
    """The finding about a package called apex that is not NVIDIA's."""
    detail = f"apex {version or 'of unknown version'} is not NVIDIA Apex: it has no apex.optimizers.FusedAdam"
    return Finding(
        "nvidia-apex", UNFIT, detail, "PyPI's apex is the wrong package; NVIDIA Apex is built from its source"
    )


def list_abilities(findings: list[Finding], torch: Any) -> list[Ability]:
    """What can be run on a machine with these findings. `torch` is None when it cannot be imported."""
    report = Report(findings, [])
    obstacle = report.obstacle
    if obstacle is not None:
        return [Ability("training", False, obstacle)]
    cuda = torch.cuda.is_available()
    result = [
        Ability("FSDP engine on CPU", True, "one process, DDP, FSDP2" if report.state("gloo") == OK else "one process"),
        Ability("FSDP engine on GPU", cuda, describe_gpu_modes(report, torch) if cuda else "no usable CUDA device"),
        megatron_ability(report, cuda),
        Ability("bf16", not cuda or torch.cuda.is_bf16_supported(), "" if cuda else "on CPU, slowly"),
        Ability("fp16", cuda, "" if cuda else "needs a CUDA device"),
    ]
    vision = report.state("torchvision") == OK
    result.append(Ability("images and video (static training only)", vision, "" if vision else "needs torchvision"))
    audio = report.state("torchaudio") == OK
    result.append(Ability("audio (static training only)", audio, "" if audio else "needs torchaudio"))
    board = report.state("tensorboard") == OK
    result.append(Ability("TensorBoard curves", board, "" if board else "needs tensorboard"))
    return result


def megatron_ability(report: Report, cuda: bool) -> Ability:
    """What `engine: megatron` can do here."""
    name, state = "Megatron engine", report.state("megatron-core")
    if state != OK:
        return Ability(name, False, f"megatron-core is {state}; {MEGATRON_VERSIONS} is supported")
    if report.state("gloo") != OK and not cuda:
        return Ability(name, True, "one process: this torch has no gloo")
    parallel = "tensor, sequence, pipeline (interleaved too), expert, data parallel"
    if not cuda:
        return Ability(name, True, f"{parallel}; on CPUs through gloo, layers of its own, moe dispatcher allgather")
    layers = "Transformer Engine's layers" if report.state("transformer-engine") == OK else "torch's attention"
    optimizer = "Apex's or Transformer Engine's Adam" if has_fused_adam(report) else "torch's Adam"
    return Ability(name, True, f"{parallel}; {layers}, {optimizer}")


def has_fused_adam(report: Report) -> bool:
    """Whether a fused Adam that megatron-core can use is installed."""
    return OK in (report.state("nvidia-apex"), report.state("transformer-engine"))


def describe_gpu_modes(report: Report, torch: Any) -> str:
    """How training can use the GPUs of this machine."""
    devices = torch.cuda.device_count()
    if devices > 1 and report.state("nccl") == OK:
        return f"{devices} devices: one process, DDP, FSDP2"
    return "one process" if devices == 1 else f"{devices} devices, but without nccl only one process"


def inspect_machine(probe: Probe | None = None) -> Report:
    """The report about this machine, or about the one that `probe` presents."""
    probe = probe or Probe()
    findings = [check_python(probe), check_torch(probe)]
    torch = probe.import_module("torch") if findings[-1].state == OK else None
    if torch is not None:
        findings += check_devices(probe, torch)
        findings += [check_media(probe, "torchvision", "images or video"), check_media(probe, "torchaudio", "audio")]
        findings += [check_package(probe, "transformers", module="transformers.modeling_utils")]
        findings += [check_package(probe, name) for name in ("peft", "datasets", "safetensors", "omegaconf")]
        findings += [check_llamafactory(probe)]
        findings += [check_package(probe, "tensorboard", required=False, consequence="no curves in TensorBoard")]
        findings += [check_megatron(probe), check_transformer_engine(probe), check_apex(probe)]
        findings += check_others(probe, {finding.name for finding in findings})
    return Report(findings, list_abilities(findings, torch))


def format_report(report: Report) -> list[str]:
    """The report as lines of aligned text."""
    width = max(len(f.name) for f in report.findings)
    result = [f"dataflex_mega on {platform.system()} {platform.machine()}", "", "found"]
    for f in report.findings:
        text = "; ".join(part for part in (f.detail, f.consequence) if part)
        result.append(f"  {f.state:<6}  {f.name:<{width}}  {text}".rstrip())
    width = max(len(a.name) for a in report.abilities)
    result += ["", "so this machine can run"]
    for a in report.abilities:
        result.append(f"  {'yes' if a.possible else 'no':<6}  {a.name:<{width}}  {a.reason}".rstrip())
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns the exit status: 0 when training is possible, else 1 after one line that says why not."""
    OneLineParser(prog="dataflex-cli env", description=DESCRIPTION).parse_args(argv)
    report = inspect_machine()
    print("\n".join(format_report(report)))
    if report.obstacle is not None:
        get_logger().error("doctor: training cannot run here: %s", report.obstacle)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
