"""What `dataflex-cli setup` has to do here: from the packages that are installed to the calls of pip that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataflex_mega.errors import did_you_mean
from dataflex_mega.setup.packages import LLAMAFACTORY, LLAMAFACTORY_VERSIONS
from dataflex_mega.setup.versions import Requirement, SetupError, read_requirement, version_fits

KEPT = ("torch", "torchvision", "torchaudio", "triton")  # built for one another; an installation must not change them
PLACEHOLDER = "placeholder"  # in the version of the torchaudio that only stands in
NEVER_SET_UP = ("dev", "docs")  # extras of a checkout


@dataclass(frozen=True)
class Step:
    """One call of `pip install`."""

    label: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class SetupPlan:
    """What is to be done; nothing when `steps` is empty and there is no placeholder to install."""

    torch: str  # the version that stays
    constraints: tuple[str, ...]  # lines of pip's constraint file
    steps: tuple[Step, ...]
    placeholder: bool  # whether a torchaudio that stands in is to be installed
    notes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether everything is installed already."""
        return not self.steps and not self.placeholder


def make_plan(
    requires: Sequence[str], installed: Mapping[str, str], extras: Sequence[str], torchaudio_works: bool
) -> SetupPlan:
    """The plan for an environment.

    Args:
        requires: the requirement lines of this package's metadata, those of its extras too.
        installed: normalised name -> version of every package that is there.
        extras: names of extras.
        torchaudio_works: whether a module of that name can be imported.

    Raises:
        SetupError: without a torch that fits, or for an extra that does not exist.
    """
    requirements = [read_requirement(line) for line in requires]
    torch = _checked_torch(requirements, installed)
    _check_extras(requirements, extras)
    missing = [r.text for r in requirements if not r.extra and r.name != "torch" and not _is_met(r, installed)]
    steps = []
    if missing:
        steps.append(Step("what training needs", tuple(missing)))
    if not _is_met(Requirement("llamafactory", LLAMAFACTORY_VERSIONS, ""), installed):
        steps.append(Step("LLaMA-Factory without its dependencies", ("--no-deps", LLAMAFACTORY)))
    wanted = [r for r in requirements if r.extra and r.extra in extras and r.name != "llamafactory"]
    more = sorted({r.text for r in wanted if not _is_met(r, installed)})
    if more:
        # With what has an upper limit beside them, or pip would not look whether it still fits what an extra brings.
        limited = [r.text for r in requirements if not r.extra and "<" in r.bounds]
        steps.append(Step(f"extras {', '.join(sorted({r.extra for r in wanted}))}", (*more, *limited)))
    notes = []
    if "llamafactory" in extras:
        notes.append(
            "llamafactory: setup installs it always, without what would replace torch; "
            "all that it asks for comes with: pip install 'dataflex_mega[llamafactory]'"
        )
    kept = [f"{name}=={installed[name]}" for name in KEPT if PLACEHOLDER not in installed.get(name, PLACEHOLDER)]
    return SetupPlan(torch, tuple(kept), tuple(steps), not torchaudio_works, tuple(notes))


def _checked_torch(requirements: Sequence[Requirement], installed: Mapping[str, str]) -> str:
    bounds = next((r.bounds for r in requirements if r.name == "torch" and not r.extra), "")
    version = installed.get("torch")
    if version is None:
        raise SetupError("torch is not installed; install the build for this machine first, such as: pip install torch")
    if not version_fits(version, bounds):
        raise SetupError(f"torch {version} is installed, {bounds} is needed; setup never changes torch")
    return version


def _check_extras(requirements: Sequence[Requirement], extras: Sequence[str]) -> None:
    known = sorted({r.extra for r in requirements if r.extra} - {*NEVER_SET_UP})
    for name in extras:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there is {', '.join(known)}"
            raise SetupError(f"--extras: no extra {name!r}{hint}")


def _is_met(requirement: Requirement, installed: Mapping[str, str]) -> bool:
    version = installed.get(requirement.name)
    return version is not None and version_fits(version, requirement.bounds)
