"""The plain Triton kernels in Triton's interpreter, on a CPU, at small sizes; each in float32 against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

# Whether a kernel is interpreted is settled when its module is imported, so the checks run in a process of their own.
CHECKS = r"""
import json, sys
import torch
from vimfast_kernels import reference
from vimfast_kernels.conv_triton import causal_conv_silu
from vimfast_kernels.norm_triton import add_norm

def relative(x, exact):
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()

def compare(kernel, plain, inputs, leaves):
    exact_leaves = [x.double().requires_grad_() for x in leaves]
    outs = plain(*[exact_leaves[i] if isinstance(i, int) else i for i in inputs])
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(o) for o in outs]
    exact = [*outs, *torch.autograd.grad(outs, exact_leaves, grads)]
    ours_leaves = [x.clone().requires_grad_() for x in leaves]
    outs = kernel(*[ours_leaves[i] if isinstance(i, int) else i for i in inputs])
    outs = outs if isinstance(outs, tuple) else (outs,)
    ours = [*outs, *torch.autograd.grad(outs, ours_leaves, [g.float() for g in grads])]
    return max(relative(a, b) for a, b in zip(ours, exact, strict=True))

def conv(b, length, d, reverse, width, bias):
    x = torch.randn(b, length, d)
    leaves = [x, torch.randn(len(reverse), d, width)] + [torch.randn(len(reverse), d)] * bias
    inputs = [0, 1, 2 if bias else None]
    return compare(lambda *v: causal_conv_silu(*v, reverse=reverse),
                   lambda *v: reference.conv_silu(*v, reverse), inputs, leaves)

def conv_view():
    xz = torch.randn(2, 11, 48)
    w = torch.randn(2, 24, 4)
    exact = reference.conv_silu(xz[..., 24:].double(), w, None, [False, True])
    return relative(causal_conv_silu(xz[..., 24:], w), exact)

def norm(shape, rms, residual, keep):
    leaves = [torch.randn(shape), torch.randn(shape[-1])]
    leaves += [torch.randn(shape)] * residual + [torch.randn(shape[-1])] * (not rms)
    drop = torch.tensor([0.0, 2.0, 1.0])[: shape[0]] if keep else None
    rest = list(range(2, len(leaves)))
    r = rest.pop(0) if residual else None
    b = rest.pop(0) if not rms else None
    def plain(x, r, w, b):
        x = x if drop is None else x * drop.double().view(-1, 1, 1)
        return reference.add_rms_norm(x, r, w) if rms else reference.add_layer_norm(x, r, w, b)
    return compare(lambda x, r, w, b: add_norm(x, r, w, b, keep=drop, rms=rms), plain, [0, r, 1, b], leaves)

torch.manual_seed(0)
print(json.dumps({
    "conv": conv(2, 19, 40, [False, True], 4, True),
    "conv one step": conv(1, 1, 70, [False, True], 4, True),
    "conv back, three taps": conv(1, 3, 33, [True], 3, True),
    "conv forth, no bias": conv(2, 9, 16, [False], 2, False),
    "conv of a view": conv_view(),
    "rms": norm((3, 5, 24), True, True, False),
    "rms, paths dropped": norm((3, 5, 24), True, True, True),
    "rms without residual": norm((1, 1, 33), True, False, False),
    "layer norm": norm((2, 7, 192), False, True, False),
}))
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", CHECKS], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def test_kernels_match_float64(errors: dict[str, float]) -> None:
    assert len(errors) == 9
    bad = {name: error for name, error in errors.items() if not error < 1e-6}
    assert not bad


def test_errors_say_what_fits() -> None:
    from vimfast_kernels.conv_triton import causal_conv_silu
    from vimfast_kernels.norm_triton import add_norm

    x: Tensor = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="weight is for 6 channels, x has 8"):
        causal_conv_silu(x, torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="reverse has 1 entries for 2 directions"):
        causal_conv_silu(x, torch.zeros(2, 8, 4), reverse=[False])
    with pytest.raises(ValueError, match=r"weight is \(7,\) for 8 channels"):
        add_norm(x, None, torch.zeros(7))
