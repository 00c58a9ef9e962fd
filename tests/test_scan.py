"""The selective scan against a step-by-step float64 computation: output and every gradient."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
import vim_float64
from torch import Tensor

import vimfast_kernels
from vimfast_kernels import bidirectional_scan, mamba, selective_scan
from vimfast_kernels.scan import reference

Inputs = dict[str, Tensor]
SEQUENCES = ("u", "delta", "B", "C", "z")


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work in one piece, as at these sizes, and cut up in batch and length, as at real ones."""
    if request.param == "pieces":
        monkeypatch.setattr(reference, "STEP_ELEMENTS", 40)
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 40)


@pytest.fixture
def poison() -> Iterator[None]:
    """Every torch.empty full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make(batch: int, length: int, channels: int, states: int, ways: int = 0, seed: int = 0) -> Inputs:
    """Float64 inputs as in a model; with `ways` directions stacked in front where there is one for each."""
    g = torch.Generator().manual_seed(seed)
    k = (ways,) if ways else ()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "u": normal(*k, batch, length, channels),
        "delta": normal(*k, batch, length, channels),
        "A": -torch.exp(normal(*k, channels, states)),
        "B": normal(*k, batch, length, states),
        "C": normal(*k, batch, length, states),
        "D": normal(*k, channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(*k, channels) - 1,
    }


def results(function: Callable[..., Tensor], inputs: Inputs) -> Inputs:
    """The output and the gradient of each input, of a loss that weighs every output differently."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    weights = torch.sin(torch.arange(out.numel())).bfloat16().double().view(out.shape)  # exact in any dtype
    grads = torch.autograd.grad((out.double() * weights).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


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


def agree(got: Inputs, want: Inputs, tolerance: float) -> None:
    """Relative errors in norm; a NaN agrees with nothing."""
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        error = (got[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(1, 1, 5, 16), (2, 3, 7, 1), (3, 17, 5, 16), (1, 63, 3, 8), (2, 63, 1, 3), (3, 197, 3, 5)],
)
def test_one_direction(batch: int, length: int, channels: int, states: int, reverse: bool) -> None:
    inputs = make(batch, length, channels, states)
    got = results(lambda **x: selective_scan(**x, reverse=reverse), inputs)
    agree(got, results(step_by_step(reverse), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z"), ("D", "z", "delta_bias")])
def test_optional_inputs(without: tuple[str, ...]) -> None:
    inputs = {name: x for name, x in make(2, 17, 5, 4).items() if name not in without}
    agree(results(selective_scan, inputs), results(step_by_step(False), inputs), 1e-10)
    inputs = {name: x for name, x in make(2, 17, 5, 4, ways=2).items() if name not in without}
    agree(results(bidirectional_scan, inputs), results(both_step_by_step(1.0), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 3), (2, 63)])
def test_both_directions(batch: int, length: int) -> None:
    inputs = make(batch, length, 5, 6, ways=2)
    got = results(lambda **x: bidirectional_scan(**x, scale=0.5), inputs)
    agree(got, results(both_step_by_step(0.5), inputs), 1e-10)


@pytest.mark.usefixtures("pieces", "poison")
def test_directions_may_share_their_inputs() -> None:
    """As in mixer v1: views expanded over the directions, whose gradients add up."""
    shared, A = make(2, 17, 5, 4), make(2, 17, 5, 4, ways=2)["A"]

    def both(scan: Callable[..., Tensor], z: Tensor, A: Tensor, **x: Tensor) -> Tensor:
        return scan(**{name: v.expand(2, *v.shape) for name, v in x.items()}, A=A, z=z)

    inputs = {**shared, "A": A}
    agree(
        results(lambda **x: both(bidirectional_scan, **x), inputs),
        results(lambda **x: both(both_step_by_step(1.0), **x), inputs),
        1e-10,
    )


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("reverse", [False, True])
def test_strides_do_not_matter(reverse: bool) -> None:
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
    scan = lambda **x: selective_scan(**x, reverse=reverse)  # noqa: E731
    agree(results(scan, strided), results(scan, inputs), 1e-14)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)])
