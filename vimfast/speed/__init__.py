"""How fast this machine trains, infers and loads: what ``vimfast bench`` and the benchmarks of tools/ measure."""

from vimfast.speed.loading import endless, measure_batches
from vimfast.speed.steps import Subject, inference, milliseconds, peak_gib, timing, timings, training

__all__ = [
    "Subject",
    "endless",
    "inference",
    "measure_batches",
    "milliseconds",
    "peak_gib",
    "timing",
    "timings",
    "training",
]
