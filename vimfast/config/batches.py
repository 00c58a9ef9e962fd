"""How an update's images are shared out to GPUs and steps."""

from __future__ import annotations

from typing import NamedTuple

from vimfast.config.choices import AUTO
from vimfast.config.schema import Config
from vimfast.errors import UserError, counted


class Batches(NamedTuple):
    """How an update's images are cut up."""

    batch_size: int  # images on each GPU at once
    accum_steps: int  # batches on each GPU that make one update


def plan_batches(config: Config, world: int) -> Batches:
    """Batch size and accumulation steps for so many GPUs (processes).

    Without ``global_batch_size`` they are what the settings say. With it, the global batch stays the same on any number
    of GPUs: in ``accum_steps`` if given, else in as few equal steps as need no larger batch than ``batch_size``.

    Raises:
        UserError: ``batch_size`` is not a number yet, or the global batch cannot be shared out equally.
    """
    most, accum, wanted = config.data.batch_size, config.optim.accum_steps, config.optim.global_batch_size
    if most == AUTO:
        raise UserError(f"--batch-size {AUTO} is for training on a GPU", "give a number")
    if wanted is None:
        return Batches(most, accum)
    own, rest = divmod(wanted, world)
    if rest or own == 0 or own % accum:
        parts = counted(world, "GPU") + (f" x {accum} accumulation steps" if accum > 1 else "")
        unit = world * accum
        raise UserError(
            f"--global-batch-size {wanted} cannot be shared out to {parts}; give a multiple of {unit},"
            f" such as {max(round(wanted / unit), 1) * unit}"
        )
    if accum == 1:
        accum = next(n for n in range(-(-own // most), own + 1) if own % n == 0)
    return Batches(own // accum, accum)
