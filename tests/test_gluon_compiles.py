"""The Gluon kernels compile, without a GPU, for every architecture we name; what they compute is tested on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from vimfast_kernels import tuning  # noqa: E402
from vimfast_kernels.conv.device_backward import conv_backward_of_sum  # noqa: E402
from vimfast_kernels.conv.launch import RESIDENT  # noqa: E402
from vimfast_kernels.scan import launch  # noqa: E402

FP32 = {"a_ptr", "skip_ptr", "bias_ptr", "dbc_ptr", "dscale_ptr", "dparam_ptr", "taps_ptr", "partial_ptr"}
# The rank of the time steps, those of Tiny, Small and Base; 0: they are given.
RANKS = {80: 24, 86: 0, 89: 16, 90: 16, 100: 48}
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that one program may have


def compiled(
    kernel: Any, arch: int, element: str, num_warps: int, other: dict[str, str] | None = None, **constants: Any
) -> Any:
    """Pointers are to `element`, those of FP32 to fp32; but `other` has elements by name."""
    state = "bf16" if element == "bf16" else "fp32"
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            usual = "fp32" if name in FP32 else state if name == "state_ptr" else element
            signature[name] = "*" + (other or {}).get(name, usual)
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name not in ("length", "scale", "sequences", "segment"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places, attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def shape_of(function: Any, name: str, choice: Any, *arguments: Any) -> dict[str, Any]:
    """The constants of a program that is launched with this choice, on a GPU of 132 multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tuning_of", lambda device: replace(tuning.DEFAULT, **{name: choice}))
        patch.setattr(launch, "multiprocessors", lambda device: 132)
        options = function(*arguments, torch.device("cuda", 0))
    return {key: value for key, value in options.items() if key.isupper()}


@pytest.mark.parametrize(
    ("arch", "element", "n", "directions"),
    [
        (90, "bf16", 16, 2),
        (90, "fp32", 64, 1),
        (80, "bf16", 16, 2),
        (86, "bf16", 16, 2),
        (89, "bf16", 16, 2),
        (100, "bf16", 16, 2),
    ],
)
def test_scan_compiles(arch: int, element: str, n: int, directions: int) -> None:
    constants = {
        "D": 384, "N": n, "DIRS": directions, "CHUNK": launch.CHUNK, "FLIP": 0, "GATE": True,
        "PRECISE": element != "bf16", "RANK": RANKS[arch] if element == "bf16" else 0,
    }  # fmt: skip
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    name = "scan_forward" if element == "bf16" else "scan_forward_fp32"
    programs = [
        shape_of(launch.forward_program, name, choice, dtype, batch, 384, n)
        for choice in tuning.CHOICES[name]
        for batch in (1024, 1)
    ]
    for program in programs if n == 16 else programs[:2]:
        forward = compiled(launch.scan_forward, arch, element, directions, SAVE=True, **program, **constants)
        assert 0 < forward.metadata.shared <= SHARED_MEMORY[arch] * 1024
        # A loop that lost its body compiles too, and is fast: the exponentials of all states must be there.
        states_a_thread = program["BD"] * n // 32
        assert forward.asm["ptx"].count("ex2.approx") >= program["UNROLL"] * states_a_thread
    for sums, name in ((launch.PRODUCTS_SUMS, "scan_backward"), (1, "scan_backward_fp32")):
        for choice in tuning.CHOICES[name] if n == 16 else tuning.CHOICES[name][:1]:
            program = shape_of(launch.backward_program, name, choice, dtype, n, sums)
            warps = program["WARPS"]
            other = {"dbc_ptr": "fp16"} if program["PRODUCTS"] else {}
            backward = compiled(launch.scan_backward, arch, element, warps, other, OUT=True, **program, **constants)
            assert 0 < backward.metadata.shared <= SHARED_MEMORY[arch] * 1024
            states_a_thread = program["BD"] // warps * n // 32
            assert backward.asm["ptx"].count("ex2.approx") >= 2 * program["UNROLL"] * states_a_thread


@pytest.mark.parametrize(
    ("arch", "element", "rank", "channels"),
    [(80, "fp16", 24, 32), (89, "bf16", 112, 64), (90, "bf16", 48, 64), (90, "bf16", 80, 64)],
)
def test_convolution_backward_compiles(arch: int, element: str, rank: int, channels: int) -> None:
    d = 6 * channels
    kernel = compiled(
        conv_backward_of_sum, arch, element, channels // 16, D=d, K=2, WIDTH=4, BACK=2, BIAS=True, RANK=rank,
        CHANNELS=channels, STAGES=2, PRECISE=element == "fp16", X_TIME=2 * d, DOUT_TIME=d, FACTOR_TIME=rank,
        DX_TIME=2 * d,
    )  # fmt: skip
    assert 0 < kernel.metadata.shared <= SHARED_MEMORY[arch] * 1024
    if arch == 90:  # of an H200's multiprocessor, where a program reserves 1 KiB beside its own
        assert RESIDENT * (kernel.metadata.shared + 1024) <= 228 * 1024
    # Of the loop and of what comes before it: 32 columns in parts of 8, both directions, 16 factors at once.
    assert kernel.asm["ptx"].count("mma.sync") == 2 * 4 * 2 * -(-rank // 16)
