"""`dataflex-cli env`: what each kind of machine can do, and which obstacles it names."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex_mega import doctor
from dataflex_mega.doctor import ABSENT, BROKEN, OK, UNFIT, Finding, Probe, Report

REQUIREMENTS = ['torch>=9; extra == "x"', "torch>=2.8", "transformers<=5.6.0,>=4.55", "llamafactory<0.10,>=0.9.5"]
USUAL = ("transformers", "peft", "datasets", "safetensors", "omegaconf", "tensorboard")


def fake_torch(devices: int = 0, cuda: str | None = None, nccl: bool = False, gloo: bool = True) -> SimpleNamespace:
    device = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: devices > 0,
            device_count=lambda: devices,
            get_device_properties=lambda index: device,
            is_bf16_supported=lambda: True,
        ),
        distributed=SimpleNamespace(
            is_available=lambda: True, is_gloo_available=lambda: gloo, is_nccl_available=lambda: nccl
        ),
    )


class FakeProbe(Probe):
    """A machine with the usual packages; `changes` maps a distribution to another version, or to None for absent."""

    def __init__(self, library: Any = None, python: tuple[int, ...] = (3, 12, 1), **changes: str | None) -> None:
        versions: dict[str, str | None] = {
            **dict.fromkeys(USUAL, "5.0"),
            "torch": "2.13.0+cpu",
            "llamafactory": "0.9.5",
        }
        versions.update({name.replace("_", "-"): version for name, version in changes.items()})
        self.versions = {name: version for name, version in versions.items() if version is not None}
        self.modules: dict[str, Any] = {"torch": library or fake_torch()}
        self.programs: set[str] = set()
        self.hidden: list[str] = []
        self.interpreter = python

    def version(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def requirements(self) -> list[str]:
        return REQUIREMENTS

    def import_module(self, module: str) -> Any:
        distribution = module.split(".")[0].replace("_", "-")
        found = self.modules.get(module, SimpleNamespace() if distribution in self.versions else None)
        if isinstance(found, BaseException):
            raise found
        if found is None:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module.split(".")[0])
        return found

    def hide_module(self, module: str) -> None:
        self.hidden.append(module)

    def has_program(self, name: str) -> bool:
        return name in self.programs

    def python_version(self) -> tuple[int, ...]:
        return self.interpreter


def finding(report: Report, name: str) -> Finding:
    return next(f for f in report.findings if f.name == name)


def ability(report: Report, name: str) -> doctor.Ability:
    return next(a for a in report.abilities if a.name.startswith(name))


def test_a_cpu_machine_can_train_with_fsdp_on_the_cpu_only() -> None:
    report = doctor.inspect_machine(FakeProbe())
    assert report.obstacle is None
    assert ability(report, "FSDP engine on CPU").possible and not ability(report, "FSDP engine on GPU").possible
    assert not ability(report, "fp16").possible and not ability(report, "Megatron").possible
    assert finding(report, "torch").detail == "2.13.0+cpu (CPU build)"
    assert [finding(report, n).state for n in ("cuda", "gloo", "nccl")] == [ABSENT, OK, ABSENT]


def test_a_machine_with_gpus_shows_each_and_what_they_can_do_together() -> None:
    report = doctor.inspect_machine(FakeProbe(fake_torch(devices=2, cuda="12.8", nccl=True), torch="2.13.0"))
    assert finding(report, "torch").detail == "2.13.0 (CUDA 12.8 build)"
    assert finding(report, "cuda:1").detail == "H100, 80 GiB, sm_90"
    assert ability(report, "FSDP engine on GPU").reason == "2 devices: one process, DDP, FSDP2"
    assert ability(report, "fp16").possible
    without = doctor.inspect_machine(FakeProbe(fake_torch(devices=2, cuda="12.8", nccl=False)))
    assert "only one process" in ability(without, "FSDP engine on GPU").reason


def test_a_cpu_torch_beside_an_nvidia_driver_is_pointed_out() -> None:
    probe = FakeProbe()
    probe.programs.add("nvidia-smi")
    cuda = finding(doctor.inspect_machine(probe), "cuda")
    assert cuda.state == UNFIT and "this torch is a CPU build" in cuda.detail and "DATAFLEX_TORCH" in cuda.consequence


def test_without_gloo_the_cpu_runs_one_process() -> None:
    report = doctor.inspect_machine(FakeProbe(fake_torch(gloo=False)))
    assert ability(report, "FSDP engine on CPU").reason == "one process"


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"python": (3, 10, 4)}, "python is unfit (3.10.4; 3.11 or newer is needed)"),
        ({"torch": None}, "torch is absent"),
        ({"torch": "2.7.1"}, "torch is unfit (2.7.1; >=2.8 is supported)"),
        ({"transformers": "5.8.0"}, "transformers is unfit (5.8.0; <=5.6.0,>=4.55 is supported)"),
        ({"datasets": None}, "datasets is absent"),
        ({"llamafactory": None}, "llamafactory is absent (`dataflex-cli setup` installs it)"),
        ({"llamafactory": "0.9.4"}, "llamafactory is unfit (0.9.4; <0.10,>=0.9.5 is supported)"),
        ({"llamafactory": "0.10.0"}, "llamafactory is unfit (0.10.0; <0.10,>=0.9.5 is supported)"),
    ],
)
def test_what_is_missing_or_out_of_range_is_the_obstacle(changes: dict[str, Any], obstacle: str) -> None:
    report = doctor.inspect_machine(FakeProbe(**changes))
    assert report.obstacle == obstacle
    assert report.abilities == [doctor.Ability("training", False, obstacle)]


@pytest.mark.parametrize(
    "error", [OSError("libc10_cuda.so: not found"), RuntimeError("nms\nline two"), ImportError("x")]
)
def test_a_needed_package_that_cannot_be_imported_is_the_obstacle(error: Exception) -> None:
    probe = FakeProbe()
    probe.modules["transformers.modeling_utils"] = error
    report = doctor.inspect_machine(probe)
    first = str(error).splitlines()[0]
    assert report.obstacle == f"transformers is broken (5.0: {first})"


def test_an_error_that_no_import_should_raise_is_not_swallowed() -> None:
    probe = FakeProbe()
    probe.modules["datasets"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        doctor.inspect_machine(probe)


def test_a_missing_optional_package_is_no_obstacle() -> None:
    report = doctor.inspect_machine(FakeProbe(tensorboard=None))
    assert report.obstacle is None and not ability(report, "TensorBoard").possible
    assert finding(report, "tensorboard") == Finding("tensorboard", ABSENT, consequence="no curves in TensorBoard")


def test_torchvision_working_broken_and_absent() -> None:
    assert finding(doctor.inspect_machine(FakeProbe()), "torchvision").state == ABSENT
    working = doctor.inspect_machine(FakeProbe(torchvision="0.28"))
    assert finding(working, "torchvision").state == OK and ability(working, "images").possible

    probe = FakeProbe(torchvision="0.28")
    probe.modules["torchvision"] = RuntimeError("operator torchvision::nms does not exist")
    broken = doctor.inspect_machine(probe)
    assert finding(broken, "torchvision").detail == "0.28: operator torchvision::nms does not exist"
    assert broken.obstacle is None and not ability(broken, "images").possible
    assert probe.hidden == ["torchvision"], "a broken one must not spoil the import of transformers after it"


def test_the_torchaudio_placeholder_is_not_taken_for_torchaudio() -> None:
    report = doctor.inspect_machine(FakeProbe(torchaudio="2.4.0+placeholder"))
    assert finding(report, "torchaudio").state == ABSENT and "placeholder" in finding(report, "torchaudio").detail
    assert not ability(report, "audio").possible


def test_nvidia_apex_is_told_by_fused_adam() -> None:
    probe = FakeProbe(apex="0.1")
    probe.modules["apex.optimizers"] = SimpleNamespace(FusedAdam=object)
    assert doctor.check_apex(probe) == Finding("nvidia-apex", OK, "0.1")
    assert doctor.check_apex(FakeProbe()).state == ABSENT


@pytest.mark.parametrize(
    "optimizers", [SimpleNamespace(), ModuleNotFoundError("No module named 'apex.optimizers'", name="apex.optimizers")]
)
def test_pypis_apex_is_named_as_the_wrong_package(optimizers: Any) -> None:
    probe = FakeProbe(apex="0.9.10")
    probe.modules["apex.optimizers"] = optimizers
    found = doctor.check_apex(probe)
    assert found.state == UNFIT and "0.9.10 is not NVIDIA Apex" in found.detail
    assert "PyPI's apex is the wrong package" in found.consequence


def test_an_apex_whose_import_fails_may_be_either() -> None:
    probe = FakeProbe(apex="0.1")
    probe.modules["apex.optimizers"] = ImportError("libcudart.so.12: cannot open shared object file")
    found = doctor.check_apex(probe)
    assert found.state == BROKEN and "libcudart" in found.detail and "another project" in found.consequence
    probe.modules["apex.optimizers"] = ModuleNotFoundError("No module named 'pyramid'", name="pyramid")
    assert doctor.check_apex(probe).state == BROKEN


def test_megatron_core_and_transformer_engine() -> None:
    report = doctor.inspect_machine(FakeProbe())
    assert report.state("megatron-core") == report.state("transformer-engine") == ABSENT
    probe = FakeProbe(megatron_core="0.16.1", transformer_engine="2.1")
    probe.modules["megatron.core"] = SimpleNamespace()
    probe.modules["transformer_engine.pytorch"] = OSError("undefined symbol")
    report = doctor.inspect_machine(probe)
    assert finding(report, "megatron-core") == Finding("megatron-core", OK, "0.16.1")
    assert finding(report, "transformer-engine").detail == "2.1: undefined symbol"
    engine = ability(report, "Megatron engine")
    assert engine.possible and "on CPUs through gloo" in engine.reason
    assert (
        ability(doctor.inspect_machine(FakeProbe()), "Megatron").reason
        == "megatron-core is absent; >=0.16.1,<0.20 is supported"
    )


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0"])
def test_a_megatron_core_that_the_engine_refuses_is_unfit(version: str) -> None:
    from dataflex_mega.engines.megatron.version import NEWEST, OLDEST

    probe = FakeProbe(megatron_core=version)
    probe.modules["megatron.core"] = SimpleNamespace()
    report = doctor.inspect_machine(probe)
    assert finding(report, "megatron-core").detail == f"{version}; >=0.16.1,<0.20 is supported"
    assert not ability(report, "Megatron").possible
    assert f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, NEWEST))}" == doctor.MEGATRON_VERSIONS


def test_megatron_on_gpus_says_whose_layers_and_optimizer() -> None:
    probe = FakeProbe(fake_torch(devices=2, cuda="12.8", nccl=True), torch="2.13.0", megatron_core="0.16.1")
    probe.modules["megatron.core"] = SimpleNamespace()
    assert ability(doctor.inspect_machine(probe), "Megatron").reason.endswith("torch's attention, torch's Adam")


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("0.9.5", ">=0.9.5,<0.10", True),
        ("0.9.5.dev0", ">=0.9.5,<0.10", True),
        ("0.10", "<0.10", False),
        ("5.6.0", "<=5.6.0,>=4.55", True),
        ("5.6", "<=5.6.0", True),
        ("5.6.1", "<=5.6.0", False),
        ("2.13.0+cpu", ">=2.8", True),
        ("5.6.0", "!=5.6.0", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bounds: str, expected: bool) -> None:
    assert doctor.version_fits(version, bounds) is expected


def test_the_ranges_come_from_the_packages_own_metadata() -> None:
    assert doctor.supported_versions(Probe(), "llamafactory") != ""
    assert doctor.supported_versions(FakeProbe(), "torch") == ">=2.8"
    assert doctor.supported_versions(FakeProbe(), "peft") == ""


def test_lines_are_aligned_and_name_every_finding_and_ability() -> None:
    report = Report(
        [Finding("a", OK, "1.0"), Finding("longer", ABSENT, "d", "f")],
        [doctor.Ability("x", True), doctor.Ability("yy", False, "w")],
    )
    assert doctor.format_report(report)[1:] == [
        "",
        "found",
        "  ok      a       1.0",
        "  absent  longer  d; f",
        "",
        "so this machine can run",
        "  yes     x",
        "  no      yy  w",
    ]


def test_the_exit_status_is_1_and_the_last_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "Probe", lambda: FakeProbe(llamafactory="0.9.4"))
    assert doctor.main([]) == 1
    expected = "doctor: training cannot run here: llamafactory is unfit (0.9.4; <0.10,>=0.9.5 is supported)\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr(doctor, "Probe", FakeProbe)
    assert doctor.main([]) == 0


def test_the_command_runs_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "dataflex_mega.doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FSDP engine on CPU" in done.stdout and "nvidia-apex" in done.stdout


def test_a_hidden_module_is_not_found_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colorsys", SimpleNamespace())
    Probe().hide_module("colorsys")
    with pytest.raises(ModuleNotFoundError):
        Probe().import_module("colorsys")


# -- packages that are there but broken --------------------------------------------------------------------------------


class AskingProbe(FakeProbe):
    """Its dataflex_mega asks for sentencepiece, and for gradio and pyyaml in ways of their own."""

    def requirements(self) -> list[str]:
        more = ["sentencepiece", "pyyaml", 'gradio<=5.50.0; extra == "webui"', 'pytest-xdist>=3; extra == "dev"']
        return [*REQUIREMENTS, *more]


def missing(name: str) -> Exception:
    """transformers' error about a package that it imports when it is there: the name is in its cause only."""
    cause = ModuleNotFoundError(f"No module named {name!r}", name=name)
    error = RuntimeError("Failed to import transformers.integrations because of the following error (look up to see")
    error.__cause__ = cause
    return error


