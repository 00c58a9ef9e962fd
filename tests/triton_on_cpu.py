"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: errors of the Triton kernels against float64, as JSON."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import quick_interpreter  # noqa: F401  # the same values in less than half of the time
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vimfast_kernels import Backend, Direction, MixerWeights, bidirectional_block, gluon, register
from vimfast_kernels.block.device_steps import step_gradients
from vimfast_kernels.block.packing import pack_and_normalize_rows, padded, unpack
from vimfast_kernels.block.weights import flatten, unflatten
from vimfast_kernels.conv.launch import causal_conv_silu
from vimfast_kernels.conv.reference import conv_silu
from vimfast_kernels.norm.launch import Norm, add_norm
from vimfast_kernels.norm.reference import add_layer_norm, add_rms_norm
from vimfast_kernels.product.launch import multiply
from vimfast_kernels.scan import launch as scan_launch
from vimfast_kernels.scan import reference
from vimfast_kernels.scan.launch import StateGradients

Op = Callable[..., Any]
A_LOGS = (7, 14)  # places in `flatten`
RANDOM = (0.2, 0.9, 0.5)  # what stochastic depth draws for three samples
DROP = {"drop_rate": 0.5}
SHIFT = 2**-20  # relative: far above the roundings of float64, and too small for second derivatives to count


def relative(x: Tensor, exact: Tensor) -> float:
    """Infinite where there is a NaN, as in memory that nobody wrote: `max` would pass over a NaN."""
    error = (x.double() - exact).norm() / exact.norm().clamp_min(1e-12)
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def results(function: Op, inputs: Sequence[Tensor | None], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that are there."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    weights = (
        [torch.ones_like(y) for y in outs] if grads is None else [g.to(y) for g, y in zip(grads, outs, strict=True)]
    )
    return [*outs, *torch.autograd.grad(outs, [x for x in leaves if x is not None], weights)]


def signs(x: Tensor) -> Tensor:
    return torch.randn_like(x).sign()


def compare(kernel: Op, plain: Op, inputs: Sequence[Tensor | None]) -> float:
    """The largest relative error of an output or a gradient, as a share of how far roundings of the inputs move it.

    A gradient whose terms cancel, by the luck of the draw, loses hundreds of times as much as another, in any order of
    its sums: with a single time step, the product of B and C, one number, is a factor of all gradients of step sizes.
    """
    doubles = [None if x is None else x.double() for x in inputs]
    outs = plain(*doubles)
    grads = [torch.randn(y.shape) for y in (outs if isinstance(outs, tuple) else (outs,))]
    exact = results(plain, doubles, grads)
    amplified = [1.0] * len(exact)
    for _ in range(4):  # one number may stay where it is by chance
        moved = results(plain, [None if x is None else x * (1 + SHIFT * signs(x)) for x in doubles], grads)
        amplified = [max(a, relative(x, y) / SHIFT) for a, x, y in zip(amplified, moved, exact, strict=True)]
    pairs = zip(results(kernel, inputs, grads), exact, amplified, strict=True)
    return max(relative(x, y) / a for x, y, a in pairs)


def conv(b: int, length: int, d: int, reverse: list[bool], width: int, bias: bool) -> float:
    k = len(reverse)
    inputs = [torch.randn(b, length, d), torch.randn(k, d, width), torch.randn(k, d) if bias else None]
    return compare(lambda *v: causal_conv_silu(*v, reverse=reverse), lambda *v: conv_silu(*v, reverse), inputs)


def conv_of_a_view() -> float:
    xz, weight = torch.randn(2, 11, 48), torch.randn(2, 24, 4)
    exact = conv_silu(xz[..., 24:].double(), weight, None, [False, True])
    return relative(causal_conv_silu(xz[..., 24:], weight), exact)


