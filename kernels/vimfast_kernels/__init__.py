"""Ops of Vision Mamba, channels last, one signature for every backend. Never imports vimfast.

Source of the mathematics: :mod:`vimfast_kernels.reference`; of the switch: :mod:`vimfast_kernels.backends`.
"""

from vimfast_kernels.backends import BACKENDS, check_backend, explain
from vimfast_kernels.block import bidirectional_block, bidirectional_mixer
from vimfast_kernels.block.weights import Direction, MixerWeights
from vimfast_kernels.conv import bidirectional_conv1d_silu, causal_conv1d_silu
from vimfast_kernels.norm import add_layer_norm, add_rms_norm, drop_path
from vimfast_kernels.scan import bidirectional_scan, selective_scan

__all__ = [
    "BACKENDS",
    "Direction",
    "MixerWeights",
    "add_layer_norm",
    "add_rms_norm",
    "bidirectional_block",
    "bidirectional_conv1d_silu",
    "bidirectional_mixer",
    "bidirectional_scan",
    "causal_conv1d_silu",
    "check_backend",
    "drop_path",
    "explain",
    "selective_scan",
]
