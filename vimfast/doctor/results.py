"""What the processes of isolated functions answer."""

from __future__ import annotations

from typing import NamedTuple


class Torch(NamedTuple):
    """What a torch says of itself."""

    version: str = ""  # empty: there is none that can be imported
    cuda: str | None = None  # that it is built for
    nccl: tuple[int, ...] | None = None


class Driver(NamedTuple):
    """The NVIDIA driver of this machine."""

    version: str
    cuda: tuple[int, int]  # the latest that it runs
    gpus: int


class Gpu(NamedTuple):
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    total: int  # bytes
    free: int
    engine: bool  # it decodes JPEGs by itself
    trouble: str  # of a first computation; empty: none


class Usable(NamedTuple):
    """The GPUs that torch can compute on."""

    numbers: tuple[int, ...] = ()
    capability: tuple[int, int] = (0, 0)  # of the first one


class Error(NamedTuple):
    """Relative to what float64 gives, in norm."""

    outputs: float
    gradients: float


class Trial(NamedTuple):
    """What a backend does with Vim-Tiny."""

    unfit: str | None  # why it does not serve; None: it does
    errors: dict[str, Error]  # by precision
    seconds: float  # of the last forward and backward
