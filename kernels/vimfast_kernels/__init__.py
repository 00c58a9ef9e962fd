"""Ops of Vision Mamba, channels last, one signature for every backend. Never imports vimfast.

One package per op, with its public function, its plain-torch reference and the kernels of the ``gluon`` backend:
:mod:`~vimfast_kernels.scan`, :mod:`~vimfast_kernels.conv`, :mod:`~vimfast_kernels.norm`, :mod:`~vimfast_kernels.block`.
:mod:`vimfast_kernels.update` ends a training step.
:mod:`vimfast_kernels.backends` chooses between backends, which are registered here.
"""

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as error:  # a library that torch itself loads is an OSError
    # It has this package's name, so that `python -m vimfast_kernels.tune` ends in one line and no traceback.
    message = f"vimfast_kernels needs torch, which cannot be imported ({error}); pip install torch"
    raise ImportError(message, name=__name__) from error

from vimfast_kernels import gluon, llvm, mamba, portable, reference
from vimfast_kernels.backends import Backend, backend_names, check_backend, explain, register, report, serving
from vimfast_kernels.block import bidirectional_block, bidirectional_mixer
from vimfast_kernels.block.weights import Direction, MixerWeights
from vimfast_kernels.conv import bidirectional_conv1d_silu, causal_conv1d_silu
from vimfast_kernels.norm import add_layer_norm, add_rms_norm, drop_path
from vimfast_kernels.scan import bidirectional_scan, selective_scan

# In the order that "auto" prefers
for _backend in (gluon.BACKEND, mamba.BACKEND, llvm.BACKEND, reference.BACKEND, portable.BACKEND):
    register(_backend)

__all__ = [
    "Backend",
    "Direction",
    "MixerWeights",
    "add_layer_norm",
    "add_rms_norm",
    "backend_names",
    "bidirectional_block",
    "bidirectional_conv1d_silu",
    "bidirectional_mixer",
    "bidirectional_scan",
    "causal_conv1d_silu",
    "check_backend",
    "drop_path",
    "explain",
    "register",
    "report",
    "selective_scan",
    "serving",
]
