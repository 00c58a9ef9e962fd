"""The driver, the GPUs that torch sees, and whether DALI decodes on them."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from vimfast.doctor.isolation import Failed, isolated
from vimfast.doctor.lines import Line
from vimfast.doctor.results import Driver, Gpu, Torch, Usable
from vimfast.doctor.software import dali_packages

PART = "GPUs and decoding"
_SECONDS = 120.0  # the first use of a GPU may compile code for it
OLDEST_GPU = (8, 0)  # that the kernels serve
_FREE = 0.9  # of a GPU's memory; with less, another process holds some
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_INSTALL_TORCH = "pytorch.org has the pip command"


def find_driver() -> Driver | None:
    """The driver; None: there is none, or none that answers."""
    with suppress(Failed):
        return isolated(_ask_driver, _SECONDS)
    return None


def _ask_driver() -> Driver | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    version, cuda, gpus = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
    nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(gpus))
    return Driver(version.value.decode(), (cuda.value // 1000, cuda.value % 1000 // 10), gpus.value)


def look_at_gpus(driver: Driver | None, torch: Torch) -> tuple[list[Line], Usable]:
    """The driver and the GPUs."""
    none = Usable()
    if driver is None:
        return [_no_driver()], none
    runs = ".".join(map(str, driver.cuda))
    found = f"{driver.version}, runs CUDA up to {runs}"
    figures = {"version": driver.version, "cuda": runs, "gpus": driver.gpus}
    if torch.cuda is None:
        found += f"; {driver.gpus} GPUs, and this torch is built without CUDA"
        return [Line(PART, "driver", "red", found, f"install a torch built with CUDA: {_INSTALL_TORCH}", figures)], none
    if int(torch.cuda.split(".")[0]) > driver.cuda[0]:
        found += f"; too old for this torch, which is built for CUDA {torch.cuda}"
        fix = f"update the driver, or install a torch for CUDA {driver.cuda[0]}: {_INSTALL_TORCH}"
        return [Line(PART, "driver", "red", found, fix, figures)], none
    lines = [Line(PART, "driver", "green", found, figures=figures)]
    try:
        gpus = isolated(_see_gpus, _SECONDS)
    except Failed as error:
        return [*lines, _unusable(str(error))], none
    lines += [_describe(number, gpu) for number, gpu in enumerate(gpus)]
    fit = [number for number, gpu in enumerate(gpus) if not gpu.trouble]
    return lines, Usable(tuple(fit), gpus[fit[0]].capability) if fit else none


def _no_driver() -> Line:
    found = "no NVIDIA driver, so no GPU: all runs on the CPU, which is for trying things out"
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
        found = "there is a GPU, but its driver does not answer"
        return Line(PART, "driver", "red", found, "run nvidia-smi; restart the machine if the driver was updated")
    fix = "nothing to do without a GPU; else install its driver, or start the container with --gpus all"
    return Line(PART, "driver", "yellow", found, fix)


def _unusable(why: str) -> Line:
    visible = os.environ.get(_VISIBLE)
    if visible is not None and visible.strip() in ("", "-1"):
        return Line(PART, "GPU", "yellow", f"hidden by {_VISIBLE}={visible}", f"unset {_VISIBLE} to use it")
    fix = "run nvidia-smi; if it fails too, restart the machine or its driver"
    if visible is not None:
        fix = f"{_VISIBLE} is {visible!r}: unset it, or name GPUs that are there"
    return Line(PART, "GPU", "red", f"torch cannot use any ({why})", fix)


def _see_gpus() -> list[Gpu]:
    from vimfast.doctor.trials import see_gpus

    return see_gpus()


def _describe(number: int, gpu: Gpu) -> Line:
    capability = ".".join(map(str, gpu.capability))
    decodes = "JPEG engine" if gpu.engine else "no JPEG engine"
    found = f"{gpu.name}, compute capability {capability}, {_gib(gpu.free)} of {_gib(gpu.total)} GiB free, {decodes}"
    figures = {**gpu._asdict(), "capability": capability}
    what = f"GPU {number}"
    if gpu.trouble:
        fix = f"install a torch that serves it: {_INSTALL_TORCH}; if it did before, restart the machine"
        return Line(PART, what, "red", f"{found}; does not compute ({gpu.trouble})", fix, figures)
    if gpu.capability < OLDEST_GPU:
        found += "; the fast kernels need 8.0"
        return Line(PART, what, "yellow", found, "train on a GPU from Ampere on (A100, RTX 30) for full speed", figures)
    if gpu.free < _FREE * gpu.total:
        fix = "end what holds the rest (nvidia-smi names it), or lower --batch-size"
        return Line(PART, what, "yellow", found, fix, figures)
    return Line(PART, what, "green", found, figures=figures)


def _gib(count: int) -> str:
    return f"{count / 2**30:.0f}"


# Decoding


def look_at_dali(driver: Driver | None, torch: Torch, usable: Usable) -> Line:
    """DALI: whether it is the one for torch's CUDA, and decodes as Pillow does, on the CPU and on each kind of GPU."""
    packages = dali_packages()
    major = int((torch.cuda or "13").split(".")[0])
    if driver is not None:
        major = min(major, driver.cuda[0])
    right = f"pip install 'vimfast[cuda{min(max(major, 12), 13)}]'"
    if not packages:
        return Line(PART, "DALI", "red", "not installed, and nothing else decodes images here", right)
    names = ", ".join(f"{name} {version}" for name, version, _ in packages)
    figures = {"packages": names}
    if len(packages) > 1:
        fix = f"pip uninstall {' '.join(name for name, _, _ in packages)}; then {right}"
        return Line(PART, "DALI", "red", f"{names}: they overwrite each other's files", fix, figures)
    name, _, cuda = packages[0]
    where = ["cpu", *(f"cuda:{number}" for number in usable.numbers)]
    try:
        for device in where:
            decoders = isolated(partial(_decode, device), _SECONDS)
    except Failed as error:
        fix = f"pip uninstall {name}; then {right}" if cuda != major else f"pip install --force-reinstall {name}"
        return Line(PART, "DALI", "red", f"{names}, does not decode on {device} ({error})", fix, figures)
    found = f"{names}; decoders that work: {', '.join(decoders)}"
    if usable.numbers and torch.cuda is not None and cuda != int(torch.cuda.split(".")[0]):
        found += f"; it is for CUDA {cuda} and torch for {torch.cuda}, which loads two CUDA runtimes"
        return Line(PART, "DALI", "yellow", found, f"pip uninstall {name}; then {right}", figures)
    return Line(PART, "DALI", "green", found, figures={**figures, "decoders": decoders})


def _decode(device: str) -> list[str]:
    from vimfast.doctor.trials import decode

    return decode(device)
