"""The Triton kernels of blocks and updates compile without a GPU: the interpreter lets pass what a compiler may not."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vimfast_kernels import Direction, MixerWeights  # noqa: E402
from vimfast_kernels.block import device as block  # noqa: E402
from vimfast_kernels.block import device_steps as steps  # noqa: E402
from vimfast_kernels.block import packing  # noqa: E402
from vimfast_kernels.block.packing import Packed, Pieces  # noqa: E402
from vimfast_kernels.conv import device as conv  # noqa: E402
from vimfast_kernels.norm import device as norm  # noqa: E402
from vimfast_kernels.product import device as product  # noqa: E402
from vimfast_kernels.product import launch  # noqa: E402
from vimfast_kernels.scan import device_backward as scan  # noqa: E402
from vimfast_kernels.update import device as update  # noqa: E402
from vimfast_kernels.update import launch as update_launch  # noqa: E402

F32, BF16 = "*fp32", "*bf16"
SIZES = {"C": 192, "D": 384, "N": 16, "RANK": 12, "PAD": 16, "WIDTH": 4, "BLOCK": packing.BLOCK}
PARTS = {"IN_PARTS": 32, "OUT_PARTS": 32, "PARTS": 16, "STEP_PARTS": 132}
PARTS |= {
    "IN_ROWS": 32,
    "OUT_ROWS": 32,
    "ROWS": 16,
    "STEP_ROWS": 256,
    "SCAN_ROWS": packing.SCAN_SUM,
    "NORM_ROWS": packing.NORM_SUM,
}
TILES = {"LONG": packing.LONG_SUM, "TILE": packing.TILE}
STEP = {"ROWS": 32, "CHANNELS": 64}
NUMBERS = (
    dict.fromkeys(("batches", "batch_programs", "db_row", "dc_row", "x_batch", "x_time", "out_dir"), "i32")
    | dict.fromkeys(("rows", "length", "conv_rows", "norm_rows", "scan_rows"), "i32")
    | dict.fromkeys(("rate", "kept", "eps"), "fp32")
)
STRIDES = dict.fromkeys(("a_stride", "a_batch", "c_stride", "c_batch"), "i32")
NORM = {"C": 192, "CENTER": True, "ROWS": 4, "COLUMNS": 256}
WAY = Direction(*[F32] * 7)
WEIGHTS = MixerWeights(F32, None, WAY, WAY, F32, None)
PACKED = Packed(BF16, BF16, None, BF16, None, BF16, BF16, *[F32] * 6)
PIECES = Pieces(F32, None, F32, None, *[F32] * 6)
# Every pointer that is not named is to fp32.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pack and normalize": (
        block.pack_and_normalize,
        {"raw": WEIGHTS, "packed": PACKED, "x_ptr": BF16, "normed_ptr": BF16, "BLOCKS": 500, **NORM, **SIZES},
    ),
    "gradients": (
        block.write_all_gradients,
        {"pieces": PIECES, "grads": WEIGHTS, "norm_bias": None, "dnorm_bias": None, **SIZES, **PARTS, **TILES},
    ),
    "gradients of projections": (
        steps.step_gradients,
        {
            **dict.fromkeys(("ddelta_ptr", "low_ptr", "weight_ptr", "dx_dbl_ptr"), BF16),
            "D": 384,
            "RANK": 16,
            "COLUMNS": 16,
            "sums_ptr": "*fp16",
            "STATES": 32,
            "PARTIALS": 6,
            **STEP,
        },
    ),
    "sums of partial gradients": (
        scan.sum_partials,
        {
            **dict.fromkeys(("db_ptr", "dc_ptr"), BF16),
            "dscale_ptr": None,
            "D": 384,
            "N": 16,
            "PARTIALS": 6,
            "ROWS": 64,
            "COLUMNS": 32,
            "BATCHES": 128,
        },
    ),
    "norm": (norm.norm_forward, {"x_ptr": BF16, "bias_ptr": None, "out_ptr": BF16, **NORM}),
    "norm backward": (
        norm.norm_backward,
        {"dout_ptr": BF16, "dx_ptr": BF16, "normed_ptr": None, "rstd_ptr": None, **NORM},
    ),
    "norm backward within a block": (
        norm.norm_backward,
        {"dout_ptr": BF16, "dx_ptr": BF16, "normed_ptr": BF16, "sum_ptr": None, **NORM},
    ),
}


def signature(value: Any) -> Any:
    """Of an argument: a pointer's or number's type, a tuple of such, constexpr for what is fixed."""
    if isinstance(value, tuple):
        return type(value)(*map(signature, value))
    return value if isinstance(value, str) else "constexpr"


def constants(value: Any, path: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in constants(part, (*path, i)).items()}
    return {} if isinstance(value, str) else {path: value}


# In those of an update, memory is found by addresses in tables.
TABLES = {"tensors_ptr": "*i64", "chunks_ptr": "*i32", "first_bad_ptr": "*i8"} | dict.fromkeys(
    ("first", "chunks", "moved"), "i32"
) | dict.fromkeys(("largest", "average_weight"), "fp32")  # fmt: skip
WHOLE = {"DTYPE": tl.float32, "BYTES": 16, "BLOCK": update_launch.BLOCK}
UPDATES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "norms": (update.sum_squares, update_launch.WARPS, WHOLE),
    "verdict": (update.judge, update_launch.JUDGE_WARPS, {"WIDTH": update_launch.WIDTH}),
    "AdamW": (update.adamw, update_launch.WARPS, {**WHOLE, "AVERAGED": True}),
    "AdamW, bf16": (update.adamw, update_launch.WARPS, {**WHOLE, "AVERAGED": True, "DTYPE": tl.bfloat16}),
    "AdamW, unaligned": (update.adamw, update_launch.WARPS, {**WHOLE, "AVERAGED": False, "BYTES": 4}),
}


def compiled(kernel: Any, arguments: dict[str, Any], arch: int = 90, warps: int = 4) -> str:
    """To PTX."""
    ordered = [{**NUMBERS, **arguments}.get(parameter, F32) for parameter in kernel.arg_names]
    types = {parameter: signature(value) for parameter, value in zip(kernel.arg_names, ordered, strict=True)}
    fixed = {k: v for i, value in enumerate(ordered) for k, v in constants(value, (i,)).items()}
    options = {"num_warps": warps, "enable_fp_fusion": True}
    ptx: str = triton.compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", arch, 32), options=options).asm[
        "ptx"
    ]
    return ptx


@pytest.mark.parametrize("name", CASES)
def test_compiles(name: str) -> None:
    assert "st.global" in compiled(*CASES[name])


@pytest.mark.parametrize("element", [BF16, "*fp16"])
def test_a_convolution_compiles(element: str) -> None:
    """In bf16, one special-function instruction for each of 4 x 2 outputs of 2 channels; else two."""
    meta: dict[str, Any] = {
        "D": 384, "K": 2, "WIDTH": 4, "BACK": 2, "BIAS": True, "STEPS": 4, "CHANNELS": 128, "CHANNEL": 1,
        "TAP": 384, "PRECISE": element != BF16,
    }  # fmt: skip
    ptx = compiled(conv.conv_forward, {"x_ptr": element, "out_ptr": element, **meta}, warps=2)
    assert ptx.count("tanh.approx.f32") == (16 if element == BF16 else 0)
    assert ptx.count("ex2.approx") == (0 if element == BF16 else 16)


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_compiles(name: str, arch: int) -> None:
    kernel, warps, arguments = UPDATES[name]
    ptx = compiled(kernel, {**TABLES, **arguments}, arch, warps)
    assert "st.global" in ptx
    # 16 bytes at once, where addresses allow it.
    assert ("ld.global.v4.b32" in ptx) == (arguments.get("BYTES") == 16)


@pytest.mark.parametrize(("n", "k"), [(768, 192), (192, 384), (48, 384), (384, 16)])
def test_a_product_runs_on_the_tensor_cores(n: int, k: int) -> None:
    """The loop holds three products for every 8 terms and panel, of 64 rows for each four warps."""
    tile = launch.tile_of(n, k)
    sizes = {"N": n, "K": k, "ROWS": tile.rows, "COLUMNS": tile.columns, "PANELS": tile.panels, "INNER": tile.inner}
    ptx = compiled(
        product.product,
        {**STRIDES, **sizes, "bias_ptr": None, "ADD": False, "STAGES": tile.stages},
        warps=tile.warps,
    )
    at_once = tile.panels * (tile.inner // 8) * (tile.rows // (16 * tile.warps))
    assert ptx.count("wgmma.mma_async.sync.aligned") >= 3 * at_once
    assert ".tf32.tf32" in ptx
