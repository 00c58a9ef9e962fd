"""Python, torch, and the packages beside it: there, importable, and made for each other."""

from __future__ import annotations

import platform
import re
import sys
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec

from vimfast import __version__
from vimfast.doctor.isolation import Failed, import_here, isolated
from vimfast.doctor.lines import Line, State
from vimfast.doctor.results import Torch

PART = "software"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = "2.6"
# Module, package, and the oldest version that serves: what pyproject.toml requires beside torch.
REQUIRED = (
    ("torchvision", "torchvision", "0.21"),
    ("timm", "timm", "1.0.20"),
    ("safetensors", "safetensors", "0.4"),
    ("PIL", "pillow", "10"),
    ("numpy", "numpy", "1.26"),
    ("msgspec", "msgspec", "0.18.6"),
    ("yaml", "PyYAML", "6"),
    ("rich", "rich", "13"),
    ("jinja2", "Jinja2", "3.1"),
    ("tensorboard", "tensorboard", "2.15"),
    ("shtab", "shtab", "1.13"),
)
OPTIONAL = {  # what of a package is used, and for what, by package
    "mamba_ssm": ("mamba_ssm.ops.selective_scan_interface", "only --scan-backend mamba_ssm needs it"),
    "causal_conv1d": ("causal_conv1d", "only --scan-backend mamba_ssm needs it"),
    "llvmlite": ("llvmlite.binding", "on a CPU, inference is several times faster with it"),
}
_OF_TORCH = ("mamba_ssm", "causal_conv1d")  # built for one version of torch
DALI = "nvidia-dali-cuda"  # what the names of its packages begin with; the rest is the version of CUDA
_SECONDS = 60.0  # an import from a cold network disk takes its time


