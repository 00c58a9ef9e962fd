"""Which backend runs an op: the order of preference, what falls back, what is reported, and what refusals say."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import vim_float64
from numerics import agree, make, results
from torch import Tensor

from vimfast_kernels import (
    Backend,
    backend_names,
    bidirectional_block,
    bidirectional_scan,
    causal_conv1d_silu,
    check_backend,
    explain,
    mamba,
    reference,
    register,
    report,
    selective_scan,
    serving,
)
from vimfast_kernels.backends import OPS, dispatch, unregister

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture
def added() -> Iterator[Callable[..., None]]:
    """`register`, undone afterwards."""
    names = []

    def add(backend: Backend, **options: Any) -> None:
        register(backend, **options)
        names.append(backend.name)

    yield add
    for name in names:
        unregister(name)


def doubled_scan(*inputs: Any) -> Tensor:
    return 2 * reference.scan(*inputs)


def test_the_backends_of_the_package() -> None:
    assert backend_names() == ("auto", "gluon", "mamba_ssm", "llvm", "reference", "portable")
    assert set(reference.BACKEND.ops) == set(OPS)
    assert serving("scan", CPU, torch.float64) == ["reference", "portable"]


def test_an_unknown_name_and_the_known_ones() -> None:
    known = ", ".join(backend_names())
    with pytest.raises(ValueError, match=f"unknown scan backend 'fast'; the known ones are {known}"):
        selective_scan(**make(1, 5, 3, 2), backend="fast")


def test_auto_takes_the_first_that_serves(added: Callable[..., None]) -> None:
    inputs = make(1, 5, 3, 2)
    plain = selective_scan(**inputs)
    assert torch.equal(plain, selective_scan(**inputs, backend="reference"))
    scan = Backend("double", ops={"scan": doubled_scan}, dtypes=(torch.float64,))
    added(scan, before="reference")
    assert backend_names() == ("auto", "gluon", "mamba_ssm", "llvm", "double", "reference", "portable")
    assert torch.equal(selective_scan(**inputs), 2 * plain)
    low = {name: x.float() for name, x in inputs.items()}  # not made for fp32, which is no reason to warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(selective_scan(**low), plain.float())
    with pytest.raises(ValueError, match=r"'double' does not serve torch.float32 on cpu \(double does not take"):
        selective_scan(**low, backend="double")


def test_by_name_only_where_it_is_last(added: Callable[..., None]) -> None:
    inputs = make(1, 5, 3, 2)
    plain = selective_scan(**inputs)
    added(Backend("double", ops={"scan": doubled_scan}))
    assert torch.equal(selective_scan(**inputs), plain)
    assert torch.equal(selective_scan(**inputs, backend="double"), 2 * plain)


def test_a_failing_backend_is_warned_of_once(added: Callable[..., None]) -> None:
    asked = []

    def why_not(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
        asked.append(states)
        return "out of order" if states == 2 else None

    added(Backend("double", ops={"scan": doubled_scan, "norm": reference.BACKEND.ops["norm"]}, why_not=why_not),
          before="reference")  # fmt: skip
    inputs = make(1, 5, 3, 2)
    with pytest.warns(UserWarning, match=r"the double kernels do not run on cpu \(out of order\); using 'reference'"):
        selective_scan(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selective_scan(**inputs)
        bidirectional_scan(**make(1, 5, 3, 4, ways=2))
    assert asked == [2, 4]  # answers are remembered
    assert report("auto", CPU, torch.float64, 2)["scan"] == ("reference", "no GPU")
    with pytest.raises(ValueError, match=r"'double' does not serve torch.float64 on cpu \(out of order\); use 'auto'"):
        selective_scan(**inputs, backend="double")


def test_what_a_backend_lacks_runs_on_the_reference(added: Callable[..., None]) -> None:
    added(Backend("double", ops={"scan": doubled_scan}))
    assert {op: choice.backend for op, choice in report("double", CPU, torch.float32).items()} == {
        **dict.fromkeys(OPS, "reference"),
        "scan": "double",
    }
    assert explain("double", CPU, torch.float32) == "double (conv, norm and block: reference)"
    block = dispatch("block", "double", CPU, torch.float32)
    assert block is dispatch("block", "reference", CPU, torch.float32)


def test_a_block_reaches_the_backend_through_the_reference(added: Callable[..., None]) -> None:
    from vimfast.models.mixer import MambaMixer
    from vimfast.models.options import MixerOptions

    calls = []

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs[0].shape)
        return reference.scan(*inputs)

    added(Backend("counted", ops={"scan": counted}))
    mixer = MambaMixer(8, MixerOptions(d_state=4, scan_backend="counted"))
    bidirectional_block(torch.randn(2, 3, 8), None, torch.ones(8), None, mixer.weights(), backend="counted")
    assert calls == [(2, 2, 3, 16)]


def test_the_compiler_traces_through_the_choice(added: Callable[..., None]) -> None:
    added(Backend("double", ops={"scan": doubled_scan}))
    inputs = {name: x.float() for name, x in make(2, 9, 5, 4, ways=2).items()}

    def scan(**x: Tensor) -> Tensor:
        return bidirectional_scan(**x, backend="double")

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    want = results(scan, inputs)
    assert all(torch.equal(got, want[name]) for name, got in results(compiled, inputs).items())


def test_names_and_ops_are_checked() -> None:
    with pytest.raises(ValueError, match="'gluon' already exists"):
        register(Backend("gluon", ops={}))
    with pytest.raises(ValueError, match="unknown op 'scna'; ops are scan, conv, norm, block"):
        register(Backend("new", ops={"scna": doubled_scan}))  # type: ignore[dict-item]
    with pytest.raises(
        ValueError, match="no kernel backend 'fast' to prefer 'new' to; use gluon, mamba_ssm, llvm, reference, portable"
    ):
        register(Backend("new", ops={}), before="fast")
    assert "new" not in backend_names()


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


@without_gpu
def test_mamba_ssm_without_its_packages_or_a_gpu(request: pytest.FixtureRequest) -> None:
    mamba._load.cache_clear()
    with pytest.raises(ValueError, match=r"needs the packages mamba-ssm and causal-conv1d.*vimfast\[mamba\]"):
        check_backend("mamba_ssm")
    request.getfixturevalue("fake_mamba")
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        selective_scan(**make(1, 5, 3, 2), backend="mamba_ssm")
    assert explain("auto", CPU, torch.float64) == "reference (no GPU)"
    assert explain("reference", CPU, torch.float32) == "reference"


@pytest.mark.usefixtures("fake_mamba")
@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_gets_its_layout(reverse: bool) -> None:
    inputs = {name: x.float() for name, x in make(2, 17, 5, 4).items()}
    got = results(lambda **x: mamba.scan_one_direction(**x, reverse=reverse), inputs)
    agree(got, results(lambda **x: selective_scan(**x, reverse=reverse), inputs), 1e-5)
    x, weight, bias = inputs["u"], torch.randn(5, 4), torch.randn(5)
    got_conv = mamba.conv_one_direction(x, weight, bias, reverse)
    want = causal_conv1d_silu(x, weight, bias, reverse=reverse, backend="reference")
    torch.testing.assert_close(got_conv, want)