def norm(shape: tuple[int, int, int], rms: bool, residual: bool, dropped: bool) -> float:
    c = shape[-1]
    inputs = [torch.randn(shape), torch.randn(shape) if residual else None, torch.randn(c)]
    inputs += [] if rms else [torch.randn(c)]
    noise = torch.tensor(RANDOM[: shape[0]]) if dropped else None
    keep = torch.tensor([0.0, 2.0, 2.0][: shape[0]] if dropped else [1.0])[:, None, None]
    plain = add_rms_norm if rms else add_layer_norm
    return compare(
        lambda *v: add_norm(*v, noise=noise, rms=rms, **DROP), lambda x, *v: plain(x * keep.to(x), *v), inputs
    )


def draw_weights(c: int, d: int, n: int, rank: int, width: int, conv_bias: bool, bias: bool) -> MixerWeights:
    def direction() -> Direction:
        conv = torch.randn(d, width) / 2, torch.randn(d) if conv_bias else None
        projections = torch.randn(rank + 2 * n, d) / 8, torch.randn(d, rank), torch.randn(d) - 3
        return Direction(*conv, *projections, torch.rand(d, n) * 2.5, torch.randn(d))

    outer = torch.randn(2 * d, c) / c**0.5, torch.randn(2 * d) if bias else None
    return MixerWeights(*outer, direction(), direction(), torch.randn(c, d) / d**0.5, torch.randn(c) if bias else None)


