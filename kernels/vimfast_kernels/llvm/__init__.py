"""The backend ``llvm``: inference on a CPU, by kernels that LLVM compiles for the processor it finds.

llvmlite brings LLVM along in its wheel, so no compiler is needed; it is not imported until the first call. What needs
gradients, is traced or compiled, or is watched by a mode of torch runs on the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vimfast_kernels.backends import Backend
from vimfast_kernels.block.weights import MixerWeights, flatten
from vimfast_kernels.reference import BACKEND as REFERENCE

MOST_STATES = 64  # a step of the scan is written out for each
_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    if not _served(u, delta, A, B, C, D, z, delta_bias):
        out: Tensor = REFERENCE.ops["scan"](u, delta, A, B, C, D, z, delta_bias, list(reverse), scale)
        return out
    from vimfast_kernels.llvm import launch

    return launch.scan(u, delta, A, B, C, D, z, delta_bias, tuple(reverse), scale).to(u.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: Sequence[bool]) -> Tensor:
    if not _served(x, weight, bias):
        out: Tensor = REFERENCE.ops["conv"](x, weight, bias, list(reverse))
        return out
    from vimfast_kernels.llvm import launch

    biases = [None] * len(reverse) if bias is None else list(bias)
    return launch.conv(x, list(weight), biases, tuple(reverse)).to(x.dtype)


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
    if noise is not None or not _served(x, residual, weight, bias):
        y, total = REFERENCE.ops["norm"](x, residual, weight, bias, noise, drop_rate, eps, rms)
        return y, total
    from vimfast_kernels.llvm import launch

    y, total = launch.norm(x, residual, weight, bias, eps, rms)
    return y.to(x.dtype), total


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
    if noise is not None or not _served(x, residual, norm_weight, norm_bias, *flatten(weights)):
        y, total = REFERENCE.ops["block"](
            x, residual, norm_weight, norm_bias, weights, rms=rms, eps=eps, noise=noise, drop_rate=drop_rate,
            scale=scale, overwrite=overwrite, backend=backend,
        )  # fmt: skip
        return y, total
    from vimfast_kernels.llvm import launch

    y, total = launch.norm(x, residual, norm_weight, norm_bias, eps, rms, overwrite)
    return launch.mixer(y.to(x.dtype), weights, scale), total


def _served(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read their memory: plain ones on the CPU, and nobody asks for gradients or keeps a trace."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # Modes (FLOP counting, fake tensors), transformations (vmap) and forward derivatives see torch's ops only.
    watched = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    if watched or forward_ad._current_level >= 0:
        return False
    here = [x for x in tensors if x is not None]
    if not all(type(x) in _TYPES and x.device.type == "cpu" and x.dtype in _DTYPES for x in here):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in here))


def _missing() -> str | None:
    if find_spec("llvmlite") is None:
        return "needs the package llvmlite, which vimfast[cpu] installs"
    try:
        from vimfast_kernels.llvm import machine
    except (ImportError, OSError) as error:  # LLVM's own libraries are loaded by llvmlite
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        return f"needs llvmlite, which cannot be imported ({reason}): pip install --force-reinstall llvmlite"
    return machine.missing()


def _why_not(device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    if states > MOST_STATES:
        return f"state size {states} is above {MOST_STATES}"
    return _trial(int(states))


@functools.cache
def _trial(states: int) -> str | None:
    """Why the kernels do not work on this machine, or None: the scan is compiled and run."""
    with ThreadPoolExecutor(1) as elsewhere:  # where no mode of torch is on, as fake tensors' may be here
        return elsewhere.submit(_try_scan, states).result()


def _try_scan(states: int) -> str | None:
    try:
        from vimfast_kernels.llvm import launch

        u = torch.full((2, 1, 3, 16), 0.5, device="cpu")
        A, B = -torch.ones(2, 16, states, device="cpu"), torch.full((2, 1, 3, states), 0.25, device="cpu")
        D = A[..., 0]
        out = launch.scan(u, u, A, B, B, D, u[0], D, (False, True), 1.0)
        want = REFERENCE.ops["scan"](u, u, A, B, B, D, u[0], D, [False, True], 1.0)
        exact = bool(torch.isclose(out, want, rtol=1e-4, atol=1e-4).all())
    except Exception as error:  # an llvmlite with other names, a processor that it does not know
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if exact else "a trial run gave wrong outputs"


BACKEND = Backend(
    "llvm",
    ops={"scan": scan, "conv": conv, "norm": norm, "block": block},
    why_not=_why_not,
    missing=_missing,
    devices=("cpu",),
    dtypes=_DTYPES,
    gradients=False,
)
