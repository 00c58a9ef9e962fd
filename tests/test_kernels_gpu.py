"""The GPU kernels against float64, gradients included: error at most twice that of plain torch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vimfast_kernels import bidirectional_block, explain, report
from vimfast_kernels.arithmetic import wide
from vimfast_kernels.conv.reference import conv_silu
from vimfast_kernels.norm.reference import add_layer_norm, add_rms_norm
from vimfast_kernels.scan import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison_gpu")]
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vimfast_kernels import tuning  # noqa: E402
from vimfast_kernels.block.launch import projection_gradients  # noqa: E402
from vimfast_kernels.block.weights import unflatten  # noqa: E402
from vimfast_kernels.conv.launch import causal_conv_silu, launch_backward_of_sum  # noqa: E402
from vimfast_kernels.norm.launch import add_norm  # noqa: E402
from vimfast_kernels.scan import launch as scan_launch  # noqa: E402
from vimfast_kernels.scan.launch import (  # noqa: E402
    Inputs,
    StateGradients,
    launch_backward,
    launch_forward,
    selective_scan,
)
from vimfast_kernels.tuning import CHOICES, DEFAULT  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Below these a difference is that of the order of a sum, not of precision.
NOISE = {BF16: 2e-4, FP16: 5e-5, FP32: 2e-6}


def relative(x: Tensor, exact: Tensor) -> float:
    """NaN stays NaN, and a NaN passes no bound."""
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that are there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in leaves if x is not None]
    back = torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    return [o.detach() for o in outs] + list(back)


def outcomes(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(the kernel's, which are the same twice; plain torch's in the same dtype; in float64) of each output and
    gradient."""
    exact = run(plain, [None if x is None else x.double() for x in inputs], [g.double() for g in grads])
    same = run(plain, inputs, grads)
    ours = run(kernel, inputs, grads)
    again = run(kernel, inputs, grads)
    for i, (a, b, c) in enumerate(zip(ours, same, again, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, c), f"output {i} differs from run to run"
    return list(zip(ours, same, exact, strict=True))


def within_bar(
    found: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, slack: dict[int, float] | None = None
) -> None:
    for i, (ours, same, exact) in enumerate(found):
        error, bound = relative(ours, exact), 2 * relative(same, exact) + NOISE[dtype] + (slack or {}).get(i, 0.0)
        assert error <= bound, f"output {i}: {error:.2e} > {bound:.2e}"


def check(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    dtype: torch.dtype,
    slack: dict[int, float] | None = None,
) -> None:
    within_bar(outcomes(kernel, plain, inputs, grads), dtype, slack)


def test_auto_runs_every_op_on_these_kernels() -> None:
    for dtype in (BF16, FP16, FP32):
        choices = report("auto", torch.device("cuda"), dtype)
        assert set(choices.values()) == {("gluon", None)}
    assert explain("auto", torch.device("cuda"), BF16) == "gluon"
    assert explain("auto", torch.device("cuda"), torch.float64) == "reference (gluon does not take torch.float64)"
    with pytest.raises(ValueError, match="runs on cuda tensors and these are on cpu"):
        explain("gluon", torch.device("cpu"), FP32)
    with pytest.raises(ValueError, match="state size 10 has no kernel; take one of"):
        explain("gluon", torch.device("cuda"), FP32, 10)


def scan_inputs(
    k: int, b: int, length: int, d: int, n: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor | None], Tensor]:
    """Sizes as in a trained model; z and B, C are views of wider projections."""
    torch.manual_seed(seed)
    on = {"device": "cuda", "dtype": dtype}
    u = torch.randn(k, b, length, d, **on)
    delta = torch.randn(k, b, length, d, **on) * 0.5
    A = -torch.exp(torch.rand(k, d, n, device="cuda") * 2.5)
    x_dbl = torch.randn(k, b, length, 12 + 2 * n, **on)
    D = torch.randn(k, d, device="cuda")
    z = torch.randn(b, length, 2 * d, **on)[..., d:]
    bias = torch.randn(k, d, device="cuda") - 3
    return [u, delta, A, x_dbl[..., 12 : 12 + n], x_dbl[..., 12 + n :], D, z, bias], torch.randn(b, length, d, **on)


