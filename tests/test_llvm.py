"""The backend ``llvm`` against float64, and what it leaves to the reference.

Errors in fp32 are at most twice those of plain torch.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import vim_float64
from numerics import SEQUENCES, make, normal
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vimfast_kernels.llvm
from vimfast.models.vision_mamba import VisionMamba
from vimfast_kernels import (
    add_layer_norm,
    add_rms_norm,
    bidirectional_block,
    bidirectional_conv1d_silu,
    bidirectional_scan,
    causal_conv1d_silu,
    check_backend,
    explain,
    selective_scan,
)
from vimfast_kernels.backends import _forget
from vimfast_kernels.llvm import launch, machine

pytestmark = pytest.mark.skipif(bool(vimfast_kernels.llvm._missing()), reason="needs llvmlite")
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=[4, 8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Vectors as those of smaller and larger processors."""
    width: int = request.param
    monkeypatch.setattr(machine, "_lanes", lambda channels: min(width, channels & -channels))
    return width


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are run."""
    names: list[str] = []

    def noted(kernel: machine.Kernel, *rest: Any) -> None:
        names.append(type(kernel).__name__)
        machine.run(kernel, *rest)

    monkeypatch.setattr(launch, "run", noted)
    return names


def error(got: Tensor, exact: Tensor) -> float:
    """NaN anywhere gives NaN, which is below nothing."""
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check(op: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
    """op(backend=..., **inputs) of both backends in fp32; `exact` takes float64."""
    low = {name: x.float() for name, x in inputs.items()}
    want = exact(**{name: x.double() for name, x in low.items()})
    with torch.no_grad():
        got, plain = (op(**low, backend=backend) for backend in ("llvm", "reference"))
    assert got.shape == want.shape
    assert error(got, want) <= max(2 * error(plain, want), 2 * EPS)  # of few numbers, plain torch's may be next to none


def flipped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flip(1) if name in SEQUENCES else x for name, x in inputs.items()}


def both_ways(scale: float = 1.0) -> Callable[..., Tensor]:
    def function(z: Tensor | None = None, **x: Tensor) -> Tensor:
        gate = {} if z is None else {"z": z}
        forth, back = ({name: v[k] for name, v in x.items()} | gate for k in (0, 1))
        return scale * (vim_float64.scan(**forth) + vim_float64.scan(**flipped(back)).flip(1))

    return function


@pytest.mark.usefixtures("poison", "lanes")
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(1, 1, 5, 16), (2, 3, 8, 1), (3, 17, 48, 3), (2, 197, 32, 16), (1, 63, 6, 33)],
)
def test_scan(batch: int, length: int, channels: int, states: int, runs: list[str]) -> None:
    inputs = make(batch, length, channels, states)
    check(selective_scan, vim_float64.scan, inputs)
    check(
        lambda **x: selective_scan(**x, reverse=True), lambda **x: vim_float64.scan(**flipped(x)).flip(1), inputs
    )  # fmt: skip
    both = make(batch, length, channels, states, ways=2)
    check(lambda **x: bidirectional_scan(**x, scale=0.5), both_ways(0.5), both)
    assert runs[-3:] == ["Scan"] * 3


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_scan_without(without: tuple[str, ...]) -> None:
    check(bidirectional_scan, both_ways(), {n: x for n, x in make(2, 9, 16, 4, ways=2).items() if n not in without})


@pytest.mark.usefixtures("poison")
def test_scan_of_strided_and_expanded_inputs() -> None:
    """Slices of projections, and one input for both directions."""
    inputs = make(3, 17, 8, 4, ways=2)
    wide = torch.cat([inputs[name] for name in ("B", "C", "u")], dim=-1)
    strided = {
        **inputs,
        "B": wide[..., :4],
        "C": inputs["C"].transpose(1, 2).contiguous().transpose(1, 2),
        "u": wide[:1, ..., 8:].expand(2, -1, -1, -1),
        "delta": inputs["delta"].transpose(2, 3).contiguous().transpose(2, 3),
        "z": torch.cat([inputs["z"], inputs["z"]], dim=-1)[..., 8:],
        "A": inputs["A"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    check(bidirectional_scan, both_ways(), strided)


def test_scan_of_long_steps_and_steep_decay() -> None:
    inputs = make(2, 63, 16, 16)
    check(selective_scan, vim_float64.scan, {**inputs, "delta": inputs["delta"] * 50, "A": inputs["A"] * 50})
    check(selective_scan, vim_float64.scan, {**inputs, "delta": inputs["delta"] * 1e-3 - 20})  # steps of 1e-9
    check(selective_scan, vim_float64.scan, {**inputs, "A": -0.01 * inputs["A"]})  # states that grow


def test_values_without_end_stay_visible() -> None:
    """A NaN or an infinity in one channel reaches its output, and no other channel's."""
    for name, value in (("u", torch.nan), ("delta", torch.nan), ("u", torch.inf), ("A", torch.nan), ("z", torch.nan)):
        inputs = {n: x.float() for n, x in make(1, 5, 16, 4).items()}
        inputs[name][..., 3, 3 if name != "A" else 0] = value
        with torch.no_grad():
            out = selective_scan(**inputs, backend="llvm")
        assert not out[..., 3].isfinite().all(), name
        assert out[..., torch.arange(16) != 3].isfinite().all(), name


