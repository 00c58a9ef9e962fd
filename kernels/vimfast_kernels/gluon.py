"""The backend ``gluon``: our kernels in Gluon and Triton, for NVIDIA GPUs.

They are compiled and tried once per GPU, dtype and state size; triton is not imported until then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vimfast_kernels.arithmetic import autocast_dtype
from vimfast_kernels.backends import Backend
from vimfast_kernels.block.reference import block as composed_block
from vimfast_kernels.block.weights import Direction, MixerWeights

OLDEST_GPU = (8, 0)  # compute capability of the first GPUs with cp.async, which the Gluon kernels use


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
    from vimfast_kernels.scan import launch

    return launch.selective_scan(u, delta, A, B, C, D, z, delta_bias, reverse=reverse, scale=scale)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    from vimfast_kernels.conv import launch

    return launch.causal_conv_silu(x, weight, bias, reverse=reverse)


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    drop_rate: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    from vimfast_kernels.norm import launch

    return launch.add_norm(x, residual, weight, bias, noise=noise, drop_rate=drop_rate, eps=eps, rms=rms)


def block(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weights: MixerWeights,
    *,
    rms: bool,
    eps: float,
    noise: Tensor | None,
    drop_rate: float,
    scale: float,
    overwrite: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from vimfast_kernels.block import launch

    if weights.forth.A_log.shape[0] % launch.CHANNELS:
        return composed_block(
            x, residual, norm_weight, norm_bias, weights, rms=rms, eps=eps, noise=noise, drop_rate=drop_rate,
            scale=scale, overwrite=overwrite, backend=backend,
        )  # fmt: skip
    return launch.bidirectional_block(
        x, residual, norm_weight, norm_bias, weights, dtype=autocast_dtype(x), noise=noise, drop_rate=drop_rate,
        eps=eps, rms=rms, scale=scale, overwrite=overwrite,
    )  # fmt: skip


def _missing() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA GPU and there is none here"


@functools.cache
def _trial(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why the kernels do not work on this GPU, or None: a small block is compiled and run, forward and backward."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    try:
        from vimfast_kernels.block import launch
        from vimfast_kernels.scan import launch as scan_launch

        scan_launch.check(dtype, states, length=1)
        # The first call may come from inference mode, where no tensor can require a gradient.
        outside = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False)
        with outside[0], outside[1], outside[2], torch.cuda.device(device):

            def small(*shape: int) -> Tensor:
                return torch.full(shape, 1 / 16, device="cuda")

            conv = small(64, 4), small(64)
            one = Direction(*conv, small(2 + 2 * states, 64), small(64, 2), small(64), small(64, states), small(64))
            weights = MixerWeights(small(128, 32), None, one, one, small(32, 64), None)
            length = scan_launch.PRODUCTS_SUMS  # long enough to use the same kernels as real sequences
            x = small(1, length, 32).to(dtype).requires_grad_()
            out, total = launch.bidirectional_block(x, small(1, length, 32), small(32), None, weights, dtype=dtype)
            (grad,) = torch.autograd.grad(out.sum() + total.sum(), x)
            finite = bool(out.isfinite().all() & grad.isfinite().all())
    except Exception as error:  # no triton, one with other names, a driver too old: failures take many forms
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if finite else "a trial run gave non-finite outputs"


BACKEND = Backend(
    "gluon",
    ops={"scan": scan, "conv": conv, "norm": norm, "block": block},
    why_not=_trial,
    missing=_missing,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
)