def check_scan(
    k: int, b: int, length: int, d: int, n: int, dtype: torch.dtype, reverse: Sequence[bool], drop: Sequence[int] = ()
) -> None:
    inputs, grad = scan_inputs(k, b, length, d, n, dtype)
    inputs = [None if i in drop else x for i, x in enumerate(inputs)]
    plain = lambda *x: reference.scan(*x, list(reverse), 0.5)[0]  # noqa: E731
    kernel = lambda *x: selective_scan(*x, reverse=reverse, scale=0.5)  # noqa: E731
    # The states kept for backward are bf16, so the fp32 gradients of A, D and the bias carry bf16's rounding.
    slack = dict.fromkeys(range(9), 2e-3) if dtype == BF16 else None
    if slack:
        slack = {i: v for i, v in slack.items() if ours_is_fp32(inputs, i)}
    check(kernel, plain, inputs, [grad], dtype, slack)


def ours_is_fp32(inputs: Sequence[Tensor | None], output: int) -> bool:
    """Whether result number `output` of `run` is the gradient of an fp32 input."""
    there = [x for x in inputs if x is not None]
    return output > 0 and output <= len(there) and there[output - 1].dtype == FP32


@pytest.mark.parametrize("length", [1, 3, 17, 63, 197, 1000])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_scan_lengths(length: int, dtype: torch.dtype) -> None:
    check_scan(2, 2, length, 64, 16, dtype, [False, True])


@pytest.mark.parametrize("d", [16, 33, 40, 80, 384])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_scan_channels(d: int, dtype: torch.dtype) -> None:
    check_scan(2, 1, 21, d, 16, dtype, [False, True])