def look_at_python() -> Line:
    """The interpreter, and the vimfast that it runs."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Line(
            PART, "Python", "red", f"{found} is older than {oldest}", f"make an environment of {oldest} or later"
        )
    return Line(PART, "Python", "green", f"{found}; vimfast {__version__}", figures={"vimfast": __version__})


def look_at_torch() -> tuple[Line, Torch]:
    """torch, which is then imported for all that comes after; of no version where it cannot be."""
    try:
        found = isolated(_ask_torch, _SECONDS)
        import_here("torch")
    except Failed as error:
        fix = "pip install --force-reinstall torch"
        return Line(PART, "torch", "red", f"cannot be imported ({error})", fix), Torch()
    figures = {"version": found.version, "cuda": found.cuda}
    built = f"for CUDA {found.cuda}" if found.cuda else "without CUDA"
    if _older(found.version, OLDEST_TORCH):
        old = f"{found.version} is older than {OLDEST_TORCH}"
        return Line(PART, "torch", "red", old, f"pip install 'torch>={OLDEST_TORCH}'", figures), found
    return Line(PART, "torch", "green", f"{found.version}, built {built}", figures=figures), found


def _ask_torch() -> Torch:
    import torch

    nccl = None
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        nccl = tuple(torch.cuda.nccl.version())
    return Torch(torch.__version__, torch.version.cuda, nccl)


def look_at_packages() -> list[Line]:
    """What vimfast cannot do without: a line for all that import, and one for each that does not."""
    fine, lines = {}, []
    for module, package, oldest in REQUIRED:
        version = _version(package)
        again = f"pip install '{package}>={oldest}'"
        if version is None and find_spec(module) is None:
            lines.append(Line(PART, package, "red", "not installed", again))
        elif version is not None and _older(version, oldest):
            lines.append(Line(PART, package, "red", f"{version} is older than {oldest}", again))
        elif reason := _why_not(module):
            again = f"pip install --force-reinstall '{package}>={oldest}'"
            lines.append(Line(PART, package, "red", f"cannot be imported ({reason})", again))
        else:
            import_here(module)
            fine[package] = version or "unknown version"
    if fine:
        names = ", ".join(f"{package} {version}" for package, version in fine.items())
        lines.insert(0, Line(PART, "packages", "green", names, figures=fine))
    return lines


def look_at_triton(gpus: int) -> Line:
    """triton, which compiles the kernels on a GPU; torch says which version it goes with."""
    version = _version("triton")
    if version is None and find_spec("triton") is None:
        if not gpus:
            return Line(PART, "triton", "green", "not installed; only a GPU's kernels need it")
        return Line(PART, "triton", "red", "not installed, so no kernel can be compiled", "pip install triton")
    if reason := _why_not("triton"):
        state: State = "red" if gpus else "yellow"
        found = f"{version or 'installed'}, cannot be imported ({reason})"
        return Line(PART, "triton", state, found, "pip install --force-reinstall triton")
    wanted = _wanted_triton()
    if version and wanted and not _fits(version, wanted):
        found = f"{version}, and this torch goes with {wanted}"
        return Line(PART, "triton", "yellow", found, f"pip install 'triton{wanted}'", {"version": version})
    found = f"{version}{wanted and ', which this torch goes with'}"
    return Line(PART, "triton", "green", found, figures={"version": version})


def look_at_nccl(torch: Torch, gpus: int) -> Line:
    """NCCL, by which several GPUs share what they compute."""
    if torch.nccl is not None:
        version = ".".join(map(str, torch.nccl))
        return Line(PART, "NCCL", "green", version, figures={"version": version})
    if gpus > 1:
        fix = "install a torch that is built with CUDA: pytorch.org has the command"
        return Line(PART, "NCCL", "red", f"not in this torch, and there are {gpus} GPUs", fix)
    return Line(PART, "NCCL", "green", "not in this torch; only several GPUs need it")


def look_at_optional() -> list[Line]:
    """Packages that vimfast can do without."""
    lines = []
    for package, (module, purpose) in OPTIONAL.items():
        name = package.replace("_", "-")
        version = _version(name)
        if version is None and find_spec(package) is None:
            lines.append(Line(PART, package, "green", f"not installed; {purpose}"))
        elif reason := _why_not(module):
            fitting = package in _OF_TORCH
            options = " --no-deps --no-build-isolation" * fitting
            fix = f"pip install --force-reinstall{options} {name}, or pip uninstall {name}"
            found = (
                f"{version or 'installed'}, {'does not fit this torch' if fitting else 'cannot be imported'} ({reason})"
            )
            lines.append(Line(PART, package, "yellow", found, fix))
        else:
            lines.append(Line(PART, package, "green", version or "installed", figures={"version": version}))
    return lines


def dali_packages() -> list[tuple[str, str, int]]:
    """(name, version, major version of CUDA) of each DALI that is installed."""
    found = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if match := re.fullmatch(rf"{DALI}(\d+)0", name):
            found.add((name, distribution.version, int(match[1])))
    return sorted(found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _why_not(module: str) -> str | None:
    """Why a module cannot be imported, or None."""
    try:
        isolated(partial(_import, module), _SECONDS)
    except Failed as error:
        return str(error)
    return None


def _import(module: str) -> None:
    import_module(module)


def _wanted_triton() -> str:
    """What torch requires of triton, such as ``~=3.9.0``; empty where it does not say."""
    try:
        requirements = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        if match := re.match(r"triton\s*\(?([=~]=\s*[\d.]+)", requirement):
            return match[1].replace(" ", "")
    return ""


def _fits(version: str, wanted: str) -> bool:
    """Whether a version is the one wanted (``==3.9.0``), or of its line (``~=3.9.0``)."""
    numbers = _numbers(wanted[2:])
    if wanted.startswith("~"):
        numbers = numbers[:-1]
    return _numbers(version)[: len(numbers)] == numbers


def _older(version: str, least: str) -> bool:
    return _numbers(version) < _numbers(least)


def _numbers(version: str) -> list[int]:
    """``2.15.0+cu132`` -> [2, 15, 0]."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []
