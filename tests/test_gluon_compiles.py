"""The Gluon scan compiles, without a GPU, for every architecture we name; what it computes is tested on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from vimfast_kernels import scan_gluon  # noqa: E402

FP32 = {"a_ptr", "skip_ptr", "bias_ptr", "dbc_ptr", "dparam_ptr"}
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that one program may have


def compiled(kernel: Any, arch: int, element: str, num_warps: int, **constants: Any) -> Any:
    state = "bf16" if element == "bf16" else "fp32"
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            signature[name] = "*" + ("fp32" if name in FP32 else state if name == "state_ptr" else element)
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name not in ("length", "scale"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, places, attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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
        "D": 384, "N": n, "DIRS": directions, "CHUNK": scan_gluon.CHUNK, "FLIP": 0, "GATE": True,
        "PRECISE": element != "bf16",
    }  # fmt: skip
    many, few = (scan_gluon.forward_block(batch, 384, n, 132) for batch in (1024, 1))
    wide, narrow = (
        compiled(scan_gluon.scan_forward, arch, element, directions, SAVE=True, **block, **constants)
        for block in (many, few)
    )
    assert 0 < wide.metadata.shared <= SHARED_MEMORY[arch] * 1024
    assert 0 < narrow.metadata.shared <= SHARED_MEMORY[arch] * 1024
    # A loop that lost its body compiles too, and is fast: the exponentials of all states must be there.
    for forward, block in ((wide, many), (narrow, few)):
        states_a_thread = block["BD"] * n // 32
        assert forward.asm["ptx"].count("ex2.approx") >= block["UNROLL"] * states_a_thread
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    for sums in (scan_gluon.PRODUCTS_SUMS, 1):
        program = scan_gluon.backward_block(dtype, n, sums)
        backward = compiled(scan_gluon.scan_backward, arch, element, program["WARPS"], OUT=True, **program, **constants)
        assert 0 < backward.metadata.shared <= SHARED_MEMORY[arch] * 1024
        states_a_thread = program["BD"] // program["WARPS"] * n // 32
        assert backward.asm["ptx"].count("ex2.approx") >= 2 * program["UNROLL"] * states_a_thread