@pytest.mark.parametrize("n", [8, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_scan_states(n: int, dtype: torch.dtype) -> None:
    check_scan(2, 3, 37, 48, n, dtype, [False, True])


@pytest.mark.parametrize("reverse", [[False], [True], [True, False], [False, False]])
def test_scan_directions(reverse: list[bool]) -> None:
    check_scan(len(reverse), 2, 30, 96, 16, BF16, reverse)


@pytest.mark.parametrize("drop", [(5,), (6,), (7,), (5, 6, 7)])
def test_scan_without_options(drop: tuple[int, ...]) -> None:
    check_scan(2, 2, 29, 64, 16, BF16, [False, True], drop)
    check_scan(1, 2, 29, 64, 16, FP32, [True], drop)


def test_scan_reads_any_strides() -> None:
    (u, delta, A, B, C, D, z, bias), grad = scan_inputs(2, 2, 19, 64, 16, BF16)
    strange = [
        u.transpose(2, 3).contiguous().transpose(2, 3), delta.transpose(1, 2).contiguous().transpose(1, 2),
        A.transpose(1, 2).contiguous().transpose(1, 2), B.transpose(2, 3).contiguous().transpose(2, 3),
        C.expand(2, 2, 19, 16), D, z.transpose(1, 2).contiguous().transpose(1, 2), bias,
    ]  # fmt: skip
    plain = [u, delta, A, B, C, D, z, bias]
    scan = lambda *x: selective_scan(*x, scale=0.5)  # noqa: E731
    for a, b in zip(run(scan, strange, [grad]), run(scan, plain, [grad]), strict=True):
        assert torch.equal(a, b)


class ProjectedScan(torch.autograd.Function):
    """The scan of time steps that the kernels project themselves, with the gradients that a block makes of theirs."""

    @staticmethod
    def forward(ctx: Any, reverse: list[bool], u: Tensor, low: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        inputs = Inputs(u, low, *rest, reverse, 0.5, weight)
        out, *saved = launch_forward(inputs, save=True)
        assert relative(launch_forward(inputs, save=False)[0], out.double()) <= NOISE[out.dtype]
        ctx.reverse = reverse
        ctx.save_for_backward(u, low, weight, *rest, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        u, low, weight, *rest, y, states = ctx.saved_tensors
        inputs = Inputs(u, low, *rest, ctx.reverse, 0.5, weight)
        dB, dC, dz, out = (torch.empty_like(x) for x in (inputs.B, inputs.C, dout, dout))
        du, ddelta, dA, dD, dbias = launch_backward(dout, inputs, y, states, dB, dC, dz, out)
        dlow = torch.einsum("kbld,kdr->kblr", ddelta, weight)
        return None, du, dlow, torch.einsum("kbld,kblr->kdr", ddelta, low), dA, dB, dC, dD, dz, dbias


@pytest.mark.parametrize(
    ("b", "length", "d", "rank", "n", "dtype", "reverse", "wide"),
    [
        (2, 197, 384, 16, 16, BF16, [False, True], True),
        (2, 197, 384, 16, 16, BF16, [False, True], False),
        (2, 100, 768, 24, 16, BF16, [False, True], True),
        (1, 45, 1536, 48, 16, BF16, [False, True], True),
        (2, 1, 64, 8, 16, BF16, [False, True], False),
        (1, 7, 80, 64, 16, BF16, [False, True], True),
        (3, 63, 16, 40, 16, BF16, [True], False),
        (1, 1000, 48, 32, 16, BF16, [False], True),
        (2, 21, 48, 8, 8, BF16, [False, True], True),
        (2, 21, 48, 24, 32, BF16, [False, True], False),
        (2, 21, 48, 16, 64, BF16, [True], True),
        (2, 45, 64, 16, 16, FP16, [False, True], True),
        (1, 9, 48, 24, 64, FP16, [False], False),
        (2, 45, 64, 16, 16, FP32, [False, True], True),  # these two by a product outside
        (2, 20, 64, 72, 16, BF16, [False, True], True),
    ],
)
def test_scan_projects_time_steps(
    b: int, length: int, d: int, rank: int, n: int, dtype: torch.dtype, reverse: list[bool], wide: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In rows that end with B and C, as in a block."""
    monkeypatch.setattr(scan_launch, "multiprocessors", lambda device: 0 if wide else 10**6)
    k = len(reverse)
    (u, _, A, _, _, D, z, bias), grad = scan_inputs(k, b, length, d, n, dtype)
    x_dbl = torch.randn(k, b, length, rank + 2 * n, device="cuda", dtype=dtype)
    weight = torch.randn(k, d, rank, device="cuda", dtype=dtype) / 2 / rank**0.5

    def kernel(u: Tensor, x_dbl: Tensor, weight: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        low, B, C = x_dbl.split([rank, n, n], dim=-1)
        return ProjectedScan.apply(reverse, u, low, weight, A, B, C, *rest)

    def plain(u: Tensor, x_dbl: Tensor, weight: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        low, B, C = x_dbl.split([rank, n, n], dim=-1)
        return reference.scan(u, torch.einsum("kblr,kdr->kbld", low, weight), A, B, C, *rest, reverse, 0.5)[0]

    inputs = [u, x_dbl, weight, A, D, z, bias]
    slack = {i: 2e-3 for i in range(9) if ours_is_fp32(inputs, i)} if dtype == BF16 else None
    check(kernel, plain, inputs, [grad], dtype, slack)


@pytest.mark.parametrize(
    ("rows", "d", "rank", "partials", "dtype"),
    [
        (25216, 384, 16, 6, BF16),
        (77, 96, 8, 2, BF16),
        (5, 48, 16, 1, FP16),
        (300, 384, 16, 24, BF16),  # too many partial sums for the kernel that has the products
        (300, 768, 24, 12, BF16),
        (300, 1536, 48, 24, BF16),  # these two by products of cuBLAS
        (77, 96, 8, 2, FP32),
    ],
)
def test_gradients_of_projections(rows: int, d: int, rank: int, partials: int, dtype: torch.dtype) -> None:
    """Of time steps, to their factors and weights, and the sums of B's and C's over blocks of channels."""
    torch.manual_seed(0)
    on = {"device": "cuda", "dtype": dtype}
    ddelta, weight = torch.randn(2, 1, rows, d, **on), torch.randn(2, d, rank, **on)
    x_dbl, dstates = torch.randn(2, 1, rows, rank + 32, **on), torch.randn(partials, 2, 1, rows, 32, device="cuda")
    scales = None
    exact = dstates.double()
    if dtype == BF16:
        dstates, scales = dstates.half(), 2.0 ** torch.randint(-20, 20, dstates.shape[:-1], device="cuda")
        exact = dstates.double() * scales[..., None].double()
    shares = StateGradients(dstates, scales)
    results = []
    for _ in range(2):
        dx_dbl = torch.empty_like(x_dbl)
        results.append((projection_gradients(ddelta, weight, x_dbl, shares, dx_dbl).sum(1), dx_dbl))
    (dweight, dx_dbl), again = results
    assert torch.equal(dweight, again[0])
    assert torch.equal(dx_dbl, again[1])
    rounding = {BF16: 2.5e-3, FP16: 3e-4, FP32: 2e-6}[dtype]
    dlow, states = dx_dbl[:, 0].split([rank, 32], -1)
    assert relative(dlow, ddelta[:, 0].double() @ weight.double()) < rounding
    assert relative(states, exact.sum(0)[:, 0]) < rounding
    assert relative(dweight, ddelta[:, 0].double().transpose(1, 2) @ x_dbl[:, 0, :, :rank].double()) < 2e-6


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_gradients_of_any_size_keep_their_bits(power: int) -> None:
    """Sums of dB and dC travel as fp16, each row scaled by itself."""
    inputs, grad = scan_inputs(2, 2, 197, 96, 16, BF16)
    plain, scaled = (run(selective_scan, inputs, [g]) for g in (grad, grad * 2.0**power))
    for a, b in zip(plain[1:], scaled[1:], strict=True):
        assert torch.equal(a * 2.0**power, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_of_states_stay_non_finite(value: float) -> None:
    inputs, grad = scan_inputs(1, 1, 197, 96, 16, BF16)
    grad[0, 100, 5] = value
    grads = run(lambda *v: selective_scan(*v, reverse=[False]), inputs, [grad])
    dB, dC = grads[4], grads[5]
    assert not dC[0, 0, 100].isfinite().any()
    assert not dB[0, 0, 60:101].isfinite().any()
    assert dB[0, 0, 101:].isfinite().all()
    assert dC[0, 0, 101:].isfinite().all()


def test_scan_without_gradients_is_the_same() -> None:
    inputs, _ = scan_inputs(2, 2, 45, 64, 16, BF16)
    with torch.no_grad():
        quiet = selective_scan(*inputs)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.equal(quiet, selective_scan(*leaves))


def test_scan_is_one_node_for_the_compiler() -> None:
    inputs, grad = scan_inputs(2, 1, 11, 32, 16, FP32)
    scan = torch.compile(lambda *x: selective_scan(*x, scale=0.5), fullgraph=True, backend="aot_eager")
    plain = lambda *x: selective_scan(*x, scale=0.5)  # noqa: E731
    for a, b in zip(run(scan, inputs, [grad]), run(plain, inputs, [grad]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 1, 64), (1, 3, 33), (2, 17, 40), (2, 197, 384), (1, 1000, 70)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("reverse", [[False, True], [True]])
def test_conv(shape: tuple[int, int, int], dtype: torch.dtype, reverse: list[bool]) -> None:
    torch.manual_seed(0)
    b, length, d = shape
    k = len(reverse)
    x = torch.randn(b, length, 2 * d, device="cuda", dtype=dtype)[..., :d]
    weight, bias = torch.randn(k, d, 4, device="cuda"), torch.randn(k, d, device="cuda")
    grad = torch.randn(k, b, length, d, device="cuda", dtype=dtype)
    plain = lambda *v: conv_silu(*v, list(reverse))  # noqa: E731
    kernel = lambda *v: causal_conv_silu(*v, reverse=reverse)  # noqa: E731
    check(kernel, plain, [x, weight, bias], [grad], dtype)


@pytest.mark.parametrize(
    ("shape", "rank", "taps", "bias"),
    [
        ((2, 1, 64), 8, 4, True),
        ((5, 17, 64), 24, 4, False),
        ((3, 7, 48), 48, 3, True),
        ((4, 197, 384), 48, 4, True),
        ((6, 197, 96), 56, 5, True),
        ((1, 1000, 128), 80, 4, True),
        ((2, 50, 128), 112, 2, True),
        ((2, 9, 64), 136, 4, True),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_conv_backward_of_a_sum(
    shape: tuple[int, int, int], rank: int, taps: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    b, length, d = shape
    on = {"device": "cuda", "dtype": dtype}
    x, dout = torch.randn(b, length, 2 * d, **on)[..., :d], torch.randn(2, b, length, d, **on)
    factors, products = torch.randn(2, b, length, rank, **on), torch.randn(2, rank, d, **on) / rank**0.5
    parameters = [torch.randn(2, d, taps, device="cuda"), torch.randn(2, d, device="cuda")][: 1 + bias]

    def plain(to: torch.dtype | None) -> list[Tensor]:
        leaves = [(v if to is None else v.to(to)).detach().requires_grad_() for v in (x, *parameters)]
        total = [v if to is None else v.to(to) for v in (dout, factors, products)]
        grad = total[0] + torch.einsum("kblp,kpd->kbld", *total[1:])
        return list(torch.autograd.grad(conv_silu(*leaves, *[None][bias:], [False, True]), leaves, grad))

    def ours() -> list[Tensor]:
        dx = torch.empty(b, length, 2 * d, **on)[..., :d]
        weight, *more = parameters
        partial = launch_backward_of_sum(
            dout.clone(), factors, products, x, weight, more[0] if bias else None, [False, True], dx
        )
        *dtaps, dbias = partial.sum(0).unbind(1)
        return [dx, torch.stack(dtaps, -1), dbias][: 2 + bias]

    for a, again, exact, same in zip(ours(), ours(), plain(torch.float64), plain(None), strict=True):
        assert relative(a, exact) <= 2 * relative(same, exact) + NOISE[dtype]
        assert torch.equal(a, again)


@pytest.mark.parametrize("shape", [(2, 1, 192), (1, 3, 33), (3, 197, 384), (2, 50, 1000)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("rms", [True, False])
def test_norm(shape: tuple[int, int, int], dtype: torch.dtype, rms: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=dtype)
    residual = torch.randn(shape, device="cuda")
    weight, bias = torch.randn(shape[-1], device="cuda"), torch.randn(shape[-1], device="cuda")
    grads = [torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape, device="cuda")]
    if rms:
        check(lambda *v: add_norm(*v), add_rms_norm, [x, residual, weight], grads, dtype)
        check(
            lambda x, w: add_norm(x, None, w),
            lambda x, w: add_rms_norm(x, None, w),
            [x, weight],
            grads,
            dtype,
        )
    else:
        check(lambda *v: add_norm(*v, rms=False), add_layer_norm, [x, residual, weight, bias], grads, dtype)


def test_norm_drops_paths() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(4, 9, 96, device="cuda", dtype=BF16), torch.randn(4, 9, 96, device="cuda")
    weight, noise = torch.randn(96, device="cuda"), torch.tensor([0.1, 0.9, 0.5, 0.4], device="cuda")
    keep = torch.tensor([0.0, 2.0, 2.0, 0.0], device="cuda")
    grads = [torch.randn_like(x), torch.randn_like(residual)]

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, r = add_rms_norm(wide(x) * keep[:, None, None], residual, weight)
        return y.to(x.dtype), r

    check(lambda *v: add_norm(*v, noise=noise, drop_rate=0.5), plain, [x, residual, weight], grads, BF16)


def block_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rank: int = 5,
    taps: int = 4,
    residual: bool = True,
    biases: bool = False,
    conv_bias: bool = True,
    rms: bool = True,
    seed: int = 0,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs of `block`, its weights those of a trained model in size, and gradients of its results."""
    torch.manual_seed(seed)
    c = shape[2]
    d, n = 2 * c, 16
    on = {"device": "cuda"}

    def direction() -> list[Tensor | None]:
        conv = [torch.randn(d, taps, **on) / 2, torch.randn(d, **on) / 2 if conv_bias else None]
        projections = [torch.randn(rank + 2 * n, d, **on) / 8, torch.randn(d, rank, **on), torch.randn(d, **on) - 3]
        return [*conv, *projections, torch.rand(d, n, **on) * 2.5, torch.randn(d, **on)]

    stream = [torch.randn(shape, dtype=dtype, **on), torch.randn(shape, **on) if residual else None]
    norm = [torch.randn(c, **on), None if rms else torch.randn(c, **on)]
    first = [torch.randn(2 * d, c, **on) / c**0.5, torch.randn(2 * d, **on) if biases else None]
    last = [torch.randn(c, d, **on) / d**0.5, torch.randn(c, **on) if biases else None]
    return [*stream, *norm, *first, *direction(), *direction(), *last], [torch.randn(shape, **on) for _ in range(2)]


def block(backend: str, amp: bool = False, **options: object) -> Callable[..., tuple[Tensor, Tensor]]:
    """The public op of the inputs in one list, in fp32 or under bf16 autocast; float64 stays float64."""

    def run_block(*v: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", BF16, enabled=amp and v[0].dtype != torch.float64, cache_enabled=False):
            return bidirectional_block(*v[:4], unflatten(v[4:]), scale=0.5, backend=backend, **options)

    return run_block


def check_block(shape: tuple[int, int, int], amp: bool, dtype: torch.dtype = FP32, **options: object) -> None:
    """Of eight inputs together: a block rounds its norm and weights in other places than plain torch, so the two err
    independently, and for a single input either may be off by more than twice the other."""
    noise = torch.linspace(0.05, 0.95, shape[0], device="cuda") if options.pop("dropped", False) else None
    more = {"noise": noise, "drop_rate": 0.4, "rms": options.get("rms", True)}
    ours, plain = block("gluon", amp, **more), block("reference", amp, **more)
    draws = [outcomes(ours, plain, *block_inputs(shape, dtype, seed=i, **options)) for i in range(8)]
    found = [tuple(map(torch.stack, zip(*of_output, strict=True))) for of_output in zip(*draws, strict=True)]
    # States kept for backward are bf16 where the products are; in fp32 the order of sums differs.
    slack = dict.fromkeys(range(1, 24), 2e-3 if amp else 2e-6)
    within_bar(found, BF16 if amp else FP32, slack)


@pytest.mark.parametrize("length", [1, 3, 17, 197])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_block_lengths(length: int, dtype: torch.dtype) -> None:
    check_block((2, length, 48), dtype == BF16, dtype)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 17, 64), {}),
        ((3, 21, 40), {"dropped": True}),
        ((5, 9, 72), {"biases": True, "conv_bias": False, "dropped": True}),
        ((2, 33, 32), {"rms": False, "residual": False, "taps": 3}),
        ((4, 50, 192), {"rank": 12, "rms": False, "biases": True, "dropped": True}),
        ((2, 37, 48), {"rank": 24}),
        ((1, 70, 32), {"rank": 70}),
    ],
)
@pytest.mark.parametrize("amp", [True, False])
def test_block_options(shape: tuple[int, int, int], options: dict[str, object], amp: bool) -> None:
    """fp32 comes in under autocast too, as from the position embedding."""
    check_block(shape, amp, **options)


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, choices in CHOICES.items() for choice in choices[1:]], ids=str
)
def test_every_choice_of_programs(name: str, choice: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {torch.cuda.current_device(): replace(DEFAULT, **{name: choice})})
    monkeypatch.setattr(scan_launch, "multiprocessors", lambda device: 1)  # as small as this batch, so that it is wide
    fp32 = name.endswith("fp32")
    check_block((3, 197, 96), not fp32, FP32 if fp32 else BF16)


