"""The end of a training step on a GPU: norm of the gradients, verdict, clipping, AdamW and weight average in three
launches. Triton is not imported until they are tried.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def why_not(device: torch.device, averaged: bool) -> str | None:
    """Why the kernels do not work on a device, or None. On a GPU they are compiled and tried, once.

    Args:
        averaged: with an average of the weights.
    """
    if device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        from vimfast_kernels.update import launch

        with torch.cuda.device(device):
            right = launch.trial(device, averaged)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no triton, one with other names, a driver too old: failures take many forms
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None if right else "a trial run gave wrong numbers"
