"""A :class:`~vimfast.augment.plan.Plan` carried out: uint8 images in, a normalized training batch out.

Nothing is drawn here but the noise of erased boxes, which a seed in the plan fixes. On a GPU plain Triton kernels do
the work, everywhere else Pillow itself does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vimfast.augment.plan import OPERATION, PATCH, Plan
from vimfast.augment.threads import ALONE, Threads


def carry_out(
    images: Tensor,  # uint8 [B, H, W, 3]
    plan: Plan,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    threads: Threads = ALONE,
) -> Tensor:  # [B, 3, H, W]
    """(image / 255 - mean) / std of the changed images, then boxes erased.

    Args:
        images: contiguous; not changed.
        plan: for the images of the batch, in their order.
        mean, std: of the three channels, for values in [0, 1]. Warps fill with round(255 mean).
        dtype: of the result, a floating one.
        threads: that share out the images of a CPU.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; must be torch.uint8 [B, H, W, 3]")
    if len(plan.operations) != len(images) or len(plan.patches) != len(images):
        raise ValueError(f"the plan is for {len(plan.operations)} images and there are {len(images)}")
    if plan.operations.dtype != OPERATION or plan.patches.dtype != PATCH:
        raise ValueError("a plan holds arrays of OPERATION and PATCH; make it with Plan.of")
    if images.is_cuda:
        from vimfast.augment import pixels_triton

        with torch.cuda.device(images.device):
            return pixels_triton.carry_out(images, plan, mean, std, dtype)
    from vimfast.augment import pixels_pillow

    return pixels_pillow.carry_out(images, plan, mean, std, dtype, threads)