@pytest.mark.parametrize("amp", [True, False])
def test_block_without_gradients(amp: bool) -> None:
    """The same from less memory: the new residual stands where the old one was."""
    inputs, _ = block_inputs((3, 37, 48), FP32)
    want = block("gluon", amp)(*[None if x is None else x.clone().requires_grad_() for x in inputs])
    residual = inputs[1]
    with torch.no_grad():
        fresh = block("gluon", amp)(*inputs)
        got = block("gluon", amp, overwrite=True)(*inputs)
    assert got[1] is residual
    for a, b, c in zip(fresh, got, want, strict=True):
        assert torch.equal(a, b)
        assert relative(a, c.double()) < (4e-3 if amp else 1e-6)


def test_autocast_leaves_the_norms_bias_in_fp32() -> None:
    """in_proj passes it on, in a sum here whose huge terms cancel, unless they are rounded first."""
    (x, residual, weight, _, in_weight, *others), _ = block_inputs((1, 1, 32), FP32, biases=True)
    in_weight -= in_weight.mean(1, keepdim=True)
    run_block = block("gluon", True, rms=False)
    want, got = (
        run_block(0 * x, 0 * residual, weight, torch.full_like(weight, bias), in_weight, *others)[0]
        for bias in (0.0, 1e3)
    )
    assert relative(got, want.double()) < 1e-2


def test_block_with_frozen_weights() -> None:
    inputs, _ = block_inputs((2, 9, 32), FP32, biases=True)
    for frozen in (range(2, len(inputs), 2), range(3, len(inputs), 2)):
        leaves = [None if x is None else x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        sum(y.sum() for y in block("gluon")(*leaves)).backward()
        assert all(x is None or (x.grad is None) == (i in frozen) for i, x in enumerate(leaves))


def test_block_is_one_node_for_the_compiler() -> None:
    inputs, grads = block_inputs((2, 9, 32), FP32)
    compiled = torch.compile(block("gluon"), fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs, grads), run(block("gluon"), inputs, grads), strict=True):
        assert torch.equal(a, b)


def test_block_in_a_cuda_graph() -> None:
    inputs, grads = block_inputs((2, 21, 32), FP32)
    want = run(block("gluon", True), inputs, grads)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(block("gluon", True), inputs, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(block("gluon", True), inputs, grads)
    graph.replay()
    assert all(map(torch.equal, got, want))
