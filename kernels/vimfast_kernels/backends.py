"""Which implementation runs an op: ``auto``, ``gluon``, ``mamba_ssm`` or ``reference``.

``auto`` takes the fastest that works for the tensors at hand and never fails. On a GPU that is ``gluon``, our kernels
in Gluon and Triton, which are built and tried once for each dtype; if they fail, a warning tells why, and mamba_ssm's
CUDA kernels serve where they are installed. Everywhere else it is the reference in plain torch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "gluon", "mamba_ssm", "reference")
OLDEST_GPU = (8, 0)  # compute capability of the first GPUs with cp.async, which the Gluon kernels use


class _Mamba(NamedTuple):
    scan: Callable[..., Tensor]  # selective_scan_fn(u [b, d, L], ...)
    conv: Callable[..., Tensor]  # causal_conv1d_fn(x [b, d, L], weight [d, W], ...)


@functools.cache
def _load_mamba() -> _Mamba | str:
    """The public functions of mamba_ssm and causal_conv1d, or why they cannot be had."""
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # built for another torch, they fail in many ways
        return f"{type(error).__name__}: {error}"
    return _Mamba(selective_scan_fn, causal_conv1d_fn)


@functools.cache
def _trial(device: int, dtype: torch.dtype, states: int) -> str | None:
    """Why the Gluon kernels do not serve on this GPU, or None: a small block is built and run, forward and backward."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    try:
        from vimfast_kernels.block import launch as block
        from vimfast_kernels.block.weights import Direction, MixerWeights
        from vimfast_kernels.scan import launch as scan

        scan.check(dtype, states, length=1)
        # The first call may come from inference, where no tensor made could have a gradient.
        outside = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False)
        with outside[0], outside[1], outside[2], torch.cuda.device(device):

            def small(*shape: int) -> Tensor:
                return torch.full(shape, 1 / 16, device="cuda")

            conv = small(64, 4), small(64)
            one = Direction(*conv, small(2 + 2 * states, 64), small(64, 2), small(64), small(64, states), small(64))
            weights = MixerWeights(small(128, 32), None, one, one, small(32, 64), None)
            length = scan.PRODUCTS_SUMS  # long enough for the kernels that real sequences meet
            x = small(1, length, 32).to(dtype).requires_grad_()
            out, total = block.bidirectional_block(x, small(1, length, 32), small(32), None, weights, dtype=dtype)
            (grad,) = torch.autograd.grad(out.sum() + total.sum(), x)
            finite = bool(out.isfinite().all() & grad.isfinite().all())
    except Exception as error:  # no triton, one with other names, a driver too old: they fail in many ways
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if finite else "a trial run gave no finite numbers"


@functools.cache  # so the warning comes once, and the answer costs nothing in a step
def _tell_trial(device: int, dtype: torch.dtype, states: int) -> bool:
    trouble = _trial(device, dtype, states)
    if trouble is not None:
        rest = "mamba_ssm" if _mamba_loads() else "reference"
        warnings.warn(f"the fast kernels do not run on this GPU ({trouble}); using {rest!r}", stacklevel=2)
    return trouble is None


def _constant(function: F) -> F:
    """For the compiler, which looks through a cache, but not through a function that it is told to take for a constant.

    ``torch.compiler.assume_constant_result`` does no more, and imports the whole compiler for it, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _gluon_trouble(device: int, dtype: torch.dtype, states: int) -> str | None:
    return _trial(device, dtype, states)


@_constant
def _gluon_serves(device: int, dtype: torch.dtype, states: int) -> bool:
    return dtype != torch.float64 and _tell_trial(device, dtype, states)


@_constant
def _mamba_loads() -> bool:
    return isinstance(_load_mamba(), _Mamba)


def check_backend(backend: str) -> str:
    """``backend`` itself if this machine can run it; a ValueError with the cure if not."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}; the known ones are {', '.join(BACKENDS)}")
    if backend == "gluon" and not torch.cuda.is_available():
        raise ValueError("scan backend 'gluon' needs a CUDA GPU and there is none here; use 'auto'")
    if backend == "mamba_ssm":
        if isinstance(found := _load_mamba(), str):
            raise ValueError(
                "scan backend 'mamba_ssm' needs the packages mamba-ssm and causal-conv1d, which do not import"
                f" ({found}); install vimfast[mamba] or use 'auto'"
            )
        if not torch.cuda.is_available():
            raise ValueError("scan backend 'mamba_ssm' needs a CUDA GPU and there is none here; use 'auto'")
    return backend


def resolve(backend: str, x: Tensor, states: int = 16) -> str:
    """The backend, ``gluon``, ``mamba_ssm`` or ``reference``, that will work on ``x`` with this state size."""
    if backend == "reference":
        return backend
    if backend == "auto":
        if x.is_cuda and _gluon_serves(x.device.index, x.dtype, states):
            return "gluon"
        return "mamba_ssm" if x.is_cuda and x.dtype != torch.float64 and _mamba_loads() else "reference"
    check_backend(backend)
    if not x.is_cuda:
        raise ValueError(f"scan backend {backend!r} works on CUDA tensors and this one is on {x.device}; use 'auto'")
    if backend == "gluon" and (trouble := _gluon_trouble(x.device.index, x.dtype, states)):
        raise ValueError(f"scan backend 'gluon' does not run on this GPU ({trouble}); use 'auto'")
    return backend


def explain(backend: str, device: torch.device, dtype: torch.dtype, states: int = 16) -> str:
    """Which backend will work on tensors of this kind, and why not a faster one: ``"reference (no GPU)"``."""
    probe = torch.empty(0, device=device, dtype=dtype)
    chosen = resolve(backend, probe, states)
    if backend != "auto" or chosen == "gluon":
        return chosen
    if not probe.is_cuda:
        return f"{chosen} (no GPU)"
    return f"{chosen} ({_gluon_trouble(probe.device.index, dtype, states)})"


def mamba_scan(
    u: Tensor,  # [b, L, d]
    delta: Tensor,  # [b, L, d]
    A: Tensor,  # [d, N]
    B: Tensor,  # [b, L, N]
    C: Tensor,  # [b, L, N]
    D: Tensor | None,  # [d]
    z: Tensor | None,  # [b, L, d]
    delta_bias: Tensor | None,  # [d]
    reverse: bool,
) -> Tensor:  # [b, L, d]
    """The reference's scan of one direction through mamba_ssm, whose sequences are [b, d, L] of one dtype."""

    def there(x: Tensor | None) -> Any:
        if x is None:
            return None
        x = x.to(u.dtype).transpose(1, 2)
        return x.flip(2) if reverse else x

    def plain(x: Tensor | None) -> Any:
        return None if x is None else x.float()

    mamba = _load_mamba()
    assert isinstance(mamba, _Mamba)
    y = mamba.scan(
        there(u), there(delta), plain(A), there(B), there(C), plain(D), there(z), plain(delta_bias), delta_softplus=True
    )
    return (y.flip(2) if reverse else y).transpose(1, 2)


def mamba_conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The reference's convolution and SiLU of one direction, x [b, L, d] and weight [d, W], through causal_conv1d."""
    mamba = _load_mamba()
    assert isinstance(mamba, _Mamba)
    x = (x.flip(1) if reverse else x).transpose(1, 2)
    if x.stride(0) % 8 or x.stride(2) % 8:  # its channels-last kernel reads 8 channels at a time
        x = x.contiguous()
    y = mamba.conv(x, weight, bias, activation="silu").transpose(1, 2)
    return y.flip(1) if reverse else y
