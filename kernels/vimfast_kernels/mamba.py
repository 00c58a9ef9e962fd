"""The backend ``mamba_ssm``: the CUDA kernels of mamba-ssm and causal-conv1d, where these packages are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vimfast_kernels.backends import Backend


class _Packages(NamedTuple):
    scan: Callable[..., Tensor]  # selective_scan_fn(u [b, d, L], ...)
    conv: Callable[..., Tensor]  # causal_conv1d_fn(x [b, d, L], weight [d, W], ...)


@functools.cache
def _load() -> _Packages | str:
    """The public functions of both packages, or why they cannot be imported."""
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # a build for another torch fails in many ways
        return f"{type(error).__name__}: {error}"
    return _Packages(selective_scan_fn, causal_conv1d_fn)


def _missing() -> str | None:
    if isinstance(found := _load(), str):
        return (
            "needs the packages mamba-ssm and causal-conv1d, which vimfast[mamba] installs and which do not import here"
            f" ({found})"
        )
    return None if torch.cuda.is_available() else "needs a CUDA GPU and there is none here"


def scan(
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
) -> Tensor:
    y, *others = (
        scan_one_direction(u[k], delta[k], A[k], B[k], C[k], _pick(D, k), z, _pick(delta_bias, k), back)
        for k, back in enumerate(reverse)
    )
    for other in others:
        y = y + other
    return y if scale == 1.0 else y * scale


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    ways = [conv_one_direction(x, weight[k], _pick(bias, k), back) for k, back in enumerate(reverse)]
    return torch.stack(ways) if len(ways) > 1 else ways[0][None]


def scan_one_direction(
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
    """Calls mamba_ssm, whose sequences are [b, d, L] and share one dtype."""

    def sequence(x: Tensor | None) -> Any:
        if x is None:
            return None
        x = x.to(u.dtype).transpose(1, 2)
        return x.flip(2) if reverse else x

    def parameter(x: Tensor | None) -> Any:
        return None if x is None else x.float()

    packages = _load()
    assert isinstance(packages, _Packages)
    y = packages.scan(
        sequence(u),
        sequence(delta),
        parameter(A),
        sequence(B),
        sequence(C),
        parameter(D),
        sequence(z),
        parameter(delta_bias),
        delta_softplus=True,
    )
    return (y.flip(2) if reverse else y).transpose(1, 2)


def conv_one_direction(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Calls causal_conv1d: x [b, L, d], weight [d, W] -> [b, L, d]."""
    packages = _load()
    assert isinstance(packages, _Packages)
    x = (x.flip(1) if reverse else x).transpose(1, 2)
    if x.stride(0) % 8 or x.stride(2) % 8:  # its channels-last kernel reads 8 channels at a time
        x = x.contiguous()
    y = packages.conv(x, weight, bias, activation="silu").transpose(1, 2)
    return y.flip(1) if reverse else y


def _pick(x: Tensor | None, k: int) -> Tensor | None:
    return None if x is None else x[k]


BACKEND = Backend(
    "mamba_ssm",
    ops={"scan": scan, "conv": conv},
    missing=_missing,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
)