def test_arithmetic_is_fp32_in_any_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """bf16 and fp16 cost the rounding of inputs and outputs (2^-9, 2^-12 of them), no more."""
    inputs = make(2, 197, 5, 16, ways=2)
    low = {name: x.to(dtype if name in SEQUENCES else torch.float32) for name, x in inputs.items()}
    got = results(bidirectional_scan, low)
    assert got["out"].dtype == dtype
    assert {name: got[name].dtype for name in low} == {name: x.dtype for name, x in low.items()}
    rounded = {name: x.double() for name, x in low.items()}
    agree(got, results(both_step_by_step(1.0), rounded), tolerance)


def test_long_steps_and_steep_decay_stay_finite() -> None:
    inputs = {name: x.float() for name, x in make(2, 63, 5, 16).items()}
    inputs["delta"] = inputs["delta"] * 50  # softplus up to 100 and down to 0
    inputs["A"] = inputs["A"] * 50
    exact = {name: x.double() for name, x in inputs.items()}
    agree(results(selective_scan, inputs), results(step_by_step(False), exact), 1e-5)


def test_autocast_changes_nothing() -> None:
    inputs = {name: x.float() for name, x in make(2, 17, 5, 4, ways=2).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = results(bidirectional_scan, inputs)
    want = results(bidirectional_scan, inputs)
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


def test_backend_switch() -> None:
    inputs = make(1, 5, 3, 2)
    assert torch.equal(selective_scan(**inputs, backend="auto"), selective_scan(**inputs, backend="reference"))
    with pytest.raises(
        ValueError, match="unknown scan backend 'fast'; the known ones are auto, gluon, mamba_ssm, reference"
    ):
        selective_scan(**inputs, backend="fast")


@pytest.fixture
def fake_mamba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with the public functions of mamba_ssm and causal_conv1d, in their [b, d, L] layout."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert delta_softplus
        sequences = [None if x is None else x.transpose(1, 2) for x in (u, delta, B, C, z)]
        u, delta, B, C, z = sequences
        return vim_float64.scan(u, delta, A, B, C, D, z, delta_bias).transpose(1, 2)

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        assert activation == "silu"
        return vim_float64.conv_silu(x.transpose(1, 2), weight, bias).transpose(1, 2)

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "causal_conv1d")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].selective_scan_fn = selective_scan_fn
    modules[names[3]].causal_conv1d_fn = causal_conv1d_fn
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    mamba._load.cache_clear()
    yield
    mamba._load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_mamba_ssm_without_its_packages_or_a_gpu(request: pytest.FixtureRequest) -> None:
    mamba._load.cache_clear()
    with pytest.raises(ValueError, match=r"needs the packages mamba-ssm and causal-conv1d.*vimfast\[mamba\]"):
        vimfast_kernels.check_backend("mamba_ssm")
    request.getfixturevalue("fake_mamba")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        selective_scan(**make(1, 5, 3, 2), backend="mamba_ssm")
    assert vimfast_kernels.explain("auto", torch.device("cpu"), torch.float32) == "reference (no GPU)"
    assert vimfast_kernels.explain("reference", torch.device("cpu"), torch.float32) == "reference"


@pytest.mark.usefixtures("fake_mamba")
@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_gets_its_layout(reverse: bool) -> None:
    inputs = {name: x.float() for name, x in make(2, 17, 5, 4).items()}
    got = results(lambda **x: mamba.scan_one_direction(**x, reverse=reverse), inputs)
    agree(got, results(lambda **x: selective_scan(**x, reverse=reverse), inputs), 1e-5)
    x, weight, bias = inputs["u"], torch.randn(5, 4), torch.randn(5)
    got_conv = mamba.conv_one_direction(x, weight, bias, reverse)
    want = vimfast_kernels.causal_conv1d_silu(x, weight, bias, reverse=reverse, backend="reference")
    torch.testing.assert_close(got_conv, want)