def test_a_broken_optional_package_is_named_with_what_it_lacks() -> None:
    probe = AskingProbe(hqq="0.2.8", sentencepiece="0.2.3", pyyaml="6.0.4", gradio="5.50.0", pytest_xdist="3.8")
    probe.modules["hqq.core.quantize"] = ModuleNotFoundError("No module named 'termcolor'", name="termcolor")
    probe.modules["transformers.modeling_utils"] = missing("termcolor")
    probe.modules["yaml"] = SimpleNamespace()
    report = doctor.inspect_machine(probe)
    assert finding(report, "hqq") == Finding(
        "hqq", BROKEN, "0.2.8: No module named 'termcolor'", "reinstall or remove it", required=False
    )
    assert report.obstacle == "transformers is broken (5.0: No module named 'termcolor')"
    names = [f.name for f in report.findings]
    assert not {"gradio", "sentencepiece", "pyyaml", "pytest-xdist", "torchao"} & set(names)  # fine, or not there
    assert "  broken  hqq " in "\n".join(doctor.format_report(report))


def test_what_dataflex_mega_asks_for_is_missed_by_name() -> None:
    probe = AskingProbe(pyyaml="6.0.4")
    probe.modules["yaml"] = SimpleNamespace()
    report = doctor.inspect_machine(probe)
    assert finding(report, "sentencepiece").state == ABSENT and report.obstacle == "sentencepiece is absent"
