"""The selective scan of every backend that serves a CPU against a step-by-step float64 computation.

Output and every gradient. Another backend is tested by one entry in EXTRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import vim_float64
from numerics import SEQUENCES, agree, make, results
from torch import Tensor

from vimfast_kernels import Backend, bidirectional_scan, register, selective_scan, serving
from vimfast_kernels.backends import unregister
from vimfast_kernels.scan import reference


def chunked_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    reverse: Sequence[bool],
    scale: float,
    steps: int = 8,
) -> Tensor:
    """In chunks of a few steps, each a masked product of its steps with one another: differentiated by autograd."""
    total = torch.zeros_like(u[0], dtype=torch.float64)
    for k, back in enumerate(reverse):
        x, raw, b, c = (v[k].double().flip(1) if back else v[k].double() for v in (u, delta, B, C))
        dt = F.softplus(raw if delta_bias is None else raw + delta_bias[k].double())  # [b, L, d]
        rates = dt.unsqueeze(3) * A[k].double()  # [b, L, d, N]
        drive = (dt * x).unsqueeze(3) * b.unsqueeze(2)
        state, ys = torch.zeros_like(drive[:, 0]), []
        for t in (slice(i, i + steps) for i in range(0, x.shape[1], steps)):
            passed = rates[:, t].cumsum(1)  # from the chunk's start to after each step
            between = passed.unsqueeze(2) - passed.unsqueeze(1)  # [b, to, from, d, N]
            later = torch.ones(between.shape[1:3], dtype=torch.bool).tril()[:, :, None, None]
            kept = torch.where(later, between, -torch.inf).exp()
            states = (kept * drive[:, t].unsqueeze(1)).sum(2) + passed.exp() * state.unsqueeze(1)
            ys.append((states * c[:, t].unsqueeze(2)).sum(3))
            state = states[:, -1]
        y = torch.cat(ys, 1) if D is None else torch.cat(ys, 1) + D[k].double() * x
        total = total + (y.flip(1) if back else y)
    gate = 1.0 if z is None else F.silu(z.double())
    return (scale * gate * total).to(u.dtype)


# Backends beside those of the package, tested in the same way.
EXTRA = {"chunked": Backend("chunked", ops={"scan": chunked_scan}, devices=("cpu",))}


@pytest.fixture(params=[*serving("scan", torch.device("cpu"), torch.float64), *EXTRA])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend with a scan for a CPU, those of this file registered meanwhile."""
    if request.param in EXTRA:
        register(EXTRA[request.param])
    yield request.param
    if request.param in EXTRA:
        unregister(request.param)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work in one piece, as at these sizes, and cut up in batch and length, as at real ones."""
    if request.param == "pieces":
        monkeypatch.setattr(reference, "STEP_ELEMENTS", 40)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 40)


def step_by_step(reverse: bool) -> Callable[..., Tensor]:
    def function(**x: Tensor) -> Tensor:
        if reverse:
            x = {name: v.flip(1) if name in SEQUENCES else v for name, v in x.items()}
        y = vim_float64.scan(**x)
        return y.flip(1) if reverse else y

    return function


def both_step_by_step(scale: float) -> Callable[..., Tensor]:
    def function(z: Tensor | None = None, **x: Tensor) -> Tensor:
        gate = {} if z is None else {"z": z}
        ways = [step_by_step(k == 1)(**{name: v[k] for name, v in x.items()}, **gate) for k in (0, 1)]
        return scale * (ways[0] + ways[1])

    return function


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(1, 1, 5, 16), (2, 3, 7, 1), (3, 17, 5, 16), (1, 63, 3, 8), (2, 63, 1, 3), (3, 197, 3, 5)],
)
def test_one_direction(batch: int, length: int, channels: int, states: int, reverse: bool, backend: str) -> None:
    inputs = make(batch, length, channels, states)
    got = results(partial(selective_scan, reverse=reverse, backend=backend), inputs)
    agree(got, results(step_by_step(reverse), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z"), ("D", "z", "delta_bias")])
def test_optional_inputs(without: tuple[str, ...], backend: str) -> None:
    inputs = {name: x for name, x in make(2, 17, 5, 4).items() if name not in without}
    one, both = partial(selective_scan, backend=backend), partial(bidirectional_scan, backend=backend)
    agree(results(one, inputs), results(step_by_step(False), inputs), 1e-10)
    inputs = {name: x for name, x in make(2, 17, 5, 4, ways=2).items() if name not in without}
    agree(results(both, inputs), results(both_step_by_step(1.0), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 3), (2, 63)])
def test_both_directions(batch: int, length: int, backend: str) -> None:
    inputs = make(batch, length, 5, 6, ways=2)
    got = results(partial(bidirectional_scan, scale=0.5, backend=backend), inputs)
    agree(got, results(both_step_by_step(0.5), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
def test_directions_may_share_their_inputs(backend: str) -> None:
    """As in mixer v1: views expanded over the directions, whose gradients add up."""
    shared, A = make(2, 17, 5, 4), make(2, 17, 5, 4, ways=2)["A"]

    def both(scan: Callable[..., Tensor], z: Tensor, A: Tensor, **x: Tensor) -> Tensor:
        return scan(**{name: v.expand(2, *v.shape) for name, v in x.items()}, A=A, z=z)

    inputs = {**shared, "A": A}
    agree(
        results(lambda **x: both(partial(bidirectional_scan, backend=backend), **x), inputs),
        results(lambda **x: both(both_step_by_step(1.0), **x), inputs),
        1e-10,
    )


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_do_not_matter(reverse: bool, backend: str) -> None:
    inputs = make(3, 17, 5, 4)
    wide = torch.cat([inputs["B"], inputs["C"], inputs["u"], inputs["z"]], dim=-1)  # as slices of projections
    strided = {
        **inputs,
        "B": wide[..., :4],
        "C": wide[..., 4:8],
        "u": wide[..., 8:13],
        "z": wide[..., 13:],
        "delta": inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2),
        "A": inputs["A"].t().contiguous().t(),
    }
    scan = partial(selective_scan, reverse=reverse, backend=backend)
    agree(results(scan, strided), results(scan, inputs), 1e-14)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_arithmetic_is_fp32_in_any_dtype(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    """bf16 and fp16 cost the rounding of inputs and outputs (2^-9, 2^-12 of them), no more."""
    inputs = make(2, 197, 5, 16, ways=2)
    low = {name: x.to(dtype if name in SEQUENCES else torch.float32) for name, x in inputs.items()}
    got = results(partial(bidirectional_scan, backend=backend), low)
    assert got["out"].dtype == dtype
    assert {name: got[name].dtype for name in low} == {name: x.dtype for name, x in low.items()}
    rounded = {name: x.double() for name, x in low.items()}
    agree(got, results(both_step_by_step(1.0), rounded), tolerance)


def test_long_steps_and_steep_decay_stay_finite(backend: str) -> None:
    inputs = {name: x.float() for name, x in make(2, 63, 5, 16).items()}
    inputs["delta"] = inputs["delta"] * 50  # softplus up to 100 and down to 0
    inputs["A"] = inputs["A"] * 50
    exact = {name: x.double() for name, x in inputs.items()}
    agree(results(partial(selective_scan, backend=backend), inputs), results(step_by_step(False), exact), 1e-5)


def test_autocast_changes_nothing(backend: str) -> None:
    inputs = {name: x.float() for name, x in make(2, 17, 5, 4, ways=2).items()}
    scan = partial(bidirectional_scan, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(scan, inputs)
    want = results(scan, inputs)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_the_compiler_sees_one_node() -> None:
    inputs = {name: x.float() for name, x in make(2, 17, 5, 4, ways=2).items()}
    compiled = torch.compile(bidirectional_scan, fullgraph=True, backend="aot_eager")
    want = results(bidirectional_scan, inputs)
    assert all(torch.equal(got, want[name]) for name, got in results(compiled, inputs).items())


@pytest.mark.parametrize("optional", [True, False])
def test_custom_op_contract(optional: bool) -> None:
    """Schema, shape function and autograd registration, as torch checks them."""
    x = {name: v.float().requires_grad_() for name, v in make(2, 9, 3, 4, ways=2).items()}
    last = (x["D"], x["z"], x["delta_bias"]) if optional else (None, None, None)
    args = (x["u"], x["delta"], x["A"], x["B"], x["C"], *last, [False, True], 0.5)
    torch.library.opcheck(reference.scan, args)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("delta", (2, 9, 4)), ("B", (2, 9, 3)), ("C", (1, 9, 4)), ("D", (4,)), ("z", (2, 8, 3)), ("delta_bias", (1, 3))],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        selective_scan(**{**make(2, 9, 3, 4), name: torch.zeros(shape)})


def test_wrong_u_is_named() -> None:
    inputs = make(2, 9, 3, 4)
    with pytest.raises(ValueError, match=r"\[batch, length, channels\]"):
        selective_scan(**{**inputs, "u": inputs["u"][0]})
    with pytest.raises(ValueError, match=r"\[2, batch, length, channels\]"):
        bidirectional_scan(**make(2, 9, 3, 4, ways=3))


def test_saved_states_are_few() -> None:
    """At the size of Vim-Tiny a layer keeps no more than four fp32 activations beside its inputs."""
    _, steps = reference.piece(8, 197, 384, 16, on_gpu=False)
    assert -(-197 // steps) * 16 <= 4 * 197
    for batch, length in ((1, 197), (64, 197), (128, 6085)):
        assert reference.piece(batch, length, 384, 16, on_gpu=False)[1] >= 8