@pytest.mark.usefixtures("poison", "lanes")
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"), [(1, 1, 3, 4), (2, 3, 16, 4), (1, 17, 40, 2), (3, 9, 32, 1)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution(batch: int, length: int, channels: int, taps: int, with_bias: bool) -> None:
    x = normal(batch, length, 2 * channels)
    inputs = {"weight": normal(2, channels, taps, seed=1)} | (
        {"bias": normal(2, channels, seed=2)} if with_bias else {}
    )

    def exact(weight: Tensor, bias: Tensor | None = None) -> Tensor:
        own = x.float().double()[..., channels:]
        biases = (None, None) if bias is None else bias
        forth = vim_float64.conv_silu(own, weight[0], biases[0])
        return torch.stack([forth, vim_float64.conv_silu(own.flip(1), weight[1], biases[1]).flip(1)])

    half = x.float()[..., channels:]
    check(lambda **options: bidirectional_conv1d_silu(half, **options), exact, inputs)
    one = {name: v[1] for name, v in inputs.items()}

    def back(**options: Tensor) -> Tensor:
        return exact(**{name: torch.stack([v, v]) for name, v in options.items()})[1]

    check(lambda **options: causal_conv1d_silu(half, **options, reverse=True), back, one)


@pytest.mark.usefixtures("poison", "lanes")
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("channels", [7, 48])
@pytest.mark.parametrize("first", [True, False])
def test_norms(rows: int, channels: int, first: bool) -> None:
    inputs = {"x": 3 + normal(2, rows, channels), "weight": normal(channels, seed=2)}
    if not first:
        inputs["residual"] = 50 * normal(2, rows, channels, seed=1)
    for norm, bias in ((add_rms_norm, None), (add_layer_norm, normal(channels, seed=3)), (add_layer_norm, None)):

        def exact(x: Tensor, weight: Tensor, residual: Tensor | None = None, **rest: Tensor) -> Tensor:
            total = x if residual is None else x + residual
            shift = rest.get("bias") if norm is add_rms_norm else rest.get("bias", torch.zeros_like(weight))  # noqa: B023
            return torch.stack([vim_float64.norm(total, weight, shift), total])

        def op(residual: Tensor | None = None, **rest: Any) -> Tensor:
            return torch.stack(norm(residual=residual, **rest))  # noqa: B023

        check(op, exact, inputs if bias is None else {**inputs, "bias": bias})