def packing(source: torch.dtype, target: torch.dtype, *sizes: Any) -> float:
    """How many arrays are not packed to the bit, A's rounding aside."""
    flat = flatten(draw_weights(*sizes))
    # Small integers: the interpreter cuts bf16 off where a GPU rounds.
    flat = [x if x is None or i in A_LOGS else (8 * x).round().to(source) for i, x in enumerate(flat)]
    w = unflatten(flat)
    rank, d = w.forth.dt_weight.shape[1], len(w.forth.D)
    pad = padded(rank)
    zeros = torch.zeros(pad - rank, d, dtype=source)

    def both(piece: Callable[[Direction], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.stack([piece(w.forth), piece(w.back)]).to(dtype)

    x, scale = torch.randn(1, 2, sizes[0]), (torch.arange(sizes[0]) % 3 - 1).to(source)
    norm = Norm(scale, None, None, 0.0, 1e-5, rms=True)
    narrow, wide, _ = pack_and_normalize_rows(w, norm, x, None, torch.empty_like(x), target)
    got = unpack(w, narrow, wide)
    outer = w.in_weight * scale, w.in_weight, w.in_bias, w.out_weight, w.out_bias
    want = [
        *(None if x is None else x.to(target) for x in outer),
        both(lambda way: torch.cat([way.x_weight[:rank], zeros, way.x_weight[rank:]]), target),
        both(lambda way: F.pad(way.dt_weight, (0, pad - rank)), target),
        both(lambda way: way.conv_weight),
        None if w.forth.conv_bias is None else both(lambda way: way.conv_bias),
        both(lambda way: way.conv_weight.T),
        both(lambda way: way.dt_bias),
        got.A,
        both(lambda way: way.D),
    ]
    wrong = 0
    for a, b in zip(got, want, strict=True):
        wrong += (a is None) != (b is None) or (a is not None and (a.dtype != b.dtype or not torch.equal(a, b)))
    return wrong + relative(got.A, -torch.exp(both(lambda way: way.A_log, torch.float64)))


def state_gradients(*shape: int, scaled: bool) -> tuple[StateGradients, Tensor]:
    """(dB and dC of blocks of channels [blocks, ..., 2 n], their sums in float64)."""
    sums = torch.randn(shape)
    if not scaled:
        return StateGradients(sums, None), sums.double().sum(0)
    sums, scales = sums.half(), 2.0 ** torch.randint(-40, 40, shape[:-1])
    return StateGradients(sums, scales), (sums.double() * scales[..., None].double()).sum(0)


def gradients_of_projections(rows: int, d: int, rank: int, parts: int, partials: int, scaled: bool = False) -> float:
    """Of time steps, to their factors and weights, and the sums of B's and C's."""
    ddelta, x_dbl = torch.randn(2, rows, d), torch.randn(2, rows, rank + 32)
    weight, pieces, dx_dbl = torch.randn(2, d, rank), torch.empty(2, parts, d, rank), torch.empty(2, rows, rank + 32)
    dstates, exact_states = state_gradients(partials, 2, rows, 32, scaled=scaled)
    step_gradients[(parts, 2)](
        ddelta, x_dbl, weight, *dstates, dx_dbl, pieces, rows, D=d, RANK=rank,
        COLUMNS=max(16, triton.next_power_of_2(rank)), STATES=32, PARTIALS=partials, ROWS=32, CHANNELS=64,
    )  # fmt: skip
    exact = torch.cat([ddelta.double() @ weight.double(), exact_states], -1)
    if not partials:
        assert dx_dbl[..., rank:].isnan().all()
        dx_dbl[..., rank:] = 0
    dweight = ddelta.double().transpose(1, 2) @ x_dbl[..., :rank].double()
    return max(relative(pieces.sum(1), dweight), relative(dx_dbl, exact))


def sums_of_partials(blocks: int, b: int, length: int, d: int, n: int, scaled: bool = False) -> float:
    """Of the scan's backward programs: dB and dC in rows of a larger array, and the gradients of parameters."""
    dstates, exact_states = state_gradients(blocks, 2, b, length, 2 * n, scaled=scaled)
    dparameters = torch.randn(2, b, d * (n + 2))
    rows, grads = torch.empty(2, b, length, 2 * n + 8), (torch.empty(2, d, n), torch.empty(2, d), torch.empty(2, d))
    dB, dC = rows[..., 8:].chunk(2, -1)
    scan_launch.sum_partials(dstates, dB, dC, dparameters, grads)
    alone = torch.empty_like(rows)
    scan_launch.sum_partials(dstates, *alone[..., 8:].chunk(2, -1))
    assert torch.equal(alone[..., 8:], rows[..., 8:])
    assert rows[..., :8].isnan().all()
    exact = dparameters.double().sum(1).split([d * n, d, d], -1)
    errors = [relative(x.flatten(1), y) for x, y in zip(grads, exact, strict=True)]
    return max(relative(rows[..., 8:], exact_states), *errors)


def split_product(batches: int, m: int, n: int, k: int, turned: bool, add: bool, bias: bool = False) -> float:
    """Of rows that are part of longer ones, written into such; with as many entries beside them written too."""
    a, out = torch.randn(batches, m, k + 5), torch.randn(batches, m, n + 3)
    w = torch.randn(batches, n, k).transpose(1, 2) if turned else torch.randn(batches, k, n)
    b = torch.randn(n) if bias else None
    a, into, beside = a[..., :k], out[..., :n], out[..., n:].clone()
    want = a.double() @ w.double() + (into if add else 0) + (0 if b is None else b)
    got = multiply(a, w, out=into, add=add) if b is None else multiply(a[0], w[0], b)[None]
    return relative(got, want) + float((out[..., n:] != beside).sum())


def split_special_values() -> float:
    """How many infinities, NaN and huge values come out as anything finite, or reach other rows."""
    a, w = torch.randn(6, 40), torch.randn(40, 20)
    a[0, 3], a[1, 5], a[2, 7] = torch.inf, torch.nan, -torch.inf
    a[3, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN whose bits are all ones
    a[4] *= 1e-39  # below the normal numbers
    got = multiply(a, w)
    return float(got[:4].isfinite().sum() + (~got[4:].isfinite()).sum() + (got[4] == 0).sum())


def projected(inputs):  # type: ignore[no-untyped-def]
    """The reference's arguments: time steps projected, as the kernels do it themselves."""
    *arguments, weight = inputs
    arguments[1] = torch.einsum("kblr,kdr->kbld", inputs.delta, weight)
    return arguments


def forward_by_reference(inputs, save, out=None):  # type: ignore[no-untyped-def]
    """The Gluon scan, which has no interpreter."""
    u, delta, A, B, C, D, z, bias, reverse, scale = projected(inputs)
    y, states = scan_launch.empty_saved(u, *u.shape, A.shape[2], save, True)
    if save:
        y.copy_(reference.scan(u, delta, A, B, C, D, None, bias, reverse, 1.0)[0])
    result = reference.scan(u, delta, A, B, C, D, z, bias, reverse, scale)[0]
    return (result if out is None else out.copy_(result)), y, states


def backward_by_reference(dout, inputs, y, _, dz, out):  # type: ignore[no-untyped-def]
    """In parts that add up without rounding: two blocks of channels, and one for each image."""
    out.copy_(inputs.scale * F.silu(inputs.z) * y)
    arguments = projected(inputs)
    grads = reference.scan_backward(dout, reference.scan(*arguments)[1], *arguments)
    du, ddelta, dA, dB, dC, dD, own_dz, dbias = grads
    dz.copy_(own_dz)
    dstates = torch.cat([dB, dC], -1)
    share = torch.zeros(dout.shape[0], 1)
    share[0] = 2
    share[-1] -= 1
    partials = StateGradients(torch.stack([2 * dstates, -dstates]), None)
    return du, ddelta, partials, share * torch.cat([dA.flatten(1), dD, dbias], -1)[:, None]


def blocks(
    b: int, length: int, c: int, rms: bool, residual: bool, dropped: bool, *sizes: Any
) -> tuple[Op, Op, list[Tensor | None]]:
    """The op as on a GPU, the composition, and their inputs."""
    noise = torch.tensor(RANDOM[:b]) if dropped else None
    options = {"noise": noise, "rms": rms, "scale": 0.5, **DROP}
    inputs = [
        *(torch.randn(b, length, c), torch.randn(b, length, c) if residual else None),
        *(torch.randn(c), None if rms else torch.randn(c)),
        *flatten(draw_weights(c, *sizes)),
    ]

    def fast(*v: Any, **more: Any) -> Any:
        return bidirectional_block(*v[:4], unflatten(v[4:]), **options, **more, backend="interpreted")

    return fast, lambda *v: bidirectional_block(*v[:4], unflatten(v[4:]), **options), inputs


USUAL = (2, 5, 20, True, True, True, 48, 16, 5, 4, True, True)
FEW = (2, 3, 8, False, True, True, 16, 16, 3, 4, True, True)  # for what sizes do not matter to


def block_without_gradients() -> float:
    """In memory of its own and in the residual's."""
    fast, _, inputs = blocks(*FEW)
    want = fast(*(None if x is None else x.clone().requires_grad_() for x in inputs))
    again = fast(*inputs)
    residual = inputs[1]
    got = fast(*inputs, overwrite=True)
    assert got[1] is residual
    assert again[1] is not residual
    return max(relative(x, y.double()) for x, y in zip((*got, *again), [y.detach() for y in want] * 2, strict=True))


def block_with_frozen_weights() -> float:
    """How many gradients there are that nobody asked for, or that are missing, or that freezing others changed."""
    fast, _, inputs = blocks(*FEW)

    def gradients(frozen: Sequence[int]) -> list[Tensor | None]:
        leaves = [None if x is None else x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        sum(y.sum() for y in fast(*leaves)).backward()
        return [None if x is None else x.grad for x in leaves]

    want, wrong = gradients([]), 0
    for frozen in (range(2, len(inputs), 2), range(3, len(inputs), 2)):
        for i, (got, whole) in enumerate(zip(gradients(frozen), want, strict=True)):
            asked = whole is not None and i not in frozen
            wrong += (got is not None) != asked or (asked and not torch.equal(got, whole))
    return wrong


def block_compiled() -> float:
    fast, _, inputs = blocks(*FEW)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    return 1.0 - all(map(torch.equal, results(fast, inputs), results(compiled, inputs)))


def main() -> None:
    torch.use_deterministic_algorithms(True)  # every torch.empty is full of NaN
    scan_launch.launch_forward, scan_launch.launch_backward_programs = forward_by_reference, backward_by_reference
    register(Backend("interpreted", ops={op: run for op, run in gluon.BACKEND.ops.items() if op != "scan"}))
    fp32, bf16 = torch.float32, torch.bfloat16
    cases: dict[str, Callable[[], float]] = {
        "conv": lambda: conv(2, 19, 40, [False, True], 4, True),
        "conv one step": lambda: conv(1, 1, 70, [False, True], 4, True),
        "conv back, three taps": lambda: conv(1, 3, 33, [True], 3, True),
        "conv forth, no bias": lambda: conv(2, 9, 16, [False], 2, False),
        "conv of a view": conv_of_a_view,
        "rms": lambda: norm((3, 5, 24), True, True, False),
        "rms, paths dropped": lambda: norm((3, 5, 24), True, True, True),
        "rms without residual": lambda: norm((1, 1, 33), True, False, False),
        "layer norm": lambda: norm((2, 7, 192), False, True, False),
        "packing, cast": lambda: packing(fp32, bf16, 20, 48, 16, 5, 4, True, True),
        "packing, as it is": lambda: packing(fp32, fp32, 33, 80, 8, 8, 3, False, False),
        "packing, widened": lambda: packing(torch.float16, fp32, 24, 32, 16, 12, 4, True, False),
        "block": lambda: compare(*blocks(*USUAL)),
        "block, layer norm, 3 taps": lambda: compare(*blocks(3, 3, 33, False, True, False, 64, 8, 12, 3, True, False)),
        # 17 blocks of two rows for 16 programs of the norm's backward, and all biases.
        "block, layer norm, rows of many programs": lambda: compare(
            *blocks(3, 11, 260, False, True, True, 16, 8, 3, 4, True, True)
        ),
        "block of a width without kernels": lambda: compare(
            *blocks(2, 5, 10, True, True, True, 20, 8, 3, 4, True, False)
        ),
        "block, one step": lambda: compare(*blocks(1, 1, 32, True, False, False, 64, 16, 8, 4, False, False)),
        "block without gradients": block_without_gradients,
        "block with frozen weights": block_with_frozen_weights,
        "block, compiled": block_compiled,
        "product": lambda: split_product(2, 70, 48, 96, True, False),
        "product, added": lambda: split_product(2, 1, 200, 24, False, True),
        "product with a bias": lambda: split_product(1, 130, 192, 40, True, False, bias=True),
        "product of few": lambda: split_product(1, 3, 12, 17, False, False),
        "special values": split_special_values,
        "gradients of projections": lambda: gradients_of_projections(77, 96, 16, 2, 2),
        "gradients of projections, scaled sums": lambda: gradients_of_projections(77, 96, 16, 2, 3, scaled=True),
        "gradients of few projections": lambda: gradients_of_projections(5, 48, 40, 3, 1),
        "gradients of projections, states summed before": lambda: gradients_of_projections(33, 32, 8, 2, 0),
        "sums of partial gradients": lambda: sums_of_partials(6, 3, 7, 48, 16),
        "scaled sums of partial gradients": lambda: sums_of_partials(3, 3, 7, 48, 16, scaled=True),
        "sums of few partial gradients": lambda: sums_of_partials(1, 1, 1, 16, 8),
    }
    errors = {}
    for name, case in cases.items():
        torch.manual_seed(zlib.crc32(name.encode()))  # what a case draws does not depend on those before it
        errors[name] = case()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