def small(kind: str, backend: str = "auto", **options: Any) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=7, bimamba_type=kind, if_bidirectional=False,
        final_pool_type="mean", scan_backend=backend, **options,
    )  # fmt: skip
    for index, parameter in enumerate(model.parameters()):  # as if trained: no two directions, no two channels alike
        torch.manual_seed(index)
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=["v2", "v1", "none"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rms", [True, False])
def test_models(kind: str, rms: bool, runs: list[str]) -> None:
    images = normal(3, 3, 32, 32).float()
    fast, plain = small(kind, rms_norm=rms), small(kind, "reference", rms_norm=rms)
    with torch.inference_mode():
        want = copy.deepcopy(plain).double()(images.double())
        assert error(fast(images), want) <= 2 * error(plain(images), want)
    assert runs == ["Norm", "Conv", "Scan"] * 2 + ["Norm"]


def test_hooked_blocks_run_op_by_op(runs: list[str]) -> None:
    model, kept = small("v2"), []
    with torch.no_grad():
        want = model(torch.ones(1, 3, 32, 32))
        handle = model.layers[0].mixer.x_proj.register_forward_hook(lambda *given: kept.append(given[2]))
        torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), want)
        handle.remove()
    assert len(kept) == 1
    assert runs == (["Norm", "Conv", "Scan"] * 2 + ["Norm"]) + [
        "Norm",
        "Conv",
        "Conv",
        "Scan",
        "Norm",
        "Conv",
        "Scan",
        "Norm",
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """As weights, and by autocast: what comes out has the reference's dtype, and its error at most twice."""
    images = normal(2, 3, 32, 32).float()
    fast, plain = small("v2"), small("v2", "reference")
    with torch.inference_mode():
        want = copy.deepcopy(plain).double()(images.double())
        with torch.autocast("cpu", dtype):
            pair = fast(images), plain(images)
        for got, like in (pair, [model.to(dtype)(images.to(dtype)) for model in (fast, plain)]):
            assert got.dtype == like.dtype
            assert error(got, want) <= min(2 * error(like, want), tolerance)


def test_the_residual_is_overwritten_only_where_it_may_be() -> None:
    x, residual, weight = normal(1, 3, 8).float(), normal(1, 3, 8, seed=1).float(), torch.ones(8)
    kept = residual.clone()
    with torch.no_grad():
        _, total = add_rms_norm(x, residual, weight, backend="llvm")
    assert torch.equal(residual, kept)
    assert torch.equal(total, kept + x)
    assert launch.norm(x, residual, weight, None, 1e-5, True, overwrite=True)[1].data_ptr() == residual.data_ptr()
    assert torch.equal(residual, total)


# What it leaves to the reference


def test_training_runs_on_the_reference(runs: list[str]) -> None:
    images = normal(2, 3, 32, 32).float()
    grads = []
    for backend in ("llvm", "reference"):
        model = small("v2", backend)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not runs
    with torch.no_grad():
        model(images)
    assert not runs


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return {name: x.float() for name, x in make(2, 5, 16, 4, ways=2).items()}


def test_what_looks_at_the_ops_sees_those_of_torch(inputs: dict[str, Tensor], runs: list[str]) -> None:
    def scan() -> Tensor:
        return bidirectional_scan(**inputs, backend="llvm")

    with torch.no_grad():
        want = scan()
        runs.clear()  # of the first use, which also tries the backend
        scan()
        assert runs == ["Scan"]
        with FlopCounterMode(display=False) as counter:
            scan()
        assert counter.get_total_flops() > 0
        torch.testing.assert_close(torch.compile(scan, fullgraph=True, backend="aot_eager")(), want)
        exact = bidirectional_scan(**{name: x.double() for name, x in inputs.items()})
    assert exact.dtype == torch.float64
    assert runs == ["Scan"]


def test_export_sees_none_of_it(runs: list[str]) -> None:
    """Even if the backend is tried meanwhile."""
    model, images = small("v2"), torch.ones(1, 3, 32, 32)
    _forget()
    vimfast_kernels.llvm._trial.cache_clear()
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        assert "vimfast" not in str(program.graph)
        runs.clear()
        torch.testing.assert_close(program.module()(images), model(images))


def test_tensors_that_do_not_fit_are_refused() -> None:
    """Instead of reading beyond them."""
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"norm: weight is \(4,\), and the other tensors imply \(8,\)"):
            add_rms_norm(torch.ones(2, 8), None, torch.ones(4), backend="llvm")
        mixer = small("v2").layers[0].mixer
        mixer.A_b_log = torch.nn.Parameter(torch.ones(64, 8))
        with pytest.raises(ValueError, match=r"mixer: A_log is \(64, 8\), and the other tensors imply \(64, 16\)"):
            bidirectional_block(torch.ones(1, 3, 32), None, torch.ones(32), None, mixer.weights(), backend="llvm")
        with pytest.raises(RuntimeError, match="meta"):
            add_rms_norm(torch.ones(2, 8), torch.ones(2, 8, device="meta"), torch.ones(8), backend="llvm")


# Threads, and machines without it


def test_threads_change_nothing(inputs: dict[str, Tensor]) -> None:
    """Neither how many of torch's there are, nor how many of the caller's."""

    def scan(_: int = 0) -> Tensor:
        with torch.no_grad():
            return bidirectional_scan(**inputs, backend="llvm")

    want, before = scan(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(scan(), want)
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(got, want) for got in pool.map(scan, range(20)))


def test_compiled_code_may_be_dropped(inputs: dict[str, Tensor]) -> None:
    """Each has all that it needs of LLVM to itself."""
    with torch.no_grad():
        want = bidirectional_scan(**inputs, backend="llvm")
        for _ in range(3):
            machine._compiled.cache_clear()
            gc.collect()
            assert torch.equal(bidirectional_scan(**inputs, backend="llvm"), want)


@pytest.fixture
def without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _forget()
    monkeypatch.setattr(vimfast_kernels.llvm, "find_spec", lambda name: None)
    yield
    _forget()


@pytest.mark.usefixtures("without_llvmlite")
def test_without_llvmlite(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(
        ValueError, match=r"'llvm' needs the package llvmlite, which vimfast\[cpu\] installs; use 'auto'"
    ):
        check_backend("llvm")
    assert torch.equal(bidirectional_scan(**inputs), bidirectional_scan(**inputs, backend="reference"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_is_said_of_it() -> None:
    assert explain("auto", CPU, torch.float32) == "llvm (no GPU; training: reference)"
    assert explain("llvm", CPU, torch.bfloat16) == "llvm (training: reference)"
    assert explain("auto", CPU, torch.float64) == "reference (no GPU)"


def test_too_many_states_are_warned_of(inputs: dict[str, Tensor]) -> None:
    many = {name: x.float() for name, x in make(1, 2, 4, 65).items()}
    with pytest.warns(UserWarning, match=r"the llvm kernels do not run on cpu \(state size 65 is above 64\)"):
        selective_scan(**many)
